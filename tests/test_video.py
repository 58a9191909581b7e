"""Bytes of a video -> frames: real files with every kind of fault, caps, and damage by the dozen."""

from __future__ import annotations

import io
import struct
import time
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
import pytest

from pipeline import video as video_room
from pipeline.contract import CropConfig, Quarantined, Reason
from pipeline.demo import TEXT, encode_mp4, hum, moving_gradient
from pipeline.demo_faces import Bytes
from pipeline.video import Decode, Frame, read_frames

CONFIG = CropConfig()
LANDSCAPE, PORTRAIT, WIDE = (480, 640), (640, 480), (480, 853)

# name: frames, packets that do not decode, (height, width), seconds to the last frame
REAL = {
    "av1.mp4": (109, 0, LANDSCAPE, 3.6),
    "corrupt_middle.mp4": (108, 1, LANDSCAPE, 3.6),
    "face_noface.mov": (169, 0, (540, 960), 6.36),
    "faststart.mp4": (109, 0, LANDSCAPE, 3.6),
    "h264_audio.mp4": (109, 0, LANDSCAPE, 3.6),
    "hard_cut_two_people.mp4": (174, 0, LANDSCAPE, 5.8),
    "hevc_10bit.mp4": (109, 0, LANDSCAPE, 3.6),
    "mpeg4.avi": (60, 0, LANDSCAPE, 1.967),
    "no_face_gray.mp4": (25, 0, (240, 320), 0.96),
    "odd_223x167_444.mp4": (109, 0, (167, 223), 3.6),
    "rotation_flag_90.mp4": (109, 0, PORTRAIT, 3.6),
    "sar_4_3.mp4": (30, 0, WIDE, 0.967),
    "truncated_faststart.mp4": (47, 1, LANDSCAPE, 1.533),
    "two_people_hstack.mp4": (67, 0, (480, 1280), 2.2),
    "vfr.mp4": (57, 0, LANDSCAPE, 3.6),
    "vp9.webm": (109, 0, LANDSCAPE, 3.6),
}
REAL_BROKEN = {
    "audio_only.mp4": Reason.NO_VIDEO_STREAM,
    "text.mp4": Reason.UNREADABLE,
    "truncated_moov_at_end.mp4": Reason.UNREADABLE,
    "zero_byte.mp4": Reason.EMPTY,
}


def frames_of(data: bytes, config: CropConfig = CONFIG) -> tuple[list[Frame], Decode]:
    report = Decode()
    return list(read_frames(data, config, report)), report


def reason_of(data: bytes, config: CropConfig = CONFIG) -> Reason:
    with pytest.raises(Quarantined) as caught:
        frames_of(data, config)
    assert caught.value.detail
    return caught.value.reason


def boxes(data: bytes, kind: bytes) -> list[int]:
    """Where the boxes of a kind start in an MP4."""
    return [i - 4 for i in range(len(data)) if data.startswith(kind, i)]


@pytest.fixture(scope="module")
def quadrants() -> Bytes:
    """Eight frames, 128 high and 192 wide, whose four quarters are red, green / blue, white."""
    frame_HWC = np.zeros((128, 192, 3), np.uint8)
    frame_HWC[:64, :96, 0], frame_HWC[:64, 96:, 1], frame_HWC[64:, :96, 2], frame_HWC[64:, 96:] = 255, 255, 255, 255
    return np.repeat(frame_HWC[None], 8, 0)


@pytest.fixture(scope="module")
def video(quadrants: Bytes) -> bytes:
    return encode_mp4(quadrants, hum(8, np.random.default_rng(0)))


# Real files.


def test_every_real_file_has_an_expectation(media: Path) -> None:
    assert {p.name for p in (media / "edge").iterdir()} == {*REAL, *REAL_BROKEN}


