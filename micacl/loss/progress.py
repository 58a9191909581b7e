"""Where in a run a step is. Every schedule of the objective is a pure function of it, so resuming needs no memory.

weight of MCCL at step s of S = mccl_weight * ramp(s) * decay(s)
ramp(s)  = min(1, (s + 1) / R),  R = max(1, round(mccl_ramp_share * S))
decay(s) = 1, or (1 + cos(pi s / S)) / 2
"""

from __future__ import annotations

import math
from dataclasses import dataclass

SCHEDULES = ("constant", "cosine")


@dataclass(frozen=True, kw_only=True, slots=True)
class Progress:
    """A step of a run. The default is the first step of a run of one."""

    step: int = 0
    """Updates of this stage before this one."""
    steps: int = 1
    """Updates of this stage."""
    epoch: int = 0
    """Of the run, counted from 0."""
    epochs: int = 1
    """Of the run."""
    head_only: bool = False
    """The second stage of decoupled training: only the classifier learns (docs/training.md)."""

    def reached(self, share: float) -> bool:
        """Whether this epoch begins at or after `share` of the run's epochs."""
        return self.epoch >= share * self.epochs - 1e-9  # 0.28 * 25 is a little more than 7


def scheduled(weight: float, progress: Progress, *, ramp_share: float, schedule: str) -> float:
    """The weight of this step, see the module's formula."""
    ramp = max(1, round(ramp_share * progress.steps))
    decay = 0.5 * (1 + math.cos(math.pi * progress.step / progress.steps)) if schedule == "cosine" else 1.0
    return weight * min(1.0, (progress.step + 1) / ramp) * decay
