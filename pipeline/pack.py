"""Bags -> shards. First a plan (pure), then one shard for each row of the plan (idempotent).

Shards are class-pure: a balanced epoch streams the head classes once and keeps the tail's shards at hand. Which bags
go together is a function of their keys alone; a shard's name is a hash of what goes in, so equal inputs meet equal
names and a shard that is there with its index is not made again.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.bags import Bag
from pipeline.contract import SCHEMA_VERSION, BagMeta, MicaclError, PackConfig, Video, canonical_json, digest, part_name
from pipeline.crop import CropRecord, bag_stub, read_crop
from pipeline.dataset import INDEX_SCHEMA, read_index, write_index
from pipeline.shards import Span, write_shard
from pipeline.storage import Store

UNLABELLED = "unlabelled"
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
    """Group bags by split and label, order them by key and cut them by count and bytes.

    Args:
        records: of each video that was written: the video, its split and its record.
    """
    groups: dict[tuple[str, int, str], list[Member]] = {}
    for video, split, record in records:
        group = groups.setdefault((split, video.fold or 0, _folder_name(video.label or UNLABELLED)), [])
        group += [
            Member(
                key=b.key,
                sha256=b.sha256,
                size=b.size,
                crop=record.object,
                subject=video.subject,
                scene=video.scene,
            )
            for b in record.bags
        ]
    return [
        ShardPlan(split=split, fold=fold or None, label=label, members=tuple(part))
        for (split, fold, label), members in sorted(groups.items())
        for part in _cut(sorted(members, key=lambda m: m.key), config)
    ]


def _folder_name(label: str) -> str:
    if "/" in label or label in (".", "..") or not label.isprintable():
        raise MicaclError(f"The label {label!r} cannot name a folder.", "Nothing was packed.", "Rename it: no slash.")
    return label


def _cut(members: Sequence[Member], config: PackConfig) -> Iterator[list[Member]]:
    part: list[Member] = []
    for member in members:
        full = len(part) >= config.max_bags or sum(m.size for m in part) + member.size > config.max_bytes
        if part and full:
            yield part
            part = []
        part.append(member)
    if part:
        yield part


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
