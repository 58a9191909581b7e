"""The rows of an index as runs: neighbours of one class in one shard. What a plan knows of a dataset.

    row    0 1 2 3 4 5 6 7 8 9
    label  0 0 0 0 1 1 1 0 0 0       runs:  (0, shard 0, rows 0-3) (1, shard 1, rows 4-6) (0, shard 2, rows 7-9)
    shard  0 0 0 0 1 1 1 2 2 2

Shards are class-pure, so a run is a shard and 10^8 rows are some 10^5 runs: the version file alone says them all, and
no process needs a column of all rows. Rows in any other order are as good, only larger.

Legend: C classes, N rows, R runs.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.contract import digest

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Runs:
    """Runs in the order of their rows, which cover 0..rows without a gap."""

    labels_R: Ints
    """Class index."""
    shards_R: Ints
    """Shard index, below the number of shards."""
    counts_R: Ints
    """Rows, at least 1."""

    @classmethod
    def of_columns(cls, labels: npt.ArrayLike, shards: npt.ArrayLike) -> Runs:
        """From the class index and shard index of each row, shape (N,)."""
        return cls.of_parts([(labels, shards)])

    @classmethod
    def of_parts(cls, parts: Iterable[tuple[npt.ArrayLike, npt.ArrayLike]]) -> Runs:
        """The same from columns that come in parts, such as the batches of a Parquet file."""
        found = [
            _runs_of(_whole_numbers(labels, "labels"), _whole_numbers(shards, "shards")) for labels, shards in parts
        ]
        columns = [np.concatenate(column) for column in zip(*found, strict=True)] or [np.empty(0, np.int64)] * 3
        return cls(*columns)

    @property
    def rows(self) -> int:
        return int(self.counts_R.sum())

    @cached_property
    def first_R(self) -> Ints:
        """First row of each run."""
        return np.cumsum(self.counts_R) - self.counts_R

    @cached_property
    def hash(self) -> str:
        """sha256 over the rows' labels and shards, however they were cut into runs."""
        whole = _joined(self)
        return digest(b"".join(np.ascontiguousarray(c, "<i8").tobytes() for c in (*whole, np.array([self.rows]))))

    def class_counts(self, classes: int) -> Ints:
        """Rows of each class, shape (C,). Raises ValueError for a label outside 0..classes."""
        if len(self.labels_R) and not 0 <= int(self.labels_R.min()) <= int(self.labels_R.max()) < classes:
            wrong = int(self.labels_R.max() if self.labels_R.max() >= classes else self.labels_R.min())
            raise ValueError(wrong)
        return np.bincount(self.labels_R, weights=self.counts_R, minlength=classes).astype(np.int64)

    def of_class(self, label: int) -> ClassRows:
        """The rows of one class, shard by shard."""
        mine = np.flatnonzero(self.labels_R == label)
        mine = mine[np.argsort(self.shards_R[mine], kind="stable")]
        return ClassRows(self.first_R[mine], self.counts_R[mine], self.shards_R[mine])


class ClassRows:
    """Items 0..len of a class, numbered shard by shard, and the row that each is."""

    def __init__(self, first_R: Ints, counts_R: Ints, shards_R: Ints) -> None:
        self._first_R, self._end_R = first_R, np.cumsum(counts_R)
        edges = np.flatnonzero(np.diff(shards_R, prepend=-1))
        self.shards_S: Ints = shards_R[edges]
        """Shard index of each of the class's shards, ascending."""
        self.sizes_S: Ints = np.add.reduceat(counts_R, edges) if len(edges) else np.empty(0, np.int64)
        """Items in each of them."""

    def __len__(self) -> int:
        return int(self._end_R[-1])

    def rows(self, items: Ints) -> Ints:
        """The row of each item."""
        run = np.searchsorted(self._end_R, items, "right")
        before = np.where(run > 0, self._end_R[run - 1], 0)
        return np.asarray(self._first_R[run] + items - before, np.int64)


def _runs_of(labels: Ints, shards: Ints) -> tuple[Ints, Ints, Ints]:
    if len(labels) != len(shards):
        raise ValueError(f"{len(labels)} labels and {len(shards)} shards: lengths must agree")
    if not len(labels):
        return (np.empty(0, np.int64),) * 3
    change = np.flatnonzero((labels[1:] != labels[:-1]) | (shards[1:] != shards[:-1])) + 1
    start = np.concatenate([[0], change]).astype(np.int64)
    counts = np.diff(start, append=len(labels))
    return labels[start].astype(np.int64), shards[start].astype(np.int64), counts


def _joined(runs: Runs) -> tuple[Ints, Ints, Ints]:
    """With neighbours of one class and shard made one run."""
    if not len(runs.labels_R):
        return runs.labels_R, runs.shards_R, runs.counts_R
    same = (np.diff(runs.labels_R) == 0) & (np.diff(runs.shards_R) == 0)
    start = np.flatnonzero(np.concatenate([[True], ~same]))
    return runs.labels_R[start], runs.shards_R[start], np.add.reduceat(runs.counts_R, start)


def _whole_numbers(values: npt.ArrayLike, what: str) -> npt.NDArray[Any]:
    array = np.asarray(values)
    if array.ndim != 1 or (len(array) and array.dtype.kind not in "iu"):
        raise ValueError(f"{what} have shape {array.shape} and type {array.dtype}, expected whole numbers (rows,)")
    return array
