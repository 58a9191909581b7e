"""Frames -> tracks: who is followed, where a track ends, what is kept, and that the detector is OpenCV's."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import faces
from pipeline.bags import video_to_bags
from pipeline.contract import CropConfig, Quarantined, Reason
from pipeline.demo import encode_mp4, hum, moving_gradient
from pipeline.demo_faces import Bytes
from pipeline.detector import Face, detect
from pipeline.faces import Box, Cut, Track, follow_faces, iter_instances
from pipeline.video import Frame, read_frames

CONFIG = CropConfig(faces="all", instances=2, frames_per_instance=3, min_frames=4)
Draw = Callable[..., Bytes]


def as_frames(frames_THWC: Bytes, fps: float = 25.0) -> Iterator[Frame]:
    return (Frame(i, i / fps, rgb_HWC) for i, rgb_HWC in enumerate(frames_THWC))


def overlap(a: Face, b: Face) -> float:
    return faces._overlap(a, b)


@pytest.fixture(scope="module")
def two_people(face_frames: Draw) -> Bytes:
    """One person from column 0, another from column 160."""
    return np.concatenate([face_frames(person=0), face_frames(person=1)], axis=2)


# Tracks.


def test_one_face_is_one_track(face_frames: Draw) -> None:
    frames_THWC = face_frames()
    (track,) = follow_faces(as_frames(frames_THWC), CONFIG)
    assert track.seen == len(frames_THWC) == 12
    assert track.last_t_s == pytest.approx(11 / 25)
    assert track.cuts[0].t_s == 0
    assert 0.6 <= track.score <= 1
    for cut in track.cuts:
        assert abs(cut.box.cx - 80) < 30
        assert abs(cut.box.cy - 80) < 40
        assert 30 < cut.box.side < 140


def test_two_people_side_by_side_are_two_tracks(two_people: Bytes) -> None:
    tracks = follow_faces(as_frames(two_people), CONFIG)
    assert len(tracks) == 2
    assert sorted(t.seen for t in tracks) == [12, 12]
    assert sorted(int(c.box.cx // 160) for t in tracks for c in t.cuts[:1]) == [0, 1]
    for track in tracks:  # nobody changes sides
        assert len({c.box.cx < 160 for c in track.cuts}) == 1
    assert tracks[0].area_seconds >= tracks[1].area_seconds


@pytest.mark.parametrize(("which", "bags"), [("all", 2), ("largest", 1)])
def test_all_tracks_or_the_largest(two_people: Bytes, which: str, bags: int) -> None:
    config = CropConfig(faces=which, instances=2, frames_per_instance=3)
    data = encode_mp4(two_people, hum(12, np.random.default_rng(0)))
    made, report = video_to_bags(data, name="two.mp4", video_id="v", config=config)
    assert [b.meta.key for b in made] == [f"v_{i}" for i in range(bags)]
    assert [b.meta.track for b in made] == list(range(bags))
    assert report.frames == 12
    largest = max(follow_faces(read_frames(data, config), config), key=lambda t: t.area_seconds)
    assert (made[0].meta.boxes[0][0] < 160) == (largest.cuts[0].box.cx < 160)


def test_a_hard_cut_ends_every_track(face_frames: Draw) -> None:
    dark, light = face_frames(person=0) // 3, 255 - (255 - face_frames(person=1)) // 2
    tracks = sorted(follow_faces(as_frames(np.concatenate([dark, light])), CONFIG), key=lambda t: t.cuts[0].t_s)
    assert [t.seen for t in tracks] == [12, 12]
    assert tracks[0].last_t_s == pytest.approx(11 / 25)
    assert tracks[1].cuts[0].t_s == pytest.approx(12 / 25)
    assert max(c.region_HWC.mean() for c in tracks[0].cuts) < min(c.region_HWC.mean() for c in tracks[1].cuts)


def test_a_light_that_changes_slowly_is_no_cut(face_frames: Draw) -> None:
    """From half to full brightness over twelve frames: every step is far below the one of a cut."""
    frames_THWC = (face_frames() * np.linspace(0.5, 1, 12)[:, None, None, None]).astype(np.uint8)
    (track,) = follow_faces(as_frames(frames_THWC), CONFIG)
    assert track.seen == 12


def test_a_face_that_is_missed_once_is_followed_on(face_frames: Draw, monkeypatch: pytest.MonkeyPatch) -> None:
    frames_THWC, calls = face_frames(), iter(range(100))
    monkeypatch.setattr(faces, "detect", lambda rgb, config: [] if next(calls) == 2 else detect(rgb, config))
    (track,) = follow_faces(as_frames(frames_THWC), CONFIG)
    assert track.seen == 12
    assert len(track.scores) == 3  # of the searches in frames 0, 3 and 9, not of the miss in 6


def on_a_wall(frames_THWC: Bytes, size: int = 640) -> Bytes:
    """The same small in a large grey picture that never changes: no hard cut can be told from it."""
    wall = np.full((len(frames_THWC), size, size, 3), 128, np.uint8)
    side = frames_THWC.shape[1]
    at = (size - side) // 2
    wall[:, at : at + side, at : at + side] = frames_THWC
    return wall


def test_a_track_does_not_jump_to_another_person(media: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One takes the place of the other between two searches: nothing but their looks tells it."""
    data = (media / "edge" / "hard_cut_two_people.mp4").read_bytes()
    frames = [frame.rgb_HWC for frame in read_frames(data, CONFIG)]
    people = [np.stack([around_face(f) for f in part]) for part in (frames[:12], frames[-12:])]
    frames_THWC = on_a_wall(np.concatenate(people))
    first, second = sorted(follow_faces(as_frames(frames_THWC), CONFIG), key=lambda t: t.cuts[0].t_s)
    assert first.last_t_s < 12 / 25 <= second.cuts[0].t_s
    monkeypatch.setattr(faces, "alike", lambda *_: True)
    assert len(follow_faces(as_frames(frames_THWC), CONFIG)) == 1


