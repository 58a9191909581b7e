"""How far the numbers of one test set would move with other people in it: bootstrap intervals by subject.

Clips of one subject are alike, so the subject is drawn, not the clip: S subjects with replacement from the S there are,
each with all its clips, and WAR, UAR, macro F1 and recalls are worked out anew. Of 2,000 such draws the percentiles are
the interval. With few subjects plain percentiles are too narrow by the factor by which a t interval is wider than a
normal one; the percentiles that are taken are moved out by it (the expanded percentile interval of T. Hesterberg, "What
teachers should know about the bootstrap", The American Statistician 69(4), 2015, section 5.4). tests/test_bootstrap.py
measures the coverage.

A number is a function of sums over subjects, so nothing is drawn clip by clip: subjects that add the same are one kind,
how many of each kind a draw has is multinomial, and all draws are one matrix product. That is the same distribution.

The interval says what other subjects would do to *these* predictions. It says nothing of another seed or another
training set; `micacl crossval` shows the spread over seeds beside it.

Legend: N clips, S subjects (units), K classes, R draws, X columns that are summed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

DRAWS = 2000
LEVEL = 0.95
FEWEST_RESOLVED = 6
"""Subjects, or clips: of fewer, not even all of them moving one way would be less than 5 % likely by chance."""
FEW_UNITS = 10
"""Below this an interval is said to be rough, whatever is done to it."""
_CHUNK = 2**24
"""Numbers in memory at a time."""

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Measure = Callable[[Floats], Floats]
"""Sums, (R, X), to values, (R,) or (R, K)."""
Interval = tuple[float, float] | None
"""None where it cannot be told: no draw has a value, or there is one unit."""


@dataclass(frozen=True, slots=True)
class Units:
    """What is drawn: the unit of each clip, and what that is in words."""

    code_N: Ints
    units: int
    kind: str
    """subject, or clip."""
    note: str

    @classmethod
    def of(cls, keys: Sequence[str], subjects: Sequence[str | None]) -> Units:
        """A clip's subject; one without stands for its video (`<video>_<track>` is the key)."""
        known = sum(subject is not None for subject in subjects)
        pairs = zip(keys, subjects, strict=True)
        names = [(True, s) if s is not None else (False, key.rpartition("_")[0] or key) for key, s in pairs]
        number: dict[Any, int] = {}
        code_N = np.array([number.setdefault(name, len(number)) for name in names], np.int64)
        kind = "subject" if known else "clip"
        note = "" if len(number) >= FEW_UNITS else f"Only {len(number)} {kind}s: a rough interval."
        if len(number) < FEWEST_RESOLVED:
            note = f"Only {len(number)} {kind}s: a rough interval, and no difference is called resolved."
        if len(number) == 1:
            note = f"Only 1 {kind}: no interval."
        if not known:
            note = f"No subject is known: by clip, and too narrow if people come more than once. {note}".strip()
        elif known < len(names):
            note = f"{len(names) - known} clips have no subject and count as one each. {note}".strip()
        return cls(code_N, len(number), kind, note)


def sums_by_unit(units: Units, columns_NX: NDArray[Any]) -> Floats:
    """(S, X): what each unit adds."""
    out_SX = np.zeros((units.units, columns_NX.shape[1]))
    np.add.at(out_SX, units.code_N, columns_NX)
    return out_SX


