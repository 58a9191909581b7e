"""Whether a probability of 0.8 is right eight times in ten, and one number that helps: the temperature.

* Confidence is the probability of the predicted class. ECE, expected calibration error (Naeini et al., AAAI 2015; Guo
  et al., ICML 2017): clips fall into 15 bins of equal width by confidence; |share right - mean confidence| of each bin
  is averaged, each bin weighed by its clips. Class-wise ECE (Kull et al., NeurIPS 2019) does so with the probability of
  each class in turn and averages over the classes.
* Temperature scaling (Guo et al.): p_T = softmax(log p / T) with the one T that makes the negative log likelihood of
  *validation* least. It moves no prediction, so UAR and WAR stay. T > 1 says that the model was too sure.

Softmax of log p / T is softmax of logits / T: the probabilities are enough. Where all validation clips are right the
likelihood only grows as T falls; then no T is told from any other, and none is given.

Legend: N clips, K classes, M bins.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

BINS = 15
LEAST, MOST = 0.05, 20.0
"""Temperatures that are searched."""
_TINY = 1e-38
"""A probability that float32 has made 0 counts as this."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Reliability:
    """Bins of equal width over [0, 1], the upper edge belonging to each."""

    clips: tuple[int, ...]
    confidence: tuple[float | None, ...]
    """Mean of the bin; None of an empty one."""
    right: tuple[float | None, ...]
    """Share of the bin's clips that are right."""

    @property
    def ece(self) -> float:
        rows = zip(self.clips, self.confidence, self.right, strict=True)
        gaps = [n * abs(c - r) for n, c, r in rows if c is not None and r is not None]
        return sum(gaps) / max(1, sum(self.clips))

    def to_dict(self) -> dict[str, Any]:
        return {"clips": list(self.clips), "confidence": list(self.confidence), "right": list(self.right)}


def reliability(p_NK: Floats, truth_N: Ints, bins: int = BINS) -> Reliability:
    """Of the predicted classes."""
    return _binned(p_NK.max(1), p_NK.argmax(1) == truth_N, bins)


def ece(p_NK: Floats, truth_N: Ints, bins: int = BINS) -> float:
    """Expected calibration error, in [0, 1]."""
    return reliability(p_NK, truth_N, bins).ece


def classwise_ece(p_NK: Floats, truth_N: Ints, bins: int = BINS) -> float:
    """Mean over the classes of the calibration error of each class's probability."""
    return float(np.mean([_binned(p_NK[:, k], truth_N == k, bins).ece for k in range(p_NK.shape[1])]))


def nll(p_NK: Floats, truth_N: Ints) -> float:
    """Mean negative log likelihood of the truth, nats a clip."""
    return float(-np.log(np.maximum(p_NK[np.arange(len(truth_N)), truth_N], _TINY)).mean())


def at_temperature(p_NK: Floats, temperature: float) -> Floats:
    """softmax(log p / T)."""
    z_NK = np.log(np.maximum(p_NK, _TINY)) / temperature
    e_NK = np.exp(z_NK - z_NK.max(1, keepdims=True))
    out_NK: Floats = e_NK / e_NK.sum(1, keepdims=True)
    return out_NK


def fit_temperature(p_NK: Floats, truth_N: Ints) -> float | None:
    """The T of least NLL; None if it lies at the end of the range: no T is better than all others.

    NLL is convex in 1 / T, so of log T too it has one valley.
    """
    from scipy.optimize import minimize_scalar

    def loss(log_t: float) -> float:
        return nll(at_temperature(p_NK, float(np.exp(log_t))), truth_N)

    low, high = np.log(LEAST), np.log(MOST)
    best = float(minimize_scalar(loss, bounds=(low, high), method="bounded", options={"xatol": 1e-6}).x)
    return None if min(best - low, high - best) < 1e-3 else float(np.exp(best))


def _binned(confidence_N: Floats, right_N: NDArray[np.bool_], bins: int) -> Reliability:
    bin_N = np.clip(np.ceil(confidence_N * bins).astype(np.int64) - 1, 0, bins - 1)
    clips_M = np.bincount(bin_N, minlength=bins)
    means = (_means(np.bincount(bin_N, weights=x_N, minlength=bins), clips_M) for x_N in (confidence_N, right_N))
    confidence, right = means
    return Reliability(clips=tuple(clips_M.tolist()), confidence=confidence, right=right)


def _means(sums_M: NDArray[Any], clips_M: NDArray[Any]) -> tuple[float | None, ...]:
    return tuple(s / n if n else None for s, n in zip(sums_M.tolist(), clips_M.tolist(), strict=True))
