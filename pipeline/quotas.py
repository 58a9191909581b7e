"""How many clips of each class are in each epoch and each global batch: whole numbers that never drift.

A share is rarely a whole number of clips: 16 clips over 7 classes are 2 2/7 each. Rounding happens twice.

* *an epoch* (`EpochTotals`): steps * global_batch clips are given to the classes, and what a class is owed or was given
  too much is carried into the next epoch. After any number of epochs a class is less than one clip away from the sum of
  its shares, whatever the schedule, however small the share, and no class is ever below `clips_per_class`.
* *a batch* (`BatchCounts`): the quota is the class's clips of the epoch over its steps, an exact fraction. Every batch
  gets floor or ceil of it and exactly `global_batch` clips in all; after s batches a class is less than one clip away
  from s * quota, and after the last it is exact. Rounding each class by itself cannot keep all three; choosing who
  gets the fractions is proportionate-fair scheduling.

docs/sampling.md has the proofs.

Legend: C classes, T steps of a block.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from pipeline.policies import UNIT, Ints, PlanConfig, shares

_BLOCK = 1024
"""Steps whose counts are in memory together; of all others every _BLOCK-th is kept."""


class EpochTotals:
    """Clips of each class in each epoch, and before it. Epochs are made in order and kept: C numbers each."""

    def __init__(self, counts: tuple[int, ...], config: PlanConfig, steps: int) -> None:
        """`counts` are rows per class."""
        self.counts, self.config = counts, config
        self._least = steps * config.clips_per_class
        self._total = steps * config.global_batch
        self._wants: dict[int, list[int]] = {}
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

    def wants(self, epoch: int) -> list[int]:
        """Due to each class in `epoch` above `clips_per_class`, in 1/UNIT clip; a whole number of clips in all."""
        config, later = self.config, epoch - self.config.then_from + 1
        phase = min(max(later, 0), config.then_over + 1) if config.then else 0  # epochs of one phase have one share
        if phase not in self._wants:
            units_C = shares(self.counts, config, epoch).tolist()
            wants_C = [max(units * self._total - self._least * UNIT, 0) for units in units_C]
            over = sum(wants_C) - (self._total - self._least * len(wants_C)) * UNIT
            while over:  # shares at the floor that were rounded down by 1/UNIT
                payer = wants_C.index(max(wants_C))
                paid = min(over, wants_C[payer])
                wants_C[payer], over = wants_C[payer] - paid, over - paid
            self._wants[phase] = wants_C
        return self._wants[phase]

    def _next(self, epoch: int) -> None:
        due_C = [owed + want for owed, want in zip(self._owed[epoch], self.wants(epoch), strict=True)]
        given_C = [max(due // UNIT, 0) for due in due_C]
        left = sum(due_C) // UNIT - sum(given_C)
        begun = [label for label, given in enumerate(given_C) if due_C[label] > given * UNIT]
        for *_, label in sorted(self._urgency(label, due_C[label], given_C[label], epoch) for label in begun)[:left]:
            given_C[label] += 1
        owed_C = [due - given * UNIT for due, given in zip(due_C, given_C, strict=True)]
        self._owed[epoch + 1 : epoch + 2] = [owed_C]  # by place, so that two threads that do the same do no harm
        self._taken[epoch + 1 : epoch + 2] = [self._taken[epoch] + np.array(given_C, np.int64) + self._least]

    def _urgency(self, label: int, due: int, given: int, epoch: int) -> tuple[float, int, int]:
        """Of a clip that a class has begun to be owed: (epoch in which it is owed whole, -part owed now, class)."""
        missing = (given + 1) * UNIT - due
        for first, last in self._phases(epoch + 1):
            want = self.wants(first)[label]
            if want * (last - first + 1) >= missing if last < math.inf else want:
                return first - -missing // want - 1, missing, label
            missing -= int(want * (last - first + 1)) if want else 0
        return math.inf, missing, label

    def _phases(self, epoch: int) -> Iterator[tuple[int, float]]:
        """Spans of epochs with one share, from `epoch` on: (first, last)."""
        config = self.config
        if config.then and epoch < config.then_from:
            yield epoch, config.then_from - 1
            epoch = config.then_from
        while config.then and epoch < config.then_from + config.then_over:
            yield epoch, epoch
            epoch += 1
        yield epoch, math.inf


@functools.lru_cache(maxsize=64)
def totals_of(counts: tuple[int, ...], config: PlanConfig, steps: int) -> EpochTotals:
    """One EpochTotals for all plans of a run."""
    return EpochTotals(counts, config, steps)


class BatchCounts:
    """Clips of each class before any step of an epoch. Memory: C numbers for each _BLOCK steps, and one block."""

    def __init__(self, draws_C: Ints, steps: int) -> None:
        """`draws_C`: clips of each class in the epoch; their sum is a multiple of `steps`."""
        self.draws_C, self.steps = draws_C, steps
        self._whole_C = draws_C // steps
        self._extra_C = [int(n) for n in draws_C % steps]
        self._slots = sum(self._extra_C) // steps
        self._period = steps // math.gcd(steps, *self._extra_C)
        self._marks = [[0] * len(self._extra_C)]  # of each block: clips of the extras before it
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
            for behind in range(min(number, len(self._marks) - 1), number + 1):
                block = (behind, self._make_block(behind))
            self._block = block
        return np.asarray(block[1][within], np.int32)

    def _make_block(self, number: int) -> npt.NDArray[np.int32]:
        """Extras before each step of a block, shape (T, C); the state behind it is kept."""
        first = number * _BLOCK
        steps = min(_BLOCK, self._period - first)
        block_TC, after_C = fair_extras(self._extra_C, self.steps, self._slots, self._marks[number], first, steps)
        self._marks[number + 1 : number + 2] = [after_C]  # by place: see EpochTotals
        return block_TC


def fair_extras(
    extra_C: list[int], unit: int, slots: int, taken_C: list[int], first: int, steps: int
) -> tuple[npt.NDArray[np.int32], list[int]]:
    """Rounds quotas below one clip to 0 or 1 per step, so that no class is ever a whole clip early or late.

    `extra_C` are in 1/unit and sum to `slots` whole clips. Goes on from `taken_C` clips before step `first`. Gives the
    clips of each class before each of `steps` steps, shape (T, C), and before the step that follows.

    This is proportionate-fair scheduling of C tasks of weight w = extra / unit on `slots` processors: clip j of a class
    may come from step floor((j-1) / w) and must come before step ceil(j / w). The rule is PD2 of Anderson and
    Srinivasan (Mixed Pfair/ERfair scheduling of asynchronous periodic tasks, JCSS 2004), which meets every deadline.
    """
    lines = {c: iter(_clips(c, taken_C[c], extra, unit, steps)) for c, extra in enumerate(extra_C) if extra}
    waiting = sorted(next(line) for line in lines.values())
    chosen: list[int] = []
    for step in range(first, first + steps) if slots else ():
        left = slots
        for place, (_, _, _, label, release) in enumerate(waiting):
            if release <= step:
                chosen.append(label)
                waiting[place] = next(lines[label])
                left -= 1
                if not left:
                    break
        waiting.sort()
    table_TC = np.zeros((steps + 1, len(extra_C)), np.int32)
    table_TC[0] = taken_C
    table_TC[np.arange(len(chosen)) // max(slots, 1) + 1, chosen] += 1  # a class at most once in a step
    table_TC = np.cumsum(table_TC, axis=0, dtype=np.int32)
    return table_TC[:-1], table_TC[-1].tolist()


def _clips(label: int, taken: int, extra: int, unit: int, steps: int) -> Iterator[tuple[int, bool, int, int, int]]:
    """The next clips of a class, as many as `steps` steps can take, in steps:
    (deadline, clean end, -group deadline, label, release).

    The smallest tuple goes first. Of equal deadlines, one whose window overlaps the next goes first, because taking it
    late leaves the next clip a step less; of those, the one with the longer chain of such windows behind it.
    """
    end = np.arange(taken + 1, taken + steps * extra // unit + 4, dtype=np.int64) * unit
    deadline, spare = -(-end // extra), unit - extra
    group = -(-(-(-deadline * spare // unit) * unit) // spare) if spare <= extra else np.zeros_like(end)
    parts = (deadline, end % extra == 0, -group, np.full_like(end, label), (end - unit) // extra)
    return zip(*(part.tolist() for part in parts), strict=True)
