"""The perceptual hash: copies are near, other takes of the same person are not, and the search finds what is near."""

from __future__ import annotations

import io
import itertools
from fractions import Fraction
from pathlib import Path

import av
import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.bags import video_to_bags
from pipeline.codec import decode_jpeg
from pipeline.contract import CropConfig
from pipeline.phash import (
    HEX_DIGITS,
    LOOK_BITS,
    LOOK_WEIGHT,
    MAX_DISTANCE,
    MAX_LOOK,
    MOTION_BITS,
    bag_phash,
    distance,
    near_duplicates,
)
from pipeline.video import RGB, read_frames

BITS = LOOK_BITS + MOTION_BITS


def moving(seed: int, frames: int = 24, side: int = 64) -> RGB:
    """(T, side, side, 3): smooth noise of a few low frequencies that changes in time."""
    rng = np.random.default_rng(seed)
    small = rng.normal(128, 60, (6, 5, 5, 3)).astype(np.float32)
    times = [np.linspace(0, 5, frames), np.arange(6)]
    big = np.stack([cv2.resize(f, (side, side), interpolation=cv2.INTER_CUBIC) for f in small])
    mixed = [big[i] * (1 - t + i) + big[min(5, i + 1)] * (t - i) for t in times[0] for i in [min(5, int(t))]]
    return np.clip(np.stack(mixed), 0, 255).astype(np.uint8)


def is_copy(a: str, b: str) -> bool:
    return distance(a, b)[0] <= MAX_LOOK and far(a, b) <= MAX_DISTANCE


def far(a: str, b: str) -> int:
    look, motion = distance(a, b)
    return motion + LOOK_WEIGHT * look


def packed(bits_NB: np.ndarray) -> list[str]:
    return [np.packbits(row).tobytes().hex() for row in bits_NB]


def test_the_hash_of_known_frames() -> None:
    """Whole numbers only: these digits are the same on every machine and in every release of schema 2."""
    t, y, x = np.mgrid[:12, :40, :40]
    ramp_THWC = ((3 * x + 5 * y + 7 * t * (x > 20))[..., None] % 256 * [1, 1, 1]).astype(np.uint8)
    assert bag_phash(ramp_THWC) == GOLDEN
    assert bag_phash(list(ramp_THWC)) == GOLDEN


GOLDEN = "8c336c53b416a54bb36c59972c5b94ac554c93ac4b96a5cbb36c5968d3a46952554c93ac496a5ab4"


def test_bits_are_signs_of_a_cosine_transform() -> None:
    """Against the definition in floating point, on frames that are the grid already."""
    frames_THWC = np.random.default_rng(5).integers(0, 256, (16, 16, 16, 3), dtype=np.uint8)
    grey = frames_THWC @ np.array([77, 150, 29]) / 256
    basis = np.cos(np.pi * np.outer(np.arange(8), 2 * np.arange(16) + 1) / 32)
    look = basis @ (grey.mean(0) - grey.mean()) @ basis.T
    motion = np.einsum("ft,ky,lx,tyx->fkl", basis[1:5], basis, basis, grey)
    bits = np.unpackbits(np.frombuffer(bytes.fromhex(bag_phash(frames_THWC)), np.uint8))
    expected = np.concatenate([look.ravel(), motion.ravel()])
    clear = np.abs(expected) > 1  # of values about 50
    assert clear.mean() > 0.9
    assert (bits[clear] == (expected[clear] > 0)).all()


@pytest.mark.parametrize("shape", [(1, 16, 16), (3, 17, 31), (48, 128, 128), (5, 200, 100)])
def test_any_shape_has_a_hash(shape: tuple[int, int, int]) -> None:
    frames_THWC = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    text = bag_phash(frames_THWC)
    assert len(text) == HEX_DIGITS
    assert bytes.fromhex(text)


