"""What is handed to preprocessing besides a whole file: parts, folders of images, faces that are given."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Callable, Sequence
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from pipeline import raw as raw_module
from pipeline import video as video_module
from pipeline.bags import video_to_bags
from pipeline.codec import decode_jpeg
from pipeline.contract import CropConfig, Quarantined, Reason, Video
from pipeline.demo import encode_mp4, hum, moving_gradient
from pipeline.demo_faces import Bytes
from pipeline.images import read_images
from pipeline.raw import RawClip, fetch_clip, natural_order, read_clip
from pipeline.storage import LocalStore, open_store
from pipeline.video import Decode, Frame, read_frames

CONFIG = CropConfig(size=64, instances=2, frames_per_instance=3, min_frames=4)


def frames_of(raw: RawClip, config: CropConfig = CONFIG) -> tuple[list[Frame], Decode]:
    report = Decode()
    return list(read_clip(raw, config, report)), report


def reason_of(work: Callable[[], object]) -> Reason:
    with pytest.raises(Quarantined) as caught:
        work()
    assert caught.value.detail
    return caught.value.reason


def picture(rgb: Bytes, kind: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    Image.fromarray(rgb).save(file, kind, **options)
    return file.getvalue()


def numbered(count: int) -> Bytes:
    """(count, 16, 16, 3): frame i is grey of 10 + i."""
    return np.broadcast_to(np.arange(10, 10 + count, dtype=np.uint8)[:, None, None, None], (count, 16, 16, 3)).copy()


def encode(frames: int, kind: str, codec: str, options: dict[str, str], gop: int = 40) -> bytes:
    """A square that walks and a background that changes, 25 frames a second: every frame differs from every other."""
    file, rng = io.BytesIO(), np.random.default_rng(0)
    with av.open(file, "w", format=kind) as container:
        stream = container.add_stream(codec, rate=25, options=options)
        stream.height, stream.width, stream.pix_fmt = 64, 96, "yuv420p"
        stream.codec_context.gop_size = gop
        for i in range(frames):
            rgb_HWC = np.full((64, 96, 3), 40 + i % 97, np.uint8)
            at = i * 3 % 70
            rgb_HWC[20:40, at : at + 20] = rng.integers(0, 256, (20, 20, 3), np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(rgb_HWC, format="rgb24")))
        container.mux(stream.encode())
    return file.getvalue()


# Parts of a video.


@pytest.mark.parametrize(
    ("start_s", "end_s", "kept"),
    [
        (None, None, range(25)),
        (0.2, None, range(5, 25)),
        (None, 0.2, range(5)),  # the end is outside, so that neighbours share no frame
        (0.2, 0.4, range(5, 10)),
        (0.201, 0.401, range(6, 11)),
        (0.2, 99, range(5, 25)),
    ],
)
def test_a_part_has_the_frames_of_its_seconds(start_s: float | None, end_s: float | None, kept: range) -> None:
    data = encode_mp4(moving_gradient(25, 64), hum(25, np.random.default_rng(0)))
    whole, _ = frames_of(RawClip(data))
    part, report = frames_of(RawClip(data, start_s, end_s))
    assert [f.t_s for f in part] == [whole[i].t_s for i in kept]
    assert all(np.array_equal(f.rgb_HWC, whole[i].rgb_HWC) for f, i in zip(part, kept, strict=True))
    assert [f.index for f in part] == list(range(len(kept)))
    assert report.frames == len(kept)
    assert report.expected_frames == (25 if start_s is end_s is None else None)


@pytest.mark.parametrize(("start_s", "end_s"), [(5.0, None), (0.5, 0.5), (0.6, 0.4)])
def test_a_part_without_a_frame_is_too_short(start_s: float, end_s: float | None) -> None:
    data = encode_mp4(moving_gradient(25, 64), hum(25, np.random.default_rng(0)))
    assert reason_of(lambda: frames_of(RawClip(data, start_s, end_s))) is Reason.TOO_SHORT


def test_the_cap_on_seconds_is_of_the_part() -> None:
    data, config = encode(100, "mp4", "libx264", {}), dataclasses.replace(CONFIG, max_seconds=1.0)
    assert reason_of(lambda: frames_of(RawClip(data), config)) is Reason.TOO_LONG
    assert reason_of(lambda: frames_of(RawClip(data, 2.0), config)) is Reason.TOO_LONG
    assert len(frames_of(RawClip(data, 2.0, 3.0), config)[0]) == 25


SOUGHT = {
    "closed": ("mp4", "libx264", {"bf": "3", "x264-params": "b-pyramid=normal"}),
    "open": ("mp4", "libx264", {"bf": "8", "x264-params": "open-gop=1:b-adapt=2:scenecut=0"}),
    "refresh": ("mp4", "libx264", {"x264-params": "intra-refresh=1:keyint=100"}),
    "mkv": ("matroska", "libx264", {"bf": "3"}),
    "hevc": ("mp4", "libx265", {"x265-params": "open-gop=1:bframes=4:log-level=none"}),
    "vp9": ("webm", "libvpx-vp9", {"deadline": "realtime", "cpu-used": "8"}),
    "part 2": ("mp4", "mpeg4", {"bf": "2"}),
    "avi": ("avi", "mpeg4", {}),
    "ts": ("mpegts", "mpeg2video", {"bf": "2"}),
}


@pytest.mark.parametrize("name", SOUGHT)
def test_a_part_far_inside_is_that_of_a_decode_from_the_start(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    data = encode(25 * 26, *SOUGHT[name])
    whole, _ = frames_of(RawClip(data))
    decoded = []
    plain = video_module._timed
    monkeypatch.setattr(video_module, "_timed", lambda *a: (decoded.append(1) or one for one in plain(*a)))
    for start_s in (12.0, 20.44, 25.0):
        decoded.clear()
        part, report = frames_of(RawClip(data, start_s, start_s + 0.5))
        same = [f for f in whole if start_s - 0.0005 <= f.t_s < start_s + 0.4995]
        assert [f.t_s for f in part] == [f.t_s for f in same]
        assert all(np.array_equal(a.rgb_HWC, b.rgb_HWC) for a, b in zip(part, same, strict=True))
        assert report.corrupt_frames == 0
        if start_s > 20 and name not in ("avi", "ts", "refresh"):
            assert len(decoded) < 16 * 25  # ten seconds, and what is left to the key frame before them


# Folders of images.


def test_numbers_in_names_count_as_numbers() -> None:
    names = ["10.jpg", "9.jpg", "a10b2.png", "a9b10.png", "a9b9.png", "01.jpg", "1.jpg"]
    assert sorted(names, key=natural_order) == [
        *("01.jpg", "1.jpg", "9.jpg", "10.jpg"),
        *("a9b9.png", "a9b10.png", "a10b2.png"),
    ]


@pytest.mark.parametrize("place", ["folder", "s3"])
def test_a_folder_is_fetched_in_order(tmp_path: Path, place: str, request: pytest.FixtureRequest) -> None:
    url = str(tmp_path) if place == "folder" else request.getfixturevalue("s3")("frames")
    store = open_store(url)
    images = [picture(frame) for frame in numbered(12)]
    for number, image in enumerate(images, 1):
        store.put(f"clip/f{number}.PNG", image)
    for other in ("clip/notes.txt", "clip/.hidden", "clip/sub/13.png", "clip/._f1.PNG", "clipped/1.png"):
        store.put(other, b"x")
    clip = fetch_clip(Video(url=store.url("clip"), name="clip", kind="frames"), CONFIG)
    assert clip == RawClip(tuple(images))
    part = Video(url=store.url("clip"), name="p", kind="frames", start_s=0.08, end_s=0.2, cropped=True)
    assert fetch_clip(part, CONFIG) == RawClip(tuple(images[2:5]), cropped=True)
    frames, _ = frames_of(clip)
    assert [int(f.rgb_HWC[0, 0, 0]) for f in frames] == list(range(10, 22))
    assert [f.t_s for f in frames] == pytest.approx([i / 25 for i in range(12)])


def test_the_part_of_images_that_are_there_already() -> None:
    images = tuple(picture(frame) for frame in numbered(12))
    frames, _ = frames_of(RawClip(images, 0.08, 0.2), dataclasses.replace(CONFIG, image_fps=25.0))
    assert [int(f.rgb_HWC[0, 0, 0]) for f in frames] == [12, 13, 14]
    assert len(frames_of(RawClip(images, 0.5), dataclasses.replace(CONFIG, image_fps=10.0))[0]) == 7


def test_a_bad_image_costs_its_frame() -> None:
    good = picture(moving_gradient(1, 64)[0], "JPEG")
    images = [good, b"", b"text", good[: len(good) // 2], good, good[:40], good]
    frames, report = frames_of(RawClip(tuple(images)))
    assert [round(f.t_s * 25) for f in frames] == [0, 4, 6]
    assert (report.frames, report.bad_packets, report.expected_frames) == (3, 4, 7)
    assert [note.split(":")[0].split(" is")[0] for note in report.notes] == [f"image {i}" for i in (1, 2, 3, 5)]
    assert not any("0x" in note for note in report.notes)


@pytest.mark.parametrize(
    ("images", "change", "reason"),
    [
        ([b""] * 5, {}, Reason.EMPTY),
        ([b"text"] * 5, {}, Reason.NO_FRAMES),
        ([], {}, Reason.NO_FRAMES),
        ([picture(numbered(1)[0])] * 5, {"max_seconds": 4 / 25 - 0.01}, Reason.TOO_LONG),
        ([picture(numbered(1)[0])] * 5, {"max_bytes": 100}, Reason.TOO_MANY_BYTES),
        ([picture(numbered(1)[0])] * 5, {"max_pixels": 255}, Reason.TOO_MANY_PIXELS),
        ([picture(numbered(1)[0])] * 5, {"max_decode_s": 0.0}, Reason.TOO_SLOW),
    ],
)
def test_each_cap_on_images_has_its_reason(images: list[bytes], change: dict[str, float], reason: Reason) -> None:
    config = dataclasses.replace(CONFIG, **change)
    assert reason_of(lambda: frames_of(RawClip(tuple(images)), config)) is reason


@pytest.mark.parametrize(("width", "height"), [(60_000, 60_000), (4097, 2304)])
def test_the_size_of_an_image_is_checked_before_it_is_decoded(width: int, height: int) -> None:
    """A PNG header alone: decoding it would fail, so the reason shows that nobody tried."""
    data = bytearray(picture(numbered(1)[0]))
    data[16:24] = width.to_bytes(4, "big") + height.to_bytes(4, "big")
    import zlib

    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    assert reason_of(lambda: list(read_images([bytes(data)], CONFIG))) is Reason.TOO_MANY_PIXELS


def test_kinds_of_images() -> None:
    rgb_HWC = moving_gradient(1, 64)[0].copy()
    rgb_HWC[:10] = 255
    grey16 = (np.arange(64 * 64, dtype=np.uint16) * 16).reshape(64, 64)
    rgba = np.dstack([rgb_HWC, np.full((64, 64), 7, np.uint8)])
    turned = Image.Exif()
    turned[0x0112] = 6  # show it turned a quarter clockwise
    images = [
        *(
            picture(rgb_HWC, kind, **options)
            for kind, options in (("PNG", {}), ("BMP", {}), ("WEBP", {"lossless": True}))
        ),
        *(picture(rgba), picture(grey16), picture(rgb_HWC[..., 0]), picture(rgb_HWC, "PNG", exif=turned)),
    ]
    frames, report = frames_of(RawClip(tuple(images)))
    assert (report.frames, report.bad_packets) == (7, 0)
    seen = [f.rgb_HWC for f in frames]
    assert all(np.array_equal(one, rgb_HWC) for one in seen[:4])
    assert np.array_equal(seen[4], np.repeat((grey16 >> 8).astype(np.uint8)[..., None], 3, 2))
    assert np.array_equal(seen[5], np.repeat(rgb_HWC[..., :1], 3, 2))
    assert np.array_equal(seen[6], np.rot90(rgb_HWC, -1))


def put(store: LocalStore, names: Sequence[str]) -> Video:
    for name in names:
        store.put(f"clip/{name}", b"x")
    return Video(url=store.url("clip"), name="clip", kind="frames")


@pytest.mark.parametrize(
    ("names", "change", "reason"),
    [
        ([], {}, Reason.MISSING),
        (["notes.txt", "sub/1.png"], {}, Reason.NO_FRAMES),
        (["1.png"] * 3 + ["2.png"], {"max_seconds": 0.05}, Reason.TOO_LONG),
        (["1.png", "2.png"], {"max_bytes": 1}, Reason.TOO_MANY_BYTES),
    ],
)
def test_a_folder_that_cannot_be_used(
    tmp_path: Path, names: list[str], change: dict[str, float], reason: Reason
) -> None:
    video = put(LocalStore(str(tmp_path)), names)
    assert reason_of(lambda: fetch_clip(video, dataclasses.replace(CONFIG, **change))) is reason


def test_a_part_without_an_image(tmp_path: Path) -> None:
    video = dataclasses.replace(put(LocalStore(str(tmp_path)), ["1.png"]), start_s=3.0)
    assert reason_of(lambda: fetch_clip(video, CONFIG)) is Reason.TOO_SHORT


def test_a_listing_has_an_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(raw_module, "_MOST_LISTED", 3)
    video = put(LocalStore(str(tmp_path)), [f"{i}.txt" for i in range(4)])
    assert reason_of(lambda: fetch_clip(video, CONFIG)) is Reason.TOO_LONG


# Given faces.


def bag_of(raw: RawClip, config: CropConfig = CONFIG):
    ((bag,), report) = video_to_bags(raw, name="x", video_id="v", config=config)
    return bag, report


def test_a_given_box_is_the_face(face_video: Callable[..., bytes]) -> None:
    bag, _ = bag_of(RawClip(face_video(), box=(40.0, 30.0, 80.0, 60.0)))
    assert (bag.meta.detector, bag.meta.detector_score) == ("given", 1.0)
    assert bag.meta.boxes == ((80.0, 60.0, round(80 * CONFIG.margin, 1)),) * 2
    assert bag.meta.frames == 6


def test_a_given_box_finds_what_the_detector_does_not() -> None:
    data = encode_mp4(moving_gradient(12, 64), hum(12, np.random.default_rng(0)))
    assert reason_of(lambda: bag_of(RawClip(data))) is Reason.NO_FACE
    assert bag_of(RawClip(data, box=(10.0, 10.0, 20.0, 20.0)))[0].meta.frames == 6


@pytest.mark.parametrize(
    "box", [(160.0, 0, 9, 9), (0, -9.0, 9, 9), (0, 0, 0, 9), (0, 0, 9, -1), (0, 0, float("nan"), 9), (0, 0, 1e9, 1e9)]
)
def test_a_given_box_outside_the_frame(
    face_video: Callable[..., bytes], box: tuple[float, float, float, float]
) -> None:
    assert reason_of(lambda: bag_of(RawClip(face_video(), box=box))) is Reason.NO_FACE


def test_a_given_face_needs_its_frames(face_video: Callable[..., bytes]) -> None:
    for raw in (RawClip(face_video(), box=(0, 0, 90, 90), end_s=0.1), RawClip(face_video(), cropped=True, end_s=0.1)):
        assert reason_of(lambda raw=raw: bag_of(raw)) is Reason.TOO_SHORT


@pytest.mark.parametrize(("height", "width"), [(128, 128), (64, 128), (128, 64), (16, 16), (127, 33)])
def test_a_cropped_frame_is_the_crop_whole(height: int, width: int) -> None:
    """Its four quarters are four colours; the shorter side is filled up by its edge."""
    rgb_HWC = np.zeros((height, width, 3), np.uint8)
    rgb_HWC[: height // 2, : width // 2, 0] = rgb_HWC[: height // 2, width // 2 :, 1] = 255
    rgb_HWC[height // 2 :, : width // 2, 2] = rgb_HWC[height // 2 :, width // 2 :] = 255
    bag, _ = bag_of(RawClip((picture(rgb_HWC),) * 6, cropped=True))
    assert (bag.meta.detector, bag.meta.detector_score, bag.meta.face_px) == ("none", 1.0, 0.0)
    assert bag.meta.boxes == ((width / 2, height / 2, max(height, width)),) * 2
    seen = decode_jpeg(bag.encoded[0][0])
    assert seen.shape == (64, 64, 3)
    for y, x, colour in ((4, 4, (1, 0, 0)), (4, 59, (0, 1, 0)), (59, 4, (0, 0, 1)), (59, 59, (1, 1, 1))):
        assert tuple(int(v > 128) for v in seen[y, x]) == colour


def test_cropped_frames_of_several_sizes() -> None:
    frame = moving_gradient(1, 128)[0]
    images = tuple(picture(frame[:: 1 + i % 2, :: 1 + i % 2]) for i in range(6))
    bag, report = bag_of(RawClip(images, cropped=True))
    first, second = (decode_jpeg(jpeg).astype(int) for jpeg in bag.encoded[0][:2])
    assert np.abs(first - second).mean() < 8  # every second pixel of it; another size would be another place
    assert report.shape_HW == (128, 128)


# The picture of a clip, and what the record counts.


@pytest.mark.parametrize(("frames", "shown"), [(1, 0), (2, 1), (3, 2), (5, 4), (8, 4), (25, 16)])
def test_the_picture_is_of_the_second_half(frames: int, shown: int) -> None:
    _, report = frames_of(RawClip(tuple(picture(frame) for frame in numbered(frames))))
    assert report.thumb_HWC is not None
    assert int(report.thumb_HWC[0, 0, 0]) == 10 + shown


@pytest.mark.parametrize(
    ("shape", "small"),
    [((480, 640), (120, 160)), ((640, 480), (160, 120)), ((50, 70), (50, 70)), ((2, 2000), (1, 160))],
)
def test_the_picture_is_small(shape: tuple[int, int], small: tuple[int, int]) -> None:
    _, report = frames_of(RawClip((picture(np.zeros((*shape, 3), np.uint8)),)))
    assert report.thumb_HWC is not None
    assert report.thumb_HWC.shape[:2] == small
    assert report.shape_HW == shape


def test_frames_that_the_decoder_patched_are_counted(media: Path) -> None:
    report = Decode()
    for _ in read_frames((media / "edge" / "corrupt_middle.mp4").read_bytes(), CropConfig(), report):
        pass
    assert (report.frames, report.bad_packets, report.corrupt_frames, report.expected_frames) == (108, 1, 13, 109)


def udta_first(data: bytes) -> bytes:
    """The MP4 with the boxes of its moov, which comes last, in another order: offsets into mdat stay right."""
    start = data.index(b"moov") + 4
    boxes, at = [], start
    while at < len(data):
        size = int.from_bytes(data[at : at + 4], "big")
        boxes.append(data[at : at + size])
        at += size
    return data[:start] + b"".join(sorted(boxes, key=lambda box: box[4:8] != b"udta"))


def test_a_cover_picture_is_not_the_video(face_video: Callable[..., bytes]) -> None:
    """The cover is the first stream of the file."""
    file = io.BytesIO()
    with av.open(io.BytesIO(face_video())) as source, av.open(file, "w", format="mp4") as container:
        copied = container.add_stream_from_template(source.streams.video[0])
        cover = container.add_stream("png", rate=1)
        cover.height, cover.width, cover.pix_fmt = 400, 300, "rgb24"
        cover.disposition = av.stream.Disposition.attached_pic
        container.mux(cover.encode(av.VideoFrame.from_ndarray(np.zeros((400, 300, 3), np.uint8), format="rgb24")))
        for packet in source.demux(source.streams.video[0]):
            if packet.dts is not None:
                packet.stream = copied
                container.mux(packet)
    data = udta_first(file.getvalue())
    with av.open(io.BytesIO(data)) as container:
        assert [stream.codec_context.name for stream in container.streams.video] == ["png", "h264"]
    frames, _ = frames_of(RawClip(data))
    assert [len(frames), *frames[0].rgb_HWC.shape] == [12, 160, 160, 3]