def around_face(rgb_HWC: Bytes, side: int = 160) -> Bytes:
    """(side, side, 3): the face in the middle."""
    face = detect(rgb_HWC, CONFIG)[0]
    left, top = (int(v - side / 2) for v in (face.x + face.w / 2, face.y + face.h / 2))
    return rgb_HWC[top : top + side, left : left + side]


def test_two_who_pass_each_other_keep_their_tracks(face_frames: Draw, monkeypatch: pytest.MonkeyPatch) -> None:
    """The pair that overlaps most joins first, whatever the order in which the detector names them."""
    near, far = Face(40, 40, 60, 60, 0.9, ()), Face(70, 40, 60, 60, 0.8, ())
    answers = iter([[near, far], [far, near], [far, near], [near, far], [far, near]])
    monkeypatch.setattr(faces, "detect", lambda *_: next(answers))
    tracks = follow_faces(as_frames(np.zeros((13, 160, 160, 3), np.uint8)), CONFIG)
    assert sorted({(c.box.cx, c.box.cy) for t in tracks for c in t.cuts}) == [(70, 70), (100, 70)]
    assert all(len({c.box.cx for c in t.cuts}) == 1 for t in tracks)


def test_frames_of_a_miss_count_only_if_the_face_comes_back(face_frames: Draw, monkeypatch: pytest.MonkeyPatch) -> None:
    frames_THWC, face = face_frames(frames=24), Face(40, 30, 80, 100, 0.9, ())
    for found, seen, searches in (("yyny", 10, 4), ("yynn", 4, 2), ("yyn", 4, 2)):
        answers = iter(found)
        monkeypatch.setattr(faces, "detect", lambda *_, answers=answers: [face] if next(answers) == "y" else [])
        (track,) = follow_faces(as_frames(frames_THWC[: 3 * len(found) - 2]), CONFIG)
        assert (track.seen, track.searches, len(track.scores)) == (seen, searches, found.rstrip("n").count("y"))


def test_a_face_that_leaves_ends_its_track(face_frames: Draw) -> None:
    """The picture behind stays; two searches in a row without the face end the track."""
    gone = np.repeat(cv2.GaussianBlur(face_frames()[-1], (0, 0), 25)[None], 12, 0)
    tracks = follow_faces(as_frames(np.concatenate([face_frames(), gone])), CONFIG)
    assert len(tracks) == 1
    assert 9 < tracks[0].seen <= 12


def test_a_short_appearance_is_dropped(face_frames: Draw) -> None:
    assert follow_faces(as_frames(face_frames()[:3]), CONFIG) == []
    assert len(follow_faces(as_frames(face_frames()[:4]), CONFIG)) == 1


