"""Which stored frames of a bag a step uses. A sampler is a name in StreamConfig.sampler and a function here.

    segments   each instance by itself: the middle of each of `wanted` equal parts, in training a random frame of it
    m3dfel     the whole bag in one: M3DFEL's rule, kept with its quirk

The random frame is the temporal jitter of training. With `slowest` below 1, `segments` also draws a speed: what is cut
into parts is then a stretch of each instance, a random share of it from `slowest` to 1: the movement comes slower.

Frames are numbered through the bag, over the borders of its instances.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np


def pick_segments(
    instance_frames: Sequence[int], wanted: int, rng: np.random.Generator | None, slowest: float = 1.0
) -> list[list[int]]:
    """`wanted` frame numbers of each instance, in order of time, as `pick_frames`."""
    low_NT, length_NT, last_N1, start_N1 = _segments(tuple(instance_frames), wanted)
    at_NT = rng.random(low_NT.shape) if rng is not None else 0.5
    places_NT = low_NT + at_NT * length_NT
    if rng is not None and slowest < 1:
        speed = rng.uniform(slowest, 1)
        places_NT = places_NT * speed + (last_N1 + 1) * (1 - speed) * rng.random()
    frames_NT = np.minimum(places_NT.astype(np.int64), last_N1) + start_N1
    picked: list[list[int]] = frames_NT.tolist()
    return picked


@functools.lru_cache(maxsize=1024)
def _segments(instance_frames: tuple[int, ...], wanted: int) -> tuple[np.ndarray[Any, Any], ...]:
    """(begin and length of each segment, last frame of each instance, frames before it). Bags are much alike."""
    stored_N1 = np.array(instance_frames)[:, None]
    edges_NT = np.arange(wanted + 1) * stored_N1 / wanted
    return edges_NT[:, :-1], np.diff(edges_NT), stored_N1 - 1, np.cumsum(stored_N1, axis=0) - stored_N1


def pick_frames(stored: int, wanted: int, rng: np.random.Generator | None) -> list[int]:
    """`wanted` frame numbers of `stored`, never backwards in time; short instances repeat frames evenly.

    stored 12, wanted 4:   ..x...x...x..x    the middle of each quarter; in training a random frame of it
    """
    return pick_segments([stored], wanted, rng)[0]


def pick_m3dfel(instance_frames: Sequence[int], wanted: int, rng: np.random.Generator | None) -> list[list[int]]:
    """F = instances * wanted frame numbers of the bag's N, cut into instances in a row.

    Frame i is floor(N * i / F); in training a jitter of 0 to F - 1 frames of its own is added to each, and what passes
    the end is the last frame. The jitter does not depend on N, so frames of a short bag go backwards in time, as they
    do in M3DFEL's released code (Tencent/TFace, attribute/M3DFEL). That code draws its test frames so too; here
    evaluation has no jitter. A bag of fewer than F frames repeats them evenly in evaluation; in training its last one
    comes often.
    """
    stored, instances = sum(instance_frames), len(instance_frames)
    frames = instances * wanted
    jitter = (rng.random(frames) * frames).astype(int) if rng is not None else np.zeros(frames, int)
    picked = np.minimum(np.arange(frames) * stored // frames + jitter, stored - 1)
    return [[int(i) for i in part] for part in picked.reshape(instances, wanted)]


Sampler = Callable[[Sequence[int], int, np.random.Generator | None], list[list[int]]]
SAMPLERS: dict[str, Sampler] = {"segments": pick_segments, "m3dfel": pick_m3dfel}
"""By name: (stored frames of each instance, frames wanted of each, rng or None) -> (instances, wanted)."""
