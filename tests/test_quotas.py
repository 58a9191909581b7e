"""Clips per epoch and per batch: whole numbers, never a whole clip early or late. Each test has been seen to fail."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.policies import UNIT, PlanConfig, shares
from pipeline.quotas import _BLOCK, BatchCounts, EpochTotals, fair_extras, totals_of
from tests import plan_checks as check
from tests.plan_checks import make_rows


@settings(max_examples=300, deadline=None, derandomize=True)
@given(data=st.data(), unit=st.sampled_from([6, 12, 24, 60]))
def test_fair_extras_meet_every_deadline_when_ties_abound(data: st.DataObject, unit: int) -> None:
    """A coarse unit makes equal deadlines common; earliest-deadline-first without both tie-breaks fails here."""
    heavy = st.integers(unit // 2, unit - 1)
    extra_C = data.draw(st.lists(heavy | st.integers(1, unit - 1), min_size=4, max_size=14))
    extra_C += [rest] if (rest := -sum(extra_C) % unit) else []
    cut = data.draw(st.integers(1, 2 * unit - 1))
    slots = sum(extra_C) // unit
    first_TC, between_C = fair_extras(extra_C, unit, slots, [0] * len(extra_C), 0, cut)
    second_TC, end_C = fair_extras(extra_C, unit, slots, between_C, cut, 2 * unit - cut)
    taken_TC = np.concatenate([first_TC, second_TC, [end_C]])
    step_T1 = np.arange(2 * unit + 1)[:, None]
    assert np.all(np.abs(taken_TC * unit - step_T1 * extra_C) < unit)
    assert np.all((np.diff(taken_TC, axis=0) == 0) | (np.diff(taken_TC, axis=0) == 1))
    assert np.array_equal(taken_TC.sum(axis=1), step_T1[:, 0] * slots)


def test_fair_extras_need_the_second_tie_break() -> None:
    """Quotas of 6/8 and 7/8 over four slots: without the group deadline a class comes a whole clip late."""
    eighths_C = [6, 6, 6, 7, 7]
    taken_TC, end_C = fair_extras(eighths_C, 8, 4, [0] * 5, 0, 8)
    assert np.all(np.abs(taken_TC * 8 - np.arange(8)[:, None] * eighths_C) < 8)
    assert end_C == eighths_C


@settings(max_examples=60, deadline=None, derandomize=True)
@given(draws=st.lists(st.integers(0, 5000), min_size=2, max_size=9), steps=st.integers(1, 4 * _BLOCK), data=st.data())
def test_counts_before_a_step_are_the_same_in_any_order(draws: list[int], steps: int, data: st.DataObject) -> None:
    draws_C = np.array([*draws, -sum(draws) % steps])
    in_order = BatchCounts(draws_C, steps)
    before_TC = np.stack([in_order.before(step) for step in range(steps + 1)])
    assert np.all(np.abs(before_TC * steps - np.arange(steps + 1)[:, None] * draws_C) < steps)
    assert np.array_equal(before_TC[-1], draws_C)
    fresh = BatchCounts(draws_C, steps)
    for step in data.draw(st.lists(st.integers(0, steps), max_size=8)):
        assert np.array_equal(fresh.before(step), before_TC[step])
        assert np.array_equal(in_order.before(step), before_TC[step])


def test_a_short_period_needs_one_short_block() -> None:
    counts = BatchCounts(np.array([3, 3, 2]) * 10**6, 4 * 10**6)
    assert counts.before(4 * 10**6).tolist() == [3 * 10**6, 3 * 10**6, 2 * 10**6]
    assert counts.before(4 * 123_456).tolist() == [3 * 123_456, 3 * 123_456, 2 * 123_456]
    assert len(counts._block[1]) == 4


def test_a_class_below_one_clip_an_epoch_comes_when_it_is_due() -> None:
    """One step of two clips an epoch, eight classes: each comes in 3 or 4 of 14 epochs, and never early by one."""
    rows, config = make_rows([5] * 8), PlanConfig(global_batch=2, steps_per_epoch=1)
    check.check_epoch_totals(rows, config, 60)
    totals = EpochTotals((5,) * 8, config, 1)
    assert set(totals.before(14).tolist()) <= {3, 4}


def test_largest_remainder_alone_would_fall_behind() -> None:
    """Ten classes have half a clip each after five epochs, and then five of them, in a row, a fifth more in each."""
    config = PlanConfig(then="custom", weights=(0.01,) * 5 + (1,) * 5, then_from=5, global_batch=1, steps_per_epoch=1)
    check.check_epoch_totals(make_rows([4] * 10), config, 40)
    late = EpochTotals((4,) * 10, config, 1)
    assert late.before(5).tolist() == [0] * 5 + [1] * 5


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    weights=st.lists(st.floats(1e-6, 1), min_size=2, max_size=12),
    global_batch=st.integers(1, 12),
    then_from=st.integers(0, 12),
    then_over=st.integers(0, 12),
    floor=st.booleans(),
)
def test_small_shares_and_any_schedule_stay_below_one_clip(
    weights: list[float], global_batch: int, then_from: int, then_over: int, floor: bool
) -> None:
    """No class need have a clip an epoch: what is owed waits for as many epochs as it takes."""
    config = PlanConfig(
        policy="custom", weights=tuple(weights), then="uniform", then_from=then_from, then_over=then_over,
        global_batch=global_batch, steps_per_epoch=1, clips_per_class=int(floor and len(weights) <= global_batch),
    )  # fmt: skip
    check.check_epoch_totals(make_rows([3] * len(weights)), config, 50)


def test_epochs_can_be_asked_for_in_any_order() -> None:
    config = PlanConfig(policy="sqrt", then="uniform", then_from=3, then_over=5)
    counts = (90, 8, 31)
    later, in_order = EpochTotals(counts, config, 9), EpochTotals(counts, config, 9)
    of_E = [in_order.of(epoch).tolist() for epoch in range(20)]
    assert [later.of(epoch).tolist() for epoch in reversed(range(20))] == of_E[::-1]
    assert totals_of(counts, config, 9) is totals_of(counts, config, 9)


def test_what_is_owed_is_exact_after_many_epochs() -> None:
    """Thirds of a clip: after three epochs and after 3000 all classes have the same."""
    totals = EpochTotals((1, 1, 1), PlanConfig(global_batch=1), 1)
    units_C = shares((1, 1, 1), PlanConfig())
    for epochs in (3, 300, 3000):
        taken_C = totals.before(epochs).tolist()
        assert taken_C == [epochs // 3] * 3
        assert max(abs(taken * UNIT - epochs * int(u)) for taken, u in zip(taken_C, units_C, strict=True)) <= epochs


@pytest.mark.parametrize("steps", [1, 7])
def test_one_class_takes_it_all(steps: int) -> None:
    counts = BatchCounts(np.array([5 * steps]), steps)
    assert [int(counts.before(step)[0]) for step in range(steps + 1)] == list(range(0, 5 * steps + 1, 5))
