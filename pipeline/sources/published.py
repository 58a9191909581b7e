"""What the authors' lists of DFEW, FERV39k and others count, clip by clip, to compare a copy with.

Counted in the lists of several public code bases, which agree with each other.
"""

from __future__ import annotations

from collections.abc import Mapping

from pipeline.contract import DFEW_LABELS

Counts = Mapping[str, Mapping[str, int]]


def _row(*numbers: int) -> dict[str, int]:
    return dict(zip(DFEW_LABELS, numbers, strict=True))


DFEW_ALL = _row(2445, 1894, 2669, 2173, 1469, 145, 902)
"""The 11,697 single-labelled clips with a usable face, of 16,372."""
_DFEW_TEST = {
    1: _row(489, 379, 534, 435, 294, 29, 181),
    2: _row(489, 379, 534, 435, 294, 29, 181),
    3: _row(489, 379, 534, 435, 294, 29, 180),
    4: _row(489, 379, 534, 434, 294, 29, 180),
    5: _row(489, 378, 533, 434, 293, 29, 180),
}
DFEW: dict[int, dict[str, dict[str, int]]] = {
    fold: {"train": {label: DFEW_ALL[label] - n for label, n in test.items()}, "test": test}
    for fold, test in _DFEW_TEST.items()
}
"""By fold, part and label."""
FERV39K = {
    "train": _row(5854, 5523, 7790, 5906, 2502, 1833, 1680),
    "test": _row(1473, 1393, 1958, 1487, 638, 467, 431),
}
"""By part and label."""
PUBLISHED: Mapping[str, Counts] = {
    "dfew": {f"fold-{fold}": parts["test"] for fold, parts in DFEW.items()},
    "ferv39k": FERV39K,
}
TOTALS: Mapping[str, Mapping[str, int]] = {
    "mafw": {"fold-1": 1839, "fold-2": 1837, "fold-3": 1833, "fold-4": 1832, "fold-5": 1831},
    "ravdess": {f"fold-{fold}": 240 for fold in range(1, 7)},
}
"""Clips by part, where the labels' own counts are not published."""


def differences(kind: str, counts: Counts) -> list[str]:
    """What differs from the published counts, a sentence for each part; empty if nothing does or none are known.

    Args:
        kind: of the source: `dfew`, `ferv39k`, ...
        counts: clips (or bags) by part (contract.part_name) and label.
    """
    if kind in PUBLISHED:
        expected = PUBLISHED[kind]
        return [
            text
            for part in (*expected, *(p for p in counts if p not in expected))
            for text in _labels(part, counts.get(part, {}), expected.get(part, {}))
        ]
    totals = TOTALS.get(kind, {})
    have = {part: sum(counts.get(part, {}).values()) for part in totals}
    return [f"{part}: {have[part]} clips, {n} are published." for part, n in totals.items() if have[part] != n]


def _labels(part: str, have: Mapping[str, int], want: Mapping[str, int]) -> list[str]:
    if not want:
        return [f"{part}: {sum(have.values())} clips, the published lists have no such part."]
    off = [
        f"{label} {have.get(label, 0)} ({want.get(label, 0)})"
        for label in (*want, *(word for word in have if word not in want))
        if have.get(label, 0) != want.get(label, 0)
    ]
    if not off:
        return []
    return [f"{part}: {sum(have.values())} clips, {sum(want.values())} are published; {', '.join(off)}."]
