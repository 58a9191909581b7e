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
    sawtooth,
    write_dynamics_bucket,
)
from pipeline.demo_faces import make_subject
from pipeline.storage import open_store

FRAMES = 32
DRAWS = 1500


@pytest.fixture(scope="module")
def courses() -> dict[str, np.ndarray]:
    """By class (draws, frames, 3): left eye, right eye, mouth."""
    out = {}
    for number, label in enumerate(DYNAMICS_LABELS):
        rng = np.random.default_rng([3, number])
        drawn = [dynamics_course(label, FRAMES, rng) for _ in range(DRAWS)]
        out[label] = np.stack([np.column_stack([eyes, mouth]) for eyes, mouth in drawn])
    return out


def features(states: np.ndarray) -> np.ndarray:
    """(..., 3) states to (..., 9): the states, their squares and their products."""
    left, right, mouth = np.moveaxis(states, -1, 0)
    return np.stack([left, right, mouth, left**2, right**2, mouth**2, left * right, left * mouth, right * mouth], -1)


def largest_z(by_class: list[np.ndarray]) -> float:
    """Of the difference of any class's mean from the mean of all, in standard errors."""
    everything = np.concatenate(by_class)
    errors = everything.std(0) / np.sqrt(len(by_class[0]))
    return float(max(np.abs((rows.mean(0) - everything.mean(0)) / errors).max() for rows in by_class))


def test_a_single_frame_tells_no_class(courses: dict[str, np.ndarray]) -> None:
    z = max(largest_z([features(c[:, t]) for c in courses.values()]) for t in range(FRAMES))
    assert z < 5  # of 32 x 8 x 9 numbers, most of them alike


def test_frames_without_order_tell_no_class(courses: dict[str, np.ndarray]) -> None:
    assert largest_z([features(c).mean(1) for c in courses.values()]) < 4.5


def test_neighbours_in_time_tell_the_class(courses: dict[str, np.ndarray]) -> None:
    """What the two tests above would look like if they could see time."""

    def turning(states: np.ndarray) -> np.ndarray:
        left, right, mouth = np.moveaxis(states - 0.5, -1, 0)
        turn = left[:, :-1] * right[:, 1:] - right[:, :-1] * left[:, 1:]
        jump = np.diff(mouth) ** 3
        return np.stack([turn.sum(1), jump.sum(1)], -1)

    assert largest_z([turning(c) for c in courses.values()]) > 15


@pytest.mark.parametrize("label", DYNAMICS_LABELS)
def test_one_half_moves_at_a_time(label: str) -> None:
    eyes_T2, mouth_T = dynamics_course(label, FRAMES, np.random.default_rng(5))
    half = FRAMES // 2
    still = [np.ptp(part, axis=0).max() < 1e-6 for part in (eyes_T2[:half], eyes_T2[half:])]
    assert sorted(still) == [False, True]
    assert (np.ptp(mouth_T[:half]) < 1e-6, np.ptp(mouth_T[half:]) < 1e-6) == (still[1], still[0])
    assert min(eyes_T2.min(), mouth_T.min()) >= 0
    assert max(eyes_T2.max(), mouth_T.max()) <= 1


def test_the_mouth_is_at_each_height_equally_long() -> None:
    heights = sawtooth(np.linspace(0, 1, 10_000, endpoint=False))
    assert np.allclose(np.quantile(heights, [0.1, 0.5, 0.9]), [0.1, 0.5, 0.9], atol=1e-3)


def test_a_mirrored_subject_winks_on_the_same_side_of_the_picture() -> None:
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
