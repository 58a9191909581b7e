"""What two sides of a dataset share and should not: people, videos, and copies of one clip.

The sides are the splits, or the folds where a source is in folds: a subject or a video that is in two folds is trained
on and tested on in the same round of the cross-validation. Bags without a label are neither trained on nor scored, so
they leak nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.contract import part_name
from pipeline.pack import UNLABELLED
from pipeline.phash import MAX_DISTANCE, near_duplicates


@dataclass(frozen=True, kw_only=True, slots=True)
class Leak:
    """A subject or a video that is on more than one side."""

    column: str
    """subject or video."""
    name: str
    sides: tuple[str, ...]
    bags: int

    def __str__(self) -> str:
        sides = " and ".join(self.sides)
        return f"Leakage: the {self.column} {self.name!r} is in {sides} ({self.bags} bags)."


@dataclass(frozen=True, kw_only=True, slots=True)
class Suspect:
    """Two videos on two sides whose bags look and move alike. `rows` are of the index."""

    rows: tuple[int, int]
    videos: tuple[str, str]
    sides: tuple[str, str]
    distance: int
    """0 to MAX_DISTANCE."""

    def __str__(self) -> str:
        (a, b), (side_a, side_b) = self.videos, self.sides
        return (
            f"Suspected copy: the videos {a!r} ({side_a}) and {b!r} ({side_b}) look and move alike "
            f"(distance {self.distance} of at most {MAX_DISTANCE})."
        )


def leaks(index: pa.Table) -> Iterator[Leak]:
    """Subjects, then videos, each by name. What the source says: certain."""
    rows = index.append_column("side", pa.array(_sides(index), pa.string()))
    rows = rows.filter(pc.not_equal(rows["label"], UNLABELLED))
    for column in ("subject", "video"):
        named = rows.filter(pc.is_valid(rows[column]))
        groups = named.group_by(column).aggregate([("side", "distinct"), ([], "count_all")])
        many = groups.filter(pc.greater(pc.list_value_length(groups["side_distinct"]), 1)).sort_by(column)
        for row in many.to_pylist():
            sides = tuple(sorted(row["side_distinct"]))
            yield Leak(column=column, name=row[column], sides=sides, bags=row["count_all"])


def suspects(index: pa.Table) -> list[Suspect]:
    """Pairs of videos by their perceptual hashes, nearest first: probable, not certain (docs/decisions/0012)."""
    labelled = pc.indices_nonzero(pc.not_equal(index["label"], UNLABELLED))
    rows, place = index.take(labelled), labelled.to_pylist()
    sides, videos = _sides(rows), rows["video"].to_pylist()
    found: dict[tuple[str, str], Suspect] = {}
    for i, j, far in near_duplicates(rows["phash"].to_pylist(), sides):
        a, b = sorted((i, j), key=lambda row: str(videos[row]))
        names = (videos[a], videos[b])
        if names[0] != names[1] and (names not in found or far < found[names].distance):
            found[names] = Suspect(rows=(place[a], place[b]), videos=names, sides=(sides[a], sides[b]), distance=far)
    return sorted(found.values(), key=lambda s: (s.distance, s.videos))


def _sides(rows: pa.Table) -> list[str]:
    split, fold = rows["split"].to_pylist(), rows["fold"].to_pylist()
    return [part_name(s, f) for s, f in zip(split, fold, strict=True)]