def draw_sums(sums_SX: Floats, draws: int = DRAWS, seed: int = 0) -> Floats:
    """(R, X): the sums of `draws` samples of S units with replacement."""
    _, first_M, count_M = np.unique(sums_SX, axis=0, return_index=True, return_counts=True)
    order_M = np.argsort(first_M)  # of the units, not of the columns: B against A draws as A against B
    kinds_MX, count_M = sums_SX[first_M[order_M]], count_M[order_M]
    units, rng = len(sums_SX), np.random.default_rng(seed)
    step = max(1, _CHUNK // len(count_M))
    parts = [
        rng.multinomial(units, count_M / units, size=min(step, draws - at)) @ kinds_MX for at in range(0, draws, step)
    ]
    return np.concatenate(parts)


def interval(values_R: Floats, units: int, level: float = LEVEL) -> Interval:
    """Expanded percentiles of the draws that have a value."""
    from scipy import stats  # half a second that `--help` need not wait for

    found_R = values_R[~np.isnan(values_R)]
    if units < 2 or not len(found_R):
        return None
    wide = np.sqrt(units / (units - 1)) * stats.t.ppf((1 + level) / 2, units - 1)
    outside = float(stats.norm.cdf(-wide))
    low, high = np.quantile(found_R, [outside, 1 - outside])
    return float(low), float(high)


def counts_of(truth_N: Ints, predicted_N: Ints, classes: int) -> Ints:
    """(N, 3 K): of each clip whether it is right, there, predicted, by class: the columns of `MEASURES`."""
    clips = len(truth_N)
    out_N3K = np.zeros((clips, 3, classes), np.int64)
    out_N3K[np.arange(clips), 0, truth_N] = truth_N == predicted_N
    out_N3K[np.arange(clips), 1, truth_N] = 1
    out_N3K[np.arange(clips), 2, predicted_N] = 1
    return out_N3K.reshape(clips, 3 * classes)


def recall(sums_RX: Floats) -> Floats:
    """(R, K); NaN for a class that a draw does not have."""
    right_RK, there_RK, _ = np.split(sums_RX, 3, axis=1)
    return _ratio(right_RK, there_RK)


def f1(sums_RX: Floats) -> Floats:
    """(R, K); NaN for a class that a draw does not have."""
    right_RK, there_RK, predicted_RK = np.split(sums_RX, 3, axis=1)
    return np.where(there_RK > 0, _ratio(2 * right_RK, there_RK + predicted_RK), np.nan)


def war(sums_RX: Floats) -> Floats:
    """(R,) share of clips that are right."""
    right_RK, there_RK, _ = np.split(sums_RX, 3, axis=1)
    share_R: Floats = right_RK.sum(1) / there_RK.sum(1)
    return share_R


def uar(sums_RX: Floats) -> Floats:
    """(R,) mean recall over the classes that a draw has."""
    return _mean(recall(sums_RX))


def macro_f1(sums_RX: Floats) -> Floats:
    """(R,) mean F1 over the classes that a draw has."""
    return _mean(f1(sums_RX))


MEASURES: Mapping[str, Measure] = {"uar": uar, "war": war, "macro_f1": macro_f1, "recall": recall}


def _ratio(part_RK: Floats, whole_RK: Floats) -> Floats:
    out_RK: Floats = np.full(whole_RK.shape, np.nan)
    np.divide(part_RK, whole_RK, out=out_RK, where=whole_RK > 0)
    return out_RK


def _mean(values_RK: Floats) -> Floats:
    there_RK = ~np.isnan(values_RK)
    mean_R: Floats = np.where(there_RK, values_RK, 0).sum(1) / there_RK.sum(1)
    return mean_R


def intervals(
    units: Units, truth_N: Ints, predicted_N: Ints, classes: int, *, draws: int = DRAWS, seed: int = 0
) -> dict[str, Any]:
    """{uar, war, macro_f1: interval; recall: [interval, ...]} of one table of predictions."""
    sums_RX = draw_sums(sums_by_unit(units, counts_of(truth_N, predicted_N, classes)), draws, seed)
    return {name: _interval_of(measure(sums_RX), units.units) for name, measure in MEASURES.items()}


def paired_intervals(
    units: Units, truth_N: Ints, a_N: Ints, b_N: Ints, classes: int, *, draws: int = DRAWS, seed: int = 0
) -> dict[str, Any]:
    """The same of the differences b - a: each draw takes both predictions of the same subjects."""
    both_NX = np.concatenate([counts_of(truth_N, a_N, classes), counts_of(truth_N, b_N, classes)], axis=1)
    sums_RX = draw_sums(sums_by_unit(units, both_NX), draws, seed)
    a_RX, b_RX = np.split(sums_RX, 2, axis=1)
    return {name: _interval_of(measure(b_RX) - measure(a_RX), units.units) for name, measure in MEASURES.items()}


def _interval_of(values: Floats, units: int) -> Interval | list[Interval]:
    if values.ndim == 1:
        return interval(values, units)
    return [interval(values_R, units) for values_R in values.T]
