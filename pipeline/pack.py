"""Bags -> shards. First a plan (pure), then one shard for each row of the plan (idempotent).

Shards are class-pure: a balanced epoch streams the head classes once and keeps the tail's shards at hand. Which bags
go together is decided by their keys alone (`cut_ranges`); a shard's name is a hash of what goes in, so equal inputs
meet equal names and a shard that is there with its index is not made again.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.bags import Bag
from pipeline.contract import SCHEMA_VERSION, BagMeta, MicaclError, PackConfig, Video, canonical_json, digest, part_name
from pipeline.crop import CropRecord, bag_stub, read_crop
from pipeline.dataset import INDEX_SCHEMA, read_index, write_index
from pipeline.shards import Span, write_shard
from pipeline.storage import Store

UNLABELLED = "unlabelled"
_MOST_LABEL_BYTES = 128
PLACES = 2**64
Weigh = Callable[[int, int], tuple[int, int]]
"""(low, high) -> bags and bytes of the places [low, high)."""
_FROM_META = tuple(
    name
    for name in INDEX_SCHEMA.names
    if name in BagMeta.__dataclass_fields__ and name not in ("size", "key", "frames")
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Member:
    """One bag of a planned shard."""

    key: str
    sha256: str
    size: int
    crop: str
    """Key of the crop object it lies in."""
    subject: str | None = None
    scene: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardPlan:
    """What goes into one shard."""

    split: str
    label: str
    fold: int | None = None
    members: tuple[Member, ...]

    @property
    def id(self) -> str:
        """32 hex digits over everything that decides the shard's bytes."""
        said = [(m.key, m.sha256, m.subject, m.scene) for m in self.members]
        return digest(canonical_json([SCHEMA_VERSION, self.split, self.fold, self.label, said]).encode())[:32]

    @property
    def path(self) -> str:
        return f"shards/{part_name(self.split, self.fold)}/{self.label}/{self.id}.tar"

    @property
    def index_path(self) -> str:
        return f"index/{self.id}.parquet"


def plan_shards(records: Iterable[tuple[Video, str, CropRecord]], config: PackConfig) -> list[ShardPlan]:
    """The plan of bags that fit in memory. `pipeline.ledger` makes the same plan of any number.

    Args:
        records: of each video that was written: the video, its split and its record.
    """
    groups: dict[tuple[str, int, str], list[Member]] = {}
    for video, split, record in records:
        label = folder_name(video.label or UNLABELLED)
        groups.setdefault((split, video.fold or 0, label), []).extend(members_of(video, record))
    return [
        ShardPlan(split=split, fold=fold or None, label=label, members=part)
        for (split, fold, label), members in sorted(groups.items())
        for part in cut_members(members, config)
    ]


def members_of(video: Video, record: CropRecord) -> list[Member]:
    """The bags of a video as the planner sees them."""
    return [
        Member(key=b.key, sha256=b.sha256, size=b.size, crop=record.object, subject=video.subject, scene=video.scene)
        for b in record.bags
    ]


def folder_name(label: str) -> str:
    """A label that can be a folder. Raises MicaclError."""
    if "/" in label or label in (".", "..") or not label.isprintable() or len(label.encode()) > _MOST_LABEL_BYTES:
        raise MicaclError(
            f"The label {label[:80]!r} cannot name a folder.",
            "Nothing was packed.",
            f"Rename it: no slash, and at most {_MOST_LABEL_BYTES} bytes.",
        )
    return label


def place_of(key: str) -> int:
    """Where a bag lies on the ring of 2^64 places: its video id as a number. Evenly spread, for it is a hash."""
    return int(key.partition("_")[0], 16)


def cut_ranges(weigh: Weigh, config: PackConfig, low: int = 0, high: int = PLACES) -> Iterator[tuple[int, int]]:
    """Halve the range of places [low, high) until each part fits a shard; empty parts are left out.

        one class:  [------------------ 700 bags ------------------]        max_bags 256
                    [------- 343 -------][------- 357 --------]
                    [-- 170 -][-- 173 --][-- 181 -][-- 176 ---]             four shards

    Which bags share a shard is decided by their own places: one bag more splits at most the shard it falls into, and
    all others keep their names. Places are hashes, so halves are nearly equal and shards about half full or more.
    """
    bags, size = weigh(low, high)
    if not bags:
        return
    if high - low == 1 or (bags <= config.max_bags and (size <= config.max_bytes or bags == 1)):
        yield low, high
        return
    middle = (low + high) // 2
    yield from cut_ranges(weigh, config, low, middle)
    yield from cut_ranges(weigh, config, middle, high)


