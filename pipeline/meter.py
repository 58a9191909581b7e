"""The progress line of `prepare`: how much is done, how fast, what is left."""

from __future__ import annotations

import time
from collections import deque

from pipeline.ledger import Ledger

_RATE_LINES = 16
"""Rates are over the time since this many progress lines ago: half a minute."""


class Meter:
    """The progress line: how much is done, how fast, what is left."""

    def __init__(self, known: int, listed: int) -> None:
        self.listed, self.last = listed, time.monotonic()
        self._seen: deque[tuple[float, int, int]] = deque([(self.last, known, 0)], maxlen=_RATE_LINES)

    def due(self) -> bool:
        """Every two seconds."""
        now = time.monotonic()
        if now - self.last < 2:
            return False
        self.last = now
        return True

    def line(self, ledger: Ledger, worked: int) -> str:
        counts, now = ledger.counts(), time.monotonic()
        since, done, bags = self._seen[0]
        seconds = max(now - since, 1e-3)
        rate, clips = (counts["done"] - done) / seconds, (counts["bags"] - bags) / seconds
        self._seen.append((now, counts["done"], counts["bags"]))
        left = _duration((self.listed - counts["done"]) / max(rate, 1e-3))
        return (
            f"cropped {counts['done']}/{self.listed} videos ({worked} decoded now), {counts['bags']} bags, "
            f"{counts['quarantined']} quarantined, {rate:.1f} videos/s, {clips:.1f} clips/s, {left} left"
        )


def _duration(seconds: float) -> str:
    """`45 s`, `12 min`, `3.5 h`: as exact as a guess can be."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
