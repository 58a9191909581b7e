"""`micacl verify`: read a dataset version whole and name everything that is wrong with it.

    version file (its own hash) ──> each index file (hash) ──> each shard (once) ──> each bag: hash, meta = index row,
                 │                                                                            frame headers
                 ├─> quarantine list (hash), counts of videos
                 └─> over all rows: counts, keys, labels; people, videos and copies on two sides (pipeline/leakage.py)

Nothing here stops at the first problem, and nothing is repaired: each problem says what, where and the remedy. Of a
JPEG the header is decoded, not the pixels (the bag's sha256 says that they are the ones that were written); H.264 is
decoded whole. Memory holds one shard a reader, and the index.
"""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from pipeline.bags import Bag
from pipeline.codec import find_fault
from pipeline.contract import (
    MicaclError,
    canonical_json,
    digest,
    json_object,
    require_schema,
)
from pipeline.dataset import (
    INDEX_SCHEMA,
    body_sha256,
    list_versions,
    read_index,
    read_version,
    version_key,
)
from pipeline.pack import UNLABELLED
from pipeline.problems import DELETE_VERSION, RECOMMIT, REPACK, UNFIT, Problem, Severity
from pipeline.shapes import VERSION, require_shape
from pipeline.shards import read_bag
from pipeline.sources.published import differences
from pipeline.storage import Store, open_store
from pipeline.verify_rows import check_crop_hash, check_lists, check_rows, check_sides, check_videos

MAX_PROBLEMS = 100
"""Listed in the result; `problems_found` counts all."""
_READERS = 4
_END_BYTES = 1024
"""Of a tar: two zero blocks."""
_SAY_EVERY_S = 5.0


Say = Callable[[str], None]


@dataclass(slots=True)
class _ShardCheck:
    """What one shard gave."""

    rows: pa.Table
    bytes: int = 0
    problems: list[Problem] = field(default_factory=list)


def verify_dataset(url: str, version: int | None = None, say: Say | None = None) -> dict[str, Any]:
    """Check a version (the newest by default) against its own files. `say` gets a line every few seconds.

    Returns {"ok" (neither damage nor leak), "version", "bags", "bytes" (of shards, read), "problems" (at most
    MAX_PROBLEMS, the worst first), "problems_found", "found" (by severity), "notes"}.
    Raises MicaclError if the bucket or the version is not there.
    """
    store = open_store(url)
    number, data = _version_bytes(store, version)
    where = store.url(version_key(number))
    try:
        body = json_object(data, where)
        require_schema(body.get("schema"), where)
        require_shape(body, VERSION, where)
        shards = [_shard_entry(shard) for shard in body["shards"]]
        told = {str(part): {str(k): int(n) for k, n in of.items()} for part, of in body["counts"].items()}
        labels = [str(label) for label in body["labels"]]
    except (MicaclError, *UNFIT) as error:
        why = error.cause if isinstance(error, MicaclError) else f"{type(error).__name__}: {error}."
        what = f"The version file is not what `prepare` writes. {why}"
        return _result(number, 0, 0, [Problem(what=what, where=where, remedy=DELETE_VERSION)], [])
    checks = _check_shards(store, shards, say)
    rows = pa.concat_tables([c.rows for c in checks]) if checks else INDEX_SCHEMA.empty_table()
    problems = [
        *_check_version(number, body, data, where),
        *(problem for check in checks for problem in check.problems),
        *check_rows(rows, told, labels, where),
        *check_crop_hash(rows, body, where),
        *check_videos(rows, body, where),
        *check_lists(store, body),
        *check_sides(rows, where),
    ]
    return _result(number, rows.num_rows, sum(c.bytes for c in checks), problems, version_notes(body))


def _version_bytes(store: Store, version: int | None) -> tuple[int, bytes]:
    """Number and bytes of a version file. Raises MicaclError if there is none."""
    store.check()
    known = list_versions(store)
    if not known or (version is not None and version not in known):
        read_version(store, version)  # refuses in words
    number = version or known[-1]
    return number, store.get(version_key(number))


def version_notes(body: Mapping[str, Any]) -> list[str]:
    """What is worth knowing and no problem: the layout of the source, differences from its published counts."""
    source = body.get("source")
    if not isinstance(source, Mapping):
        return []
    notes = [str(source["layout"])] if source.get("layout") else []
    with contextlib.suppress(*UNFIT):  # counts of somebody else's making are named by verify
        notes += differences(str(source.get("kind")), body["counts"])
    return notes


def _result(number: int, bags: int, size: int, problems: Sequence[Problem], notes: Sequence[str]) -> dict[str, Any]:
    ordered = sorted(problems, key=lambda p: list(Severity).index(p.severity))
    found = {severity.value: sum(p.severity == severity for p in problems) for severity in Severity}
    return {
        "ok": not found[Severity.DAMAGE] and not found[Severity.LEAK],
        "version": number,
        "bags": bags,
        "bytes": size,
        "problems": [p.to_json() for p in ordered[:MAX_PROBLEMS]],
        "problems_found": len(problems),
        "found": found,
        "notes": list(notes),
    }


def _shard_entry(shard: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that are used below. Raises KeyError or TypeError where one is missing or of another kind."""
    index = {"path": str(shard["index"]["path"]), "sha256": str(shard["index"]["sha256"])}
    words = {name: str(shard[name]) for name in ("path", "split", "label")}
    return {**words, "bags": int(shard["bags"]), "bytes": int(shard["bytes"]), "index": index}


def _check_version(number: int, body: Mapping[str, Any], data: bytes, where: str) -> Iterator[Problem]:
    if body.get("sha256") != body_sha256(body) or canonical_json(body).encode() != data:
        what = "The version file is not the one that was written: its content does not have the sha256 that it names."
        yield Problem(what=what, where=where, remedy=DELETE_VERSION)
    if body.get("version") != number:
        yield Problem(what=f"It says version {body.get('version')}, its name {number}.", where=where, remedy=RECOMMIT)
    paths = Counter(shard["path"] for shard in body["shards"])
    for path in sorted(path for path, times in paths.items() if times > 1):
        yield Problem(what=f"It lists {path} more than once.", where=where, remedy=RECOMMIT)


def _check_shards(store: Store, shards: Sequence[Mapping[str, Any]], say: Say | None) -> list[_ShardCheck]:
    """Every shard, a few at a time."""
    done: list[_ShardCheck] = []
    start = last = time.monotonic()
    with ThreadPoolExecutor(_READERS) as pool:
        for check in pool.map(lambda shard: _check_shard(store, shard), shards):
            done.append(check)
            now = time.monotonic()
            if say and now - last >= _SAY_EVERY_S:
                last = now
                say(_progress(done, len(shards), now - start))
    return done


def _progress(done: Sequence[_ShardCheck], total: int, seconds: float) -> str:
    size, problems = sum(c.bytes for c in done), sum(len(c.problems) for c in done)
    left = seconds * (total - len(done)) / len(done)
    return (
        f"checked {len(done)}/{total} shards, {size / 1e6:.0f} MB at {size / 1e6 / max(seconds, 1e-3):.0f} MB/s, "
        f"{problems} problems, {left:.0f} s left"
    )


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
    except (OSError, ValueError, MicaclError) as error:
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
    except (OSError, ValueError, MicaclError) as error:
        yield str(error), None
        return
    if digest(data) != shard["index"]["sha256"]:  # what somebody else wrote is not parsed
        yield f"The index file has sha256 {digest(data)[:12]}…, listed is {shard['index']['sha256'][:12]}….", None
        return
    try:
        yield "", read_index(data)
    except MicaclError as error:
        yield error.cause, None


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