def cut_members(members: Sequence[Member], config: PackConfig) -> Iterator[tuple[Member, ...]]:
    """The shards of one class."""
    ordered = sorted(members, key=lambda m: m.key)
    places = [place_of(m.key) for m in ordered]

    def slice_of(low: int, high: int) -> Sequence[Member]:
        return ordered[bisect_left(places, low) : bisect_left(places, high)]

    def weigh(low: int, high: int) -> tuple[int, int]:
        found = slice_of(low, high)
        return len(found), sum(m.size for m in found)

    for low, high in cut_ranges(weigh, config):
        yield from cut_rows(slice_of(low, high), config)


def cut_rows(members: Sequence[Member], config: PackConfig) -> Iterator[tuple[Member, ...]]:
    """One shard, or several where the bags of a single video are too many for one."""
    part: list[Member] = []
    for member in members:
        full = len(part) >= config.max_bags or sum(m.size for m in part) + member.size > config.max_bytes
        if part and full:
            yield tuple(part)
            part = []
        part.append(member)
    if part:
        yield tuple(part)


def pack_shard(plan: ShardPlan, store: Store) -> tuple[dict[str, Any], bool]:
    """Write one shard and its index file unless both are there. Returns its entry in the version, and whether it wrote.

    The index file is put last: it is the shard's done-mark and carries the shard's size and hash.
    """
    try:
        data = store.get(plan.index_path)
        if store.exists(plan.path):
            return _entry(plan, data), False
    except FileNotFoundError:
        pass
    bags = list(_gather(plan, store))
    tar, spans = write_shard(bags)
    data = write_index([_row(bag.meta, span, plan) for bag, span in zip(bags, spans, strict=True)])
    store.put(plan.path, tar)
    store.put(plan.index_path, data)
    return _entry(plan, data), True


def _gather(plan: ShardPlan, store: Store) -> Iterator[Bag]:
    """The plan's bags in its order, with what the table says of them; each is what was planned, by its hash."""
    crops: dict[str, list[Bag]] = {}
    for member in plan.members:  # in key order, so the bags of one video follow each other
        if member.crop not in crops:
            crops = {member.crop: _crop_of(store, member.crop)}
        bag = next((b for b in crops[member.crop] if b.meta.key == member.key), None)
        if bag is None or bag_stub(bag).sha256 != member.sha256:
            raise _unusable(store, member.crop, f"does not hold the bag {member.key} as it was cropped")
        label = None if plan.label == UNLABELLED else plan.label
        said = bag.meta.said(label=label, split=plan.split, fold=plan.fold, subject=member.subject, scene=member.scene)
        yield Bag(said, bag.encoded)


def _crop_of(store: Store, key: str) -> list[Bag]:
    try:
        return read_crop(store, key)
    except FileNotFoundError as error:
        raise _unusable(store, key, "is gone") from error


def _unusable(store: Store, key: str, what: str) -> MicaclError:
    return MicaclError(
        f"{store.url(key)} {what}.",
        "Its shard was not written and no version was committed.",
        "Delete that crop, if it is there, and run the same command again: it is made anew.",
    )


def _row(meta: BagMeta, span: Span, plan: ShardPlan) -> dict[str, Any]:
    return {
        **{name: getattr(meta, name) for name in _FROM_META},
        "key": meta.key,
        "label": plan.label,
        "shard": plan.path,
        "offset": span.offset,
        "size": span.size,
        "sha256": span.sha256,
        "frames": meta.frames,
        "instances": len(meta.instance_frames),
    }


def _entry(plan: ShardPlan, index: bytes) -> dict[str, Any]:
    """The shard in the version file. Its bags are hashed one by one in the index, whose hash stands here."""
    rows = read_index(index)
    last = rows.num_rows - 1
    return {
        "path": plan.path,
        "split": plan.split,
        **({} if plan.fold is None else {"fold": plan.fold}),
        "label": plan.label,
        "bags": rows.num_rows,
        "bytes": rows["offset"][last].as_py() + rows["size"][last].as_py() + 1024,
        "index": {"path": plan.index_path, "sha256": digest(index)},
    }