@pytest.mark.parametrize("name", REAL)
def test_a_real_file_decodes(media: Path, name: str) -> None:
    frames, bad, size, seconds = REAL[name]
    count, times, last, report = 0, [], None, Decode()
    for frame in read_frames((media / "edge" / name).read_bytes(), CONFIG, report):
        assert frame.index == count
        assert frame.rgb_HWC.shape == (*size, 3)
        assert frame.rgb_HWC.dtype == np.uint8
        count += 1
        times.append(frame.t_s)
        last = frame
    assert (count, report.frames, report.bad_packets) == (frames, frames, bad)
    assert len(report.notes) == bad
    assert times[0] == 0
    assert times == sorted(set(times))
    assert last is not None
    assert last.t_s == pytest.approx(seconds, abs=0.01)


@pytest.mark.parametrize("name", REAL_BROKEN)
def test_a_broken_real_file_has_its_reason(media: Path, name: str) -> None:
    assert reason_of((media / "edge" / name).read_bytes()) is REAL_BROKEN[name]


def test_a_variable_frame_rate_stays_variable(media: Path) -> None:
    frames, _ = frames_of((media / "edge" / "vfr.mp4").read_bytes())
    steps = np.diff([f.t_s for f in frames])
    assert steps.max() > 1.8 * steps.min() > 0


def test_a_corrupted_middle_costs_one_frame_and_no_other(media: Path) -> None:
    whole, _ = frames_of((media / "edge" / "faststart.mp4").read_bytes())
    hurt, _ = frames_of((media / "edge" / "corrupt_middle.mp4").read_bytes())
    times = [round(f.t_s, 3) for f in whole]
    assert len({round(f.t_s, 3) for f in hurt} & set(times)) == 108
    assert all(np.array_equal(a.rgb_HWC, b.rgb_HWC) for a, b in zip(whole[:19], hurt[:19], strict=True))
    after = [np.abs(a.rgb_HWC.astype(int) - b.rgb_HWC).mean() for a, b in zip(whole[38:], hurt[37:], strict=True)]
    assert max(after) < 10  # decoded from a picture that is not whole: near, not equal


def test_the_real_rotation_flag_turns_the_picture(media: Path) -> None:
    upright, _ = frames_of((media / "edge" / "faststart.mp4").read_bytes())
    turned, _ = frames_of((media / "edge" / "rotation_flag_90.mp4").read_bytes())
    assert np.array_equal(turned[5].rgb_HWC, np.rot90(upright[5].rgb_HWC, 1))


# Geometry of synthetic files; the expectation follows from the file format, not from FFmpeg.


