"""Numbers of a column -> bars of a small chart, and the same in words for who does not see it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

BINS = 24
WIDTH, HEIGHT = 240, 64
"""Of the chart, in its own units."""
_OPEN_AT = 99
"""Percentile above which everything is in the last bar, where no range is given: one long clip flattens no chart."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Measure:
    """A column that is shown, and how."""

    column: str
    title: str
    meaning: str
    unit: str = ""
    low: float | None = None
    high: float | None = None
    nothing: float | None = None
    """A value that says that nothing was measured."""
    digits: int = 2


MEASURES = (
    Measure(column="seconds", title="Duration", unit="s", meaning="from the first to the last frame of the bag", low=0),
    Measure(
        column="face_px", title="Face size", unit="px", low=0, nothing=0, digits=0,
        meaning="longer side of the face in the source, median of the frames",
    ),
    Measure(column="blur", title="Sharpness", low=0, digits=0, meaning="variance of the Laplacian; low is blurred"),
    Measure(column="detector_score", title="Detector score", high=1, meaning="mean of the searches that found it"),
    Measure(
        column="yaw", title="Yaw", low=-1, high=1,
        meaning="-1 is turned to the person's right, 0 looks ahead, 1 to the left",
    ),
)  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class Bar:
    """One bar: where it stands in the chart, and its words."""

    x: float
    y: float
    width: float
    height: float
    words: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Histogram:
    """A chart and its numbers in words: least, quarter, median, three quarters, most."""

    column: str
    title: str
    unit: str
    meaning: str
    bars: tuple[Bar, ...]
    median_x: float
    low: str
    high: str
    numbers: tuple[str, ...]
    missing: int


def histogram(values: pa.ChunkedArray, measure: Measure) -> Histogram | None:
    """The chart of a column; None if nothing was measured."""
    found = values.drop_null().to_numpy().astype(np.float64)
    if measure.nothing is not None:
        found = found[found != measure.nothing]
    if not len(found):
        return None
    low, high, is_open = _range(found, measure)
    edges = np.linspace(low, high, BINS + 1)
    counts = np.histogram(np.clip(found, low, high), edges)[0]
    quarters = np.percentile(found, [0, 25, 50, 75, 100])
    middle = (float(np.clip(quarters[2], low, high)) - low) / (high - low) * WIDTH
    return Histogram(
        column=measure.column,
        title=measure.title,
        unit=measure.unit,
        meaning=measure.meaning,
        bars=_bars(counts.tolist(), edges, measure, is_open),
        median_x=round(middle, 2),
        low=_text(low, measure),
        high=_text(high, measure) + (" and more" if is_open else ""),
        numbers=tuple(_text(q, measure) for q in quarters),
        missing=len(values) - len(found),
    )


def _range(found: NDArray[np.float64], measure: Measure) -> tuple[float, float, bool]:
    """Ends of the axis, and whether the last bar is open to the right."""
    least, most, far = float(found.min()), float(found.max()), float(np.percentile(found, _OPEN_AT))
    high = measure.high if measure.high is not None else _round_up(far)
    low = measure.low if measure.low is not None else np.floor(least * 10) / 10
    return float(low), high if high > low else float(low) + 1, most > high


def _round_up(value: float) -> float:
    """The next of 1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8, 10 times a power of ten."""
    if value <= 0:
        return 1.0
    power = 10.0 ** np.floor(np.log10(value))
    return float(
        next(step * power for step in (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8, 10) if step * power >= value * 0.9999)
    )


def _bars(counts: Sequence[int], edges: NDArray[np.float64], measure: Measure, is_open: bool) -> tuple[Bar, ...]:
    top, step = max(counts), WIDTH / BINS
    bars = []
    for i, count in enumerate(counts):
        height = max(1.5, HEIGHT * count / top) if count else 0.0
        end = "and more" if is_open and i == BINS - 1 else f"to {_text(edges[i + 1], measure)}"
        bars.append(
            Bar(
                x=round(i * step + 0.75, 2),
                y=round(HEIGHT - height, 2),
                width=round(step - 1.5, 2),
                height=round(height, 2),
                words=f"{count} bags: {_text(edges[i], measure)} {end} {measure.unit}".strip(),
            )
        )
    return tuple(bar for bar in bars if bar.height)


def _text(value: float, measure: Measure) -> str:
    return f"{value:.{measure.digits}f}".rstrip("0").rstrip(".") if measure.digits else f"{value:.0f}"
