"""Numbers -> pictures as SVG that lives inside a page: it takes the page's font and its colours, by day and by night.

matplotlib draws in stand-in colours, which are then replaced by the page's variables
(pipeline/templates/report.css.j2); ids get a prefix, so that many pictures stand in one page. Same numbers, same bytes.

Legend: K classes, N clips, M bins.
"""

from __future__ import annotations

import io
import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

_PAGE = {"#010203": "var(--ink)", "#010204": "var(--line)", "#010205": "var(--soft)"}
_TONES = {"#01020a": "var(--a)", "#01020b": "var(--b)", "#01020c": "var(--c)", "#01020d": "var(--d)"}
_TONES |= {"#01020e": "var(--e)", "#01020f": "var(--warn)"}
_INK, _LINE, _SOFT = _PAGE
TONES = tuple(_TONES)
_MARKS = "os^vDPX*"
MAX_POINTS = 3000
"""Of an embedding map; more are thinned evenly."""
_numbers = re.compile(r'(id="|url\(#|href="#)')


@dataclass(frozen=True, kw_only=True, slots=True)
class Curve:
    """One line of one run."""

    group: str
    """Its recipe: lines of one group have one colour."""
    x: Sequence[float]
    y: Sequence[float]


def curves(panels: Mapping[str, Sequence[Curve]], prefix: str) -> str:
    """One panel a title, a thin line a run, a thick one for the mean of a group where all its runs have the same x."""
    figure, axes = _figure(len(panels), 3.2, 3.3 * len(panels))
    groups = list(dict.fromkeys(line.group for lines in panels.values() for line in lines))
    for axis, (title, lines) in zip(axes, panels.items(), strict=True):
        for number, group in enumerate(groups):
            mine, style = [line for line in lines if line.group == group], _style(number)
            for line in mine:
                axis.plot(line.x, line.y, linewidth=0.7, alpha=0.45, marker="." if len(line.x) == 1 else "", **style)
            if mine and len({tuple(line.x) for line in mine}) == 1:
                axis.plot(mine[0].x, np.mean([line.y for line in mine], 0), linewidth=1.8, label=_plain(group), **style)
            elif mine:
                axis.plot([], [], linewidth=1.8, label=_plain(group), **style)
        axis.set_title(title, fontsize=10, color=_INK)
        axis.set_xlabel("step")
    if len(groups) > 1:
        _legend(axes[0])
    return _svg(figure, prefix)


def confusion(matrix: Sequence[Sequence[int]], classes: Sequence[str], prefix: str) -> str:
    """Shares of each true class as shades, counts written in."""
    counts_KK = np.array(matrix)
    share_KK = counts_KK / np.maximum(counts_KK.sum(1, keepdims=True), 1)
    figure, (axis,) = _figure(1, 0.42 * len(classes) + 1.3, 0.5 * len(classes) + 1.6)
    for (i, j), n in np.ndenumerate(counts_KK):
        # Shades end at 0.6, so that the ink on them can be read in both schemes.
        axis.fill([j, j + 1, j + 1, j], [i, i, i + 1, i + 1], color=TONES[0], alpha=0.6 * share_KK[i, j], linewidth=0)
        if n:
            axis.text(j + 0.5, i + 0.5, str(n), ha="center", va="center", fontsize=8, color=_INK)
    middles, names = np.arange(len(classes)) + 0.5, [_plain(word) for word in classes]
    axis.set_xticks(middles, names, rotation=40, ha="right")
    axis.set_yticks(middles, names)
    axis.set_xlim(0, len(classes))
    axis.set_ylim(len(classes), 0)
    axis.set_xlabel("predicted")
    axis.set_ylabel("true")
    return _svg(figure, prefix)


def reliability(before: Mapping[str, Any], after: Mapping[str, Any] | None, prefix: str) -> str:
    """Share right against confidence, a point a bin, its area by the clips; the diagonal would be calibrated."""
    figure, (axis,) = _figure(1, 3.0, 3.4)
    axis.plot([0, 1], [0, 1], color=_SOFT, linewidth=0.8, linestyle="--")
    parts = [("as it is", before, TONES[0], "o")]
    parts += [("at the temperature", after, TONES[1], "s")] if after is not None else []
    for label, found, tone, mark in parts:
        bins = zip(found["clips"], found["confidence"], found["right"], strict=True)
        points = np.array([(c, r, n) for n, c, r in bins if n])
        size_M = 8 + 90 * points[:, 2] / points[:, 2].max()
        axis.plot(points[:, 0], points[:, 1], color=tone, linewidth=0.8, label=label)
        axis.scatter(points[:, 0], points[:, 1], s=size_M, color=tone, marker=mark, alpha=0.75, linewidths=0)
    axis.set_xlim(0, 1.02)
    axis.set_ylim(0, 1.02)
    axis.set_xlabel("confidence")
    axis.set_ylabel("share right")
    _legend(axis)
    return _svg(figure, prefix)


