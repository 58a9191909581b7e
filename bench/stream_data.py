"""The data of bench/stream.py: a long-tailed dataset of the house, written by the house's own code, and its copies.

    60 rendered clips ──crop, JPEG──> 704 bags under keys of their own ──crops, plan, shards, index, commit──> dataset
                                                                                                  │
                                                            tars of train by class <──────────────┘

A bag's pixels repeat under other keys; its key, its crop object and its place in a shard are its own, so nothing that
reads by key, offset or hash can tell.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from pipeline.bags import Bag
from pipeline.codec import encode_jpeg
from pipeline.contract import DFEW_LABELS, BagMeta, CropConfig, PackConfig, Video, digest
from pipeline.crop import CropRecord, bag_stub, crop_key
from pipeline.dataset import commit, open_dataset, version_body
from pipeline.demo_faces import make_subject, render_clip
from pipeline.pack import pack_shard, plan_shards
from pipeline.shards import bag_members, read_bags, write_members
from pipeline.storage import Store, open_store

BAGS = {"happy": 144, "sad": 115, "neutral": 162, "angry": 130, "surprise": 88, "disgust": 9, "fear": 56}
"""By label: DFEW's shape, 18 to 1, and 44 batches of 16 in all."""
CLIPS = 60
"""Rendered; more are copies."""
CROP = CropConfig()
MAX_BAGS = 32
_MARGIN = 16
"""Pixels cut from each side of what is rendered, so that the face fills the crop as it does in real bags."""


def build(folder: Path) -> str:
    """Write and commit the dataset. Returns its URL."""
    store = open_store(str(folder))
    clips = [render_bag(n) for n in range(CLIPS)]
    records = [(video, "train", _put_crop(store, video, clips[n % CLIPS])) for n, video in enumerate(_videos())]
    shards = [pack_shard(plan, store)[0] for plan in plan_shards(records, PackConfig(max_bags=MAX_BAGS))]
    store.put(path := f"quarantine/{digest(b'')[:32]}.jsonl", b"")
    body = version_body(
        labels=DFEW_LABELS,
        shards=shards,
        rows={"train": BAGS},
        crop={**dataclasses.asdict(CROP), "hash": CROP.hash},
        videos={"listed": len(records), "written": len(records), "quarantined": 0},
        quarantined={},
        quarantine={"path": path, "sha256": digest(b"")},
    )
    commit(store, body)
    return store.root


def shards_by_class(url: str) -> dict[str, list[str]]:
    """URLs of the tars by label."""
    dataset = open_dataset(url)
    out: dict[str, list[str]] = {label: [] for label in BAGS}
    for shard in dataset.body["shards"]:
        out[shard["label"]].append(dataset.store.url(shard["path"]))
    return out


def jpeg_bytes(url: str) -> dict[str, int]:
    """Bytes of the 48 JPEGs of each bag by key."""
    dataset = open_dataset(url)
    tars = (dataset.store.get(shard["path"]) for shard in dataset.body["shards"])
    bags = (bag for tar in tars for bag in read_bags(tar, "a shard of the benchmark"))
    return {bag.meta.key: sum(len(data) for members in bag.encoded for data in members) for bag in bags}


def copy_tree(folder: Path, url: str) -> None:
    """Every file below a folder -> the same key below a URL."""
    store = open_store(url)
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        store.put(path.relative_to(folder).as_posix(), path.read_bytes())


def render_bag(number: int) -> tuple[tuple[bytes, ...], ...]:
    """The JPEGs of one clip, by instance."""
    rng = np.random.default_rng([7, number])
    frames = CROP.instances * CROP.frames_per_instance
    label = tuple(BAGS)[number % len(BAGS)]
    clip_THW3 = render_clip(make_subject(rng), label, frames, CROP.size + 2 * _MARGIN, rng)
    inner = slice(_MARGIN, _MARGIN + CROP.size)
    jpegs = [encode_jpeg(np.ascontiguousarray(frame[inner, inner]), CROP.jpeg_quality) for frame in clip_THW3]
    n = CROP.frames_per_instance
    return tuple(tuple(jpegs[i * n : (i + 1) * n]) for i in range(CROP.instances))


def _videos() -> Iterator[Video]:
    for label, bags in BAGS.items():
        for i in range(bags):
            name = f"train/{label}/{i:04d}.mp4"
            yield Video(url=f"/nowhere/{name}", name=name, fingerprint="1", label=label, split="train", subject=name)


def _put_crop(store: Store, video: Video, encoded: tuple[tuple[bytes, ...], ...]) -> CropRecord:
    meta = BagMeta(
        key=f"{video.id}_0",
        video=video.name,
        track=0,
        instance_frames=(CROP.frames_per_instance,) * CROP.instances,
        seconds=1.9,
        fps=25.0,
        size=CROP.size,
        detector=CROP.detector,
        detector_score=0.9,
        crop=CROP.hash,
        codec=CROP.codec,
        boxes=((64.0, 64.0, 40.0),) * CROP.instances,
    )
    bag = Bag(meta, encoded)
    record = CropRecord(video=video.name, object=crop_key(video, CROP), frames=meta.frames, bags=(bag_stub(bag),))
    members = [("record.json", record.to_json().encode()), *bag_members(bag)]
    store.put(record.object, write_members(members) + b"\0" * 1024)
    return record
