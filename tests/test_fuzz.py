"""Damaged files by the hundred through the sandbox: bags or a reason, never a hang, never the end of this process.

The mutations are seeded, so a failure is found again by its name.
"""

from __future__ import annotations

import io
from collections.abc import Callable

import av
import numpy as np
import pytest
from PIL import Image

from pipeline.contract import CropConfig, Reason
from pipeline.demo_faces import Bytes
from pipeline.raw import RawClip
from pipeline.sandbox import crop_in_sandbox
from pipeline.shards import read_bags

CONFIG = CropConfig(
    size=64, instances=2, frames_per_instance=3, detect_every=6, max_pixels=2**20, max_seconds=60, max_decode_s=20
)
HEADER = 1024
SEEDS = 17


def encode(frames_THW3: Bytes, kind: str, codec: str, pixels: str = "yuv420p") -> bytes:
    file = io.BytesIO()
    with av.open(file, "w", format=kind) as container:
        stream = container.add_stream(codec, rate=25)
        stream.height, stream.width = frames_THW3.shape[1:3]
        stream.pix_fmt = pixels
        for frame_HW3 in frames_THW3:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame_HW3, format="rgb24")))
        container.mux(stream.encode())
    return file.getvalue()


def picture(frame_HW3: Bytes, kind: str) -> bytes:
    file = io.BytesIO()
    Image.fromarray(frame_HW3).save(file, kind)
    return file.getvalue()


@pytest.fixture(scope="module")
def whole(face_video: Callable[..., bytes], face_frames: Callable[..., Bytes]) -> dict[str, bytes]:
    frames_THW3 = face_frames()
    return {
        "mp4": face_video(),
        "webm": encode(frames_THW3, "webm", "libvpx-vp9"),
        "avi": encode(frames_THW3, "avi", "mpeg4"),
        **{kind: picture(frames_THW3[5], kind) for kind in ("jpeg", "png", "bmp", "webp")},
    }


def flip(data: bytearray, rng: np.random.Generator, low: int, high: int) -> None:
    for _ in range(int(rng.integers(1, 40))):
        data[int(rng.integers(low, high))] = int(rng.integers(256))


def mutate(data: bytes, other: bytes, how: str, rng: np.random.Generator) -> bytes:
    """One of four kinds of damage."""
    out = bytearray(data)
    if how == "header":  # MP4 has its index at the end
        at_end = bool(rng.integers(2))
        flip(out, rng, *((max(0, len(out) - HEADER), len(out)) if at_end else (0, min(len(out), HEADER))))
    elif how == "bytes":
        flip(out, rng, 0, len(out))
    elif how == "truncated":
        del out[int(rng.integers(1, len(out))) :]
    else:
        at, size = int(rng.integers(len(out))), int(rng.integers(1, 4000))
        start = int(rng.integers(max(1, len(other) - size)))
        out[at : at + int(rng.integers(size))] = other[start : start + size]
    return bytes(out)


def check(raw: RawClip, name: str) -> str:
    """Run the clip; returns `bags` or the reason."""
    made = crop_in_sandbox(raw, name=name, video_id="v", config=CONFIG)
    bags = list(read_bags(made.tar, name))
    if made.reason is None:
        assert len(bags) >= 1
        assert all(bag.meta.frames <= 6 for bag in bags)
        assert made.frames >= CONFIG.min_frames
        return "bags"
    assert Reason(made.reason)
    assert made.detail
    assert not bags
    return made.reason


def test_the_files_are_good_before_they_are_damaged(whole: dict[str, bytes]) -> None:
    for kind in ("mp4", "webm", "avi"):
        assert check(RawClip(whole[kind]), kind) == "bags"
    assert check(RawClip(tuple(whole[kind] for kind in ("jpeg", "png", "bmp", "webp"))), "images") == "bags"


@pytest.mark.parametrize("how", ["header", "bytes", "truncated", "spliced"])
@pytest.mark.parametrize(("kind", "other"), [("mp4", "avi"), ("webm", "mp4"), ("avi", "webm")])
def test_a_damaged_video_ends_in_bags_or_a_reason(whole: dict[str, bytes], kind: str, other: str, how: str) -> None:
    ends = set()
    for seed in range(SEEDS):
        rng = np.random.default_rng([seed, *how.encode(), *kind.encode()])
        ends.add(check(RawClip(mutate(whole[kind], whole[other], how, rng)), f"{kind} {how} {seed}"))
    assert len(ends) > 1  # else the damage is none, or all there is


@pytest.mark.parametrize("kind", ["jpeg", "png", "bmp", "webp"])
def test_damaged_images_end_in_bags_or_a_reason(whole: dict[str, bytes], kind: str) -> None:
    for seed in range(5):
        rng = np.random.default_rng([seed, *kind.encode()])
        ways = ["header", "bytes", "truncated", "spliced"] * 2
        damaged = tuple(mutate(whole[kind], whole["jpeg"], how, rng) for how in ways)
        check(RawClip((whole[kind], *damaged, whole[kind])), f"{kind} {seed}")
