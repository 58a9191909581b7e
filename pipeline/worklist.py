"""What a run of `prepare` still has to crop, written to storage before it is cropped.

    <dataset>/listing/<id>.parquet    some hundred videos each, by video id; named by content
    <dataset>/latest-run.json         the run's list of those files

Ray's tasks read their videos from it, so the driver holds none of them, and `micacl status` counts from any machine
what is left. It is a note about a run, no part of a version: nobody who reads a dataset reads it.
"""

from __future__ import annotations

import functools
import io
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.contract import MicaclError, Video, canonical_json, digest, expecting, json_object
from pipeline.dataset import get_checked
from pipeline.parquet import read_parquet
from pipeline.storage import Store, open_store

CURRENT = "latest-run.json"
PART_VIDEOS = 512
_SCHEMA = pa.schema([(name, pa.string()) for name in ("video", "subject", "row")])


@dataclass(frozen=True, slots=True)
class WorkList:
    """A work list that is on storage."""

    parts: tuple[tuple[str, str], ...]
    """(key, sha256); PART_VIDEOS videos each, the last one fewer."""
    videos: int
    listed: int
    """By the source; those that are not in the list were done before."""
    crop: str
    """CropConfig.hash."""


def write_worklist(store: Store, videos: Iterable[Video], listed: int, crop: str) -> WorkList:
    """Write the videos (by id) part by part. A reader sees the list when its last object is there."""
    parts, count, rest = [], 0, iter(videos)
    while rows := list(islice(rest, PART_VIDEOS)):
        columns = {"video": [v.name for v in rows], "subject": [v.subject for v in rows]}
        columns["row"] = [v.to_json() for v in rows]
        out = io.BytesIO()
        pq.write_table(pa.table(columns, schema=_SCHEMA), out, compression="zstd")
        key, sha256 = f"listing/{digest(out.getvalue())[:32]}.parquet", digest(out.getvalue())
        store.put(key, out.getvalue())
        parts.append((key, sha256))
        count += len(rows)
    work = WorkList(tuple(parts), count, listed, crop)
    said = {"parts": [list(p) for p in parts], "videos": count, "listed": listed, "crop": crop}
    store.put(CURRENT, canonical_json(said).encode())
    return work


def read_worklist(store: Store) -> WorkList | None:
    """The list of the latest run, if there is one. Raises MicaclError if it is not ours."""
    try:
        data = store.get(CURRENT)
    except FileNotFoundError:
        return None
    said = json_object(data, store.url(CURRENT))
    with expecting(store.url(CURRENT)):
        parts = tuple((str(key), str(sha256)) for key, sha256 in said["parts"])
        return WorkList(parts, int(said["videos"]), int(said["listed"]), str(said["crop"]))


def iter_worklist(store: Store, work: WorkList) -> Iterator[Video]:
    """Every video of a list, one part in memory. Raises MicaclError if a part is gone."""
    for part in work.parts:
        yield from _read_part(store.root, *part)


def read_videos(url: str, parts: Sequence[tuple[str, str]], start: int, stop: int) -> list[Video]:
    """Videos start .. stop - 1 of a list. Raises MicaclError if a part is gone."""
    found = [
        video
        for number in range(start // PART_VIDEOS, -(-stop // PART_VIDEOS))
        for video in _part_slice(url, parts[number], start - number * PART_VIDEOS, stop - number * PART_VIDEOS)
    ]
    if len(found) != stop - start:
        raise MicaclError(f"The work list in {url} is short.", "The job stopped.", "Run the same command again.")
    return found


def _part_slice(url: str, part: tuple[str, str], start: int, stop: int) -> tuple[Video, ...]:
    return _read_part(url, *part)[max(0, start) : stop]


@functools.lru_cache(maxsize=2)
def _read_part(url: str, key: str, sha256: str) -> tuple[Video, ...]:
    table = read_parquet(get_checked(open_store(url), key, sha256))
    return tuple(Video.from_json(text) for text in table["row"].to_pylist())
