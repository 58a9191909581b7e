"""A raw bucket whose classes differ in dynamics alone: what a model without a sense of time cannot tell apart.

A clip has two halves, in either order. In one the eyes move and the mouth stands still, in the other the mouth moves
and the eyes stand still:

    eyes    theta runs 1 or 2 turns, forwards or backwards;    left eye closes by (1 + cos theta) / 2,
                                                                right eye closes by (1 + sin theta) / 2
    mouth   a sawtooth that rises fast and falls slowly, or the same played backwards

    class = <slow|fast> _ <right|left> _ <onset|offset>
            turns         which eye leads  mouth opens fast and closes slowly, or the reverse

All phases are uniform, and what stands still stands at a phase of its own. So

* at every time the state (theta, mouth) has one and the same distribution in all eight classes: a single frame tells
  nothing, wherever in the clip it stands;
* the frames of the moving half sweep the same closed curve in all eight classes: the frames without their order tell
  nothing either (but for the sampling of that curve: a fast eye passes fewer different phases between two frames).

Subject, light, head motion, order of the halves, number of mouth strokes and noise are drawn without looking at the
class. A mirror image swaps the eyes, so this set is trained without flips. The faces are those of
pipeline/demo_faces.py.
"""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt

from pipeline.contract import MicaclError, digest
from pipeline.demo import Clip, encode_mp4, labels_csv, put
from pipeline.demo_faces import (
    EYES,
    FACE,
    UNITS,
    Bytes,
    Floats,
    Subject,
    bump_field,
    drift,
    make_subject,
    pixel_grid,
    render_course,
    squash_field,
    unit_fields,
)

if TYPE_CHECKING:
    from pipeline.storage import Store

SPEEDS: Final = ("slow", "fast")
LEADS: Final = ("right", "left")
PROFILES: Final = ("onset", "offset")
DYNAMICS_LABELS: Final = tuple("_".join(words) for words in itertools.product(SPEEDS, LEADS, PROFILES))
"""slow_right_onset, slow_right_offset, slow_left_onset, ..., fast_left_offset: eight."""

