"""How many clips of each class are in each epoch and each global batch: whole numbers that never drift.

A share is rarely a whole number of clips: 16 clips over 7 classes are 2 2/7 each. Rounding happens twice.

* *an epoch* (`EpochTotals`): steps * global_batch clips are given to the classes by largest remainder, and what a class
  is owed or was given too much is carried into the next epoch. After any number of epochs a class is less than one clip
  away from the sum of its shares, whatever the schedule (docs/sampling.md has the proof and its one exception).
* *a batch* (`BatchCounts`): the quota is the class's clips of the epoch over its steps, an exact fraction. Every batch
  gets floor or ceil of it and exactly `global_batch` clips in all; after s batches a class is less than one clip away
  from s * quota, and after the last it is exact. Rounding each class by itself cannot keep all three; choosing who
  gets the fractions is proportionate-fair scheduling.

Legend: C classes, T steps of a block.
"""

from __future__ import annotations

import functools
import math

import numpy as np
import numpy.typing as npt

from pipeline.policies import UNIT, Ints, PlanConfig, shares

_BLOCK = 1024
"""Steps whose counts are in memory together; of all others every _BLOCK-th is kept."""


class EpochTotals:
    """Clips of each class in each epoch, and before it. Epochs are made in order and kept: C numbers each."""

    def __init__(self, counts: tuple[int, ...], config: PlanConfig, steps: int) -> None:
        """`counts` are rows per class."""
        self.counts, self.config, self.steps = counts, config, steps
        self._taken: list[Ints] = [np.zeros(len(counts), np.int64)]
        self._owed: list[list[int]] = [[0] * len(counts)]  # in 1/UNIT clip, exact: Python's whole numbers have no end

    def before(self, epoch: int) -> Ints:
        """Draws of each class in the epochs before `epoch`, shape (C,)."""
        while len(self._taken) <= epoch:
            self._next(len(self._taken) - 1)
        return self._taken[epoch]

    def of(self, epoch: int) -> Ints:
        """Draws of each class in `epoch`, shape (C,), steps * global_batch in all."""
        return self.before(epoch + 1) - self.before(epoch)

    def _next(self, epoch: int) -> None:
        total = self.steps * self.config.global_batch
        least = self.steps * self.config.clips_per_class
        units_C = shares(self.counts, self.config, epoch).tolist()
        wanted_C = [owed + units * total for owed, units in zip(self._owed[epoch], units_C, strict=True)]
        given_C = apportion(wanted_C, total, least)
        owed_C = [wanted - given * UNIT for wanted, given in zip(wanted_C, given_C, strict=True)]
        self._owed[epoch + 1 :] = [owed_C]  # by place, so that two threads that do the same do no harm
        self._taken[epoch + 1 :] = [self._taken[epoch] + np.array(given_C, np.int64)]


@functools.lru_cache(maxsize=64)
def totals_of(counts: tuple[int, ...], config: PlanConfig, steps: int) -> EpochTotals:
    """One EpochTotals for all plans of a run."""
    return EpochTotals(counts, config, steps)


