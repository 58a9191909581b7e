"""Progress that a person can read."""

from __future__ import annotations

from collections.abc import Callable

from micacl.train.hooks import StepRecord


class Console:
    """Says one line a log: step, losses, clips/s over all ranks, share of time spent waiting for data."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self.say = say

    def after_step(self, record: StepRecord) -> None:
        if record.losses is None:
            return
        losses = " ".join(f"{name} {value:.3f}" for name, value in record.losses.items())
        self.say(
            f"step {record.step}/{record.steps} epoch {record.epoch} {losses} lr {record.lr:.2g} "
            f"{record.clips_per_s:.1f} clips/s data-wait {record.wait_share:.0%}"
        )
