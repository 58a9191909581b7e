"""A raw bucket whose classes differ in dynamics alone: what a model without a sense of time cannot tell apart.

A clip has two halves, in either order. In one the mouth goes sideways and keeps as open as it is, in the other it opens
or closes and keeps its place:

    place    from left to right, or from right to left; at once back where it began; once or twice in the half
    opening  from closed to open (onset), or from open to closed (offset), once

    class = <slow|fast> _ <right|left> _ <onset|offset>
            how often     where it goes   how it opens

Played backwards, one class is another. What stands still does so at a place of its own, and a movement begins a little
early or late. So

* a frame tells nothing when its place in the clip is not known: over a clip, the state (place, opening) has one and the
  same distribution in all eight classes. (When it is known it does: the first frame of an onset is closed.)
* the frames of a clip are the same set in all eight classes: without their order they tell nothing (but for how densely
  they sample it: a fast mouth is at fewer different places between two frames).

Subject, light, head motion, order of the halves and noise are drawn without looking at the class. A mirror image
swaps left and right, so this set is trained without flips. The faces are those of pipeline/demo_faces.py.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache, partial
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt

from pipeline.contract import MicaclError, digest
from pipeline.demo import Clip, encode_mp4, labels_csv, put
from pipeline.demo_faces import Bytes, Subject, drift, make_subject, render_course
from pipeline.demo_units import FACE, MOUTH, UNITS, Floats, bump_field, pixel_grid, unit_fields

if TYPE_CHECKING:
    from pipeline.storage import Store

SPEEDS: Final = ("slow", "fast")
WAYS: Final = ("right", "left")
PROFILES: Final = ("onset", "offset")
DYNAMICS_LABELS: Final = tuple("_".join(words) for words in itertools.product(SPEEDS, WAYS, PROFILES))
"""slow_right_onset, slow_right_offset, slow_left_onset, ..., fast_left_offset: eight."""

_JITTER: Final = 0.12
"""Most share of a period by which a movement begins too early or too late."""
_OPEN_PX: Final = 20.0
"""Height of the open mouth, portrait pixels."""
_SIDE_PX: Final = 12.0
"""How far the mouth wanders to either side, portrait pixels."""


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


def write_dynamics_bucket(
    store: Store, config: DynamicsConfig, mapped: Callable[..., Iterable[int]] = map
) -> dict[str, Any]:
    """Draw and store the whole bucket: videos/<subject>/<clip>.mp4 and labels.csv. Returns counts, fit for JSON.

    `mapped` draws the clips; that of a pool of processes does it faster.
    """
    clips = plan_dynamics(config)
    total = sum(mapped(partial(_write_clip, store, config), clips))
    total += put(store, "labels.csv", labels_csv(clips))
    counts = Counter((clip.split, clip.label) for clip in clips)
    return {"videos": {f"{split}/{label}": n for (split, label), n in sorted(counts.items())}, "bytes": total}


def _write_clip(store: Store, config: DynamicsConfig, clip: Clip) -> int:
    frames_THW3 = draw_dynamics(clip, _look(config, clip.subject), config)
    return put(store, clip.path, encode_mp4(frames_THW3, np.zeros(0, np.float32)))


@cache
def _look(config: DynamicsConfig, subject: str) -> Subject:
    return make_subject(_stream(config, "subject", subject))


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
    place_T, opening_T = dynamics_course(clip.label, config.frames, rng)
    side_T = (2 * place_T - 1) * (-1 if subject.mirrored else 1)
    strength = rng.uniform(0.85, 1.1, 2).astype(np.float32)
    idle_TU = np.stack([rng.uniform(0, 0.15) * drift(config.frames, rng) for _ in UNITS], axis=1)
    weights_TU = np.concatenate([idle_TU, (side_T * strength[0])[:, None]], axis=1).astype(np.float32)
    fields_UHW2 = np.concatenate([unit_fields(), sideways_field()])
    return render_course(subject, weights_TU, fields_UHW2, _OPEN_PX * strength[1] * opening_T, config.side, rng)


def dynamics_course(label: str, frames: int, rng: np.random.Generator) -> tuple[Floats, Floats]:
    """Where the mouth is, 0 left to 1 right of the picture, and how far open, 0 to 1: (T,) and (T,) of one clip."""
    speed, way, profile = label.split("_")
    half = frames // 2
    time_T = (np.arange(half) + 0.5) / half
    place_T = ramp(rng.uniform(-_JITTER, _JITTER) + (1.0 + SPEEDS.index(speed)) * time_T)
    opening_T = ramp(rng.uniform(-_JITTER, _JITTER) + time_T)
    place_T = 1 - place_T if way == "right" else place_T
    opening_T = 1 - opening_T if profile == "offset" else opening_T
    place, opening = np.full((2, half), rng.uniform(size=(2, 1)), np.float32)
    place_first = rng.random() < 0.5
    place_T = np.concatenate([place_T, place] if place_first else [place, place_T])
    opening_T = np.concatenate([opening, opening_T] if place_first else [opening_T, opening])
    return place_T, opening_T


def ramp(phase_T: npt.ArrayLike) -> Floats:
    """Rises from 0 to 1 over a period and falls back at once; each height lasts equally long."""
    return np.mod(np.asarray(phase_T, np.float32), np.float32(1))


@cache
def sideways_field() -> Floats:
    """(1, H, W, 2): a push of mouth and chin to the right of the picture."""
    left, top, right, bottom = FACE
    grid_HW2 = pixel_grid()[top:bottom, left:right]
    return bump_field(grid_HW2, (MOUTH[0], MOUTH[1] + 4, _SIDE_PX, 0.0, 26.0, 18.0))[None]


def _stream(config: DynamicsConfig, *names: str) -> np.random.Generator:
    """A stream of random numbers of its own for each name: adding clips changes no other clip."""
    return np.random.default_rng(int(digest("/".join(("dynamics", str(config.seed), *names)).encode())[:32], 16))