def test_no_frames_and_no_face() -> None:
    assert follow_faces(iter(()), CONFIG) == []
    assert follow_faces(as_frames(moving_gradient(12, 160)), CONFIG) == []


@pytest.mark.parametrize(("frames", "reason"), [(3, Reason.TOO_SHORT), (12, Reason.NO_FACE)])
def test_a_video_without_a_track_has_its_reason(frames: int, reason: Reason) -> None:
    data = encode_mp4(moving_gradient(frames, 160), hum(frames, np.random.default_rng(0)))
    with pytest.raises(Quarantined) as caught:
        video_to_bags(data, name="a.mp4", video_id="v", config=CONFIG)
    assert caught.value.reason is reason


def test_the_box_moves_evenly_between_two_searches(monkeypatch: pytest.MonkeyPatch) -> None:
    found = iter([Face(40, 40, 20, 20, 0.9, ()), Face(41, 44, 26, 26, 0.9, ())])
    monkeypatch.setattr(faces, "detect", lambda *_: [next(found)])
    (track,) = follow_faces(as_frames(np.zeros((4, 120, 160, 3), np.uint8)), CONFIG)
    assert [(c.box.cx, c.box.cy, c.box.side) for c in track.cuts] == [
        pytest.approx((50 + i * 4 / 3, 50 + i * 7 / 3, 20 + 2 * i)) for i in range(4)
    ]


def test_a_face_at_the_edge_keeps_a_region(monkeypatch: pytest.MonkeyPatch) -> None:
    """Detectors give boxes that stick out of the frame; what is kept never does."""
    for x, y in ((-30, -30), (150, 110), (-10, 115), (155, -15)):
        monkeypatch.setattr(faces, "detect", lambda *_, x=x, y=y: [Face(x, y, 20, 20, 0.9, ())])
        (track,) = follow_faces(as_frames(np.zeros((4, 120, 160, 3), np.uint8)), CONFIG)
        for cut in track.cuts:
            height, width = cut.region_HWC.shape[:2]
            assert height >= 1
            assert width >= 1
            assert 0 <= cut.left <= cut.left + width <= 160
            assert 0 <= cut.top <= cut.top + height <= 120


def test_the_region_holds_the_crop(face_frames: Draw) -> None:
    """With a face in the middle nothing of the crop of its own box lies outside what is kept."""
    (track,) = follow_faces(as_frames(face_frames(side=320)), CONFIG)
    for cut in track.cuts:
        half, (height, width) = cut.box.side * CONFIG.margin / 2, cut.region_HWC.shape[:2]
        assert max(0, cut.box.cx - half) >= cut.left
        assert max(0, cut.box.cy - half) >= cut.top
        assert min(320, cut.box.cx + half) <= cut.left + width
        assert min(320, cut.box.cy + half) <= cut.top + height


# What is kept of a long track.


def tiny_cut(number: int) -> Cut:
    return Cut(float(number), Box(0, 0, 1), np.zeros((1, 1, 3), np.uint8), 0, 0)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(limit=st.integers(1, 60), frames=st.integers(1, 3000))
def test_thinning_is_even_and_bounded(limit: int, frames: int) -> None:
    track, most = Track(limit), 0
    for i in range(frames):
        track.add(tiny_cut(i))
        most = max(most, len(track.cuts))
    kept = [int(c.t_s) for c in track.cuts]
    assert most <= 2 * limit
    assert kept == list(range(0, frames, track.stride))
    assert len(kept) >= min(frames, limit)
    assert (track.seen, track.last_t_s) == (frames, frames - 1)


