"""Two tables of predictions of the same clips: which differences can be told from chance.

* *McNemar, exact*: of the clips that only one of the two has right, how likely is so uneven a share if both were as
  good: a two-sided binomial test at 1/2. It takes clips as independent; where people come more than once its p is too
  small.
* *Paired bootstrap by subject*: the interval of the difference over draws of subjects (micacl.bootstrap).
* *Holm*: K classes are K tests; the p of their McNemar tests are corrected so that the chance of one false alarm among
  all stays below the level (Holm, Scandinavian Journal of Statistics 6, 1979).

A difference of UAR or WAR is *resolved* if its 95 % interval by subject leaves out 0. One of a class's recall needs
that and a corrected p below 0.05: seven intervals, one of which misses, are no finding.

Legend: N clips, K classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from micacl.bootstrap import DRAWS, FEWEST_RESOLVED, Interval, Ints, Units, counts_of, paired_intervals
from micacl.bootstrap import recall as recalls

SIGNIFICANT = 0.05


@dataclass(frozen=True, kw_only=True, slots=True)
class Difference:
    """One number of two runs. Shares in [0, 1]; None where a class has no clip."""

    name: str
    a: float | None
    b: float | None
    difference: float | None
    """b - a."""
    interval: Interval
    """95 %, by subject."""
    only_a: int
    """Clips that A alone has right."""
    only_b: int
    p: float | None
    """McNemar; of a class, corrected after Holm. None for UAR, which has no such test."""
    resolved: bool

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"interval": None if self.interval is None else list(self.interval)}


def mcnemar(only_a: int, only_b: int) -> float:
    """Two-sided exact p of so uneven a share of the clips that one alone has right; 1 if there is none."""
    from scipy import stats

    if not only_a + only_b:
        return 1.0
    return float(stats.binomtest(only_a, only_a + only_b, 0.5).pvalue)


def holm(p: Sequence[float]) -> list[float]:
    """Corrected p, in the order given: the i-th smallest of n times n - i + 1, never below the one before."""
    order = sorted(range(len(p)), key=lambda i: p[i])
    out, floor = [1.0] * len(p), 0.0
    for rank, i in enumerate(order):
        floor = min(1.0, max(floor, (len(p) - rank) * p[i]))
        out[i] = floor
    return out


def compare(
    units: Units, truth_N: Ints, a_N: Ints, b_N: Ints, classes: Sequence[str], *, draws: int = DRAWS
) -> list[Difference]:
    """UAR, WAR, then the recall of each class."""
    count = len(classes)
    intervals = paired_intervals(units, truth_N, a_N, b_N, count, draws=draws)
    right_a_N, right_b_N = a_N == truth_N, b_N == truth_N
    recall_a, recall_b = (_recall(truth_N, x_N, count) for x_N in (a_N, b_N))
    of_class = [_discordant(right_a_N, right_b_N, truth_N == k) for k in range(count)]
    p_of = dict(zip([k for k in range(count) if recall_a[k] is not None], _class_p(recall_a, of_class), strict=True))
    uar_a, uar_b = (float(np.mean([r for r in x if r is not None])) for x in (recall_a, recall_b))
    only_a, only_b = _discordant(right_a_N, right_b_N, np.ones(len(truth_N), bool))
    common = {"only_a": only_a, "only_b": only_b, "units": units.units}
    out = [
        _difference("UAR", uar_a, uar_b, intervals["uar"], p=None, **common),
        _difference("WAR", right_a_N.mean(), right_b_N.mean(), intervals["war"], p=mcnemar(only_a, only_b), **common),
    ]
    for k, word in enumerate(classes):
        alone = {"only_a": of_class[k][0], "only_b": of_class[k][1], "units": units.units}
        found = _difference(word, recall_a[k], recall_b[k], intervals["recall"][k], p=p_of.get(k), **alone)
        out.append(found)
    return out


def _difference(
    name: str,
    a: float | None,
    b: float | None,
    interval: Interval,
    *,
    p: float | None,
    only_a: int,
    only_b: int,
    units: int,
) -> Difference:
    apart = units >= FEWEST_RESOLVED and interval is not None and not interval[0] <= 0 <= interval[1]
    of_class = name not in ("UAR", "WAR")
    return Difference(
        name=name,
        a=None if a is None else float(a),
        b=None if b is None else float(b),
        difference=None if a is None or b is None else float(b - a),
        interval=interval,
        only_a=only_a,
        only_b=only_b,
        p=p,
        resolved=apart and (not of_class or (p is not None and p < SIGNIFICANT)),
    )


def _recall(truth_N: Ints, predicted_N: Ints, classes: int) -> list[float | None]:
    found = recalls(counts_of(truth_N, predicted_N, classes).sum(0, keepdims=True).astype(float))[0]
    return [None if np.isnan(r) else float(r) for r in found]


def _class_p(recall: Sequence[float | None], discordant: Sequence[tuple[int, int]]) -> list[float]:
    return holm([mcnemar(*pair) for r, pair in zip(recall, discordant, strict=True) if r is not None])


def _discordant(right_a_N: NDArray[np.bool_], right_b_N: NDArray[np.bool_], of_N: NDArray[np.bool_]) -> tuple[int, int]:
    return int((right_a_N & ~right_b_N & of_N).sum()), int((right_b_N & ~right_a_N & of_N).sum())
