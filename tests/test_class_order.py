"""Cycles of a class and turns of its groups, by themselves. Each test has been seen to fail."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.class_order import Cycles, GroupedOrder, random_words, shuffled
from pipeline.plan import PlanConfig
from tests.plan_checks import CHI2_999, Ints, Rows, batches, chi2, make_rows, most_open, require_even

SIZES = st.lists(st.integers(1, 12), min_size=1, max_size=12)


def cycles(sizes: list[int], before: int, draws: int, **rest: Any) -> Cycles:
    where: dict[str, Any] = {"window": 3, "seed": 4, "key": (2,), "epoch": 0, **rest}
    return Cycles(np.array(sizes), before=before, draws=draws, **where)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(sizes=SIZES, before=st.integers(0, 500), draws=st.integers(1, 300), window=st.integers(1, 6), data=st.data())
def test_any_stretch_of_draws_is_that_of_the_whole(
    sizes: list[int], before: int, draws: int, window: int, data: st.DataObject
) -> None:
    whole = cycles(sizes, before, draws, window=window).draws(0, draws)
    assert len(whole) == draws
    require_even(whole.tolist(), range(sum(sizes)))
    used = cycles(sizes, before, draws, window=window)
    for _ in range(4):
        start = data.draw(st.integers(0, draws))
        stop = data.draw(st.integers(start, draws))
        assert used.draws(start, stop).tolist() == whole[start:stop].tolist()


@settings(max_examples=150, deadline=None, derandomize=True)
@given(sizes=SIZES, draws=st.lists(st.integers(0, 150), min_size=1, max_size=8))
def test_partial_cycles_go_round_the_master_order(sizes: list[int], draws: list[int]) -> None:
    """Which items an epoch takes once more than others: the next stretch of the circle."""
    circle = np.argsort(cycles(sizes, 0, 1).places())
    before = 0
    for epoch, count in enumerate(draws):
        use = np.bincount(cycles(sizes, before, count, epoch=epoch).draws(0, count), minlength=sum(sizes))
        stretch = np.bincount(circle[np.arange(before, before + count) % len(circle)], minlength=sum(sizes))
        assert np.array_equal(use, stretch)
        before += count


def test_orders_differ_from_cycle_to_cycle_and_epoch_to_epoch() -> None:
    one = cycles([10] * 6, 0, 180)
    parts = [one.draws(i, i + 60).tolist() for i in (0, 60, 120)] + [
        cycles([10] * 6, 0, 60, epoch=1).draws(0, 60).tolist()
    ]
    assert len({tuple(part) for part in parts}) == 4
    assert all(sorted(part) == list(range(60)) for part in parts)


def test_a_window_is_used_up_before_the_next_one_begins() -> None:
    shard_T = cycles([7] * 12, 0, 84, window=3).draws(0, 84) // 7
    windows = [set(shard_T[i : i + 21].tolist()) for i in range(0, 84, 21)]
    assert [len(shards) for shards in windows] == [3] * 4
    assert len(set().union(*windows)) == 12
    assert most_open(shard_T) == 3


def test_a_place_in_a_cycle_is_equally_likely_for_each_item() -> None:
    place = [int(np.flatnonzero(cycles([2] * 4, 0, 8, window=2, seed=s).draws(0, 8) == 5)[0]) for s in range(2000)]
    assert chi2(np.bincount(place, minlength=8), np.full(8, 250)) < CHI2_999[7]


@settings(max_examples=80, deadline=None, derandomize=True)
@given(
    groups=st.lists(st.integers(0, 5), min_size=1, max_size=30),
    draws=st.lists(st.integers(0, 70), min_size=1, max_size=7),
)
def test_turns_of_groups_count_what_each_had_before(groups: list[int], draws: list[int]) -> None:
    """The draws of a group in the epochs before: ceil((B - place) / groups), with B those of the class."""
    before, use_N = 0, np.zeros(len(groups), np.int64)
    for epoch, count in enumerate(draws):
        order = _grouped(groups, before, count, epoch)
        sets = [np.array(rows) for rows in order._rows_G]
        for group, rows in enumerate(sets):
            place = int(order._place_G[group])
            assert use_N[rows].sum() == max(0, -(-(before - place) // len(sets)))
        for start in range(0, count, 9):  # as batches ask
            np.add.at(use_N, order.rows(start, min(start + 9, count)), 1)
        before += count
        assert np.ptp([use_N[rows].sum() for rows in sets]) <= 1
        assert all(np.ptp(use_N[rows]) <= 1 for rows in sets)


def _grouped(groups: list[int], before: int, draws: int, epoch: int) -> GroupedOrder:
    def cycles_of(sizes_S: Ints, before: int, draws: int, key: tuple[int, ...]) -> Cycles:
        return cycles(sizes_S.tolist(), before, draws, key=(2, *key), epoch=epoch)

    return GroupedOrder(np.arange(len(groups)), np.array(groups), cycles_of, before, draws)


def test_a_subject_with_many_clips_comes_no_more_often() -> None:
    label = np.zeros(104, np.int64)
    group = np.array([0] * 100 + [1] * 3 + [-1])
    rows = Rows(label, np.arange(104) // 10, group, 1)
    row_N = batches(rows.plan(PlanConfig(global_batch=13, second="subject"))).ravel()
    assert sorted(np.unique(group[row_N], return_counts=True)[1].tolist()) == [34, 35, 35]


def test_groups_may_have_any_numbers_and_none_is_a_group() -> None:
    rows = make_rows([40, 9], groups=4)
    config = PlanConfig(second="scene", global_batch=6)
    renamed = Rows(rows.labels_N, rows.shards_N, rows.groups_N * 7 - 1_000_000, rows.classes)
    assert np.array_equal(batches(renamed.plan(config)), batches(rows.plan(config)))


def test_no_two_uses_share_their_random_words() -> None:
    keys = [(kind, *rest) for kind in range(4) for rest in ((0,), (1,), (0, 0), (0, 1, 0), (0, 1, 1), (1, 0, 0))]
    words = {tuple(random_words(2, 7, *key).tolist()) for key in keys}
    assert len(words) == len(keys)
    assert sorted(shuffled(50, 7, 1).tolist()) == list(range(50))
