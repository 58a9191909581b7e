"""The rows of a split as a reader sees them: of each its class, its shard, and where in the shard its bag lies.

Of a whole split the version file alone says how many rows of which class are in which shard, so a split opens without a
single index file; the index file of a shard is read, hash-checked, when its first bag is. A split that was filtered
(`where`), or whose subjects are wanted, has been read as a whole before. Row numbers are the same both ways.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.contract import MicaclError, foreign, require_label
from pipeline.dataset import Dataset
from pipeline.once import Once
from pipeline.runs import Ints, Runs

_TABLES = 1024
"""Index files in memory; one is some 25 kB."""


class Place(NamedTuple):
    """Where a bag lies."""

    shard: str
    key: str
    offset: int
    size: int
    sha256: str


@dataclass(frozen=True, eq=False, slots=True)
class _Table:
    """The columns of some rows that a reader needs."""

    keys: pa.Array
    sha256: pa.Array
    offsets: Ints
    sizes: Ints

    @classmethod
    def of(cls, rows: pa.Table) -> _Table:
        keys, sha256 = (rows[name].combine_chunks() for name in ("key", "sha256"))
        return cls(keys, sha256, rows["offset"].to_numpy(), rows["size"].to_numpy())

    def place(self, shard: str, i: int) -> Place:
        return Place(shard, self.keys[i].as_py(), int(self.offsets[i]), int(self.sizes[i]), self.sha256[i].as_py())


class SplitRows:
    """All rows of a split, in the order of the index."""

    split: str | None = None
    """The split that these are all rows of, if they are."""

    def __init__(
        self, dataset: Dataset, entries: Sequence[Mapping[str, Any]], counts: Ints, table: pa.Table | None
    ) -> None:
        """`entries` of body["shards"], and how many rows of the split are in each; `table`: those rows, if read."""
        self.dataset, self.labels = dataset, dataset.labels
        self.shards = tuple(str(entry["path"]) for entry in entries)
        self.shard_bytes = np.array([entry["bytes"] for entry in entries], np.int64)
        self.used_bytes = self.shard_bytes
        """Of each shard, those that belong to rows of the split."""
        names = {label: n for n, label in enumerate(self.labels)}
        self.runs = Runs(
            np.array([names.get(entry["label"], -1) for entry in entries], np.int64),
            np.arange(len(entries), dtype=np.int64),
            counts,
        )
        self._entries, self._ends = entries, np.cumsum(counts)
        self._table = None if table is None else _Table.of(table)
        self._tables: Once[int, _Table] = Once(_TABLES)
        self.table = table
        if self._table is not None:
            shard_N = np.repeat(np.arange(len(entries)), counts)
            self.used_bytes = np.bincount(shard_N, weights=self._table.sizes, minlength=len(entries)).astype(np.int64)

    def __len__(self) -> int:
        return self.runs.rows

    def shard_of(self, row: int) -> int:
        return int(np.searchsorted(self._ends, row, "right"))

    def rows_of(self, shard: int) -> tuple[int, int]:
        """First row of a shard, and of the next."""
        end = int(self._ends[shard])
        return end - int(self.runs.counts_R[shard]), end

    def place(self, row: int) -> Place:
        """Where the bag of a row lies; reads the shard's index file if need be. Raises MicaclError."""
        shard = self.shard_of(row)
        if self._table is not None:
            return self._table.place(self.shards[shard], row)
        first, _ = self.rows_of(shard)
        return self._tables.get(shard, lambda: self._load(shard)).place(self.shards[shard], row - first)

    def label(self, row: int) -> int:
        """Place of the row's label in the label set; -1 if it has none."""
        return int(self.runs.labels_R[self.shard_of(row)])

    def require_labelled(self) -> None:
        """Raises MicaclError if a row has a label outside the label set."""
        for entry in self._entries:
            require_label(entry["label"], self.labels, self.dataset.store.root)

    def groups(self, column: str) -> NDArray[np.int64]:
        """Number of the subject or scene of each row, shape (N,); rows without one are a group. Raises MicaclError."""
        table = self.table if self.table is not None else _split_table(self.dataset, self.shards)
        if table.num_rows != len(self):
            raise foreign("a version file", ValueError(f"the index has {table.num_rows} of its {len(self)} rows"))
        values = table[column].combine_chunks()
        if values.null_count == len(values):
            raise MicaclError(
                f"No bag of the split has a {column}.",
                "The classes cannot be balanced over it.",
                f"Leave --plan.second out, or prepare the dataset from a source that tells the {column} of each video.",
            )
        codes: Any = values.dictionary_encode().indices.fill_null(-1).to_numpy(zero_copy_only=False)
        return np.asarray(codes, np.int64)

    def _load(self, shard: int) -> _Table:
        entry, counts = self._entries[shard], int(self.runs.counts_R[shard])
        rows = self.dataset.shard_index(entry)
        if rows.num_rows != counts or set(rows["label"].unique().to_pylist()) != {entry["label"]}:
            raise foreign(
                f"an index file ({entry['index']['path']})",
                ValueError(f"{rows.num_rows} rows, the version says {counts} of {entry['label']}"),
            )
        return _Table.of(rows)


