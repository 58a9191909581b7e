"""One video -> one object: its bags, or the record of why it was quarantined. The dear step, done once.

    <dataset>/crops/<crop hash>/<2 hex>/<video id>.<fingerprint>.tar

The first member is the record; the bags follow, with nothing said of them. One put makes the object, so it
exists whole or not at all, and a run that finds it decodes nothing.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from pipeline.bags import Bag, video_to_bags
from pipeline.contract import (
    SAID,
    SCHEMA_VERSION,
    BagMeta,
    CropConfig,
    MicaclError,
    Quarantined,
    Reason,
    Video,
    canonical_json,
    digest,
    foreign,
    json_object,
    require_schema,
)
from pipeline.dataset import INDEX_SCHEMA
from pipeline.shards import bag_members, read_bags, read_members, write_members
from pipeline.storage import Store, open_store, split_url

_HEAD_BYTES = 32 * 1024
_RECORD = "record.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class BagStub:
    """A bag as the planner of shards needs it."""

    key: str
    sha256: str
    """Of its tar blocks as they lie in a crop: what its content is, whatever is said of it."""
    size: int
    """Bytes of its tar blocks."""
    columns: dict[str, Any] = field(default_factory=dict)
    """What the index will say of it that no source says: frames, seconds, quality. `--pack.where` asks for it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CropRecord:
    """What became of one video."""

    video: str
    object: str
    """Key of the crop object in the dataset."""
    frames: int = 0
    bad_packets: int = 0
    reason: str | None = None
    detail: str = ""
    bags: tuple[BagStub, ...] = ()
    schema: int = SCHEMA_VERSION

    def to_json(self) -> str:
        return canonical_json(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str | bytes, where: str = "a crop") -> CropRecord:
        fields: dict[str, Any] = json_object(text, f"a record in {where}")
        require_schema(fields.get("schema"), where)
        try:
            return cls(**{**fields, "bags": tuple(BagStub(**b) for b in fields["bags"])})
        except (KeyError, TypeError) as error:
            raise foreign(f"a record in {where}", error) from error


def crop_key(video: Video, config: CropConfig) -> str:
    """Where the crop of a video lies. Other pixels (settings, changed source) have another name."""
    return f"crops/{config.hash}/{video.id[:2]}/{video.id}.{digest(video.fingerprint.encode())[:8]}.tar"


def read_record(store: Store, key: str) -> CropRecord | None:
    """The record of a crop that is there, by one small read; None if there is none."""
    try:
        head = store.read_range(key, 0, _HEAD_BYTES)
    except FileNotFoundError:
        return None
    size = _octal(head[124:136])
    if 512 + size > len(head):
        head = store.read_range(key, 0, 512 + size)
    return CropRecord.from_json(head[512 : 512 + size], store.url(key))


def _octal(field: bytes) -> int:
    """The size in a tar header; 0 (and so a record that is refused by name) if it is none."""
    digits = field.rstrip(b"\0 ")
    return int(digits, 8) if digits.isdigit() and not set(digits) & set(b"89") else 0


def crop_video(video: Video, config: CropConfig, store: Store) -> tuple[CropRecord, bool]:
    """Crop one video unless that is done. Returns the record and whether this call did the work."""
    video = video if video.fingerprint else dataclasses.replace(video, fingerprint=_fingerprint_now(video))
    key = crop_key(video, config)
    found = read_record(store, key)
    if found is not None:
        return found, False
    bags: list[Bag] = []
    try:
        data = fetch_video(video, config)
        bags, report = video_to_bags(data, name=video.name, video_id=video.id, config=config)
        record = CropRecord(
            video=video.name,
            object=key,
            frames=report.frames,
            bad_packets=report.bad_packets,
            detail="; ".join(report.notes),
            bags=tuple(bag_stub(bag) for bag in bags),
        )
    except Quarantined as why:
        record = CropRecord(video=video.name, object=key, reason=why.reason.value, detail=why.detail)
    members = [(_RECORD, record.to_json().encode()), *(m for bag in bags for m in bag_members(bag))]
    store.put(key, write_members(members) + b"\0" * 1024)
    return record, True


def _fingerprint_now(video: Video) -> str:
    """Of a video that no listing gave one: a file that was missing is looked for again in every run."""
    root, key = split_url(video.url)
    found = open_store(root).stat(key)
    return found.fingerprint if found else Reason.MISSING.value


def fetch_video(video: Video, config: CropConfig) -> bytes:
    """The encoded video. Raises Quarantined(MISSING | TOO_MANY_BYTES)."""
    root, key = split_url(video.url)
    source = open_store(root)
    found = source.stat(key)
    if found is None:
        raise Quarantined(Reason.MISSING, f"{video.url} is not there")
    if found.size > config.max_bytes:
        raise Quarantined(Reason.TOO_MANY_BYTES, f"{found.size} bytes, the cap is {config.max_bytes}")
    return source.get(key)


def bag_stub(bag: Bag) -> BagStub:
    """What the planner of shards needs of a bag, the same before and after pack."""
    plain = Bag(bag.meta.said(), bag.encoded)
    blocks = write_members(bag_members(plain))
    return BagStub(key=bag.meta.key, sha256=digest(blocks), size=len(blocks), columns=_columns(plain.meta))


def _columns(meta: BagMeta) -> dict[str, Any]:
    """Index columns of a bag that are known before it is packed."""
    packed = {*SAID, "key", "video", "shard", "offset", "size", "sha256", "instances"}
    return {
        "instances": len(meta.instance_frames),
        **{name: getattr(meta, name) for name in INDEX_SCHEMA.names if name not in packed},
    }


def read_crop(store: Store, key: str) -> list[Bag]:
    """The bags of a crop. Raises MicaclError if it was damaged, FileNotFoundError if it is gone."""
    data = store.get(key)
    name, record = next(read_members(data, store.url(key)), ("", b""))
    if name != _RECORD:
        raise MicaclError(f"{store.url(key)} is no crop.", "Its bags were not used.", "Delete it and prepare again.")
    start = 512 + -(-len(record) // 512) * 512
    return list(read_bags(data[start:], store.url(key)))
