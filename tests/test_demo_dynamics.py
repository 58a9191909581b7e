"""Classes of the dynamics set differ in dynamics alone."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from pipeline.contract import MicaclError
from pipeline.demo_dynamics import (
    DYNAMICS_LABELS,
    DynamicsConfig,
    draw_dynamics,
    dynamics_course,
    plan_dynamics,
    ramp,
    write_dynamics_bucket,
)
from pipeline.demo_faces import make_subject
from pipeline.storage import open_store

FRAMES = 32
DRAWS = 1500


@pytest.fixture(scope="module")
def courses() -> dict[str, np.ndarray]:
    """By class (draws, frames, 2): place and opening of the mouth."""
    out = {}
    for number, label in enumerate(DYNAMICS_LABELS):
        rng = np.random.default_rng([3, number])
        drawn = [dynamics_course(label, FRAMES, rng) for _ in range(DRAWS)]
        out[label] = np.stack([np.column_stack(course) for course in drawn])
    return out


def features(states: np.ndarray) -> np.ndarray:
    """(..., 2) states to (..., 7): the states, their powers and products."""
    place, opening = np.moveaxis(states, -1, 0)
    return np.stack([place, opening, place**2, opening**2, place * opening, place**2 * opening, place * opening**2], -1)


def largest_z(by_class: list[np.ndarray]) -> float:
    """Of the difference of any class's mean from the mean of all, in standard errors."""
    everything = np.concatenate(by_class)
    errors = everything.std(0) / np.sqrt(len(by_class[0]))
    return float(max(np.abs((rows.mean(0) - everything.mean(0)) / errors).max() for rows in by_class))


def test_a_single_frame_from_anywhere_tells_no_class(courses: dict[str, np.ndarray]) -> None:
    rng = np.random.default_rng(4)
    frames = [c[np.arange(DRAWS), rng.integers(FRAMES, size=DRAWS)] for c in courses.values()]
    assert largest_z([features(f) for f in frames]) < 4


def test_frames_without_order_tell_no_class(courses: dict[str, np.ndarray]) -> None:
    assert largest_z([features(c).mean(1) for c in courses.values()]) < 4.5


def test_neighbours_in_time_tell_the_class(courses: dict[str, np.ndarray]) -> None:
    """What the two tests above would look like if they could see time."""

    def asymmetry(states: np.ndarray) -> np.ndarray:
        steps = np.diff(states, axis=1)
        return np.concatenate([(steps**3).sum(1), (steps**2).sum(1)], -1)

    assert largest_z([asymmetry(c) for c in courses.values()]) > 15


@pytest.mark.parametrize("label", DYNAMICS_LABELS)
def test_one_half_moves_at_a_time(label: str) -> None:
    half = FRAMES // 2
    for seed in range(20):
        course = np.column_stack(dynamics_course(label, FRAMES, np.random.default_rng(seed)))
        still = [[bool(np.ptp(part) < 1e-6) for part in column] for column in (course[:half].T, course[half:].T)]
        assert sorted(still) == [[False, True], [True, False]]
        assert course.min() >= 0
        assert course.max() <= 1


def test_a_ramp_is_at_each_height_equally_long() -> None:
    heights = ramp(np.linspace(0, 1, 10_000, endpoint=False))
    assert np.allclose(np.quantile(heights, [0.1, 0.5, 0.9]), [0.1, 0.5, 0.9], atol=1e-3)


def test_the_mouth_of_a_mirrored_subject_goes_to_the_same_side_of_the_picture() -> None:
    config = DynamicsConfig(train_clips=(1,) * 8, test_clips=1, frames=8)
    clip = plan_dynamics(config)[0]
    subject = make_subject(np.random.default_rng(1))
    one, other = (
        draw_dynamics(clip, dataclasses.replace(subject, mirrored=mirrored), config) for mirrored in (False, True)
    )
    assert one.shape == (8, config.side, config.side, 3)
    assert not np.array_equal(one, other)


def test_the_bucket(tmp_path: Path) -> None:
    config = DynamicsConfig(
        train_clips=(2, 1, 1, 1, 1, 1, 1, 1), test_clips=1, train_subjects=2, test_subjects=1, frames=8
    )
    first = write_dynamics_bucket(open_store(str(tmp_path / "a")), config)
    assert first == write_dynamics_bucket(open_store(str(tmp_path / "b")), config)
    files = sorted(p.relative_to(tmp_path / "a") for p in (tmp_path / "a").rglob("*") if p.is_file())
    assert all((tmp_path / "a" / f).read_bytes() == (tmp_path / "b" / f).read_bytes() for f in files)
    rows = (tmp_path / "a" / "labels.csv").read_text().splitlines()
    assert len(rows) == 1 + 9 + 8
    split_of = {row.split(",")[2]: row.split(",")[3] for row in rows[1:]}
    assert split_of == {"s00": "train", "s01": "train", "t00": "test"}
    assert first["videos"]["train/slow_right_onset"] == 2


@pytest.mark.parametrize(
    "wrong", [{"train_clips": (1, 2)}, {"test_clips": 0}, {"frames": 9}, {"frames": 6}, {"train_subjects": 0}]
)
def test_refused_in_words(wrong: dict[str, object]) -> None:
    with pytest.raises(MicaclError, match="dynamics set"):
        DynamicsConfig(**wrong)  # type: ignore[arg-type]
