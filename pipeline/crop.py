"""One video -> one object: its bags, or the record of why it was quarantined. The dear step, done once.

    <dataset>/crops/<crop hash>/<2 hex>/<video id>.<fingerprint>.tar

The first member is the record. The bags follow, with nothing said of them; of a video that is quarantined though some
frame decoded, a small picture instead. One put makes the object, so it exists whole or not at all, and a run that finds
it decodes nothing: to try a video again, delete its object.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from pipeline.bags import Bag
from pipeline.clip import Cropped, quarantined
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
from pipeline.image_folders import folder_fingerprint
from pipeline.raw import fetch_clip, list_images
from pipeline.sandbox import crop_in_sandbox
from pipeline.shapes import RECORD, require_shape
from pipeline.shards import bag_members, read_bags, read_members, write_members
from pipeline.storage import Store, open_store, split_url

_HEAD_BYTES = 32 * 1024
_RECORD = "record.json"
_THUMB = "thumb.jpg"


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
    """That decoded, in the part that is meant."""
    bad_packets: int = 0
    """Packets (of a folder: images) that did not decode."""
    corrupt_frames: int = 0
    """Of `frames`, those that the decoder marks as damaged."""
    expected_frames: int | None = None
    """As the container says; None if it does not say."""
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
        require_shape(fields, RECORD, f"a record in {where}")
        if fields["reason"] is not None and fields["reason"] not in list(Reason):
            raise foreign(f"a record in {where}", ValueError(f"the reason {fields['reason'][:40]!r}"))
        try:
            return cls(**{**fields, "bags": tuple(BagStub(**b) for b in fields["bags"])})
        except (KeyError, TypeError) as error:
            raise foreign(f"a record in {where}", error) from error


def crop_key(video: Video, config: CropConfig) -> str:
    """Where the crop of a video lies. Other pixels (settings, changed source, another part) have another name."""
    source = video.fingerprint + _part(video)
    return f"crops/{config.hash}/{video.id[:2]}/{video.id}.{digest(source.encode())[:8]}.tar"


def _part(video: Video) -> str:
    """What of a file is meant, beside the file; empty for a whole video in which faces are searched."""
    plain = Video(url="", name="")
    fields = ("kind", "cropped", "start_s", "end_s", "box")
    said = {name: getattr(video, name) for name in fields if getattr(video, name) != getattr(plain, name)}
    return canonical_json(said) if said else ""


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
    if found is not None and (found.video, found.object) != (video.name, key):
        raise foreign(f"a record in {store.url(key)}", ValueError(f"it is of {found.video} at {found.object}"))
    if found is not None:
        return found, False
    try:
        done = crop_in_sandbox(fetch_clip(video, config), name=video.name, video_id=video.id, config=config)
    except Quarantined as why:
        done = quarantined(why)
    record = _record(video, key, done)
    members = [(_RECORD, record.to_json().encode()), *([(_THUMB, done.thumb)] if done.thumb else [])]
    store.put(key, write_members(members) + done.tar + b"\0" * 1024)
    return record, True


def _record(video: Video, key: str, done: Cropped) -> CropRecord:
    return CropRecord(
        video=video.name,
        object=key,
        frames=done.frames,
        bad_packets=done.bad_packets,
        corrupt_frames=done.corrupt_frames,
        expected_frames=done.expected_frames,
        reason=done.reason,
        detail=done.detail,
        bags=tuple(bag_stub(bag) for bag in read_bags(done.tar, video.name)),
    )


def _fingerprint_now(video: Video) -> str:
    """Of a video that no listing gave one, the one that a listing would give; what is missing is looked for again in
    every run.
    """
    if video.kind == "frames":
        try:
            return folder_fingerprint(list_images(open_store(video.url)))
        except Quarantined as why:
            return why.reason.value
    root, key = split_url(video.url)
    found = open_store(root).stat(key)
    return found.fingerprint if found else Reason.MISSING.value


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
    data, at, remedy = store.get(key), 0, "Delete that object and run the same command again: it is made anew."
    try:
        for name, member in read_members(data, store.url(key)):
            if name not in (_RECORD, _THUMB):
                break
            at += 512 + -(-len(member) // 512) * 512
        bags = list(read_bags(data[at:], store.url(key))) if at else []
    except MicaclError as error:
        raise MicaclError(error.cause, "Its bags were not used.", remedy) from error
    if not at:
        raise MicaclError(f"{store.url(key)} is no crop.", "Its bags were not used.", remedy)
    return bags


def read_thumb(store: Store, key: str) -> bytes | None:
    """A small JPEG of a video that is quarantined, or None: no frame of it decoded, or it is not quarantined.

    Raises MicaclError if the crop was damaged, FileNotFoundError if it is gone.
    """
    members = read_members(store.get(key), store.url(key))
    return next((data for name, data in members if name == _THUMB), None)
