"""A checkpoint every n steps and at the end: every rank exports, rank 0 writes, then all go on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from micacl.loss.objective import Objective
from micacl.train.checkpoint import Checkpoint, drop_old, newest_checkpoint, write_checkpoint
from micacl.train.engine import Engine
from micacl.train.hooks import StepRecord
from micacl.train.hooks.jsonl import JsonLines
from pipeline.contract import MicaclError
from pipeline.storage import Store


class SaveCheckpoint:
    """Args: `state_at(step)` gives the JSON state; `metrics` is flushed with each checkpoint (rank 0 has it).

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
    ) -> None:
        self.engine, self.store, self.every, self.keep = engine, store, every, keep
        self.state_at, self.metrics, self.objective = state_at, metrics, objective

    def after_step(self, record: StepRecord) -> None:
        if record.step % self.every and record.step != record.steps:
            return
        weights, moments = self.engine.export_state()
        self._require_finite(weights, record)
        if self.engine.rank == 0:
            kept = self.objective.export_state() if self.objective is not None else {}
            state = self.state_at(record.step)
            write_checkpoint(self.store, Checkpoint(record.step, weights, moments, state, kept))
            drop_old(self.store, self.keep)
            if self.metrics is not None:
                self.metrics.flush()

    def _require_finite(self, weights: Mapping[str, Tensor], record: StepRecord) -> None:
        odd = sorted(name for name, t in weights.items() if not bool(torch.isfinite(t).all()))
        if odd:
            raise MicaclError(
                f"{len(odd)} weights are not finite after step {record.step} (first {odd[0]}), "
                f"on the clips {', '.join(record.keys)}.",
                f"No checkpoint was written; good is {newest_checkpoint(self.store)}.",
                "Lower --train.lr, or look at those clips with `micacl report`.",
            )