def corners(rgb_HWC: Bytes) -> list[str]:
    height, width = rgb_HWC.shape[:2]
    names = {(1, 0, 0): "red", (0, 1, 0): "green", (0, 0, 1): "blue", (1, 1, 1): "white"}
    at = [(y, x) for y in (height // 4, 3 * height // 4) for x in (width // 4, 3 * width // 4)]
    return [names[tuple(int(v > 128) for v in rgb_HWC[y, x])] for y, x in at]  # type: ignore[index]


@pytest.mark.parametrize(
    ("matrix", "shape", "seen"),
    [
        ((1, 0, 0, 1), (128, 192), ["red", "green", "blue", "white"]),
        ((0, 1, -1, 0), (192, 128), ["blue", "red", "white", "green"]),  # x -> down: clockwise
        ((0, -1, 1, 0), (192, 128), ["green", "white", "red", "blue"]),
        ((-1, 0, 0, -1), (128, 192), ["white", "blue", "green", "red"]),
    ],
)
def test_the_display_matrix_of_an_mp4_is_honoured(
    video: bytes, matrix: tuple[int, ...], shape: tuple[int, int], seen: list[str]
) -> None:
    """ISO 14496-12, 8.3.2: x' = a x + c y, y' = b x + d y, with y down."""
    data = bytearray(video)
    at = boxes(video, b"tkhd")[0] + 8 + 40
    a, b, c, d = (v << 16 for v in matrix)
    data[at : at + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    frames, _ = frames_of(bytes(data))
    assert len(frames) == 8
    assert frames[3].rgb_HWC.shape == (*shape, 3)
    assert corners(frames[3].rgb_HWC) == seen


def test_frames_are_the_ones_that_were_encoded(face_frames: Callable[..., Bytes]) -> None:
    sent_THWC = face_frames()
    frames, report = frames_of(encode_mp4(sent_THWC, hum(len(sent_THWC), np.random.default_rng(0))))
    assert (len(frames), report.frames, report.bad_packets) == (12, 12, 0)
    assert [f.t_s for f in frames] == pytest.approx([i / 25 for i in range(12)], abs=1e-3)
    error = np.mean([np.abs(f.rgb_HWC.astype(int) - sent).mean() for f, sent in zip(frames, sent_THWC, strict=True)])
    assert error < 6  # of 255, H.264 at crf 23; the next frame would be as near, so order is told by the times


# Caps and files that are no video.


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"max_bytes": 100}, Reason.TOO_MANY_BYTES),
        ({"max_pixels": 128 * 192 - 1}, Reason.TOO_MANY_PIXELS),
        ({"max_seconds": 0.2}, Reason.TOO_LONG),
        ({"max_decode_s": 0.0}, Reason.TOO_SLOW),
    ],
)
def test_each_cap_has_its_reason(video: bytes, change: dict[str, float], reason: Reason) -> None:
    assert reason_of(video, CropConfig(**change)) is reason  # type: ignore[arg-type]


@pytest.mark.parametrize("change", [{"max_pixels": 128 * 192}, {"max_seconds": 7 / 25 + 0.001}])
def test_a_cap_is_not_met_by_a_video_at_it(video: bytes, change: dict[str, float]) -> None:
    assert len(frames_of(video, CropConfig(**change))[0]) == 8  # type: ignore[arg-type]


def test_the_caps_come_before_the_bytes_are_decoded(video: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(av, "open", lambda *_, **__: pytest.fail("opened"))
    assert reason_of(video, CropConfig(max_bytes=len(video) - 1)) is Reason.TOO_MANY_BYTES
    assert reason_of(b"") is Reason.EMPTY


def test_stretched_pixels_count_towards_the_cap(video: bytes) -> None:
    """A few bytes in the header must not make a frame of gigabytes."""
    at = boxes(video, b"avcC")[0]
    pasp = struct.pack(">I4sII", 16, b"pasp", 1000, 1)
    data = bytearray(video)
    data[at:at] = pasp
    for kind in (b"moov", b"trak", b"mdia", b"minf", b"stbl", b"stsd", b"avc1"):
        start = next(i for i in boxes(video, kind) if i < at)
        data[start : start + 4] = struct.pack(">I", struct.unpack(">I", video[start : start + 4])[0] + 16)
    assert reason_of(bytes(data), CropConfig(max_pixels=2000 * 128)) is Reason.TOO_MANY_PIXELS


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", Reason.EMPTY),
        (b"\0" * 4096, Reason.UNREADABLE),
        (TEXT, Reason.UNREADABLE),
        (b"\xff\xd8\xff\xe0 not a picture", Reason.UNREADABLE),
    ],
)
def test_no_video_at_all(data: bytes, reason: Reason) -> None:
    assert reason_of(data) is reason


def test_sound_alone() -> None:
    assert reason_of(encode_mp4(None, hum(25, np.random.default_rng(0)))) is Reason.NO_VIDEO_STREAM


