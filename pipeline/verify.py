"""`micacl verify`: read a dataset version whole and name everything that is wrong with it.

    version file ──> each index file (hash) ──> each shard (once) ──> each bag: hash, meta = index row, frames
                 └─> over all rows: counts, keys, labels, leakage of subjects and videos between splits

Nothing here stops at the first problem, and nothing is repaired: each problem says what, where and the remedy. Of a
JPEG the header is decoded, not the pixels (the bag's sha256 says that they are the ones that were written); H.264 is
decoded whole.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.bags import Bag
from pipeline.codec import find_fault
from pipeline.contract import MicaclError, digest, part_name
from pipeline.dataset import INDEX_SCHEMA, read_index, read_version, version_key
from pipeline.pack import UNLABELLED
from pipeline.shards import read_bag
from pipeline.storage import Store, open_store

MAX_PROBLEMS = 100
"""Listed in the result; `problems_found` counts all."""
_READERS = 4
_END_BYTES = 1024
"""Of a tar: two zero blocks."""

REPACK = (
    "Delete this shard and its index file and run the same `micacl prepare` again: it makes both anew from the crops. "
    "If `micacl forget --delete` removed it, use a newer version."
)
RECOMMIT = "Do not use this version; run the same `micacl prepare` again, which commits a new one."
_DELETE_VERSION = "Delete that version file and run the same `micacl prepare` again, which commits a new one."
RESPLIT = "Give the split of each video in the table so that none is on both sides, and run `micacl prepare` again."


@dataclass(frozen=True, kw_only=True, slots=True)
class Problem:
    """One thing that is wrong."""

    what: str
    where: str
    """URL of an object, with the bag's key where one bag is meant."""
    remedy: str

    def to_json(self) -> dict[str, str]:
        return {"what": self.what, "where": self.where, "remedy": self.remedy}


@dataclass(slots=True)
class _ShardCheck:
    """What one shard gave."""

    rows: pa.Table
    bytes: int = 0
    problems: list[Problem] = field(default_factory=list)


def verify_dataset(url: str, version: int | None = None) -> dict[str, Any]:
    """Check a version (the newest by default) against its own files.

    Returns {"ok", "version", "bags", "bytes" (of shards, read), "problems" (at most MAX_PROBLEMS), "problems_found"}.
    Raises MicaclError if the bucket or the version is not there.
    """
    store = open_store(url)
    try:
        number, body, _ = read_version(store, version)
        shards = [_shard_entry(shard) for shard in body["shards"]]
        told = {split: dict(of_split) for split, of_split in body["counts"].items()}
        labels = [str(label) for label in body["labels"]]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        what = f"A version file is not what `prepare` writes: {type(error).__name__}: {error}."
        return _result(version, 0, 0, [Problem(what=what, where=store.url("versions/"), remedy=_DELETE_VERSION)])
    where = store.url(version_key(number))
    with ThreadPoolExecutor(_READERS) as pool:
        checks = list(pool.map(lambda shard: _check_shard(store, shard), shards))
    rows = pa.concat_tables([c.rows for c in checks]) if checks else INDEX_SCHEMA.empty_table()
    problems = [
        *_check_version(number, body, where),
        *(problem for check in checks for problem in check.problems),
        *_check_rows(rows, told, labels, where),
        *_check_crop_hash(rows, body, where),
    ]
    return _result(number, rows.num_rows, sum(c.bytes for c in checks), problems)


def _result(number: int | None, bags: int, size: int, problems: Sequence[Problem]) -> dict[str, Any]:
    return {
        "ok": not problems,
        "version": number,
        "bags": bags,
        "bytes": size,
        "problems": [p.to_json() for p in problems[:MAX_PROBLEMS]],
        "problems_found": len(problems),
    }


