"""Validation every few epochs: all ranks share the clips, each is counted once, the sums are added up over ranks.

The model is in evaluation mode meanwhile, so neither running statistics nor torch's generator move: a run with
validation has the losses of one without. What is counted is a confusion matrix and a sum of losses, so the result is
the same at any number of ranks, and every rank has it and decides alike.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from micacl.batch import BatchConfig, collate
from micacl.calibration import nll
from micacl.metrics import uar, war
from micacl.predictor import forward
from micacl.train.best import Validated
from micacl.train.engine import Engine
from micacl.train.hooks import StepRecord
from micacl.train.hooks.jsonl import JsonLines
from pipeline.contract import MicaclError
from pipeline.loader import EvalLoader
from pipeline.rows import SplitRows
from pipeline.stream import StreamConfig

_CLIPS_PER_FORWARD = 16


class Validate:
    """Args: `every` steps; `best` so far, of an earlier attempt; `metrics` gets a line (rank 0 has it)."""

    def __init__(
        self,
        engine: Engine,
        rows: SplitRows,
        stream: StreamConfig,
        batch: BatchConfig,
        *,
        every: int,
        best: Validated | None,
        metrics: JsonLines | None,
        say: Callable[[str], None],
    ) -> None:
        self.engine, self.rows, self.stream, self.batch = engine, rows, stream, batch
        self.every, self.best, self.metrics, self.say = every, best, metrics, say

    def after_step(self, record: StepRecord) -> None:
        if record.step % self.every and record.step != record.steps:
            return
        found = validate(self.engine, self.rows, self.stream, self.batch, record.step)
        better = found.beats(self.best)
        if better:
            self.best = found
        if self.metrics is not None:
            self.metrics.add({"step": found.step, "epoch": record.epoch, **_named(found)})
        self.say(
            f"step {found.step}/{record.steps} validation UAR {100 * found.uar:.2f} WAR {100 * found.war:.2f} "
            f"loss {found.loss:.3f} ({found.clips} clips){', the best so far' if better else ''}"
        )


def _named(found: Validated) -> dict[str, float]:
    return {f"val/{name}": value for name, value in found.to_dict().items() if name != "step"}


def validate(engine: Engine, rows: SplitRows, stream: StreamConfig, batch_config: BatchConfig, step: int) -> Validated:
    """Score all rows with the engine's weights as they are. Every rank must call it. Raises MicaclError."""
    classes = len(rows.labels)
    sums = np.zeros(classes * classes + 1)
    engine.model.eval()
    try:
        batches = EvalLoader(rows, stream, clips_per_batch=_CLIPS_PER_FORWARD, rank=engine.rank, ranks=engine.ranks)
        for clips in batches:
            p_BK, _ = forward(engine.forward, collate(clips, batch_config, train=False), engine.device)
            p_MK, truth_M = p_BK[clips.mask_B].astype(np.float64), clips.labels_B[clips.mask_B]
            sums[:-1] += np.bincount(truth_M * classes + p_MK.argmax(1), minlength=classes * classes)
            sums[-1] += nll(p_MK, truth_M) * len(truth_M) if len(truth_M) else 0.0
    finally:
        engine.model.train()
    total = engine.mean(torch.tensor(sums, dtype=torch.float64, device=engine.device)).cpu().numpy() * engine.ranks
    matrix_KK = total[:-1].round().astype(np.int64).reshape(classes, classes)
    if (clips_seen := int(matrix_KK.sum())) != len(rows):
        raise MicaclError(
            f"{clips_seen} validation clips were scored, there are {len(rows)}.",
            "The best checkpoint would be chosen by other numbers than those of the split.",
            "Run `micacl verify` on the dataset.",
        )
    return Validated(
        step=step, uar=uar(matrix_KK), war=war(matrix_KK), loss=float(total[-1]) / clips_seen, clips=clips_seen
    )
