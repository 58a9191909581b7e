"""A checkpoint every n steps, at the end, and where validation is best: every rank exports, rank 0 writes.

Runs after the validation hook, which has decided alike on every rank.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from micacl.loss.objective import Objective
from micacl.train.best import put_best
from micacl.train.checkpoint import Checkpoint, drop_old, newest_checkpoint, write_checkpoint
from micacl.train.engine import Engine
from micacl.train.hooks import StepRecord
from micacl.train.hooks.jsonl import JsonLines
from micacl.train.hooks.validate import Validate
from pipeline.contract import MicaclError
from pipeline.storage import Store


class SaveCheckpoint:
    """Args: `state_at(step)` gives the JSON state; `metrics` is put before each checkpoint (rank 0 has it).

    `validation`: its best checkpoint is written whenever it comes, and kept beside the newest `keep`.

    `objective` is the one that trains, if a checkpoint must keep its queue. Weights that are not finite are refused, so
    that the newest complete checkpoint is one to go on from.
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
        objective: Objective | None = None,
        validation: Validate | None = None,
    ) -> None:
        self.engine, self.store, self.every, self.keep = engine, store, every, keep
        self.state_at, self.metrics, self.objective, self.validation = state_at, metrics, objective, validation

    def after_step(self, record: StepRecord) -> None:
        best = None if self.validation is None else self.validation.best
        is_best = best is not None and best.step == record.step
        if record.step % self.every and record.step != record.steps and not is_best:
            return
        weights, moments = self.engine.export_state()
        self._require_finite(weights, record)
        if self.engine.rank:
            return
        if self.metrics is not None:
            self.metrics.flush()
        kept = self.objective.export_state() if self.objective is not None else {}
        state = {**self.state_at(record.step), **({} if best is None else {"best": best.to_dict()})}
        write_checkpoint(self.store, Checkpoint(record.step, weights, moments, state, kept))
        if best is not None and is_best:
            put_best(self.store, best)
        drop_old(self.store, self.keep, None if best is None else best.step)

    def _require_finite(self, weights: Mapping[str, Tensor], record: StepRecord) -> None:
        odd = sorted(name for name, t in weights.items() if not bool(torch.isfinite(t).all()))
        if odd:
            raise MicaclError(
                f"{len(odd)} weights are not finite after step {record.step} (first {odd[0]}), "
                f"on the clips {', '.join(record.keys)}.",
                f"No checkpoint was written; good is {newest_checkpoint(self.store)}.",
                "Lower --train.lr, or look at those clips with `micacl report`.",
            )