def _shard_entry(shard: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that are used below. Raises KeyError or TypeError where one is missing or of another kind."""
    index = {"path": str(shard["index"]["path"]), "sha256": str(shard["index"]["sha256"])}
    words = {name: str(shard[name]) for name in ("path", "split", "label")}
    return {**words, "bags": int(shard["bags"]), "bytes": int(shard["bytes"]), "index": index}


def _check_version(number: int, body: Mapping[str, Any], where: str) -> Iterator[Problem]:
    if body.get("version") != number:
        yield Problem(what=f"It says version {body.get('version')}, its name {number}.", where=where, remedy=RECOMMIT)
    paths = Counter(shard["path"] for shard in body["shards"])
    for path in sorted(path for path, times in paths.items() if times > 1):
        yield Problem(what=f"It lists {path} more than once.", where=where, remedy=RECOMMIT)


def _check_shard(store: Store, shard: Mapping[str, Any]) -> _ShardCheck:
    """Index file, tar and every bag of one shard; holds one shard in memory."""
    check = _ShardCheck(INDEX_SCHEMA.empty_table())
    index_url, shard_url = store.url(shard["index"]["path"]), store.url(shard["path"])
    for what, rows in _read_rows(store, shard):
        if rows is not None:
            check.rows = rows
        if what:
            check.problems.append(Problem(what=what, where=index_url, remedy=REPACK))
    try:
        data = store.get(shard["path"])
    except (FileNotFoundError, MicaclError) as error:
        what = "The shard is missing." if isinstance(error, FileNotFoundError) else str(error)
        check.problems.append(Problem(what=what, where=shard_url, remedy=REPACK))
        return check
    check.bytes = len(data)
    found = [(shard_url, what) for what in _check_extent(data, check.rows, shard)]
    found += _check_bags(data, check.rows, shard, shard_url)
    check.problems += [Problem(what=what, where=where, remedy=REPACK) for where, what in found]
    return check


def _read_rows(store: Store, shard: Mapping[str, Any]) -> Iterator[tuple[str, pa.Table | None]]:
    """What is wrong with an index file (empty: nothing), and its rows if they can be read."""
    try:
        data = store.get(shard["index"]["path"])
    except FileNotFoundError:
        yield "The index file is missing.", None
        return
    except MicaclError as error:
        yield str(error), None
        return
    if digest(data) != shard["index"]["sha256"]:
        yield f"The index file has sha256 {digest(data)[:12]}…, listed is {shard['index']['sha256'][:12]}….", None
    try:
        yield "", read_index(data)
    except (pa.ArrowException, OSError, ValueError, KeyError) as error:
        yield f"The index file cannot be read: {error}.", None


def _check_extent(data: bytes, rows: pa.Table, shard: Mapping[str, Any]) -> Iterator[str]:
    """The bags lie end to end, and the end of the tar follows."""
    if len(data) != shard["bytes"]:
        yield f"The shard has {len(data)} bytes, listed are {shard['bytes']}."
    if rows.num_rows != shard["bags"]:
        yield f"The index has {rows.num_rows} bags, the version lists {shard['bags']}."
    at = 0
    for offset, size, key in zip(*(rows[c].to_pylist() for c in ("offset", "size", "key")), strict=True):
        if offset != at:
            yield f"Bag {key} begins at byte {offset}, but the one before it ends at {at}."
        at = offset + size
    if rows.num_rows and data[at:] != b"\0" * _END_BYTES:
        yield f"After the last bag, at byte {at}, there is something else than the end of a tar."


def _check_bags(data: bytes, rows: pa.Table, shard: Mapping[str, Any], url: str) -> Iterator[tuple[str, str]]:
    """(where, what) of everything wrong inside the bags of a shard."""
    for row in rows.to_pylist():
        where = f"{url} bag {row['key']}"
        for column, value in (("split", shard["split"]), ("label", shard["label"]), ("shard", shard["path"])):
            if row[column] != value:
                yield where, f"The index says {column} {row[column]!r}, the version {value!r}."
        span = data[max(0, row["offset"]) : max(0, row["offset"] + row["size"])]
        if digest(span) != row["sha256"]:
            yield where, f"The bag has sha256 {digest(span)[:12]}…, the index says {str(row['sha256'])[:12]}…."
        try:
            bag = read_bag(span, where)
        except (MicaclError, ValueError, KeyError, TypeError, AttributeError) as error:
            cause = error.cause if isinstance(error, MicaclError) else f"Its json is not a bag's ({error})."
            yield where, cause.removeprefix(f"{where}: ")
            continue
        yield from ((where, what) for what in (*_compare(bag, row), *_check_frames(bag)))


def _compare(bag: Bag, row: Mapping[str, Any]) -> Iterator[str]:
    """Index row against the bag's own json."""
    meta = bag.meta
    said = {name: getattr(meta, name) for name in INDEX_SCHEMA.names if hasattr(meta, name) and name != "size"}
    said |= {"label": UNLABELLED if meta.label is None else meta.label, "instances": len(meta.instance_frames)}
    for name, value in sorted(said.items()):
        if value != row[name]:
            yield f"The bag's json says {name} {value!r}, the index {row[name]!r}."


def _check_frames(bag: Bag) -> Iterator[str]:
    """The frames are of the stored codec, size and number; the first fault of a bag is named."""
    for i, members in enumerate(bag.encoded):
        if fault := find_fault(members, bag.meta, i):
            yield fault
            return


def _check_rows(
    rows: pa.Table, told: Mapping[str, Mapping[str, int]], labels: Sequence[str], where: str
) -> Iterator[Problem]:
    """What can only be seen over all shards."""
    counted = _count(rows)
    for split in sorted({*counted, *told}):
        for label in sorted({*counted.get(split, {}), *told.get(split, {})}):
            have, said = counted.get(split, {}).get(label, 0), told.get(split, {}).get(label, 0)
            if have != said:
                what = f"It counts {said} bags of {split}/{label}, the index files have {have}."
                yield Problem(what=what, where=where, remedy=RECOMMIT)
            if label not in labels and label != UNLABELLED:
                what = (
                    f"{split} has {have} bags labelled {label!r}, which is not in the label set ({', '.join(labels)})."
                )
                yield Problem(what=what, where=where, remedy="Run `micacl prepare` again with --labels that has it.")
    keys = rows.group_by("key").aggregate([([], "count_all")])
    for key in keys.filter(pc.greater(keys["count_all"], 1))["key"].to_pylist():
        shards = sorted(set(rows.filter(pc.equal(rows["key"], key))["shard"].to_pylist()))
        yield Problem(what=f"The bag {key} is there twice, in {', '.join(shards)}.", where=where, remedy=RECOMMIT)
    # A bag without a label is neither trained on nor scored, so it leaks nothing.
    labelled = rows.filter(pc.not_equal(rows["label"], UNLABELLED))
    for column in ("subject", "video"):
        for name, splits in _in_many_splits(labelled, column):
            what = f"Leakage: the {column} {name!r} is in {' and '.join(splits)}."
            yield Problem(what=what, where=where, remedy=RESPLIT)


def _count(rows: pa.Table) -> dict[str, dict[str, int]]:
    out: dict[str, dict[str, int]] = {}
    for row in rows.group_by(["split", "fold", "label"]).aggregate([([], "count_all")]).to_pylist():
        out.setdefault(part_name(row["split"], row["fold"]), {})[str(row["label"])] = row["count_all"]
    return out


def _in_many_splits(rows: pa.Table, column: str) -> Iterable[tuple[str, list[str]]]:
    named = rows.filter(pc.is_valid(rows[column]))
    groups = named.group_by(column).aggregate([("split", "distinct")])
    many = groups.filter(pc.greater(pc.list_value_length(groups["split_distinct"]), 1)).sort_by(column)
    return [(row[column], sorted(row["split_distinct"])) for row in many.to_pylist()]


def _check_crop_hash(rows: pa.Table, body: Mapping[str, Any], where: str) -> Iterator[Problem]:
    """Every bag was cut by the settings that the version names."""
    said = json.dumps(dict(body.get("crop") or {}).get("hash"))
    for other in sorted({json.dumps(value) for value in pc.unique(rows["crop"]).to_pylist()} - {said}):
        what = f"It says that crops are of settings {said}, but the index has bags of settings {other}."
        yield Problem(what=what, where=where, remedy=RECOMMIT)
