"""Intervals by subject: against the same drawn clip by clip, and how often they hold what they promise."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from micacl import metrics
from micacl.bootstrap import (
    MEASURES,
    Units,
    counts_of,
    draw_sums,
    interval,
    intervals,
    paired_intervals,
    sums_by_unit,
)

CLASSES = 3


def table(subjects: int, per_subject: int, seed: int, skill: float = 1.0) -> tuple[Units, np.ndarray, np.ndarray]:
    """Units, truth and prediction of clips whose subjects differ in how well they are read."""
    rng = np.random.default_rng(seed)
    who = np.repeat(np.arange(subjects), per_subject)
    ease = rng.beta(2 * skill, 2, subjects)[who]
    truth = rng.integers(0, CLASSES, len(who))
    predicted = np.where(rng.random(len(who)) < ease, truth, (truth + rng.integers(1, CLASSES, len(who))) % CLASSES)
    return Units.of([f"v{i}_0" for i in range(len(who))], [f"s{i}" for i in who]), truth, predicted


def matrix_of(truth: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    return np.bincount(truth * CLASSES + predicted, minlength=CLASSES**2).reshape(CLASSES, CLASSES)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 30))
def test_measures_are_those_of_metrics(seed: int, clips: int) -> None:
    rng = np.random.default_rng(seed)
    truth, predicted = rng.integers(0, CLASSES, clips), rng.integers(0, CLASSES, clips)
    sums = counts_of(truth, predicted, CLASSES).sum(0, keepdims=True).astype(float)
    matrix = matrix_of(truth, predicted)
    for name in ("uar", "war", "macro_f1"):
        assert MEASURES[name](sums)[0] == pytest.approx(getattr(metrics, name)(matrix))
    np.testing.assert_allclose(MEASURES["recall"](sums)[0], metrics.recall_by_class(matrix))


def test_draws_are_distributed_as_those_of_subjects_one_by_one() -> None:
    """The multinomial over kinds of subjects against picking subjects and concatenating their clips."""
    units, truth, predicted = table(8, 5, seed=3)
    fast = MEASURES["uar"](draw_sums(sums_by_unit(units, counts_of(truth, predicted, CLASSES)), 4000, seed=1))
    rng, slow = np.random.default_rng(2), []
    for _ in range(4000):
        rows = np.concatenate([np.flatnonzero(units.code_N == u) for u in rng.integers(0, 8, 8)])
        slow.append(metrics.uar(matrix_of(truth[rows], predicted[rows])))
    quantiles = [0.025, 0.25, 0.5, 0.75, 0.975]
    np.testing.assert_allclose(np.quantile(fast, quantiles), np.quantile(slow, quantiles), atol=0.015)


def test_subjects_that_add_the_same_are_drawn_as_often_as_others() -> None:
    """Nine alike and one apart: the one is drawn once on average, and not at all in 0.9^10 of the draws."""
    sums = draw_sums(np.array([[1.0, 0.0]] * 9 + [[0.0, 1.0]]), 20000, seed=0)
    assert (sums.sum(1) == 10).all()
    assert sums[:, 1].mean() == pytest.approx(1, abs=0.03)
    assert (sums[:, 1] == 0).mean() == pytest.approx(0.9**10, abs=0.01)


def test_chunks_do_not_change_what_is_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    sums = np.arange(12.0).reshape(6, 2)
    monkeypatch.setattr("micacl.bootstrap._CHUNK", 60)
    assert draw_sums(sums, 25, seed=5).shape == (25, 2)


def test_a_seed_gives_the_same_interval_and_clips_that_move_together_a_wider_one() -> None:
    units, truth, predicted = table(20, 10, seed=0)
    assert intervals(units, truth, predicted, CLASSES) == intervals(units, truth, predicted, CLASSES)
    by_clip = Units.of([f"v{i}_0" for i in range(200)], [None] * 200)
    wide, narrow = (intervals(u, truth, predicted, CLASSES)["war"] for u in (units, by_clip))
    assert wide[1] - wide[0] > 1.3 * (narrow[1] - narrow[0])


def test_what_is_drawn_is_said() -> None:
    known = Units.of(["a_0", "a_1", "b_0"], ["s", "s", "t"])
    assert (known.units, known.kind, known.code_N.tolist()) == (2, "subject", [0, 0, 1])
    assert "Only 2 subjects" in known.note
    none = Units.of(["a_0", "a_1", "b_0"], [None] * 3)
    assert (none.units, none.kind) == (2, "clip")  # the two faces of one video stay together
    assert "No subject is known" in none.note
    some = Units.of([f"{i}_0" for i in range(20)], [None, *[f"s{i}" for i in range(19)]])
    assert some.note == "1 clips have no subject and count as one each."
    assert Units.of(["a_0", "b_0"], ["b", None]).units == 2  # a subject and a video of one name are two


def test_one_unit_has_no_interval() -> None:
    assert interval(np.array([0.5, 0.6]), units=1) is None
    assert interval(np.array([np.nan]), units=9) is None


def test_a_class_that_no_draw_has_does_not_break_the_others() -> None:
    units = Units.of([f"v{i}_0" for i in range(12)], [f"s{i}" for i in range(12)])
    truth = np.array([0] * 11 + [1])
    found = intervals(units, truth, np.zeros(12, np.int64), CLASSES)
    assert found["recall"][2] is None
    assert found["recall"][0] == (1.0, 1.0)
    assert found["uar"][1] == 1.0  # draws without the rare class have the other's recall alone


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6))
def test_paired_intervals_are_antisymmetric_and_zero_for_one_run_against_itself(seed: int) -> None:
    units, truth, a = table(15, 4, seed)
    b = table(15, 4, seed, skill=2.0)[2]
    there, back = (paired_intervals(units, truth, x, y, CLASSES, draws=200) for x, y in ((a, b), (b, a)))
    assert there["uar"] == pytest.approx((-back["uar"][1], -back["uar"][0]))
    same = paired_intervals(units, truth, a, a, CLASSES, draws=200)
    assert same["war"] == same["uar"] == (0.0, 0.0)


def test_pairing_makes_a_small_sure_difference_visible() -> None:
    """B is A with a tenth of its errors mended: every draw favours B, though each alone has a wide interval."""
    units, truth, a = table(30, 10, seed=4)
    wrong = np.flatnonzero(a != truth)
    b = a.copy()
    b[wrong[::10]] = truth[wrong[::10]]
    low, _ = paired_intervals(units, truth, a, b, CLASSES)["war"]
    assert low > 0
    alone = intervals(units, truth, a, CLASSES)["war"]
    assert alone[1] - alone[0] > 3 * (np.mean(b == truth) - np.mean(a == truth))


@pytest.mark.parametrize("subjects", [8, 30])
def test_the_interval_holds_the_truth_as_often_as_it_says(subjects: int) -> None:
    """300 data sets of a known WAR of 1/2: 95 % promised; 1/300 of chance error is some 1.3 %."""
    held = 0
    for seed in range(300):
        units, truth, predicted = table(subjects, 12, seed)
        low, high = intervals(units, truth, predicted, CLASSES, draws=400)["war"]
        held += low <= 0.5 <= high
    assert 0.92 <= held / 300 <= 0.985


def test_plain_percentiles_would_not_hold_it_with_few_subjects() -> None:
    """Why they are moved out: the same 8 subjects, without."""
    held = 0
    for seed in range(300):
        units, truth, predicted = table(8, 12, seed)
        draws = MEASURES["war"](draw_sums(sums_by_unit(units, counts_of(truth, predicted, CLASSES)), 400))
        low, high = np.quantile(draws, [0.025, 0.975])
        held += low <= 0.5 <= high
    assert held / 300 < 0.92
