"""`micacl forget`: a new version without some subjects or videos.

    newest version ──> shards that hold them ──> the same shards without those bags ──> commit
                       all others: listed as they were

Nothing is decoded and no other shard is read. A rewritten shard has the name that `prepare` would give to the same
bags. Which checkpoints and bundles were trained on what was forgotten is not looked up here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.bags import Bag
from pipeline.contract import MicaclError, Video, digest
from pipeline.crop import bag_stub
from pipeline.dataset import OF_COMMIT, Dataset, bag_counts, commit, get_checked, open_dataset, read_index, write_index
from pipeline.pack import Member, ShardPlan
from pipeline.shards import read_bag, read_bags, write_shard
from pipeline.storage import Store


def forget(url: str, subjects: Sequence[str] = (), videos: Sequence[str] = (), delete: bool = False) -> dict[str, Any]:
    """Commit a version without `subjects` and `videos` (names as the index has them).

    With `delete`, every shard and index file that holds one of their bags is deleted after the commit, whichever
    version lists it or none, and so are the crops of those videos. Older version files stay: they then list objects
    that are gone, and `verify` of such a version says so. Run again after it was stopped half way, it deletes the rest.
    Without `delete`, older versions stay readable and still hold them.

    Returns {"dataset", "version", "committed", "videos", "bags", "shards_rewritten", "deleted", "remedy"}.
    Raises MicaclError for a name that is not there, or if somebody else commits at the same time.
    """
    _require_some(subjects, videos)
    dataset = open_dataset(url)
    store = dataset.store
    rows = pa.concat_tables([dataset.index, *_other_rows(dataset)]) if delete else dataset.index
    _require_known(rows, "subject", subjects, store)
    _require_known(rows, "video", videos, store)
    gone = rows.filter(_match(rows, subjects, videos))
    names = sorted(set(gone["video"].to_pylist()))
    here = dataset.index.filter(_match(dataset.index, subjects, names))
    number, new, rewritten = _commit_without(dataset, set(here["key"].to_pylist()))
    return {
        "dataset": store.root,
        "version": number,
        "committed": new,
        "videos": names,
        "bags": here.num_rows,
        "shards_rewritten": rewritten,
        "deleted": _delete(store, names) if delete else [],
        "remedy": _remedy(delete),
    }


def _remedy(delete: bool) -> str:
    raw = (
        "Delete the raw videos too, or take them out of the table: while they are in the raw bucket the next "
        "`micacl prepare` brings them back."
    )
    if delete:
        return f"{raw} A bucket that keeps old object versions needs a lifecycle rule that expires them."
    return f"{raw} Older versions still list them: run `micacl forget` with --delete to remove the bytes."


def _require_some(subjects: Sequence[str], videos: Sequence[str]) -> None:
    if not subjects and not videos:
        raise MicaclError("No subject and no video was named.", "Nothing was forgotten.", "Use --subject or --video.")


def _require_known(rows: pa.Table, column: str, wanted: Sequence[str], store: Store) -> None:
    """Every name is in the column. A typo must not end as "done"."""
    if not wanted:
        return
    known = {str(name) for name in pc.unique(rows[column]).to_pylist() if name is not None}
    for name in wanted:
        if name not in known:
            near = get_close_matches(name, known, n=3, cutoff=0.4)
            raise MicaclError(
                f"{store.root} has no {column} {name!r}.",
                "Nothing was forgotten, nor were the other names that were given.",
                f"Did you mean {' or '.join(near)}?" if near else f"It has {len(known)} {column}s; check the name.",
            )


def _match(rows: pa.Table, subjects: Sequence[str], videos: Sequence[str]) -> pa.ChunkedArray:
    """True for the bags of these subjects or videos, shape (rows,)."""
    of_subject = pc.is_in(rows["subject"], pa.array(subjects, pa.string()))
    return pc.or_(of_subject, pc.is_in(rows["video"], pa.array(videos, pa.string())))


def _commit_without(dataset: Dataset, keys: set[str]) -> tuple[int, bool, int]:
    """(version, whether it was written, shards rewritten). The newest version if it holds none of the keys already."""
    if not keys:
        return dataset.number, False, 0
    old = {k: v for k, v in dataset.body.items() if k not in OF_COMMIT}
    shards: list[dict[str, Any]] = []
    rewritten = 0
    for shard in old["shards"]:
        rows = read_index(get_checked(dataset.store, shard["index"]["path"], shard["index"]["sha256"]))
        kept = [row for row in rows.to_pylist() if row["key"] not in keys]
        if len(kept) == rows.num_rows:
            shards.append(shard)
        elif kept:
            shards.append(_rewrite(dataset.store, shard, kept))
            rewritten += 1
    body = {
        **old,
        "shards": sorted(shards, key=lambda s: str(s["path"])),
        "counts": bag_counts(shards),
        "videos": _video_counts(old["videos"], dataset.index, keys),
    }
    number, new = commit(dataset.store, body, parent=dataset.number)
    return number, new, rewritten


def _rewrite(store: Store, shard: Mapping[str, Any], kept: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Write the shard of the kept rows and its index file; returns its entry in the version."""
    data = store.get(shard["path"])
    bags = [_checked_bag(data, row, store.url(shard["path"])) for row in kept]
    plan = ShardPlan(
        split=shard["split"],
        fold=shard.get("fold"),
        label=shard["label"],
        members=tuple(_member(bag) for bag in bags),
    )
    tar, spans = write_shard(bags)
    rows = {row["key"]: row for row in kept}
    index = write_index(
        [{**rows[s.key], "shard": plan.path, "offset": s.offset, "size": s.size, "sha256": s.sha256} for s in spans]
    )
    store.put(plan.path, tar)
    store.put(plan.index_path, index)
    return {
        **shard,
        "path": plan.path,
        "bags": len(bags),
        "bytes": len(tar),
        "index": {"path": plan.index_path, "sha256": digest(index)},
    }


