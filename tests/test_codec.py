"""Frames -> members -> frames: near the source, in order, the same bytes each time; damage is an error in words."""

from __future__ import annotations

import base64
import dataclasses
import re
import subprocess
import sys
import tracemalloc
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path

import av
import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import codec
from pipeline.bags import Bag
from pipeline.codec import MAX_SIDE, decode_instance, decode_jpeg, encode_instance, encode_jpeg, find_fault
from pipeline.contract import CODECS, BagMeta, CropConfig, MicaclError, PackConfig, Video, digest
from pipeline.dataset import commit, version_body
from pipeline.demo_faces import Bytes
from pipeline.forget import forget
from pipeline.pack import pack_shard, plan_shards
from pipeline.report import write_report
from pipeline.storage import open_store
from pipeline.verify import verify_dataset
from pipeline.video import RGB, read_frames
from tests.tiny_dataset import CROP, INSTANCES, make_dataset, put_crop, tiny_bag

LEAST_PSNR_DB = {("drawn", "jpeg"): 37.3, ("drawn", "h264"): 36.1, ("real", "jpeg"): 43.0, ("real", "h264"): 41.0}
"""Of the worst of 12 faces of 128 px, JPEG at quality 90; about 1 dB below what they have."""
MOST_KB = {("drawn", "jpeg"): 62, ("drawn", "h264"): 8.3, ("real", "jpeg"): 41, ("real", "h264"): 4.5}


def psnr_db(a: Bytes, b: Bytes) -> float:
    return float(10 * np.log10(255**2 / np.mean((a.astype(float) - b) ** 2)))


def meta_of(codec_name: str, frames: int, size: int) -> BagMeta:
    return BagMeta(
        key="5f0c9a1b2c3d4e5f_0",
        video="a.mp4",
        track=0,
        instance_frames=(frames,),
        seconds=1.0,
        fps=25.0,
        size=size,
        detector="yunet-2023mar",
        detector_score=0.9,
        crop="0123456789ab",
        boxes=((64.0, 64.0, 40.0),),
        codec=codec_name,
    )


def there_and_back(frames_HWC: Sequence[RGB], codec_name: str) -> tuple[tuple[bytes, ...], Bytes]:
    members = encode_instance(frames_HWC, codec_name, 90)
    n = len(frames_HWC)
    decoded = decode_instance(members, meta_of(codec_name, n, frames_HWC[0].shape[0]), 0, range(n))
    return members, np.stack(decoded)