def split_rows(dataset: Dataset, split: str) -> SplitRows:
    """The rows of one split. Raises MicaclError if there are none."""
    _require_entries(dataset)
    seen = [_seen_split(e, dataset.fold) for e in dataset.body["shards"]]
    held_out = dataset.val_share > 0 and "val" not in seen and split in ("train", "val")
    source = "train" if held_out else split
    entries: list[Mapping[str, Any]] = [e for e, s in zip(dataset.body["shards"], seen, strict=True) if s == source]
    if dataset.where or dataset.loaded is not None or held_out:
        rows = _of_table(dataset, entries, dataset.split(split))
    elif entries:
        rows = SplitRows(dataset, entries, np.array([e["bags"] for e in entries], np.int64), None)
    else:
        raise dataset.no_split(split, seen)
    rows.split = None if dataset.loaded is not None else split
    return rows


def table_rows(dataset: Dataset, table: pa.Table) -> SplitRows:
    """Rows of the index that were chosen by hand, in its order. Raises MicaclError."""
    _require_entries(dataset)
    return _of_table(dataset, dataset.body["shards"], table)


def _of_table(dataset: Dataset, entries: Sequence[Mapping[str, Any]], table: pa.Table) -> SplitRows:
    paths = table["shard"].combine_chunks().dictionary_encode()
    counts = np.bincount(paths.indices.to_numpy(), minlength=len(paths.dictionary)).astype(np.int64)
    by_path = {entry["path"]: entry for entry in entries}
    if lost := set(paths.dictionary.to_pylist()) - by_path.keys():
        raise foreign("a version file", ValueError(f"it does not list {min(lost)}, which its index has"))
    return SplitRows(dataset, [by_path[path] for path in paths.dictionary.to_pylist()], counts, table)


def _split_table(dataset: Dataset, shards: Sequence[str]) -> pa.Table:
    wanted = set(shards)
    mask = [path in wanted for path in dataset.index["shard"].to_pylist()]
    return dataset.index.filter(pa.array(mask))


def _require_entries(dataset: Dataset) -> None:
    """Counts that would move the rows of other shards, and shards that would come twice. Raises MicaclError."""
    seen: set[str] = set()
    for entry in dataset.body["shards"]:
        path = entry["path"]
        if not 0 < entry["bags"] <= entry["bytes"] < 2**53:
            what = f"{path} has {entry['bags']} bags in {entry['bytes']} bytes"
        elif path in seen:
            what = f"it lists {path} twice"
        else:
            seen.add(path)
            continue
        raise foreign(f"a version file of {dataset.store.root}", ValueError(what))


def _seen_split(entry: Mapping[str, Any], fold: int | None) -> str:
    """The split that a shard is seen as when `fold` is the test fold."""
    if fold is None or entry.get("fold") is None:
        return str(entry["split"])
    return "test" if entry["fold"] == fold else "train"