def _checked_bag(data: bytes, row: Mapping[str, Any], url: str) -> Bag:
    span = data[row["offset"] : row["offset"] + row["size"]]
    if digest(span) != row["sha256"]:
        raise MicaclError(
            f"{url} bag {row['key']} has another sha256 than the index says.",
            "Nothing was forgotten: a damaged bag is not copied.",
            "`micacl verify URL` names all damage; `micacl prepare` makes a deleted shard anew from the crops.",
        )
    return read_bag(span, url)


def _member(bag: Bag) -> Member:
    """As the planner of shards sees a bag, so that the shard has the name that `prepare` would give it."""
    stub = bag_stub(bag)
    return Member(
        key=stub.key, sha256=stub.sha256, size=stub.size, crop="", subject=bag.meta.subject, scene=bag.meta.scene
    )


def _video_counts(old: Mapping[str, int], index: pa.Table, keys: set[str]) -> dict[str, int]:
    held = pc.is_in(index["key"], pa.array(sorted(keys), pa.string()))
    kept = set(index.filter(pc.invert(held))["video"].to_pylist())
    gone = set(index.filter(held)["video"].to_pylist()) - kept
    return {**old, "written": len(kept), "forgotten": old.get("forgotten", 0) + len(gone)}


def _other_rows(dataset: Dataset) -> Iterator[pa.Table]:
    """Rows of index files that the newest version does not list: older versions, and runs that were stopped."""
    listed = {shard["index"]["path"] for shard in dataset.body["shards"]}
    for entry in dataset.store.list("index/"):
        if entry.key not in listed:
            yield _read_any_index(dataset.store, entry.key)


def _read_any_index(store: Store, key: str) -> pa.Table:
    try:
        return read_index(store.get(key))
    except (pa.ArrowException, OSError, ValueError) as error:
        raise MicaclError(
            f"{store.url(key)} cannot be read as an index file ({error}).",
            "It is not known whose bags its shard holds, so nothing was deleted.",
            "Delete it and the shard of the same name, then run the same command again.",
        ) from error


def _delete(store: Store, videos: Sequence[str]) -> list[str]:
    """Delete every object that holds a bag of these videos. Returns the keys.

    A shard's index file says what the shard holds, so it goes last: whoever is stopped here can start again.
    """
    keys = list(_holders(store, set(videos)))
    for key in keys:
        store.delete(key)
    return keys


def _holders(store: Store, videos: set[str]) -> Iterator[str]:
    """Keys of shards without an index file (a pack that was stopped), crops, then shards each with its index file."""
    shards: dict[str, set[str]] = {}
    indexed: set[str] = set()
    for key in sorted(entry.key for entry in store.list("index/")):
        rows = _read_any_index(store, key)
        paths = {path for path in rows["shard"].to_pylist() if path.startswith("shards/")}
        indexed |= paths
        if videos & set(rows["video"].to_pylist()):
            shards[key] = paths
    for key in sorted(entry.key for entry in store.list("shards/")):
        if key not in indexed and any(b.meta.video in videos for b in read_bags(store.get(key), store.url(key))):
            yield key
    ids = {Video(url="", name=name).id for name in videos}
    for key in sorted(entry.key for entry in store.list("crops/")):
        if key.rpartition("/")[2].partition(".")[0] in ids:
            yield key
    for index_key, paths in shards.items():
        yield from (*sorted(paths), index_key)