def test_a_long_video_keeps_few_frames(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(faces, "detect", lambda *_: [Face(20, 20, 20, 20, 0.9, ())])
    (track,) = follow_faces((Frame(i, i / 25, np.zeros((64, 64, 3), np.uint8)) for i in range(2000)), CONFIG)
    assert track.seen == 2000
    assert 6 <= len(track.cuts) <= 2 * 6
    assert track.last_t_s == pytest.approx(1999 / 25)
    steps = np.diff([c.t_s for c in track.cuts])
    assert steps == pytest.approx(np.full(len(steps), steps[0]))
    assert track.cuts[-1].t_s > 1999 / 25 - 2 * steps[0]


@settings(max_examples=200, deadline=None, derandomize=True)
@given(count=st.integers(0, 500), instances=st.integers(1, 40))
def test_instances_tile_the_frames(count: int, instances: int) -> None:
    runs = list(iter_instances(count, instances))
    assert len(runs) == instances
    assert [i for run in runs for i in run] == list(range(count))
    assert max(map(len, runs)) - min(map(len, runs)) <= 1


def test_instances_of_the_docstring() -> None:
    assert [list(run) for run in iter_instances(10, 4)] == [[0, 1], [2, 3, 4], [5, 6], [7, 8, 9]]


# Bags of whole videos.


def test_the_same_video_gives_the_same_bytes(face_video: Callable[..., bytes]) -> None:
    first, second = (video_to_bags(face_video(), name="a.mp4", video_id="v", config=CONFIG)[0] for _ in range(2))
    assert [b.encoded for b in first] == [b.encoded for b in second]
    assert [b.meta.to_json() for b in first] == [b.meta.to_json() for b in second]


def test_what_is_said_of_a_bag_is_so(face_video: Callable[..., bytes]) -> None:
    data = face_video(frames=16, side=320)
    ((bag,), _) = video_to_bags(data, name="a.mp4", video_id="v", config=CONFIG)
    meta = bag.meta
    assert (meta.key, meta.video, meta.track) == ("v_0", "a.mp4", 0)
    assert (meta.label, meta.split, meta.subject) == (None, None, None)
    assert meta.instance_frames == (3, 3)
    assert (meta.crop, meta.detector, meta.size) == (CONFIG.hash, CONFIG.detector, CONFIG.size)
    assert meta.seconds == pytest.approx(15 / 25, abs=1e-3)
    assert meta.fps == pytest.approx(5 / meta.seconds, abs=0.01)
    assert len(meta.boxes) == 2
    for cx, cy, side in meta.boxes:
        assert abs(cx - 160) < 60
        assert abs(cy - 160) < 80
        assert 60 * CONFIG.margin < side < 280 * CONFIG.margin


def test_quality_is_told(face_frames: Draw) -> None:
    """Size, sharpness and the share of searches, against what was drawn."""
    sharp = face_frames(frames=16, side=320)
    soft = np.stack([cv2.GaussianBlur(frame, (0, 0), 3) for frame in sharp])
    small = np.stack([cv2.resize(frame, (160, 160), interpolation=cv2.INTER_AREA) for frame in sharp])
    metas = []
    for frames_THWC in (sharp, soft, small):
        data = encode_mp4(frames_THWC, hum(16, np.random.default_rng(0)))
        metas.append(video_to_bags(data, name="a.mp4", video_id="v", config=CONFIG)[0][0].meta)
    one, blurred, half = metas
    assert blurred.blur < one.blur / 3
    assert half.face_px == pytest.approx(one.face_px / 2, rel=0.15)
    for meta in metas:
        assert meta.face_share == 1
        assert meta.yaw is not None
        assert abs(meta.yaw) < 0.5


@pytest.mark.parametrize(("name", "bags"), [("h264_audio.mp4", 1), ("sar_4_3.mp4", 1), ("two_people_hstack.mp4", 2)])
def test_tracks_of_real_files(media: Path, name: str, bags: int) -> None:
    data = (media / "edge" / name).read_bytes()
    made, report = video_to_bags(data, name=name, video_id="v", config=CropConfig(faces="all"))
    assert len(made) == bags
    for bag in made:
        assert bag.meta.seconds == pytest.approx((report.frames - 1) / 30, abs=0.05)
        assert bag.meta.detector_score > 0.75
    assert len(video_to_bags(data, name=name, video_id="v", config=CropConfig())[0]) == 1


def test_a_real_cut_between_two_people_ends_the_track(media: Path) -> None:
    """They sit at nearly the same place before like walls; what holds today: two tracks that share no frame."""
    data = (media / "edge" / "hard_cut_two_people.mp4").read_bytes()
    tracks = sorted(follow_faces(read_frames(data, CropConfig()), CropConfig()), key=lambda t: t.cuts[0].t_s)
    assert len(tracks) == 2
    assert sum(t.seen for t in tracks) == 174
    assert tracks[0].last_t_s < tracks[1].cuts[0].t_s
