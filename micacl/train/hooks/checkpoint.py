"""A checkpoint every n steps, at the end, and where validation is best: every rank exports, rank 0 writes.

Runs after the validation hook, which has decided alike on every rank.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from micacl.train.best import put_best
from micacl.train.checkpoint import Checkpoint, drop_old, write_checkpoint
from micacl.train.engine import Engine
from micacl.train.hooks import StepRecord
from micacl.train.hooks.jsonl import JsonLines
from micacl.train.hooks.validate import Validate
from pipeline.storage import Store


class SaveCheckpoint:
    """Args: `state_at(step)` gives the JSON state; `metrics` is put before each checkpoint (rank 0 has it).

    `validation`: its best checkpoint is written whenever it comes, and kept beside the newest `keep`.
    """

    def __init__(
        self,
        engine: Engine,
        store: Store,
        *,
        every: int,
        keep: int,
        state_at: Callable[[int], dict[str, Any]],
        metrics: JsonLines | None,
        validation: Validate | None = None,
    ) -> None:
        self.engine, self.store, self.every, self.keep = engine, store, every, keep
        self.state_at, self.metrics, self.validation = state_at, metrics, validation

    def after_step(self, record: StepRecord) -> None:
        best = None if self.validation is None else self.validation.best
        is_best = best is not None and best.step == record.step
        if record.step % self.every and record.step != record.steps and not is_best:
            return
        weights, moments = self.engine.export_state()
        if self.engine.rank:
            return
        if self.metrics is not None:
            self.metrics.flush()
        state = {**self.state_at(record.step), **({} if best is None else {"best": best.to_dict()})}
        write_checkpoint(self.store, Checkpoint(record.step, weights, moments, state))
        if best is not None and is_best:
            put_best(self.store, best)
        drop_old(self.store, self.keep, None if best is None else best.step)