def test_an_mp4_without_its_index(video: bytes) -> None:
    assert reason_of(video[: len(video) // 2]) is Reason.UNREADABLE


def test_a_container_in_which_nothing_decodes(video: bytes) -> None:
    data = bytearray(video)
    at = boxes(video, b"mdat")[0] + 8
    data[at : boxes(video, b"moov")[0]] = bytes(boxes(video, b"moov")[0] - at)
    assert reason_of(bytes(data)) is Reason.NO_FRAMES


def test_a_cut_off_transport_stream_keeps_what_is_there() -> None:
    file = io.BytesIO()
    with av.open(file, "w", format="mpegts") as container:
        stream = container.add_stream("mpeg2video", rate=25)
        stream.height, stream.width = 128, 128
        for frame_HWC in moving_gradient(25, 128):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame_HWC, format="rgb24")))
        container.mux(stream.encode())
    whole, cut = (frames_of(data)[0] for data in (file.getvalue(), file.getvalue()[: len(file.getvalue()) // 2]))
    assert 5 < len(cut) < len(whole) == 25


def test_a_codec_that_ffmpeg_does_not_know(video: bytes) -> None:
    assert reason_of(video.replace(b"avc1", b"zzz1")) in (Reason.UNREADABLE, Reason.NO_FRAMES)


def test_a_playlist_does_not_open_files_of_this_machine(
    video: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "secret.mp4").write_bytes(video)
    monkeypatch.chdir(tmp_path)
    assert reason_of(b"ffconcat version 1.0\nfile secret.mp4\n") is Reason.UNREADABLE


@pytest.mark.slow
def test_a_session_description_does_not_open_the_network() -> None:
    """FFmpeg waits 20 s of wall time on the port that the file names; no CPU time passes meanwhile."""
    text = "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 5004 RTP/AVP 96\n"
    assert reason_of(f"{text}a=rtpmap:96 H264/90000\n".encode()) is Reason.UNREADABLE


# Damage by the dozen.


@pytest.mark.parametrize("seed", range(60))
def test_damage_ends_in_frames_or_a_reason(video: bytes, seed: int) -> None:
    rng, data = np.random.default_rng(seed), bytearray(video)
    moov = boxes(video, b"moov")[0]
    low, high = ((0, len(data)), (moov, len(data)), (0, moov))[seed % 3]  # anywhere, header, body
    for _ in range(int(rng.integers(1, 40))):
        at = int(rng.integers(low, high))
        data[at] = int(rng.integers(256))
    if seed % 5 == 0:
        del data[int(rng.integers(low, high)) :]
    config, report, start_s = CropConfig(max_pixels=2**20, max_seconds=10), Decode(), time.process_time()
    count = 0
    try:
        for frame in read_frames(bytes(data), config, report):
            assert frame.rgb_HWC.size <= 3 * 2**20
            count += 1
    except Quarantined:
        assert count < 40
    assert report.frames == count <= 40
    assert time.process_time() - start_s < 20  # CPU, and far from what it takes: a hang, not a slow machine


def told(data: bytes, end_s: float | None) -> list[object]:
    """What the report says as each frame comes, and at the end."""
    report, said = Decode(), []
    try:
        for frame in read_frames(data, CONFIG, report, end_s=end_s):
            said.append((frame.index, frame.t_s, report.bad_packets, report.corrupt_frames))
    except Quarantined as why:
        said.append((why.reason, why.detail))
    return [*said, (report.frames, report.bad_packets, report.corrupt_frames, report.notes)]


@pytest.mark.parametrize("end_s", [None, 0.6])
def test_decoding_ahead_changes_nothing_that_is_told(end_s: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    data = encode_mp4(moving_gradient(40, 128), hum(40, np.random.default_rng(0)))
    moov, hurt = boxes(data, b"moov")[0], []
    for seed in range(12):
        rng, one = np.random.default_rng(seed), bytearray(data)
        for at in rng.integers(moov // 8, moov, 30):
            one[at] ^= 255
        hurt.append(bytes(one))
    ahead = [told(one, end_s) for one in hurt]
    assert len({frame[2] for frames in ahead for frame in frames[:-1]}) > 1, "bad packets lie between frames"
    monkeypatch.setattr(video_room, "_AHEAD_PIXELS", 0)
    assert [told(one, end_s) for one in hurt] == ahead
