"""Which objects of a dataset hold some videos, and how they are deleted so that a kill at any point leaves no doubt.

    index/, LISTS      say by row which videos they hold (and whose)
    shards/            held by what an index file says; one without an index file is read
    BY_VIDEO           named by the video's id

Before the first object is deleted, the keys of all of them are put into `forgetting/<id>.json`, which is deleted last.
Whoever finds one there deletes the rest. It holds keys, no names.
"""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.contract import MicaclError, Video, canonical_json, digest, expecting, json_object
from pipeline.dataset import INDEX_SCHEMA, get_checked
from pipeline.parquet import read_parquet
from pipeline.shards import read_members
from pipeline.storage import Store

LISTS = ("quarantine/", "records/", "listing/")
"""Folders of lists of videos: JSON lines or Parquet, rows with `video` (or `name`) and, where it is known, `subject`.
A list that a version names anywhere as {path, sha256} is rewritten without the rows; others that hold one are deleted.
A new kind of list needs its folder's name here, and nothing else."""
BY_VIDEO = ("crops/", "thumbnails/")
"""Folders of objects whose names begin with the video's id and a dot."""
INTENTS = "forgetting/"
_DELETABLE = ("shards/", "index/", *BY_VIDEO, *LISTS)
_NAME = ("video", "name")
_WHO = ("video", "subject", "shard")
_READERS = 8

Rows = Mapping[str, pa.Table]
"""Rows (video, subject, shard; null where a file has no such column) by the key of the index file or list."""


def read_who(store: Store) -> dict[str, pa.Table]:
    """The rows of every index file and list, whichever version names it or none. Raises MicaclError."""
    keys = sorted(entry.key for folder in ("index/", *LISTS) for entry in store.list(folder))
    with ThreadPoolExecutor(_READERS) as pool:
        return dict(zip(keys, pool.map(lambda key: read_rows(store, key).select(_WHO), keys), strict=True))


def read_rows(store: Store, key: str) -> pa.Table:
    """An index file or list of any release with the columns of the index (null: not there). Raises MicaclError."""
    try:
        found = _table(store.get(key), key)
        if found.num_rows:
            found = found.set_column(found.schema.get_field_index(_named(found)), "video", found[_named(found)])
        columns = [
            found[c.name].cast(c.type) if c.name in found.column_names else pa.nulls(found.num_rows, c.type)
            for c in INDEX_SCHEMA
        ]
        return pa.table(columns, schema=INDEX_SCHEMA)
    except (pa.ArrowException, MicaclError, OSError, ValueError) as error:
        raise MicaclError(
            f"{store.url(key)} cannot be read as a list of videos ({error}).",
            "It is not known whom it holds, so nothing was forgotten.",
            "Delete it (an index file together with the shard of the same name), then run the same command again.",
        ) from error


def _table(data: bytes, key: str) -> pa.Table:
    if key.endswith(".jsonl"):
        rows = [json_object(line, key) for line in data.splitlines() if line.strip()]
        return pa.Table.from_pylist([{"video": _name(row), "subject": _word(row.get("subject"))} for row in rows])
    return read_parquet(data)


def _word(value: Any) -> str | None:
    return None if value is None else str(value)


def _named(table: pa.Table) -> str:
    """The column of the video's name. Raises ValueError if there is none."""
    for column in _NAME:
        if column in table.column_names:
            return column
    raise ValueError(f"it has no column {' or '.join(_NAME)}")


def _name(row: Mapping[str, Any]) -> str:
    for column in _NAME:
        if column in row:
            return str(row[column])
    raise ValueError(f"a row has no {' or '.join(_NAME)}")


def holding(rows: pa.Table, videos: Collection[str]) -> pa.ChunkedArray:
    """True for rows of these videos, shape (rows,)."""
    return pc.is_in(rows[_named(rows)].cast(pa.string()), pa.array(sorted(videos), pa.string()))


def holders(store: Store, who: Rows, videos: Collection[str]) -> list[str]:
    """Keys of all that holds one of these videos: each shard before its index file.

    Args:
        who: from `read_who`.

    Raises MicaclError if a shard without an index file cannot be read.
    """
    with_rows = {key for key, rows in who.items() if pc.any(holding(rows, videos)).as_py()}
    shards = {key: _shards_of(rows) for key, rows in who.items() if key.startswith("index/")}
    indexed = {path for paths in shards.values() for path in paths}
    keys = list(_unindexed(store, indexed, videos))
    keys += _by_video(store, {Video(url="", name=name).id for name in videos})
    keys += sorted(key for key in with_rows if key not in shards)
    for key in sorted(with_rows & set(shards)):
        keys += [*sorted(shards[key]), key]
    return list(dict.fromkeys(keys))


def _shards_of(rows: pa.Table) -> set[str]:
    return {path for path in pc.unique(rows["shard"]).to_pylist() if path and path.startswith("shards/")}


