"""The checks of the plan see a plan that is broken on purpose: each mutation must make its check fail.

A mutation is a small change of one function, as a slip of the hand would make it. Every check passes first on the plan
as it is, with the same rows and config.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

import pipeline.plan as plan_module
from pipeline import class_order, quotas
from pipeline.class_order import ClassOrder, Cycles, GroupedOrder
from pipeline.plan import Draw, EpochPlan, PlanConfig
from pipeline.policies import UNIT
from pipeline.quotas import EpochTotals
from pipeline.runs import ClassRows
from tests import plan_checks as check
from tests.plan_checks import Ints, make_rows

Patch = pytest.MonkeyPatch
Mutation = Callable[[Patch], None]

_EIGHTHS = PlanConfig(policy="custom", weights=(6, 6, 6, 7, 7), global_batch=4, steps_per_epoch=8)
_QUARTERS = PlanConfig(policy="custom", weights=(2, 2, 2, 3, 3), global_batch=3, steps_per_epoch=4)
_LATE_TURN = PlanConfig(then="custom", weights=(0.01,) * 5 + (1,) * 5, then_from=5, global_batch=1, steps_per_epoch=1)


def _clips_with(change: Callable[[tuple[Any, ...]], tuple[Any, ...]]) -> Mutation:
    def mutate(patch: Patch) -> None:
        clips = quotas._clips
        patch.setattr(quotas, "_clips", lambda *a: (change(clip) for clip in clips(*a)))

    return mutate


def no_chain(patch: Patch) -> None:
    """The second tie-break of PD2 is left out."""
    _clips_with(lambda clip: (*clip[:2], 0, *clip[3:]))(patch)


def no_overlap(patch: Patch) -> None:
    """Both tie-breaks are left out; the class with the smaller number is first."""
    _clips_with(lambda clip: (clip[0], False, 0, *clip[3:]))(patch)


def rounded_alone(patch: Patch) -> None:
    """Each class rounds its own quota."""

    def alone(extra_C: list[int], unit: int, slots: int, taken_C: list[int], first: int, steps: int) -> Any:
        step_T1 = np.arange(first, first + steps + 1)[:, None]
        table_TC = (step_T1 * np.array(extra_C) + unit // 2) // unit
        return table_TC[:-1], table_TC[-1].tolist()

    patch.setattr(quotas, "fair_extras", alone)


def with_replacement(patch: Patch) -> None:
    """A window draws its clips with replacement."""
    mixed = Cycles._mixed

    def drawn(self: Cycles, *where: Any) -> Ints:
        items = mixed(self, *where)
        return items[np.random.default_rng(len(items)).integers(0, len(items), len(items))]

    patch.setattr(Cycles, "_mixed", drawn)


def master_from_the_start(patch: Patch) -> None:
    """Every epoch begins at the start of the master order."""
    init = Cycles.__init__

    def anew(self: Cycles, sizes_S: Ints, **rest: Any) -> None:
        init(self, sizes_S, **{**rest, "before": 0})

    patch.setattr(Cycles, "__init__", anew)


def arc_without_its_end(patch: Patch) -> None:
    """The circle is not closed: a stretch over its end begins at the start of the circle."""
    init = Cycles.__init__

    def cut(self: Cycles, sizes_S: Ints, **rest: Any) -> None:
        init(self, sizes_S, **rest)
        self.offset = self.offset if self.offset + self.rest <= self.items else 0

    patch.setattr(Cycles, "__init__", cut)


def mix_without_the_step(patch: Patch) -> None:
    """The classes of every batch are in the same order."""
    patch.setattr(plan_module, "shuffled", lambda count, seed, *key: class_order.shuffled(count, seed, *key[:-1]))


def no_mix(patch: Patch) -> None:
    """The classes of a batch come in the order of the label set."""
    patch.setattr(plan_module, "shuffled", lambda count, *_: np.arange(count))


def key_of_the_rank(patch: Patch) -> None:
    """The key of augmentation is of the rank and the place in its part."""
    draws = EpochPlan.draws

    def of_rank(self: EpochPlan, step: int, rank: int = 0, ranks: int = 1) -> list[Draw]:
        clips = draws(self, step, rank, ranks)
        return [clip._replace(rng_key=(self._key + rank, n)) for n, clip in enumerate(clips)]

    patch.setattr(EpochPlan, "draws", of_rank)


def key_of_the_step(patch: Patch) -> None:
    """All clips of a batch have one key."""
    getitem = EpochPlan.__getitem__

    def of_step(self: EpochPlan, position: int) -> Draw:
        return getitem(self, position)._replace(rng_key=(self._key, position // self.config.global_batch))

    patch.setattr(EpochPlan, "__getitem__", of_step)


def blocks_of_ranks(patch: Patch) -> None:
    """Each rank has the positions of a block of the epoch, as samplers of shards do."""

    def block(self: EpochPlan, step: int, rank: int, ranks: int) -> Ints:
        clips = self.config.global_batch // ranks
        return rank * self.steps * clips + np.arange(step * clips, (step + 1) * clips)

    patch.setattr(EpochPlan, "rank_positions", block)


def no_windows(patch: Patch) -> None:
    """All shards of a class are mixed."""
    init = Cycles.__init__

    def wide(self: Cycles, sizes_S: Ints, **rest: Any) -> None:
        init(self, sizes_S, **{**rest, "window": len(sizes_S)})

    patch.setattr(Cycles, "__init__", wide)


def turns_of_clips(patch: Patch) -> None:
    """The second key is read and not used."""

    def plain(rows_N: Ints, groups_N: Ints, cycles_of: Any, before: int, draws: int) -> ClassOrder:
        del groups_N
        return ClassOrder(ClassRows(rows_N, np.ones_like(rows_N), np.arange(len(rows_N))), cycles_of, before, draws)

    patch.setattr(plan_module, "GroupedOrder", plain)


def groups_begin_anew(patch: Patch) -> None:
    """The clips of a group begin at the start of their master order in every epoch."""
    init = GroupedOrder.__init__

    def anew(self: GroupedOrder, rows_N: Ints, groups_N: Ints, cycles_of: Any, before: int, draws: int) -> None:
        init(self, rows_N, groups_N, cycles_of, before, draws)
        self._before = 0

    patch.setattr(GroupedOrder, "__init__", anew)


def forgets_what_is_owed(patch: Patch) -> None:
    """Every epoch rounds for itself."""
    following = EpochTotals._next

    def forget(self: EpochTotals, epoch: int) -> None:
        following(self, epoch)
        self._owed[-1] = [0] * len(self.counts)

    patch.setattr(EpochTotals, "_next", forget)


def largest_remainder(patch: Patch) -> None:
    """The clips left over go to who is owed most now, and not to who must have one first."""
    patch.setattr(
        EpochTotals, "_urgency", lambda _, label, due, given, epoch: (0 * epoch, (given + 1) * UNIT - due, label)
    )


def total_by_rounding(patch: Patch) -> None:
    """The clips of an epoch are rounded shares, and need not fill its batches."""
    of = EpochTotals.of
    patch.setattr(EpochTotals, "of", lambda self, epoch: of(self, epoch) + np.eye(len(self.counts), dtype=np.int64)[0])


def remembers_draws(patch: Patch) -> None:
    """A class goes on where the last call stopped."""
    rows = ClassOrder.rows

    def going_on(self: ClassOrder, start: int, stop: int) -> Ints:
        at = getattr(self, "at", 0)
        self.at = at + stop - start  # type: ignore[attr-defined]
        return rows(self, at, self.at)  # type: ignore[attr-defined]

    patch.setattr(ClassOrder, "rows", going_on)


ROWS = make_rows([90, 14, 37, 1], [3, 8, 5])
FIVE = make_rows([9] * 5)
MIXED = PlanConfig(policy="sqrt", global_batch=7, steps_per_epoch=30, shard_window=2, seed=3)
RANKED = PlanConfig(policy="sqrt", global_batch=24, steps_per_epoch=5)
SECOND = PlanConfig(policy="natural", global_batch=7, second="subject")

CASES: list[tuple[Mutation, Callable[[], None]]] = [
    (no_chain, lambda: check.check_batch_counts(FIVE, _EIGHTHS, 0)),
    (no_overlap, lambda: check.check_batch_counts(FIVE, _QUARTERS, 0)),
    (rounded_alone, lambda: check.check_batch_counts(ROWS, MIXED, 0)),
    (total_by_rounding, lambda: check.check_epoch_totals(ROWS, MIXED, 3)),
    (forgets_what_is_owed, lambda: check.check_epoch_totals(ROWS, MIXED, 30)),
    (largest_remainder, lambda: check.check_epoch_totals(make_rows([4] * 10), _LATE_TURN, 20)),
    (with_replacement, lambda: check.check_use(ROWS, MIXED, 0)),
    (turns_of_clips, lambda: check.check_use(ROWS, SECOND, 0)),
    (master_from_the_start, lambda: check.check_use_over_epochs(ROWS, MIXED, 4)),
    (arc_without_its_end, lambda: check.check_use_over_epochs(ROWS, MIXED, 6)),
    (groups_begin_anew, lambda: check.check_use_over_epochs(ROWS, SECOND, 6)),
    (no_windows, lambda: check.check_working_set(ROWS, MIXED, 0)),
    (remembers_draws, lambda: check.check_pure(ROWS, MIXED, 0)),
    (mix_without_the_step, lambda: check.check_no_pattern(0)),
    (no_mix, lambda: check.check_no_pattern(0)),
    (key_of_the_rank, lambda: check.check_ranks(ROWS, RANKED, (1, 4), 3)),
    (blocks_of_ranks, lambda: check.check_ranks(ROWS, RANKED, (1, 4), 3)),
    (key_of_the_step, lambda: check.check_keys([ROWS.plan(MIXED)])),
]


@pytest.fixture(autouse=True)
def _fresh_totals() -> Iterator[None]:
    """Totals are kept between plans: a broken one must not see the good ones, nor be seen."""
    quotas.totals_of.cache_clear()
    yield
    quotas.totals_of.cache_clear()


@pytest.mark.parametrize(("mutation", "holds"), CASES, ids=[mutation.__name__ for mutation, _ in CASES])
def test_a_broken_plan_is_seen(mutation: Mutation, holds: Callable[[], None]) -> None:
    holds()
    quotas.totals_of.cache_clear()
    with pytest.MonkeyPatch.context() as patch:
        mutation(patch)
        with pytest.raises(AssertionError):
            holds()


def test_every_check_has_a_mutation() -> None:
    used = set(itertools.chain.from_iterable(holds.__code__.co_names for _, holds in CASES))
    assert {name for name in vars(check) if name.startswith("check_")} <= used