_RISE: Final = 0.25
"""Share of a mouth stroke that opens, in `onset`."""
_OPEN_PX: Final = 16.0
"""Height of the open mouth, portrait pixels."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DynamicsConfig:
    """How much is drawn, and from which seed."""

    seed: int = 7
    train_clips: tuple[int, ...] = (60,) * 8
    """Training clips of each class, in the order of DYNAMICS_LABELS."""
    test_clips: int = 30
    """Held-out clips of every class."""
    train_subjects: int = 24
    test_subjects: int = 10
    """Held out: no clip of them is in train."""
    frames: int = 32
    """Of a clip, at 25 per second; even."""
    side: int = 160
    """Of the square frame, pixels; even."""

    def __post_init__(self) -> None:
        counts = (*self.train_clips, self.test_clips, self.train_subjects, self.test_subjects)
        if len(self.train_clips) != len(DYNAMICS_LABELS) or min(counts) < 1 or self.frames < 8 or self.frames % 2:
            raise MicaclError(
                f"The dynamics set was asked for {self.train_clips} training clips, {self.test_clips} test clips a "
                f"class, {self.train_subjects} + {self.test_subjects} subjects, {self.frames} frames a clip.",
                "Nothing was written.",
                f"Give {len(DYNAMICS_LABELS)} counts of training clips, no count below 1, an even 8 frames or more.",
            )


def write_dynamics_bucket(store: Store, config: DynamicsConfig) -> dict[str, Any]:
    """Draw and store the whole bucket: videos/<subject>/<clip>.mp4 and labels.csv. Returns counts, fit for JSON."""
    clips = plan_dynamics(config)
    looks = {name: make_subject(_stream(config, "subject", name)) for name in sorted({clip.subject for clip in clips})}
    silence = np.zeros(0, np.float32)
    total = 0
    for clip in clips:
        frames_THW3 = draw_dynamics(clip, looks[clip.subject], config)
        total += put(store, clip.path, encode_mp4(frames_THW3, silence))
    total += put(store, "labels.csv", labels_csv(clips))
    counts = Counter((clip.split, clip.label) for clip in clips)
    return {"videos": {f"{split}/{label}": n for (split, label), n in sorted(counts.items())}, "bytes": total}


def plan_dynamics(config: DynamicsConfig) -> list[Clip]:
    """Every clip, sorted by path. Subjects take turns within a class; names tell no class."""
    wanted = [("train", label, i + c) for c, label in enumerate(DYNAMICS_LABELS) for i in range(config.train_clips[c])]
    wanted += [("test", label, i + c) for c, label in enumerate(DYNAMICS_LABELS) for i in range(config.test_clips)]
    people = {"train": ("s", config.train_subjects), "test": ("t", config.test_subjects)}
    seen: Counter[str] = Counter()
    clips = []
    for place in _stream(config, "order").permutation(len(wanted)):
        split, label, turn = wanted[place]
        kind, count = people[split]
        subject = f"{kind}{turn % count:02d}"
        path = f"videos/{subject}/{subject}_{seen[subject]:03d}.mp4"
        clips.append(Clip(path=path, label=label, subject=subject, split=split))
        seen[subject] += 1
    return sorted(clips, key=lambda clip: clip.path)


def draw_dynamics(clip: Clip, subject: Subject, config: DynamicsConfig) -> Bytes:
    """(T, side, side, 3) RGB of one clip; a function of the seed, the clip and its subject."""
    rng = _stream(config, clip.path)
    eyes_T2, mouth_T = dynamics_course(clip.label, config.frames, rng)
    if subject.mirrored:
        eyes_T2 = eyes_T2[:, ::-1]
    strength = rng.uniform(0.85, 1.1, 3).astype(np.float32)
    idle_TU = np.stack([rng.uniform(0, 0.15) * drift(config.frames, rng) for _ in UNITS], axis=1)
    weights_TU = np.concatenate([idle_TU, eyes_T2 * strength[:2]], axis=1).astype(np.float32)
    fields_UHW2 = np.concatenate([unit_fields(), wink_fields()])
    return render_course(subject, weights_TU, fields_UHW2, _OPEN_PX * strength[2] * mouth_T, config.side, rng)


def dynamics_course(label: str, frames: int, rng: np.random.Generator) -> tuple[Floats, Floats]:
    """How far the left and right eye are closed (T, 2) and the mouth is open (T,), 0 to 1, over one clip."""
    speed, lead, profile = label.split("_")
    half = frames // 2
    step_T = np.arange(half) / half
    turns = (1.0 + SPEEDS.index(speed)) * (1 if lead == "left" else -1)
    theta_T = rng.uniform() + turns * step_T
    stroke_T = rng.uniform() + rng.uniform(1.1, 1.6) * step_T * (1 if profile == "onset" else -1)
    theta, stroke = np.full(half, rng.uniform()), np.full(half, rng.uniform())
    eyes_first = rng.random() < 0.5
    theta_T = np.concatenate([theta_T, theta] if eyes_first else [theta, theta_T])
    stroke_T = np.concatenate([stroke, stroke_T] if eyes_first else [stroke_T, stroke])
    eyes_T2 = 0.5 + 0.5 * np.stack([np.cos(2 * np.pi * theta_T), np.sin(2 * np.pi * theta_T)], axis=1)
    return eyes_T2.astype(np.float32), sawtooth(stroke_T)


def sawtooth(phase_T: npt.ArrayLike) -> Floats:
    """Rises from 0 to 1 over the first quarter of a period and falls over the rest; each height lasts equally long."""
    part_T = np.mod(np.asarray(phase_T, np.float32), np.float32(1))
    return np.asarray(np.minimum(part_T / _RISE, (1 - part_T) / (1 - _RISE)), np.float32)


@cache
def wink_fields() -> Floats:
    """(2, H, W, 2): pushes that close the eye on the left and on the right of the picture, and lower its brow."""
    left, top, right, bottom = FACE
    grid_HW2 = pixel_grid()[top:bottom, left:right]
    brows = ((104.0, 89.0), (153.0, 91.0))
    fields = [
        1.9 * squash_field(grid_HW2, x, y, 12, 7) + bump_field(grid_HW2, (bx, by, 0, 5, 11, 6))
        for (x, y), (bx, by) in zip(EYES, brows, strict=True)
    ]
    return np.stack(fields).astype(np.float32)


def _stream(config: DynamicsConfig, *names: str) -> np.random.Generator:
    """A stream of random numbers of its own for each name: adding clips changes no other clip."""
    return np.random.default_rng(int(digest("/".join(("dynamics", str(config.seed), *names)).encode())[:32], 16))