def _by_video(store: Store, ids: Collection[str]) -> list[str]:
    keys = (entry.key for folder in BY_VIDEO for entry in store.list(folder))
    return sorted(key for key in keys if video_id_of(key) in ids)


def video_id_of(key: str) -> str:
    """The video id in the name of an object of BY_VIDEO."""
    return key.rpartition("/")[2].partition(".")[0]


def _unindexed(store: Store, indexed: Collection[str], videos: Collection[str]) -> Iterator[str]:
    """Shards that no index file names (a pack that was stopped) and that hold one of the videos."""
    for key in sorted(entry.key for entry in store.list("shards/")):
        if key in indexed:
            continue
        try:
            metas = [
                json_object(data, key) for name, data in read_members(store.get(key), key) if name.endswith(".json")
            ]
        except MicaclError as error:
            raise MicaclError(
                f"{store.url(key)} cannot be read ({error.cause})",
                "It has no index file, so it is not known whom it holds, and nothing was forgotten.",
                "No version lists it: delete it, then run the same command again.",
            ) from error
        if any(meta.get("video") in videos for meta in metas):
            yield key


def listed_keys(body: Any) -> set[str]:
    """Every key that a version body names in a `path`."""
    if isinstance(body, Mapping):
        mine = {str(body["path"])} if "path" in body else set()
        return mine.union(*(listed_keys(value) for value in body.values()))
    if isinstance(body, list):
        return set[str]().union(*(listed_keys(value) for value in body))
    return set()


def lists_without(store: Store, value: Any, videos: Collection[str], reasons: Counter[str]) -> Any:
    """A part of a version body whose lists ({path, sha256}) lack the rows of these videos; changed ones are written.

    `reasons` counts the rows that were taken out of a quarantine list, by reason.
    """
    if isinstance(value, list):
        return [lists_without(store, one, videos, reasons) for one in value]
    if not isinstance(value, Mapping):
        return value
    if not ({"path", "sha256"} <= set(value) and str(value["path"]).startswith(LISTS)):
        return {name: lists_without(store, one, videos, reasons) for name, one in value.items()}
    key = str(value["path"])
    data = get_checked(store, key, str(value["sha256"]))
    kept = (_lines_without if key.endswith(".jsonl") else _parquet_without)(data, key, videos, reasons)
    if kept is None:
        return value
    folder, suffix = key.rpartition("/")[0], key.rpartition(".")[2]
    path = f"{folder}/{digest(kept)[:32]}.{suffix}"
    store.put(path, kept)
    sizes = {"bytes": len(kept)} if "bytes" in value else {}
    return {**value, **sizes, "path": path, "sha256": digest(kept)}


def _lines_without(data: bytes, key: str, videos: Collection[str], reasons: Counter[str]) -> bytes | None:
    lines = [(line, json_object(line, key)) for line in data.splitlines(keepends=True) if line.strip()]
    gone = [row for _, row in lines if _name(row) in videos]
    if key.startswith("quarantine/"):
        reasons.update(str(row.get("reason")) for row in gone)
    return b"".join(line for line, row in lines if _name(row) not in videos) if gone else None


def _parquet_without(data: bytes, key: str, videos: Collection[str], reasons: Counter[str]) -> bytes | None:
    del key, reasons
    table = read_parquet(data)
    held = holding(table, videos)
    if not pc.any(held).as_py():
        return None
    out = io.BytesIO()
    pq.write_table(table.filter(pc.invert(held)), out, compression="zstd")
    return out.getvalue()


def erase(store: Store, keys: Sequence[str]) -> None:
    """Delete these objects. Stopped half way, `finish_erasures` deletes the rest."""
    if not keys:
        return
    data = canonical_json({"delete": list(keys)}).encode()
    intent = f"{INTENTS}{digest(data)[:32]}.json"
    store.put(intent, data)
    for key in [*keys, intent]:
        store.delete(key)


def pending_erasures(store: Store, listed: Collection[str]) -> dict[str, list[str]]:
    """By intent: the keys that a stopped `erase` may have left, less those that are listed. Raises MicaclError."""
    out: dict[str, list[str]] = {}
    for intent in sorted(entry.key for entry in store.list(INTENTS)):
        where = store.url(intent)
        with expecting(where):
            keys = [str(key) for key in json_object(store.get(intent), where)["delete"]]
        if any(not key.startswith(_DELETABLE) or ".." in key.split("/") for key in keys):
            raise MicaclError(
                f"{where} names objects that `forget` never deletes.",
                "It was changed by hand; nothing was deleted.",
                "Delete it and run the same command again.",
            )
        out[intent] = [key for key in keys if key not in listed]
    return out


def finish_erasures(store: Store, listed: Collection[str]) -> list[str]:
    """Delete what a stopped `erase` left. Returns the keys."""
    pending = pending_erasures(store, listed)
    for intent, keys in pending.items():
        for key in [*keys, intent]:
            store.delete(key)
    return [key for keys in pending.values() for key in keys]
