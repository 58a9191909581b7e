"""Pictures of a dataset as data: URIs, for a page that loads nothing. Only what decodes as a JPEG gets onto a page."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pipeline.bags import Bag
from pipeline.codec import decode_instance, decode_jpeg, encode_jpeg
from pipeline.contract import MicaclError, digest
from pipeline.crop import read_thumb
from pipeline.dataset import Dataset
from pipeline.shards import read_bag
from pipeline.storage import Store

_QUALITY = 90
"""JPEG quality of a frame that is not stored as JPEG."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Strip:
    """One bag in pictures, or the reason why there are none."""

    video: str
    side: str
    """Split or fold."""
    label: str
    subject: str
    seconds: float
    pictures: tuple[str, ...] = ()
    """One data: URI an instance, in time order."""
    problem: str = ""


def strip_of(dataset: Dataset, row: Mapping[str, Any], side: str) -> Strip:
    """The middle frame of each instance of the bag of an index row."""
    said = {name: row[name] for name in ("video", "label", "seconds")}
    said |= {"subject": row["subject"] or "", "side": side}
    where = f"{dataset.store.url(row['shard'])} bag {row['key']}"
    try:
        span = dataset.store.read_range(row["shard"], row["offset"], row["size"])
        if digest(span) != row["sha256"]:
            return Strip(**said, problem="Its bytes are not the ones that were written: run micacl verify.")
        return Strip(**said, pictures=tuple(map(data_uri, middle_jpegs(read_bag(span, where)))))
    except FileNotFoundError:
        return Strip(**said, problem="Its shard is missing: run micacl verify.")
    except MicaclError as error:
        return Strip(**said, problem=error.cause)


def middle_jpegs(bag: Bag) -> list[bytes]:
    """The middle frame of each instance as a JPEG that decodes. Raises MicaclError."""
    pictures = []
    for i, members in enumerate(bag.encoded):
        middle = bag.meta.instance_frames[i] // 2
        (frame_HWC,) = decode_instance(members, bag.meta, i, [middle])
        pictures.append(members[middle] if bag.meta.codec == "jpeg" else encode_jpeg(frame_HWC, _QUALITY))
    return pictures


def thumbnail(store: Store, key: str) -> str:
    """A quarantined video's picture, as its crop object keeps it; empty if it has none that can be shown."""
    if not key:
        return ""
    try:
        jpeg = read_thumb(store, key)
        if jpeg is None:
            return ""
        decode_jpeg(jpeg, store.url(key))
    except (FileNotFoundError, MicaclError):
        return ""
    return data_uri(jpeg)


def data_uri(jpeg: bytes) -> str:
    return f"data:image/jpeg;base64,{base64.b64encode(jpeg).decode()}"
