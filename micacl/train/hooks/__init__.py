"""One job a hook: what else happens after a step. The loop calls them in order, on every rank."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class StepRecord:
    """One step as logged. Losses are means over ranks and exist on steps that log; the rest is this rank's."""

    step: int
    """Updates done, this one included."""
    steps: int
    epoch: int
    lr: float
    losses: Mapping[str, float] | None
    clips_per_s: float
    """Over all ranks, since the last log."""
    wait_share: float
    """Of the time since the last log, spent waiting for data."""
    keys: tuple[str, ...]


class Hook(Protocol):
    def after_step(self, record: StepRecord) -> None:
        """Called once a step on every rank."""