def apportion(wanted_C: list[int], total: int, least: int) -> list[int]:
    """`total` clips for classes that want `wanted` / UNIT each, by largest remainder, none below `least`.

    The wants sum to total * UNIT. Of equal remainders the class with the smaller number is first.
    """
    given_C = [max(wanted // UNIT, least) for wanted in wanted_C]
    missing = [wanted - given * UNIT for wanted, given in zip(wanted_C, given_C, strict=True)]
    left = total - sum(given_C)
    for label in sorted(range(len(given_C)), key=lambda c: -missing[c])[: max(left, 0)]:
        given_C[label] += 1
    while left < 0:  # the floor gave too much: taken from who has most to spare
        label = min((c for c in range(len(given_C)) if given_C[c] > least), key=lambda c: missing[c])
        given_C[label] -= 1
        missing[label] += UNIT
        left += 1
    return given_C


class BatchCounts:
    """Clips of each class before any step of an epoch. Memory: C numbers for each _BLOCK steps, and one block."""

    def __init__(self, draws_C: Ints, steps: int) -> None:
        """`draws_C`: clips of each class in the epoch; their sum is a multiple of `steps`."""
        self.draws_C, self.steps = draws_C, steps
        self._whole_C = draws_C // steps
        self._extra_C = [int(n) for n in draws_C % steps]
        self._slots = sum(self._extra_C) // steps
        self._period = steps // math.gcd(steps, *self._extra_C)
        self._marks = {0: [0] * len(self._extra_C)}  # block -> clips of the extras before it
        self._block: tuple[int, npt.NDArray[np.int32]] = (-1, np.empty((0, 0), np.int32))

    def before(self, step: int) -> Ints:
        """Clips of each class in the batches before `step`, 0 <= step <= steps, shape (C,)."""
        periods, within = divmod(step, self._period)
        of_period_C = [extra * self._period // self.steps for extra in self._extra_C]
        out_C = self._whole_C * step + np.array(of_period_C, np.int64) * periods
        return np.asarray(out_C + self._extras_before(within), np.int64)

    def _extras_before(self, step: int) -> npt.NDArray[np.int32]:
        number, within = divmod(step, _BLOCK)
        block = self._block  # read once: reader threads share a plan
        if block[0] != number:
            for behind in range(max(n for n in self._marks if n <= number), number + 1):
                block = (behind, self._make_block(behind))
            self._block = block
        return np.asarray(block[1][within], np.int32)

    def _make_block(self, number: int) -> npt.NDArray[np.int32]:
        """Extras before each step of a block, shape (_BLOCK, C); the state behind it is kept."""
        block_TC, after_C = fair_extras(self._extra_C, self.steps, self._slots, self._marks[number], number * _BLOCK)
        self._marks[number + 1] = after_C
        return block_TC


def fair_extras(
    extra_C: list[int], unit: int, slots: int, taken_C: list[int], first: int, steps: int = _BLOCK
) -> tuple[npt.NDArray[np.int32], list[int]]:
    """Rounds quotas below one clip to 0 or 1 per step, so that no class is ever a whole clip early or late.

    `extra_C` are in 1/unit and sum to `slots` whole clips. Goes on from `taken_C` clips before step `first`. Gives the
    clips of each class before each of `steps` steps, shape (T, C), and before the step that follows.

    This is proportionate-fair scheduling of C tasks of weight w = extra / unit on `slots` processors: clip j of a class
    may come from step floor((j-1) / w) and must come before step ceil(j / w). The rule is PD2 of Anderson and
    Srinivasan (Mixed Pfair/ERfair scheduling of asynchronous periodic tasks, JCSS 2004), which meets every deadline.
    """
    out_TC = np.empty((steps, len(extra_C)), np.int32)
    taken_C = list(taken_C)
    waiting = [_clip(label, taken_C[label] + 1, extra, unit) for label, extra in enumerate(extra_C) if extra]
    waiting.sort()
    for step in range(steps):
        out_TC[step] = taken_C
        late = [clip for clip in waiting if clip[-1] <= first + step][:slots]
        for clip in late:
            label, number = clip[3], clip[4]
            taken_C[label] = number
            waiting[waiting.index(clip)] = _clip(label, number + 1, extra_C[label], unit)
        waiting.sort()
    return out_TC, taken_C


def _clip(label: int, number: int, extra: int, unit: int) -> tuple[int, bool, int, int, int, int]:
    """Clip `number` (from 1) of a class: (deadline, clean end, -group deadline, label, number, release), in steps.

    The smallest tuple goes first. Of equal deadlines, one whose window overlaps the next goes first, because taking it
    late leaves the next clip a step less; of those, the one with the longer chain of such windows behind it.
    """
    end = number * unit
    deadline, spare = -(-end // extra), unit - extra
    group = -(-(-(-deadline * spare // unit) * unit) // spare) if spare <= extra else 0
    return deadline, end % extra == 0, -group, label, number, (end - unit) // extra
