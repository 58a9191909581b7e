"""A committed dataset in a fraction of a second, without Ray, FFmpeg or a face detector.

A bright blob starts near the centre of each clip and moves out in a direction that the label decides, over noise:
a tiny model can learn it. Crops, plan, shards, index and version are written by the code under test of the house.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from pipeline.bags import Bag
from pipeline.codec import encode_instance
from pipeline.contract import DFEW_LABELS, BagMeta, CropConfig, PackConfig, Video, canonical_json, digest
from pipeline.crop import CropRecord, bag_stub, crop_key
from pipeline.dataset import commit, version_body
from pipeline.pack import UNLABELLED, pack_shard, plan_shards
from pipeline.shards import bag_members, write_members
from pipeline.storage import Store, open_store
from pipeline.video import RGB

SIZE, INSTANCES, FRAMES = 32, 4, 3
CROP = CropConfig(size=SIZE, instances=INSTANCES, frames_per_instance=FRAMES, min_frames=INSTANCES)
VIDEOS_PER_SUBJECT = 2


def make_dataset(
    folder: str | Path,
    counts: Mapping[str, Mapping[str, int]],
    seed: int,
    *,
    max_bags: int = 256,
    prefix: str = "",
    quarantined: Mapping[str, tuple[str, str]] | None = None,
    quarantined_subjects: Mapping[str, str] | None = None,
    crop: CropConfig = CROP,
) -> str:
    """Write and commit a dataset. Returns its URL.

    Args:
        counts: bags by split and label; the label `unlabelled` stands for none. One bag a video, two videos a subject;
            subjects are s0, s1, ... and never in two splits.
        max_bags: per shard.
        prefix: of every video's name; the rest of it is `<split>/<label>/<number>.mp4`.
        quarantined: reason and detail by video name.
        quarantined_subjects: who is seen, by the name of a quarantined video; others have none.
    """
    store = open_store(str(folder))
    labels = label_set(counts)
    records = [
        (video, str(video.split), put_crop(store, video, [tiny_bag(video, labels, seed, crop)], crop))
        for video in _videos(counts, prefix)
    ]
    lost = [quarantine_crop(store, name, *why, crop) for name, why in sorted((quarantined or {}).items())]
    shards = [pack_shard(plan, store)[0] for plan in plan_shards(records, PackConfig(max_bags=max_bags))]
    seen = {name: {"subject": subject} for name, subject in (quarantined_subjects or {}).items()}
    said = [{"video": r.video, "reason": r.reason, "detail": r.detail, "object": r.object} for r in lost]
    lines = [f"{canonical_json({**row, **seen.get(row['video'], {})})}\n" for row in said]
    data = "".join(lines).encode()
    store.put(path := f"quarantine/{digest(data)[:32]}.jsonl", data)
    body = version_body(
        labels=labels,
        shards=shards,
        rows={split: {k: n for k, n in of_split.items() if n} for split, of_split in counts.items()},
        crop={**dataclasses.asdict(crop), "hash": crop.hash},
        videos={"listed": len(records) + len(lost), "written": len(records), "quarantined": len(lost)},
        quarantined=dict(sorted(Counter(str(r.reason) for r in lost).items())),
        quarantine={"path": path, "sha256": digest(data)},
    )
    commit(store, body)
    return store.root


def label_set(counts: Mapping[str, Mapping[str, int]]) -> tuple[str, ...]:
    """In DFEW's order if all are of it, else in the order in which they appear."""
    words = dict.fromkeys(label for of_split in counts.values() for label in of_split if label != UNLABELLED)
    return tuple(k for k in DFEW_LABELS if k in words) if set(words) <= set(DFEW_LABELS) else tuple(words)


def _videos(counts: Mapping[str, Mapping[str, int]], prefix: str) -> Iterator[Video]:
    subject = 0
    for split, of_split in counts.items():
        in_split = 0
        for label, n in of_split.items():
            for i in range(n):
                name = f"{prefix}{split}/{label}/{i:04d}.mp4"
                yield Video(
                    url=f"/nowhere/{name}",
                    name=name,
                    fingerprint="1",
                    label=None if label == UNLABELLED else label,
                    split=split,
                    subject=f"s{subject + in_split // VIDEOS_PER_SUBJECT}",
                )
                in_split += 1
        subject += -(-in_split // VIDEOS_PER_SUBJECT)


def tiny_bag(video: Video, labels: tuple[str, ...], seed: int, crop: CropConfig = CROP) -> Bag:
    """The one bag of a video: a function of (name, label, seed)."""
    rng = np.random.default_rng([seed, int(video.id, 16)])
    angle = 2 * math.pi * labels.index(video.label) / len(labels) if video.label else rng.uniform(0, 2 * math.pi)
    frames = [_frame(angle, t / (INSTANCES * FRAMES - 1), crop.size, rng) for t in range(INSTANCES * FRAMES)]
    parts = [frames[i * FRAMES : (i + 1) * FRAMES] for i in range(INSTANCES)]
    meta = BagMeta(
        key=f"{video.id}_0",
        video=video.name,
        track=0,
        instance_frames=(FRAMES,) * INSTANCES,
        seconds=1.0,
        fps=11.0,
        size=crop.size,
        detector=crop.detector,
        detector_score=0.9,
        crop=crop.hash,
        codec=crop.codec,
        boxes=((64.0, 64.0, 40.0),) * INSTANCES,
    )
    return Bag(meta, tuple(encode_instance(part, crop.codec, crop.jpeg_quality) for part in parts))


def _frame(angle: float, t: float, size: int, rng: np.random.Generator) -> RGB:
    """A blob at distance t (0 to 1) from near the centre towards the border."""
    reach = size * (0.05 + 0.3 * t)
    cx, cy = rng.normal([size / 2 + reach * math.cos(angle), size / 2 + reach * math.sin(angle)], 0.5)
    y, x = np.mgrid[:size, :size]
    blob = np.exp(-((x - cx) ** 2 + (y - cy) ** 2) / (2 * (size / 10) ** 2))
    noise = rng.normal(60, 10, (size, size, 3))
    frame = np.clip(noise + 170 * blob[..., None] * (1.0, 0.9, 0.7), 0, 255)
    return np.asarray(frame, np.uint8)


def put_crop(store: Store, video: Video, bags: list[Bag], crop: CropConfig = CROP) -> CropRecord:
    """A crop object as `crop_video` writes it."""
    record = CropRecord(
        video=video.name,
        object=crop_key(video, crop),
        frames=sum(bag.meta.frames for bag in bags),
        bags=tuple(bag_stub(bag) for bag in bags),
    )
    return _put_record(store, record, bags)


def quarantine_crop(store: Store, name: str, reason: str, detail: str, crop: CropConfig = CROP) -> CropRecord:
    """The crop object of a video that gave no bag."""
    key = crop_key(Video(url=f"/nowhere/{name}", name=name, fingerprint="1"), crop)
    return _put_record(store, CropRecord(video=name, object=key, reason=reason, detail=detail), [])


def _put_record(store: Store, record: CropRecord, bags: list[Bag]) -> CropRecord:
    members = [("record.json", record.to_json().encode()), *(m for bag in bags for m in bag_members(bag))]
    store.put(record.object, write_members(members) + b"\0" * 1024)
    return record