def embedding_map(
    features_ND: NDArray[np.floating[Any]], truth_N: NDArray[np.int64], classes: Sequence[str], prefix: str
) -> tuple[str, float]:
    """(picture, share of the variance that it shows): the two first principal components of bag features."""
    xy_N2, shown = principal_plane(features_ND)
    keep = np.unique(np.linspace(0, len(xy_N2) - 1, min(MAX_POINTS, len(xy_N2))).round().astype(int))
    figure, (axis,) = _figure(1, 3.0, 3.9)
    for k, word in enumerate(classes):
        mine = keep[truth_N[keep] == k]
        mark = _MARKS[(k + k // len(TONES)) % len(_MARKS)]
        tone = TONES[k % len(TONES)]
        axis.scatter(
            xy_N2[mine, 0], xy_N2[mine, 1], s=9, color=tone, marker=mark, alpha=0.7, linewidths=0, label=_plain(word)
        )
    axis.set_xticks([])
    axis.set_yticks([])
    _legend(axis, loc="center left", bbox_to_anchor=(1, 0.5), handletextpad=0.1)
    return _svg(figure, prefix), shown


def principal_plane(features_ND: NDArray[np.floating[Any]]) -> tuple[NDArray[np.float64], float]:
    """((N, 2) coordinates, share of the variance in them). The sign is fixed: the longest loading is positive."""
    centred_ND = features_ND.astype(np.float64) - features_ND.mean(0)
    _, s_D, axes_DD = np.linalg.svd(centred_ND, full_matrices=False)
    plane_2D = np.zeros((2, centred_ND.shape[1]))
    plane_2D[: len(axes_DD[:2])] = axes_DD[:2]
    longest = np.abs(plane_2D).argmax(1)
    plane_2D *= np.where(plane_2D[np.arange(2), longest] < 0, -1, 1)[:, None]
    total = float((s_D**2).sum())
    return centred_ND @ plane_2D.T, float((s_D[:2] ** 2).sum() / total) if total else 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Recall:
    """Of one class of one recipe."""

    group: str
    label: str
    clips: float
    """For training."""
    recall: float
    low: float
    high: float


def recall_by_count(points: Sequence[Recall], prefix: str) -> str:
    """Recall of each class against its training clips, log scale, with intervals."""
    figure, (axis,) = _figure(1, 3.3, 8.0)
    groups = list(dict.fromkeys(p.group for p in points))
    for number, group in enumerate(groups):
        mine, style = [p for p in points if p.group == group], _style(number)
        x = [p.clips * (1 + 0.035 * (number - (len(groups) - 1) / 2)) for p in mine]
        y, low, high = ([getattr(p, name) for p in mine] for name in ("recall", "low", "high"))
        axis.vlines(x, low, high, color=style["color"], linewidth=0.9, alpha=0.7)
        axis.scatter(
            x, y, s=16, color=style["color"], marker=_MARKS[number % len(_MARKS)], label=_plain(group), linewidths=0
        )
    for p in (p for p in points if p.group == groups[0]):
        axis.annotate(_plain(p.label), (p.clips, 1.02), fontsize=7, color=_SOFT, ha="center", va="bottom", rotation=30)
    _log_axis(axis)
    axis.set_ylim(-0.03, 1.03)
    axis.set_xlabel("training clips of the class (log)")
    axis.set_ylabel("recall")
    if len(groups) > 1:
        _legend(axis, loc="center left", bbox_to_anchor=(1, 0.5))
    return _svg(figure, prefix)


def _log_axis(axis: Any) -> None:
    """Numbers as people write them, not powers of ten."""
    from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

    axis.set_xscale("log")
    axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.xaxis.set_minor_locator(NullLocator())


def _plain(word: str) -> str:
    """A dollar sign is no formula."""
    return word.replace("$", r"\$")


def _style(number: int) -> dict[str, str]:
    return {"color": TONES[number % len(TONES)], "linestyle": ("-", "--", ":")[number // len(TONES) % 3]}


def _figure(panels: int, height: float, width: float = 8.0) -> tuple[Any, Any]:
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasSVG(figure)
    axes = figure.subplots(1, panels, squeeze=False)[0]
    for axis in axes:
        for side, spine in axis.spines.items():
            spine.set_visible(side in ("left", "bottom"))
            spine.set_color(_LINE)
        axis.tick_params(colors=_SOFT, labelsize=8, color=_LINE)
        for label in (axis.xaxis.label, axis.yaxis.label):
            label.set_color(_SOFT)
            label.set_fontsize(8)
        axis.patch.set_alpha(0)
    figure.patch.set_alpha(0)
    return figure, axes


def _legend(axis: Any, **where: Any) -> None:
    axis.legend(fontsize=7, frameon=False, labelcolor=_INK, **where)


def _svg(figure: Any, prefix: str) -> str:
    """The element alone, for HTML."""
    import matplotlib as mpl

    out = io.StringIO()
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "micacl", "font.family": "sans-serif"}):
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = out.getvalue()
    text = text[text.index("<svg") :]
    for stand_in, tone in itertools.chain(_PAGE.items(), _TONES.items()):
        text = text.replace(stand_in, tone)
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", text, count=1, flags=re.DOTALL)
    text = re.sub(r"font-family: [^;\"]*; ?", "", text)
    wide = re.search(r'width="([\d.]+)pt" height="[\d.]+pt"', text)
    assert wide is not None, "matplotlib writes both"
    text = text.replace(wide[0], f'style="max-width: {float(wide[1]) * 1.3:.0f}px"', 1)
    return _numbers.sub(lambda m: m[1] + prefix + "-", text).strip()
