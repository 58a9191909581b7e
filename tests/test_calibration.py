"""Calibration errors by hand and by brute force; temperatures that are known beforehand."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar
from scipy.special import softmax

from micacl.calibration import at_temperature, classwise_ece, ece, fit_temperature, nll, reliability


def drawn(clips: int, seed: int, temperature: float, classes: int = 4) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities that are too sure by a factor: truths are drawn at that temperature."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 2, (clips, classes))
    right = softmax(logits / temperature, axis=1)
    truth = (right.cumsum(1) > rng.random((clips, 1))).argmax(1)
    return softmax(logits, axis=1), truth


def slow_ece(confidence: np.ndarray, right: np.ndarray, bins: int) -> float:
    total = 0.0
    for m in range(bins):
        low, high = m / bins, (m + 1) / bins
        inside = (confidence > low) & (confidence <= high) | ((m == 0) & (confidence == 0))
        if inside.any():
            total += inside.sum() / len(confidence) * abs(right[inside].mean() - confidence[inside].mean())
    return total


def test_by_hand() -> None:
    p = np.array([[0.9, 0.1], [0.9, 0.1], [0.6, 0.4], [0.2, 0.8]])
    truth = np.array([0, 1, 0, 1])
    assert ece(p, truth) == pytest.approx((2 * 0.4 + 0.4 + 0.2) / 4)  # 0.9 is right once in two
    found = reliability(p, truth, bins=5)
    assert found.clips == (0, 0, 1, 1, 2)
    assert found.right == (None, None, 1.0, 1.0, 0.5)
    assert found.confidence[4] == pytest.approx(0.9)
    assert nll(p, truth) == pytest.approx(-np.log([0.9, 0.1, 0.6, 0.8]).mean())


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 60), st.sampled_from([1, 5, 15]))
def test_against_the_definition(seed: int, clips: int, bins: int) -> None:
    p, truth = drawn(clips, seed, 1.0)
    assert ece(p, truth, bins) == pytest.approx(slow_ece(p.max(1), p.argmax(1) == truth, bins))
    each = [slow_ece(p[:, k], truth == k, bins) for k in range(4)]
    assert classwise_ece(p, truth, bins) == pytest.approx(np.mean(each))
    assert sum(reliability(p, truth, bins).clips) == clips


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.5])
def test_the_temperature_that_was_drawn_with_is_found(temperature: float) -> None:
    p, truth = drawn(20000, 1, temperature)
    found = fit_temperature(p, truth)
    assert found == pytest.approx(temperature, rel=0.06)
    after = at_temperature(p, found)
    assert ece(after, truth) < 0.02
    assert nll(after, truth) <= nll(p, truth)
    assert (after.argmax(1) == p.argmax(1)).all()


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10**6))
def test_no_temperature_of_a_grid_is_better(seed: int) -> None:
    p, truth = drawn(50, seed, 1.5)
    found = fit_temperature(p, truth)
    grid = np.exp(np.linspace(np.log(0.05), np.log(20), 400))
    least = min(nll(at_temperature(p, t), truth) for t in grid)
    if found is None:
        return
    assert nll(at_temperature(p, found), truth) <= least + 1e-9
    by_scipy = minimize_scalar(lambda t: nll(at_temperature(p, t), truth), bracket=(found / 2, found), method="brent")
    assert found == pytest.approx(by_scipy.x, rel=1e-3)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10**6), st.floats(0.1, 10))
def test_softmax_of_log_p_is_softmax_of_logits(seed: int, temperature: float) -> None:
    logits = np.random.default_rng(seed).normal(0, 5, (6, 5))
    p = softmax(logits, axis=1)
    np.testing.assert_allclose(at_temperature(p, temperature), softmax(logits / temperature, axis=1), rtol=1e-9)


def test_where_all_is_right_no_temperature_is_told() -> None:
    p = np.array([[0.9, 0.1], [0.2, 0.8]])
    assert fit_temperature(p, np.array([0, 1])) is None


def test_a_probability_of_zero_is_no_nan() -> None:
    p = np.array([[1.0, 0.0]])
    assert np.isfinite(nll(p, np.array([1])))
    np.testing.assert_allclose(at_temperature(p, 2.0).sum(1), 1)
