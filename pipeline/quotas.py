"""How many clips of each class are in each global batch: shares by policy, made whole without drift.

A quota is rarely whole: 16 clips over 7 classes are 2 2/7 each. Every batch gets floor or ceil of each quota and
exactly `global_batch` clips in all, and the count of a class after s batches differs from s * quota by less than one.
Rounding each class by itself cannot keep all three; choosing who gets the fractions is proportionate-fair scheduling
(`fair_extras`). It is integer arithmetic in units of 1/UNIT clip: exact, and repeating after at most UNIT steps.

Legend: C classes, T steps of the table.
"""

from __future__ import annotations

import math
from functools import cached_property

import numpy as np
import numpy.typing as npt

from pipeline.contract import MicaclError

POLICIES = ("natural", "sqrt", "effective", "uniform")

UNIT = 2**20
"""Quotas are whole numbers of 1/UNIT clip per batch."""


class Quotas:
    """Clips of each class before any step of an epoch of `steps` steps."""

    def __init__(self, units_C: npt.NDArray[np.int64], steps: int) -> None:
        """`units_C` as `quota_units` gives them."""
        self.units_C, self.steps = units_C, steps

    def before(self, step: int) -> npt.NDArray[np.int64]:
        """Clips of each class in the batches before `step`, 0 <= step <= steps, shape (C,)."""
        periods, within = divmod(step, len(self._extras_TC) - 1)
        before_C: npt.NDArray[np.int64] = self.units_C // UNIT * step + self._extras_TC[within]
        before_C += self._extras_TC[-1].astype(np.int64) * periods
        return before_C

    @cached_property
    def _extras_TC(self) -> npt.NDArray[np.int32]:
        extra_C = (self.units_C % UNIT).tolist()
        period = UNIT // math.gcd(UNIT, *extra_C)
        return fair_extras(extra_C, min(self.steps, period))


def quota_units(
    counts_C: npt.NDArray[np.int64], *, policy: str, beta: float, global_batch: int
) -> npt.NDArray[np.int64]:
    """Quota of each class per batch in 1/UNIT clip, shape (C,): at least 1 each, global_batch * UNIT in all.

    `counts_C` are rows per class. Raises MicaclError for a class without rows.
    """
    if np.any(counts_C < 1):
        empty = ", ".join(f"number {label}" for label in np.flatnonzero(counts_C < 1))
        raise MicaclError(
            f"Of the {len(counts_C)} classes (counted from 0), {empty} has no clips in this split.",
            "No epoch can be planned.",
            "Add clips of it, or use a label set without it.",
        )
    total = global_batch * UNIT
    share_C = _shares(counts_C.astype(np.float64), policy, beta)
    ideal_C = share_C / share_C.sum() * total
    units_C: npt.NDArray[np.int64] = np.maximum(np.floor(ideal_C).astype(np.int64), 1)
    left = total - int(units_C.sum())
    units_C[np.argsort(units_C - ideal_C, kind="stable")[: max(left, 0)]] += 1
    units_C[np.argmax(units_C)] += min(left, 0)  # paid by the largest class when small ones were raised to one unit
    return units_C


def fair_extras(extra_C: list[int], steps: int) -> npt.NDArray[np.int32]:
    """Rounds quotas below one clip to 0 or 1 per step, so that no class is ever a whole clip early or late.

    `extra_C` are in 1/UNIT and sum to a whole number of clips. Gives the clips of each class before each step and after
    the last, shape (steps + 1, C).

    This is proportionate-fair scheduling of C tasks of weight w = extra / UNIT on sum(w) processors: clip j of a class
    may come from step floor((j-1) / w) and must come before step ceil(j / w). The rule is PD2 of Anderson and
    Srinivasan (Mixed Pfair/ERfair scheduling of asynchronous periodic tasks, JCSS 2004), which meets every deadline.
    """
    slots = sum(extra_C) // UNIT
    taken_TC = np.zeros((steps + 1, len(extra_C)), np.int32)
    waiting = [_clip(label, 1, extra) for label, extra in enumerate(extra_C) if extra]
    for step in range(steps if slots else 0):
        for clip in sorted([clip for clip in waiting if clip[-1] <= step])[:slots]:
            label, number = clip[3], clip[4]
            taken_TC[step + 1, label] = 1
            waiting[waiting.index(clip)] = _clip(label, number + 1, extra_C[label])
    return np.cumsum(taken_TC, axis=0, dtype=np.int32)


def _clip(label: int, number: int, extra: int) -> tuple[int, bool, int, int, int, int]:
    """Clip `number` (from 1) of a class: (deadline, clean end, -group deadline, label, number, release), in steps.

    The smallest tuple goes first. Of equal deadlines, one whose window overlaps the next goes first, because taking it
    late leaves the next clip a step less; of those, the one with the longer chain of such windows behind it.
    """
    end = number * UNIT
    deadline, spare = -(-end // extra), UNIT - extra
    group = -(-(-(-deadline * spare // UNIT) * UNIT) // spare) if spare <= extra else 0
    return deadline, end % extra == 0, -group, label, number, (end - UNIT) // extra


def _shares(count_C: npt.NDArray[np.float64], policy: str, beta: float) -> npt.NDArray[np.float64]:
    """Share of each class, not normalised."""
    if policy == "natural":
        return count_C
    if policy == "sqrt":
        return np.sqrt(count_C)
    if policy == "effective":
        return count_C * (1 - beta) / (1 - beta**count_C)
    return np.ones_like(count_C)
