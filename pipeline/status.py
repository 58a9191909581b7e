"""`micacl status`: what a dataset's storage holds, by listing it.

No process is asked, so it works while a run is under way, after one was killed, and from any machine.

Crops are counted by their settings (the crop hash), because settings never mix. A quarantined video is a crop object
that holds nothing but its record, so only small objects are opened.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

from pipeline.contract import MicaclError, Video
from pipeline.crop import read_record
from pipeline.dataset import list_versions, read_version
from pipeline.storage import Entry, Store, open_store
from pipeline.worklist import WorkList, iter_worklist, read_worklist

_CROP_KEY = re.compile(r"crops/([0-9a-f]+)/[0-9a-f]{2}/([0-9a-f]{16})\.[0-9a-f]+\.tar$")
_RECORD_ONLY_BYTES = 16 * 1024
"""A crop object above this has bags in it: a record and its detail are at most a few kB."""
_READERS = 16
UNREADABLE_RECORD = "unreadable_record"


def dataset_status(url: str) -> dict[str, Any]:
    """What is done, left and broken.

    Returns {"dataset", "says" (a few sentences), "run" (of the latest prepare: videos listed, done, left; or None),
    "versions", "newest" (or None), "crops" by crop hash, "shards"}.
    Raises MicaclError if the bucket is missing or refuses us.
    """
    store = open_store(url)
    store.check()
    versions = list_versions(store)
    crops = _crops(store)
    shards = {entry.key: entry.size for entry in store.list("shards/")}
    index = {entry.key for entry in store.list("index/")}
    body = read_version(store, versions[-1])[1] if versions else None
    counts = _shard_counts(body["shards"] if body else [], shards, index)
    run = _latest_run(store)
    return {
        "dataset": store.root,
        "says": " ".join(filter(None, (_sentence(versions, crops, counts), _run_sentence(run)))),
        "run": run,
        "versions": versions,
        "newest": _summary(body) if body else None,
        "crops": crops,
        "shards": counts,
    }


def _latest_run(store: Store) -> dict[str, int] | None:
    """How far the latest `prepare` has come: crops that are there of the videos it had listed. None without one.

    Also None if its list is not whole any more: `forget` deletes the parts that name somebody.
    """
    try:
        work = read_worklist(store)
        if work is None:
            return None
        left = sum(1 for video in _without_crop(store, work))
    except MicaclError:
        return None
    return {"listed": work.listed, "done": work.listed - left, "left": left}


def _without_crop(store: Store, work: WorkList) -> Iterator[Video]:
    """Videos of the list that have no crop of the list's settings. Both are by video id: one folder in memory."""
    for folder, videos in groupby(iter_worklist(store, work), key=lambda video: video.id[:2]):
        crops = store.list(f"crops/{work.crop}/{folder}/")
        there = {found.group(2) for entry in crops if (found := _CROP_KEY.match(entry.key))}
        yield from (video for video in videos if video.id not in there)


def _run_sentence(run: dict[str, int] | None) -> str:
    if run is None or not run["left"]:
        return ""
    return (
        f"The latest prepare listed {run['listed']} videos: {run['done']} are cropped, {run['left']} are left. If none "
        "is under way, the same command goes on from there."
    )


def _summary(body: dict[str, Any]) -> dict[str, Any]:
    bags = sum(n for of_split in body["counts"].values() for n in of_split.values())
    kept = ("version", "labels", "counts", "videos", "quarantined")
    return {**{name: body.get(name) for name in kept}, "bags": bags, "crop": dict(body.get("crop") or {}).get("hash")}


def _crops(store: Store) -> dict[str, dict[str, Any]]:
    """By crop hash: crop objects, distinct videos, bytes, and quarantined by reason. Holds one folder in memory."""
    found: dict[str, _Crops] = {}
    for (settings, _), entries in groupby(_crop_entries(store), key=lambda one: one[:2]):
        of_hash = found.setdefault(settings, _Crops())
        ids = set()
        for _, _, video, entry in entries:
            ids.add(video)
            of_hash.objects += 1
            of_hash.bytes += entry.size
            if entry.size <= _RECORD_ONLY_BYTES:
                of_hash.small.append(entry.key)
        of_hash.videos += len(ids)
    return {settings: of_hash.to_dict(store) for settings, of_hash in sorted(found.items())}


def _crop_entries(store: Store) -> Iterator[tuple[str, str, str, Entry]]:
    """(settings, folder, video id, entry) of each crop. A listing yields the objects of a folder together."""
    for entry in store.list("crops/"):
        if match := _CROP_KEY.match(entry.key):
            yield match.group(1), match.group(2)[:2], match.group(2), entry


@dataclass(slots=True)
class _Crops:
    """What was counted of one crop hash."""

    objects: int = 0
    videos: int = 0
    bytes: int = 0
    small: list[str] = field(default_factory=list)
    """Keys of objects that can only hold a record."""

    def to_dict(self, store: Store) -> dict[str, Any]:
        counts = {"objects": self.objects, "videos": self.videos, "bytes": self.bytes}
        return {**counts, "quarantined": _reasons(store, self.small)}


def _reasons(store: Store, keys: Sequence[str]) -> dict[str, int]:
    def reason(key: str) -> str | None:
        try:
            record = read_record(store, key)
        except (MicaclError, ValueError, KeyError, TypeError):
            return UNREADABLE_RECORD
        return record.reason if record else None  # None also if it was deleted since it was listed

    with ThreadPoolExecutor(_READERS) as pool:
        counts = Counter(r for r in pool.map(reason, keys) if r)
    return dict(sorted(counts.items()))


def _shard_counts(listed: Sequence[Mapping[str, Any]], present: dict[str, int], index: set[str]) -> dict[str, int]:
    """Shards that the newest version lists against those that are there."""
    sizes = {str(shard["path"]): int(shard["bytes"]) for shard in listed}
    loose = [path for path in present if path not in sizes]
    return {
        "listed": len(sizes),
        "present": sum(path in present for path in sizes),
        "missing": sum(path not in present for path in sizes),
        "wrong_size": sum(path in present and present[path] != size for path, size in sizes.items()),
        "without_index": sum(shard["index"]["path"] not in index for shard in listed),
        "unreferenced": len(loose),
        "unreferenced_bytes": sum(present[path] for path in loose),
    }


def _sentence(versions: Sequence[int], crops: dict[str, dict[str, Any]], shards: dict[str, int]) -> str:
    done = sum(of_hash["objects"] for of_hash in crops.values())
    if not versions and not done and not shards["unreferenced"]:
        return "There is nothing here: no crop, no shard, no version. Check the URL, or run `micacl prepare RAW URL`."
    lost = sum(sum(of_hash["quarantined"].values()) for of_hash in crops.values())
    if not versions and lost == done and not shards["unreferenced"]:
        return f"No version: all {done} videos that were looked at are quarantined; `crops` counts the reasons."
    if not versions:
        return (
            f"No version yet: {done} crops and {shards['unreferenced']} shards are there. A run is under way or was "
            "stopped; running the same `micacl prepare` again keeps them and does the rest."
        )
    if shards["missing"] or shards["wrong_size"] or shards["without_index"]:
        return (
            f"Version {versions[-1]} is damaged: {shards['missing']} shards are missing, {shards['wrong_size']} have "
            f"another size than listed, {shards['without_index']} have no index file. `micacl verify URL` names them."
        )
    loose = shards["unreferenced"]
    more = f" {loose} shards are not listed by it (older versions, or a run under way)." if loose else ""
    return f"Version {versions[-1]}: all {shards['listed']} shards are there with their listed sizes.{more}"
