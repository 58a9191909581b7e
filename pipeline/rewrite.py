"""The body of a version without some bags and videos; the shards, index files and lists that it lists are written.

Bags are copied byte for byte, hash-checked. A shard's name is the one that `prepare` would give to the same bags, so
equal contents meet equal names, whoever wrote them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.bags import Bag
from pipeline.contract import MicaclError, digest
from pipeline.crop import bag_stub
from pipeline.dataset import Dataset, bag_counts, get_checked, read_index, write_index
from pipeline.erase import lists_without
from pipeline.pack import Member, ShardPlan
from pipeline.shards import read_bag, write_shard
from pipeline.storage import Store
from pipeline.tombstones import forgotten_of

_FROM_COMMIT = ("version", "parent")


def old_body(dataset: Dataset) -> dict[str, Any]:
    """What a version says, less what its commit added."""
    return {k: v for k, v in dataset.body.items() if k not in _FROM_COMMIT}


def body_without(dataset: Dataset, here: pa.Table, videos: Collection[str], stones: Collection[str]) -> dict[str, Any]:
    """The body of the version without the bags `here` and without rows of `videos`; what it lists is written.

    Equal to the newest one if nothing is to be taken out.
    """
    old, store = old_body(dataset), dataset.store
    keys, affected = set(here["key"].to_pylist()), set(here["shard"].to_pylist())
    shards: list[dict[str, Any]] = []
    for shard in old["shards"]:
        if shard["path"] not in affected:
            shards.append(shard)
            continue
        rows = read_index(get_checked(store, shard["index"]["path"], shard["index"]["sha256"])).to_pylist()
        if kept := [row for row in rows if row["key"] not in keys]:
            shards.append(_rewrite(store, shard, kept))
    reasons: Counter[str] = Counter()
    rest = {k: v if k == "shards" else lists_without(store, v, videos, reasons) for k, v in old.items()}
    forgotten = sorted({*forgotten_of(old), *stones})
    body = {
        **rest,
        "shards": sorted(shards, key=lambda s: str(s["path"])),
        "counts": bag_counts(shards),
        "videos": _video_counts(old["videos"], dataset.index, keys, reasons.total()),
        **({"forgotten": forgotten} if forgotten else {}),
    }
    if reasons:
        body["quarantined"] = {k: n - reasons[k] for k, n in old["quarantined"].items() if n > reasons[k]}
    return body


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


def _video_counts(old: Mapping[str, int], index: pa.Table, keys: set[str], quarantined: int) -> dict[str, int]:
    """`listed` stays the sum of written, quarantined and forgotten."""
    held = pc.is_in(index["key"], pa.array(sorted(keys), pa.string()))
    kept = set(index.filter(pc.invert(held))["video"].to_pylist())
    gone = len(set(index.filter(held)["video"].to_pylist()) - kept) + quarantined
    if not gone:
        return dict(old)
    counts = {"written": len(kept), "quarantined": old["quarantined"] - quarantined}
    return {**old, **counts, "forgotten": old.get("forgotten", 0) + gone}
