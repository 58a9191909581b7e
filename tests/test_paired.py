"""McNemar and Holm against definitions; what is called resolved, and how often nothing is."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from micacl.bootstrap import Units
from micacl.paired import compare, holm, mcnemar
from tests.test_bootstrap import table

CLASSES = ("happy", "sad", "fear")


def slow_mcnemar(a: int, b: int) -> float:
    n, p = a + b, [math.comb(a + b, i) / 2 ** (a + b) for i in range(a + b + 1)]
    return min(1.0, sum(x for x in p if x <= p[a] * (1 + 1e-9))) if n else 1.0


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 60), st.integers(0, 60))
def test_mcnemar_is_the_sum_over_shares_as_unlikely(a: int, b: int) -> None:
    assert mcnemar(a, b) == pytest.approx(slow_mcnemar(a, b))
    assert mcnemar(a, b) == pytest.approx(mcnemar(b, a))


def test_mcnemar_by_hand() -> None:
    assert mcnemar(0, 5) == pytest.approx(2 / 32)
    assert mcnemar(1, 9) == pytest.approx(2 * 11 / 1024)
    assert mcnemar(4, 4) == mcnemar(0, 0) == 1.0


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.9, 0.5]) == pytest.approx([1.0, 1.0])
    assert holm([]) == []


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=9))
def test_holm_rejects_what_the_step_down_procedure_rejects(p: list[float]) -> None:
    level, rejected = 0.05, set()
    for step, i in enumerate(sorted(range(len(p)), key=lambda i: p[i])):
        if p[i] * (len(p) - step) >= level:
            break
        rejected.add(i)
    assert {i for i, corrected in enumerate(holm(p)) if corrected < level} == rejected
    assert all(corrected >= raw for corrected, raw in zip(holm(p), p, strict=True))


def test_a_run_against_itself_resolves_nothing() -> None:
    units, truth, a = table(20, 6, seed=0)
    for row in compare(units, truth, a, a, CLASSES):
        assert (row.difference, row.only_a, row.only_b, row.resolved) == (0.0, 0, 0, False)
        assert row.p in (None, 1.0)


def test_a_large_difference_is_resolved_with_its_sign() -> None:
    units, truth, a = table(40, 10, seed=1)
    b = np.where(truth == 2, truth, a)
    rows = {row.name: row for row in compare(units, truth, a, b, CLASSES)}
    assert rows["fear"].resolved
    assert rows["fear"].b == 1.0
    assert not rows["happy"].resolved
    assert rows["UAR"].resolved
    assert rows["UAR"].difference == pytest.approx((rows["fear"].b - rows["fear"].a) / 3)
    assert rows["WAR"].only_b == rows["fear"].only_b
    assert rows["UAR"].p is None


def test_a_class_without_clips_has_no_number_and_takes_no_part_in_the_correction() -> None:
    units = Units.of([f"v{i}_0" for i in range(24)], [f"s{i}" for i in range(24)])
    truth = np.array([0, 1] * 12)
    b = truth.copy()
    rows = compare(units, truth, np.zeros(24, np.int64), b, CLASSES)
    fear = rows[-1]
    assert (fear.name, fear.a, fear.difference, fear.interval, fear.p, fear.resolved) == (
        "fear", None, None, None, None, False,
    )  # fmt: skip
    assert rows[3].p == pytest.approx(2 * mcnemar(0, 12))
    assert rows[0].a == 0.5


def test_of_equal_runs_few_are_called_different() -> None:
    """200 pairs that are as good as each other: 5 % are promised for UAR, and less for any class."""
    of_uar = of_class = 0
    for seed in range(200):
        rng = np.random.default_rng(seed)
        units, truth, base = table(25, 8, seed)
        a, b = (np.where(rng.random(len(base)) < 0.2, rng.integers(0, 3, len(base)), base) for _ in "ab")
        rows = compare(units, truth, a, b, CLASSES, draws=400)
        of_uar += rows[0].resolved
        of_class += any(row.resolved for row in rows[2:])
    assert of_uar / 200 < 0.1
    assert of_class / 200 < 0.07


def test_of_few_people_nothing_is_resolved() -> None:
    """One more right clip of each of them makes an interval without width."""
    truth_N = np.zeros(60, np.int64)
    for people, resolved in ((3, False), (5, False), (6, True)):
        units = Units.of([f"v{i}_0" for i in range(60)], [f"s{i % people}" for i in range(60)])
        b_N = np.ones(60, np.int64)
        b_N[:people] = 0
        rows = compare(units, truth_N, np.ones(60, np.int64), b_N, CLASSES)
        assert [row.resolved for row in rows[:2]] == [resolved, resolved]
