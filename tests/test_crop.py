"""One video -> one object, done once; and what a record says of a video that cannot be used."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline import crop
from pipeline.bags import video_to_bags
from pipeline.codec import encode_jpeg
from pipeline.contract import CropConfig, MicaclError, Reason, Video
from pipeline.crop import CropRecord, crop_key, crop_video, read_crop, read_record, read_thumb
from pipeline.demo import TEXT
from pipeline.demo_faces import Bytes
from pipeline.raw import fetch_clip
from pipeline.shards import bag_members, read_members, write_members
from pipeline.sources import SourceOptions, list_videos
from pipeline.storage import LocalStore, open_store

CONFIG = CropConfig(size=64, instances=2, frames_per_instance=3, min_frames=4)


@pytest.fixture
def raw(tmp_path: Path, face_video: Callable[..., bytes]) -> LocalStore:
    store = LocalStore(str(tmp_path / "raw"))
    store.put("happy/a.mp4", face_video())
    return store


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(str(tmp_path / "ds"))


@pytest.fixture
def video(raw: LocalStore) -> Video:
    (video,) = list_videos(raw.root)
    return video


def test_a_crop_holds_the_bags_of_its_video(video: Video, store: LocalStore, face_video: Callable[..., bytes]) -> None:
    record, worked = crop_video(video, CONFIG, store)
    assert worked
    assert [e.key for e in store.list()] == [record.object] == [crop_key(video, CONFIG)]
    expected, report = video_to_bags(face_video(), name=video.name, video_id=video.id, config=CONFIG)
    assert read_crop(store, record.object) == expected
    assert (record.video, record.frames, record.bad_packets) == ("happy/a.mp4", report.frames, 0)
    assert (record.reason, record.detail) == (None, "")
    assert [b.key for b in record.bags] == [b.meta.key for b in expected]
    assert [b.size for b in record.bags] == [len(write_members(bag_members(b))) for b in expected]


def test_no_table_reaches_a_crop(video: Video, store: LocalStore, tmp_path: Path) -> None:
    """Label, split and subject are filled in by pack: another label decodes nothing again and changes no byte."""
    record, _ = crop_video(video, CONFIG, store)
    other = LocalStore(str(tmp_path / "other"))
    crop_video(dataclasses.replace(video, label="sad", split="test", subject="s7", url=video.url), CONFIG, other)
    assert other.get(record.object) == store.get(record.object)
    assert b'happy"' not in store.get(record.object)


def test_a_second_crop_does_no_work(video: Video, store: LocalStore, monkeypatch: pytest.MonkeyPatch) -> None:
    first, _ = crop_video(video, CONFIG, store)
    entry = list(store.list())
    monkeypatch.setattr(crop, "crop_in_sandbox", lambda *_, **__: pytest.fail("decoded again"))
    monkeypatch.setattr(crop, "fetch_clip", lambda *_: pytest.fail("fetched again"))
    assert crop_video(video, CONFIG, store) == (first, False)
    assert list(store.list()) == entry


def test_a_changed_video_gets_another_object(video: Video, store: LocalStore) -> None:
    keys = {
        crop_key(v, c)
        for v in (video, dataclasses.replace(video, fingerprint="other"), dataclasses.replace(video, name="b.mp4"))
        for c in (CONFIG, dataclasses.replace(CONFIG, size=96))
    }
    assert len(keys) == 6
    crop_video(video, CONFIG, store)
    assert crop_video(dataclasses.replace(video, fingerprint="other"), CONFIG, store)[1]
    assert len(list(store.list("crops/"))) == 2


def test_parts_of_one_file_have_crops_of_their_own(video: Video) -> None:
    parts = [
        video,
        *(dataclasses.replace(video, **part) for part in ({"start_s": 1.0}, {"end_s": 1.0}, {"start_s": 2.0})),
        *(dataclasses.replace(video, **part) for part in ({"cropped": True}, {"kind": "frames"})),
        *(dataclasses.replace(video, box=box) for box in ((0.0, 0.0, 9.0, 9.0), (0.0, 1.0, 9.0, 9.0))),
    ]
    assert len({crop_key(part, CONFIG) for part in parts}) == len(parts)


def test_a_usable_video_leaves_no_picture(video: Video, store: LocalStore) -> None:
    record, _ = crop_video(video, CONFIG, store)
    assert read_thumb(store, record.object) is None
    members = [name for name, _ in read_members(store.get(record.object), "x")]
    assert members[0] == "record.json"
    assert "thumb.jpg" not in members


def test_equal_quarantine_gives_equal_bytes(raw: LocalStore, tmp_path: Path, face_video: Callable[..., bytes]) -> None:
    raw.put("x.mp4", face_video())
    video, config = (
        Video(url=raw.url("x.mp4"), name="x.mp4", fingerprint="1"),
        dataclasses.replace(CONFIG, min_frames=13),
    )
    stores = [LocalStore(str(tmp_path / name)) for name in ("a", "b")]
    first, second = (store.get(crop_video(video, config, store)[0].object) for store in stores)
    assert first == second
    assert [name for name, _ in read_members(first, "x")] == ["record.json", "thumb.jpg"]


def test_a_folder_of_images_is_one_video(raw: LocalStore, store: LocalStore, face_frames: Callable[..., Bytes]) -> None:
    for number, frame_HW3 in enumerate(face_frames()):
        raw.put(f"clip/{number}.jpg", encode_jpeg(frame_HW3, 95))
    video = Video(url=raw.url("clip"), name="clip", kind="frames")
    record, worked = crop_video(video, CONFIG, store)
    assert (worked, record.reason, record.frames, record.expected_frames) == (True, None, 12, 12)
    (bag,) = read_crop(store, record.object)
    assert bag.meta.fps == pytest.approx((6 - 1) / bag.meta.seconds, abs=0.01)
    assert crop_video(video, CONFIG, store) == (record, False)
    raw.put("clip/3.jpg", b"damaged")
    record, worked = crop_video(video, CONFIG, store)
    assert (worked, record.frames, record.bad_packets) == (True, 11, 1)
    assert "image 3" in record.detail


def test_a_folder_has_one_fingerprint_whoever_looks(
    raw: LocalStore, store: LocalStore, face_frames: Callable[..., Bytes]
) -> None:
    """A table lists nothing, so its clips are looked at one by one: what a listing once led to is found again."""
    for number, frame_HW3 in enumerate(face_frames()):
        raw.put(f"clips/1/{number}.jpg", encode_jpeg(frame_HW3, 95))
    for litter in ("clips/1/._0.jpg", "clips/1/note.txt", "clips/__MACOSX/1/._0.jpg", "clips/1/deeper/0.jpg"):
        raw.put(litter, b"x")
    listed, _ = list_videos(raw.url("clips"), "bucket", SourceOptions(frames="images"))
    record, worked = crop_video(listed, CONFIG, store)
    assert (worked, listed.name, record.frames, record.bad_packets) == (True, "1", 12, 0)
    raw.put("clips/t.csv", b"path\n1/\n")
    (named,) = list_videos(raw.url("clips/t.csv"))
    assert (named.name, named.fingerprint) == ("1", "")
    assert crop_video(named, CONFIG, store) == (record, False)


def test_a_place_does_not_change_the_name(video: Video) -> None:
    moved = dataclasses.replace(video, url="s3://elsewhere/happy/a.mp4", label=None, split="val", subject="s")
    assert crop_key(moved, CONFIG) == crop_key(video, CONFIG)


@pytest.mark.parametrize(
    ("data", "change", "reason"),
    [
        (None, {}, Reason.MISSING),
        (b"", {}, Reason.EMPTY),
        (TEXT, {}, Reason.UNREADABLE),
        (TEXT, {"max_bytes": 5}, Reason.TOO_MANY_BYTES),
        ("a face", {"min_frames": 13}, Reason.TOO_SHORT),
        ("a face", {"detect_score": 0.999}, Reason.NO_FACE),
    ],
)
def test_a_quarantined_video_has_a_record_and_no_bag(
    data: bytes | str | None,
    change: dict[str, float],
    reason: Reason,
    raw: LocalStore,
    store: LocalStore,
    face_video: Callable[..., bytes],
) -> None:
    if data is not None:
        raw.put("x.mp4", face_video() if isinstance(data, str) else data)
    video, config = Video(url=raw.url("x.mp4"), name="x.mp4", fingerprint="1"), dataclasses.replace(CONFIG, **change)
    record, worked = crop_video(video, config, store)
    assert (worked, record.reason, record.bags) == (True, reason.value, ())
    assert record.detail
    assert read_crop(store, record.object) == []
    assert read_record(store, record.object) == record
    thumb = read_thumb(store, record.object)
    assert (thumb is not None and thumb.startswith(b"\xff\xd8")) == (data == "a face")
    assert record.frames == (12 if data == "a face" else 0)
    assert crop_video(video, config, store) == (record, False)


def test_a_missing_video_is_looked_for_again_once_it_is_there(
    raw: LocalStore, store: LocalStore, face_video: Callable[..., bytes]
) -> None:
    raw.put("t.csv", b"path\nx.mp4\n")
    (video,) = list_videos(raw.url("t.csv"))
    assert crop_video(video, CONFIG, store)[0].reason == "missing"
    raw.put("x.mp4", face_video())
    (video,) = list_videos(raw.url("t.csv"))
    assert crop_video(video, CONFIG, store)[0].reason is None


def test_a_missing_video_elsewhere_is_looked_for_again_once_it_is_there(
    raw: LocalStore, store: LocalStore, tmp_path: Path, face_video: Callable[..., bytes]
) -> None:
    raw.put("t.csv", f"path\n{tmp_path}/elsewhere/x.mp4\n".encode())
    (video,) = list_videos(raw.url("t.csv"))
    assert crop_video(video, CONFIG, store)[0].reason == "missing"
    LocalStore(str(tmp_path / "elsewhere")).put("x.mp4", face_video())
    (video,) = list_videos(raw.url("t.csv"))
    assert crop_video(video, CONFIG, store)[0].reason is None


def test_a_record_is_read_without_the_frames(video: Video, store: LocalStore, monkeypatch: pytest.MonkeyPatch) -> None:
    record, _ = crop_video(video, CONFIG, store)
    monkeypatch.setattr(LocalStore, "get", lambda *_: pytest.fail("the whole object was read"))
    assert read_record(store, record.object) == record
    assert read_record(store, "crops/no.tar") is None


def test_a_long_record_is_read_whole(store: LocalStore) -> None:
    record = CropRecord(video="a.mp4", object="crops/a.tar", reason="unreadable", detail="x" * 100_000)
    store.put("crops/a.tar", write_members([("record.json", record.to_json().encode())]) + b"\0" * 1024)
    assert read_record(store, "crops/a.tar") == record


def test_a_record_of_another_schema_is_refused(store: LocalStore) -> None:
    text = CropRecord(video="a.mp4", object="a").to_json().replace('"schema":2', '"schema":9')
    store.put("a", write_members([("record.json", text.encode())]))
    with pytest.raises(MicaclError, match="schema 9"):
        read_record(store, "a")


@pytest.mark.parametrize("data", [b"", b"x" * 600, b"\0" * 1024])
@pytest.mark.parametrize("read", [read_record, read_crop])
def test_a_damaged_crop_is_an_error_in_words(store: LocalStore, data: bytes, read: Callable[..., object]) -> None:
    store.put("crops/a.tar", data)
    with pytest.raises(MicaclError, match=r"crops/a\.tar"):
        read(store, "crops/a.tar")


def test_a_refused_bucket_stops_the_run_instead_of_filling_the_quarantine(
    s3: Callable[[str], str], s3_environment: Callable[..., None], store: LocalStore
) -> None:
    url = f"{s3('raw')}/x.mp4"
    s3_environment(AWS_SECRET_ACCESS_KEY="wrong")
    with pytest.raises(MicaclError, match="403"):
        fetch_clip(Video(url=url, name="x.mp4"), CONFIG)


def test_crops_on_s3_are_the_crops_in_a_folder(
    raw: LocalStore, store: LocalStore, s3: Callable[[str], str], video: Video
) -> None:
    bucket = s3("raw")
    open_store(bucket).put("happy/a.mp4", raw.get("happy/a.mp4"))
    (there,) = list_videos(bucket)
    there = dataclasses.replace(there, fingerprint=video.fingerprint)
    remote = open_store(s3("ds"))
    record, _ = crop_video(there, CONFIG, remote)
    crop_video(video, CONFIG, store)
    assert remote.get(record.object) == store.get(record.object)