def test_a_still_clip_has_no_motion() -> None:
    frame = moving(1)[:1]
    text = bag_phash(np.repeat(frame, 30, axis=0))
    assert set(text[LOOK_BITS // 4 :]) == {"0"}
    assert set(text[: LOOK_BITS // 4]) != {"0"}


@pytest.mark.parametrize("seed", range(5))
def test_size_light_and_noise_do_not_matter_and_content_does(seed: int) -> None:
    frames_THWC = moving(seed)
    rng = np.random.default_rng(seed)
    larger = np.stack([cv2.resize(f, (150, 150)) for f in frames_THWC])
    lighter = np.clip(frames_THWC * 1.1 + 8 + rng.normal(0, 4, frames_THWC.shape), 0, 255).astype(np.uint8)
    text = bag_phash(frames_THWC)
    assert is_copy(text, bag_phash(larger))
    assert is_copy(text, bag_phash(lighter))
    assert is_copy(text, bag_phash(frames_THWC[::2]))
    assert not is_copy(text, bag_phash(frames_THWC[::-1]))  # the same pictures, another motion
    assert not is_copy(text, bag_phash(moving(seed + 100)))


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(2, 90))
def test_the_search_finds_what_comparing_all_pairs_finds(seed: int, rows: int) -> None:
    """The nearest copy of each row in another split, for families of copies at every distance below the limit."""
    rng = np.random.default_rng(seed)
    bits_NB = rng.integers(0, 2, (rows, BITS), dtype=np.uint8)
    for row in range(1, rows):
        if rng.random() < 0.5:
            bits_NB[row] = bits_NB[rng.integers(0, row)]
            bits_NB[row, rng.choice(LOOK_BITS, rng.integers(0, 5), replace=False)] ^= 1
            bits_NB[row, LOOK_BITS + rng.choice(MOTION_BITS, rng.integers(0, 45), replace=False)] ^= 1
    hashes = packed(bits_NB)
    splits = [["train", "test", "val"][n] for n in rng.integers(0, 3, rows)]
    found = near_duplicates(hashes, splits)
    nearest: dict[int, int] = {}
    for i, j in itertools.combinations(range(rows), 2):
        if splits[i] != splits[j] and is_copy(hashes[i], hashes[j]):
            d = far(hashes[i], hashes[j])
            nearest[i], nearest[j] = min(nearest.get(i, 999), d), min(nearest.get(j, 999), d)
    assert all(far(hashes[i], hashes[j]) == d and splits[i] != splits[j] and i < j for i, j, d in found)
    told: dict[int, int] = {}
    for i, j, d in found:
        told[i], told[j] = min(told.get(i, 999), d), min(told.get(j, 999), d)
    firsts = {(h, s): i for i, (h, s) in reversed(list(enumerate(zip(hashes, splits, strict=True))))}
    assert told == {i: d for i, d in nearest.items() if i in firsts.values()}


def test_a_crowd_of_equal_pictures_is_told_in_few_words() -> None:
    """Thousands of near-equal still clips: bounded work, one line a clip at most, none lost."""
    rng = np.random.default_rng(0)
    bits_NB = np.zeros((4000, BITS), np.uint8)
    bits_NB[:, :LOOK_BITS] = rng.random((4000, LOOK_BITS)) < 0.02
    found = near_duplicates(packed(bits_NB), ["train", "test"] * 2000)
    assert 500 < len(found) <= 4000


def test_rows_without_a_hash_and_one_split_give_no_pair() -> None:
    text = bag_phash(moving(0))
    assert near_duplicates([], []) == []
    assert near_duplicates(["", ""], ["train", "test"]) == []
    assert near_duplicates([text, text], ["train", "train"]) == []
    assert near_duplicates([text, "", text, text], ["train", "val", "test", "test"]) == [(0, 2, 0)]


def encode(frames: list[RGB], codec: str = "libx264", **options: str) -> bytes:
    out = io.BytesIO()
    with av.open(out, "w", format="mp4") as container:
        stream = container.add_stream(codec, rate=Fraction(30), options={"preset": "veryfast", **options})
        stream.height, stream.width, stream.pix_fmt = *frames[0].shape[:2], "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")))
        container.mux(stream.encode())
    return out.getvalue()


def hash_of(data: bytes) -> str:
    bags, _ = video_to_bags(data, name="clip", video_id="0" * 16, config=CropConfig())
    return bags[0].meta.phash


@pytest.mark.slow
def test_real_copies_are_near_and_other_takes_are_not(media: Path) -> None:
    """Re-encodings of one clip in other containers and codecs, and the takes that are hardest to tell apart."""
    stems = ("book", "no", "yes", "again", "please", "sorry", "bird")
    takes = {stem: hash_of((media / "asl" / f"{stem}.mkv").read_bytes()) for stem in stems}
    copies = {
        n: hash_of((media / "edge" / n).read_bytes())
        for n in ("av1.mp4", "vp9.webm", "hevc_10bit.mp4", "faststart.mp4")
    }
    assert not [pair for pair in itertools.combinations(takes, 2) if is_copy(takes[pair[0]], takes[pair[1]])]
    names = [*takes, *copies]
    found = near_duplicates([*takes.values(), *copies.values()], ["train"] * len(takes) + ["test"] * len(copies))
    assert {(names[i], names[j]) for i, j, _ in found} == {("book", name) for name in copies}


@pytest.mark.slow
def test_a_real_clip_scaled_darker_at_half_the_rate_is_a_copy(media: Path) -> None:
    data = (media / "asl" / "walk.mkv").read_bytes()
    frames = [frame.rgb_HWC for frame in read_frames(data, CropConfig())]
    text = hash_of(data)
    assert is_copy(text, hash_of(encode([cv2.resize(f, (960, 720)) for f in frames], crf="30")))
    assert is_copy(text, hash_of(encode([(f * 0.9).astype(np.uint8) for f in frames[::2]])))
    assert is_copy(text, hash_of(encode(frames[4:])))


def test_the_hash_of_a_bag_is_of_its_frames(face_video: object) -> None:
    data = face_video("happy", 24, 200)  # type: ignore[operator]
    bags, _ = video_to_bags(data, name="clip", video_id="0" * 16, config=CropConfig())
    frames = [decode_jpeg(jpeg) for instance in bags[0].encoded for jpeg in instance]
    look, motion = distance(bags[0].meta.phash, bag_phash(frames))
    assert look <= 3
    assert motion <= 24  # JPEG moves signs of weak frequencies
