"""The class quotas of a batch: exact shares, and rounding that never drifts. Each test has been seen to fail."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import pipeline.quotas as quotas_module
from pipeline.plan import PlanConfig, class_weights
from pipeline.quotas import POLICIES, UNIT, fair_extras


def test_effective_number_lies_between_natural_and_uniform() -> None:
    counts = [1000, 10]

    def tail(policy: str, beta: float = 0.999) -> float:
        return float(class_weights(counts, PlanConfig(policy=policy, beta=beta))[1])

    assert tail("effective", 0.0) == tail("natural")
    assert tail("natural") < tail("sqrt") < tail("effective") < tail("uniform")
    assert tail("effective", 0.9999999) == pytest.approx(0.5, abs=1e-4)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(data=st.data(), unit=st.sampled_from([6, 12, 24, 60]))
def test_fair_extras_meet_every_deadline_when_ties_abound(data: st.DataObject, unit: int) -> None:
    """A coarse unit makes equal deadlines common; earliest-deadline-first without both tie-breaks fails here."""
    heavy = st.integers(unit // 2, unit - 1)
    extra_C = data.draw(st.lists(heavy | st.integers(1, unit - 1), min_size=4, max_size=14))
    extra_C += [rest] if (rest := -sum(extra_C) % unit) else []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quotas_module, "UNIT", unit)
        taken_TC = fair_extras(extra_C, 2 * unit)
    step_T1 = np.arange(2 * unit + 1)[:, None]
    assert np.all(np.abs(taken_TC * unit - step_T1 * extra_C) < unit)
    assert np.all(np.diff(taken_TC, axis=0) <= 1)
    assert np.array_equal(taken_TC.sum(axis=1), step_T1[:, 0] * (sum(extra_C) // unit))


@pytest.mark.parametrize("counts", [[1, 10**8], [10**8, 1, 1], [7, 5, 3]])
def test_shares_sum_to_exactly_one_batch_and_none_is_zero(counts: list[int]) -> None:
    for policy in POLICIES:
        for clips in (1, 7, 16):
            units = quotas_module.quota_units(np.array(counts), policy=policy, beta=0.999, global_batch=clips)
            assert units.sum() == clips * UNIT
            assert units.min() >= 1


def test_fair_extras_need_the_second_tie_break() -> None:
    """Quotas of 6/8 and 7/8 over four slots: without the group deadline a class comes a whole clip late."""
    eighths_C = np.array([6, 6, 6, 7, 7])
    taken_TC = fair_extras((eighths_C * (UNIT // 8)).tolist(), 8)
    assert np.all(np.abs(taken_TC * 8 - np.arange(9)[:, None] * eighths_C) < 8)
    assert taken_TC[8].tolist() == eighths_C.tolist()