def noise(frames: int, size: int, seed: int = 0) -> list[Bytes]:
    """Soft noise that differs from frame to frame."""
    rng = np.random.default_rng(seed)
    small = [rng.integers(0, 256, (max(2, size // 4), max(2, size // 4), 3), dtype=np.uint8) for _ in range(frames)]
    return [np.asarray(cv2.resize(s, (size, size), interpolation=cv2.INTER_CUBIC), np.uint8) for s in small]


def steps(frames: int, size: int = 32) -> list[Bytes]:
    """Flat frames whose brightness says their number."""
    return [np.full((size, size, 3), 20 + i * 200 // max(1, frames - 1), np.uint8) for i in range(frames)]


def scaled(frames_HWC: Sequence[RGB], size: int = 128) -> list[Bytes]:
    return [np.asarray(cv2.resize(f, (size, size), interpolation=cv2.INTER_AREA), np.uint8) for f in frames_HWC]


@pytest.fixture(params=["drawn", "real"])
def faces(request: pytest.FixtureRequest, face_frames: Callable[..., Bytes]) -> tuple[str, list[Bytes]]:
    """Twelve consecutive frames."""
    if request.param == "drawn":
        return "drawn", scaled(list(face_frames()))
    clip = request.getfixturevalue("media") / "asl" / "again.mkv"
    whole = [f.rgb_HWC for f in read_frames(clip.read_bytes(), CropConfig())]
    return "real", scaled([f[30:190, 240:400] for f in whole[20:32]])


# Fidelity.


@pytest.mark.parametrize("name", CODECS)
def test_a_face_stays_near_its_source(faces: tuple[str, list[Bytes]], name: str) -> None:
    kind, source = faces
    members, back_THWC = there_and_back(source, name)
    assert back_THWC.shape == (12, 128, 128, 3)
    assert back_THWC.dtype == np.uint8
    worst = min(psnr_db(a, b) for a, b in zip(source, back_THWC, strict=True))
    assert worst > LEAST_PSNR_DB[kind, name]
    assert sum(map(len, members)) < MOST_KB[kind, name] * 1000


def test_h264_is_the_smaller_one(faces: tuple[str, list[Bytes]]) -> None:
    jpeg, h264 = (sum(map(len, there_and_back(faces[1], name)[0])) for name in ("jpeg", "h264"))
    assert h264 < jpeg / 6


def test_jpeg_follows_its_quality(face_frames: Callable[..., Bytes]) -> None:
    for frame_HWC in face_frames()[::4]:
        face_HWC = np.asarray(cv2.resize(frame_HWC, (128, 128), interpolation=cv2.INTER_AREA))
        data = encode_jpeg(face_HWC, 90)
        back_HWC = decode_jpeg(data)
        assert back_HWC.shape == (128, 128, 3)
        assert back_HWC.dtype == np.uint8
        assert psnr_db(face_HWC, decode_jpeg(encode_jpeg(face_HWC, 30))) < psnr_db(face_HWC, back_HWC)
        assert len(data) < 128 * 128 * 3 / 4
        assert encode_jpeg(face_HWC, 90) == data


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize(
    "colour", [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0), (250, 10, 130), (0, 0, 0), (255, 255, 255)]
)
def test_colours_stay_in_their_place(name: str, colour: tuple[int, int, int]) -> None:
    """A wrong matrix or range moves a saturated patch by 10 levels and more."""
    patch_HWC = np.full((64, 64, 3), 128, np.uint8)
    patch_HWC[16:48, 16:48] = colour
    _, back_THWC = there_and_back([patch_HWC] * 3, name)
    assert np.abs(back_THWC[:, 24:40, 24:40].astype(int) - colour).max() < 6
    assert np.abs(back_THWC[:, :12].astype(int) - 128).max() < 6


def test_a_player_that_goes_by_the_tags_shows_the_same_colours() -> None:
    source = [np.full((32, 32, 3), (250, 10, 130), np.uint8)] * 3
    pictures = h264_pictures(encode_instance(source, "h264", 90)[0])
    assert {(p.colorspace, p.color_range) for p in pictures} == {(6, 1)}
    assert np.abs(pictures[1].to_ndarray(format="rgb24").astype(int) - source[1]).max() < 6


# Number and order.


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("frames", [1, 2, 3, 12, 40])
def test_frames_come_in_order(name: str, frames: int) -> None:
    source = steps(frames)
    members, back_THWC = there_and_back(source, name)
    assert len(members) == codec.member_count(name, frames) == (1 if name == "h264" else frames)
    levels = back_THWC.mean(axis=(1, 2, 3))
    assert np.abs(levels - [f.mean() for f in source]).max() < 2


@pytest.mark.parametrize("name", CODECS)
@settings(max_examples=25, deadline=None, derandomize=True)
@given(frames=st.integers(1, 8), wanted=st.lists(st.integers(0, 7), max_size=10))
def test_frames_are_given_as_they_are_wanted(name: str, frames: int, wanted: list[int]) -> None:
    """Any order, with repeats; the same pixels as when all are decoded."""
    wanted = [n % frames for n in wanted]
    members, whole_THWC = there_and_back(noise(frames, 16), name)
    found = decode_instance(members, meta_of(name, frames, 16), 0, wanted)
    assert len(found) == len(wanted)
    assert all(np.array_equal(frame, whole_THWC[n]) for frame, n in zip(found, wanted, strict=True))


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("size", [16, 17, 18, 31, 112, 127, 129, 224])
def test_every_size_is_kept(name: str, size: int, face_frames: Callable[..., Bytes]) -> None:
    """Odd ones too: H.264 in 4:2:0 has none, so the stream has one row and column more."""
    source = scaled(list(face_frames()[:3]), size)
    _, back_THWC = there_and_back(source, name)
    assert back_THWC.shape == (3, size, size, 3)
    assert min(psnr_db(a, b) for a, b in zip(source, back_THWC, strict=True)) > 26
    edges = [slice(-1, None), slice(0, 1)]
    for edge in edges:
        assert psnr_db(np.stack(source)[:, edge], back_THWC[:, edge]) > 24
        assert psnr_db(np.stack(source)[:, :, edge], back_THWC[:, :, edge]) > 24


@pytest.mark.parametrize("name", CODECS)
def test_the_largest_frame_is_read_again(name: str) -> None:
    """More than one piece for the parser, and just at the cap of pixels."""
    source = noise(2, MAX_SIDE)
    members, back_THWC = there_and_back(source, name)
    assert max(map(len, members)) > 2**16
    assert psnr_db(source[1], back_THWC[1]) > 22


# The same bytes each time.


@pytest.mark.parametrize("name", CODECS)
def test_the_same_frames_give_the_same_bytes(name: str) -> None:
    """Twice, in threads at once, and in another process with another hash seed."""
    source = noise(12, 64)
    first = encode_instance(source, name, 90)
    with ThreadPoolExecutor(4) as pool:
        assert set(pool.map(lambda _: encode_instance(source, name, 90), range(8))) == {first}
    code = f"from tests.test_codec import *; print(digest(b''.join(encode_instance(noise(12, 64), {name!r}, 90))))"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == digest(b"".join(first))


@pytest.mark.parametrize("asm", ["0", "SSE2"])
def test_a_processor_of_fewer_instructions_gives_the_same_bytes(
    asm: str, face_frames: Callable[..., Bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without `cpu-independent` x264 takes other decisions where it has AVX2 than where it has not."""
    source = scaled(list(face_frames()))
    here = encode_instance(source, "h264", 90)
    slower = {**codec._X264, "x264-params": f"{codec._X264['x264-params']}:asm={asm}"}
    monkeypatch.setattr(codec, "_X264", slower)
    assert encode_instance(source, "h264", 90) == here


def test_threads_decode_the_same() -> None:
    members, whole_THWC = there_and_back(noise(12, 64), "h264")
    with ThreadPoolExecutor(4) as pool:
        for back in pool.map(lambda _: decode_instance(members, meta_of("h264", 12, 64), 0, range(12)), range(16)):
            assert np.array_equal(np.stack(back), whole_THWC)


def nal_types(data: bytes) -> list[int]:
    return [part[0] & 31 for part in data.replace(b"\0\0\0\1", b"\0\0\1").split(b"\0\0\1")[1:]]


def test_a_stream_holds_parameters_and_pictures_and_nothing_else() -> None:
    """No settings message (type 6), which names the release of x264; one IDR picture (5), the first."""
    (data,) = encode_instance(noise(12, 64), "h264", 90)
    assert nal_types(data) == [7, 8, 5] + [1] * 11
    assert b"x264" not in data


# Damage.


def h264_pictures(data: bytes) -> list[av.VideoFrame]:
    context = av.CodecContext.create("h264", "r")
    packets = [*context.parse(data), *context.parse(None), None]
    return [picture for packet in packets for picture in context.decode(packet)]


def foreign_stream(frames: int, width: int, height: int, pix_fmt: str = "yuv420p", name: str = "libx264") -> bytes:
    context = av.CodecContext.create(name, "w")
    context.width, context.height, context.pix_fmt, context.time_base = width, height, pix_fmt, Fraction(1, 25)
    context.options = {"preset": "ultrafast", "crf": "40"} if name == "libx264" else {}
    grey_HWC = np.full((height, width, 3), 128, np.uint8)
    packets = []
    for i in range(frames):
        frame = av.VideoFrame.from_ndarray(grey_HWC, format="rgb24").reformat(format=pix_fmt)
        frame.pts = i
        packets += context.encode(frame)
    return b"".join(map(bytes, [*packets, *context.encode(None)]))


def refused(data: bytes, match: str, frames: int = 4, size: int = 32) -> None:
    meta = meta_of("h264", frames, size)
    with pytest.raises(MicaclError, match=match) as caught:
        decode_instance([data], meta, 0, range(frames))
    assert f"5f0c9a1b2c3d4e5f_0 instance 00 is not the H.264 stream of {frames} frames of {size} px" in str(
        caught.value
    )
    assert "micacl verify" in caught.value.remedy
    assert find_fault([data], meta, 0).startswith("Instance 00 is not the H.264 stream")


GOOD = encode_instance(noise(4, 32), "h264", 90)[0]


@pytest.mark.parametrize("data", [b"", b"\0" * 100, b"no stream at all", bytes(range(256)) * 20])
def test_what_is_no_stream_is_an_error_in_words(data: bytes) -> None:
    refused(data, "H.264")


def test_a_stream_of_another_number_of_frames() -> None:
    refused(GOOD, "more than 3 pictures", frames=3)
    refused(GOOD, r"\(4 frames\)", frames=5)
    assert find_fault([GOOD], meta_of("h264", 4, 32), 0) == ""


def test_a_stream_of_another_size_or_form() -> None:
    refused(GOOD, "a picture of 32x32 px", size=64)
    refused(foreign_stream(4, 64, 32), "64x32")
    refused(foreign_stream(4, 32, 32, "yuv444p"), "yuv444p")
    refused(foreign_stream(4, 32, 32, "yuvj420p"), "yuvj420p")
    refused(foreign_stream(4, 32, 32, name="mpeg4"), "H.264")


def test_huge_pictures_are_not_decoded() -> None:
    """8192 x 4096 px would take 50 MB each; the cap is met before a picture is made."""
    data = foreign_stream(2, 8192, 4096)
    assert len(h264_pictures(data)) == 2
    refused(data, "Invalid data", frames=2)


@pytest.mark.slow
def test_many_pictures_in_few_bytes_are_not_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    data = foreign_stream(2000, 32, 32)
    assert len(data) < 100_000
    decoded: list[int] = []
    sound = codec._sound
    monkeypatch.setattr(codec, "_sound", lambda picture: (decoded.append(1), sound(picture))[1])
    refused(data, "more than 4 pictures")
    assert len(decoded) <= 2 * 4  # two readings of four


def test_a_stream_over_the_cap_is_not_parsed() -> None:
    refused(GOOD + b"\0" * codec.MAX_STREAM_BYTES, "the cap is 16777216")


@pytest.mark.parametrize("at", range(0, len(GOOD), max(1, len(GOOD) // 40)))
def test_a_stream_that_is_cut_off(at: int) -> None:
    refused(GOOD[:at], "H.264")


@settings(max_examples=150, deadline=None, derandomize=True)
@given(flips=st.lists(st.tuples(st.integers(0, len(GOOD) - 1), st.integers(1, 255)), min_size=1, max_size=8))
def test_a_stream_with_flipped_bits(flips: list[tuple[int, int]]) -> None:
    data = bytearray(GOOD)
    for at, bits in flips:
        data[at] ^= bits
    form_or_words(bytes(data))


@settings(max_examples=100, deadline=None, derandomize=True)
@given(start=st.integers(0, len(GOOD)), junk=st.binary(max_size=200), end=st.integers(0, len(GOOD)))
def test_a_stream_with_foreign_bytes(start: int, junk: bytes, end: int) -> None:
    form_or_words(GOOD[:start] + junk + GOOD[end:])


def form_or_words(data: bytes) -> None:
    """A decoder cannot know all damage (the bag's sha256 does); what it gives is of the right form or an error."""
    try:
        found = decode_instance([data], meta_of("h264", 4, 32), 0, [3, 0])
    except MicaclError:
        return
    assert [frame.shape for frame in found] == [(32, 32, 3)] * 2


def test_most_damage_is_noticed() -> None:
    noticed = 0
    for at in range(40, len(GOOD), 7):
        data = bytearray(GOOD)
        data[at] ^= 0xFF
        noticed += bool(find_fault([bytes(data)], meta_of("h264", 4, 32), 0))
    assert noticed > 0.5 * len(range(40, len(GOOD), 7))


def test_a_meta_that_claims_many_frames_costs_no_memory() -> None:
    tracemalloc.start()
    try:
        refused(GOOD, r"\(4 frames\)", frames=4096)
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


def test_a_jpeg_of_another_size_than_its_bag() -> None:
    members = encode_instance(noise(2, 32), "jpeg", 90)
    with pytest.raises(MicaclError, match=r"5f0c9a1b2c3d4e5f_0 instance 00 frame 001 is 32x32 px, its json says 64 px"):
        decode_instance(members, meta_of("jpeg", 2, 64), 0, [1])
    assert find_fault(members, meta_of("jpeg", 2, 64), 0) == "Frame 00.000 is 32x32 px, its json says 64 px."
    assert find_fault([members[0], b"x"], meta_of("jpeg", 2, 32), 0).startswith("Frame 00.001 is no JPEG")
    assert find_fault(members, meta_of("jpeg", 2, 32), 0) == ""


def test_jpegs_that_are_not_wanted_are_not_touched() -> None:
    members = encode_instance(noise(3, 32), "jpeg", 90)
    assert len(decode_instance([b"", members[1], b""], meta_of("jpeg", 3, 32), 0, [1, 1])) == 2


@pytest.mark.parametrize(
    "data", [b"", b"\xff\xd8", b"no picture at all", encode_jpeg(np.zeros((32, 32, 3), np.uint8), 90)[:200]]
)
def test_what_is_no_jpeg_is_an_error_in_words(data: bytes) -> None:
    with pytest.raises(MicaclError, match=r"frame 7 is not a JPEG.*verify"):
        decode_jpeg(data, "frame 7")


def test_a_huge_jpeg_is_not_decoded() -> None:
    with pytest.raises(MicaclError, match="1025x8"):
        decode_jpeg(encode_jpeg(np.zeros((8, MAX_SIDE + 1, 3), np.uint8), 90))
    assert decode_jpeg(encode_jpeg(np.zeros((8, MAX_SIDE, 3), np.uint8), 90)).shape == (8, MAX_SIDE, 3)


# The commands that look at stored frames.


def test_a_dataset_of_h264_is_verified_shown_and_forgotten(tmp_path: Path) -> None:
    counts = {"train": {"happy": 4, "sad": 2}, "test": {"happy": 2}}
    crop = dataclasses.replace(CROP, codec="h264")
    url = make_dataset(tmp_path, counts, 0, crop=crop)
    assert verify_dataset(url)["problems"] == []
    page = write_report(url).decode()
    pictures = [base64.b64decode(data) for data in re.findall(r"data:image/jpeg;base64,([^\"]+)", page)]
    assert len(pictures) == INSTANCES * 8
    assert {decode_jpeg(picture).shape for picture in pictures} == {(CROP.size, CROP.size, 3)}
    assert forget(url, subjects=["s1"])["bags"] == 2
    assert verify_dataset(url)["problems"] == []


def test_a_stream_that_is_not_what_its_json_says_is_found_by_verify(tmp_path: Path) -> None:
    """Right hashes over wrong content: what a faulty writer would leave behind."""
    crop = dataclasses.replace(CROP, codec="h264")
    video = Video(url="/nowhere/a.mp4", name="a.mp4", fingerprint="1", label="happy", split="train", subject="s")
    bag = tiny_bag(video, ("happy",), 0, crop)
    bad = Bag(bag.meta, (bag.encoded[0], (b"junk",), *bag.encoded[2:]))
    store = open_store(str(tmp_path))
    (plan,) = plan_shards([(video, "train", put_crop(store, video, [bad], crop))], PackConfig())
    shard, _ = pack_shard(plan, store)
    commit(
        store, version_body(labels=("happy",), shards=[shard], rows={"train": {"happy": 1}}, crop={"hash": crop.hash})
    )
    problems = [p["what"] for p in verify_dataset(store.root)["problems"]]
    assert len(problems) >= 1
    assert any(what.startswith("Instance 01 is not the H.264 stream of 3 frames of 32 px") for what in problems)
