"""A checkpoint every n steps and at the end: every rank exports, rank 0 writes, then all go on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from micacl.train.checkpoint import Checkpoint, drop_old, write_checkpoint
from micacl.train.engine import Engine
from micacl.train.hooks import StepRecord
from micacl.train.hooks.jsonl import JsonLines
from pipeline.storage import Store


class SaveCheckpoint:
    """Args: `state_at(step)` gives the JSON state; `metrics` is flushed with each checkpoint (rank 0 has it)."""

    def __init__(
        self,
        engine: Engine,
        store: Store,
        *,
        every: int,
        keep: int,
        state_at: Callable[[int], dict[str, Any]],
        metrics: JsonLines | None,
    ) -> None:
        self.engine, self.store, self.every, self.keep = engine, store, every, keep
        self.state_at, self.metrics = state_at, metrics

    def after_step(self, record: StepRecord) -> None:
        if record.step % self.every and record.step != record.steps:
            return
        weights, moments = self.engine.export_state()
        if self.engine.rank == 0:
            write_checkpoint(self.store, Checkpoint(record.step, weights, moments, self.state_at(record.step)))
            drop_old(self.store, self.keep)
            if self.metrics is not None:
                self.metrics.flush()
