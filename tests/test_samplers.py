"""Which stored frames a step uses: in order, in their instance, each as often as the sampler's rule says."""

from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.contract import MicaclError
from pipeline.decode import StreamConfig
from pipeline.samplers import SAMPLERS, pick_frames, pick_segments


@settings(max_examples=300, deadline=None, derandomize=True)
@given(stored=st.integers(1, 200), wanted=st.integers(1, 64), seed=st.none() | st.integers(0, 2**32))
def test_frames_never_go_backwards(stored: int, wanted: int, seed: int | None) -> None:
    picked = pick_frames(stored, wanted, None if seed is None else np.random.default_rng(seed))
    assert len(picked) == wanted
    assert picked == sorted(picked)
    assert 0 <= picked[0] <= picked[-1] < stored
    edges = [stored * i / wanted for i in range(wanted + 1)]
    assert all(int(a) <= frame <= b for frame, a, b in zip(picked, edges, edges[1:], strict=False))
    if wanted <= stored:
        assert len(set(picked)) >= wanted // 2
    if wanted % stored == 0:
        assert set(Counter(picked).values()) == {wanted // stored}


def test_the_frames_of_the_docstring() -> None:
    assert pick_frames(12, 4, None) == [1, 4, 7, 10]
    assert pick_frames(2, 4, None) == [0, 0, 1, 1]
    assert pick_frames(1, 3, np.random.default_rng(0)) == [0, 0, 0]


INSTANCE_FRAMES = st.lists(st.integers(1, 40), min_size=1, max_size=8)
SEEDS = st.none() | st.integers(0, 2**32)


def rng_of(seed: int | None) -> np.random.Generator | None:
    return None if seed is None else np.random.default_rng(seed)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(stored=INSTANCE_FRAMES, wanted=st.integers(1, 16), seed=SEEDS)
def test_segments_stay_in_their_instance(stored: list[int], wanted: int, seed: int | None) -> None:
    picked = SAMPLERS["segments"](stored, wanted, rng_of(seed))
    rng, start = rng_of(seed), 0
    for row, count in zip(picked, stored, strict=True):
        assert row == [start + i for i in pick_frames(count, wanted, rng)]
        start += count


@settings(max_examples=300, deadline=None, derandomize=True)
@given(stored=INSTANCE_FRAMES, wanted=st.integers(1, 16), seed=SEEDS)
def test_m3dfel_starts_at_its_sixteenths(stored: list[int], wanted: int, seed: int | None) -> None:
    """Frame i of F is floor(N i / F), plus 0 to F - 1 in training, never past the last frame."""
    picked = SAMPLERS["m3dfel"](stored, wanted, rng_of(seed))
    assert [len(row) for row in picked] == [wanted] * len(stored)
    total, count = sum(stored), len(stored) * wanted
    for i, frame in enumerate(frame for row in picked for frame in row):
        start = total * i // count
        if seed is None:
            assert frame == start
        else:
            assert start <= frame <= min(start + count - 1, total - 1)


@pytest.mark.parametrize(("stored", "backwards"), [(30, 0.31), (77, 0.21), (200, 0.02), (800, 0.0)])
def test_m3dfel_goes_backwards_as_often_as_the_released_code(stored: int, backwards: float) -> None:
    """Share of neighbours among 16 frames that run back in time; the numbers are those of a simulation of that code."""
    rng = np.random.default_rng(0)
    pairs = [
        later < earlier
        for _ in range(2000)
        for row in [np.ravel(SAMPLERS["m3dfel"]([stored // 4] * 3 + [stored - 3 * (stored // 4)], 4, rng)).tolist()]
        for earlier, later in itertools.pairwise(row)
    ]
    assert np.mean(pairs) == pytest.approx(backwards, abs=0.01)


def test_m3dfel_repeats_the_frames_of_a_short_bag() -> None:
    assert SAMPLERS["m3dfel"]([3, 2], 5, None) == [[0, 0, 1, 1, 2], [2, 3, 3, 4, 4]]
    assert SAMPLERS["m3dfel"]([1], 3, np.random.default_rng(0)) == [[0, 0, 0]]
    last = Counter(np.ravel(SAMPLERS["m3dfel"]([2] * 4, 4, np.random.default_rng(0))).tolist())
    assert last.most_common(1)[0][0] == 7


def test_m3dfel_uses_every_jitter_equally() -> None:
    rng = np.random.default_rng(0)
    jitter = Counter(SAMPLERS["m3dfel"]([250] * 4, 4, rng)[0][0] for _ in range(4000))
    assert sorted(jitter) == list(range(16))
    assert max(jitter.values()) < 1.4 * min(jitter.values())


def test_an_unknown_sampler_is_refused() -> None:
    with pytest.raises(MicaclError, match=r"--stream.sampler is 'random'.*Use segments or m3dfel"):
        StreamConfig(sampler="random")


def test_every_stored_frame_is_used_in_training() -> None:
    rng = np.random.default_rng(0)
    seen = Counter(i for _ in range(600) for i in pick_frames(12, 4, rng))
    assert sorted(seen) == list(range(12))
    assert max(seen.values()) < 1.5 * min(seen.values())


@pytest.mark.parametrize("slowest", [0.25, 0.5])
def test_a_speed_takes_a_stretch_of_each_instance(slowest: float) -> None:
    """Frames stay in order and in their instance; from the first to the last is a share of it from `slowest` to 1."""
    spans = []
    for seed in range(2000):
        picked = np.array(pick_segments([1000] * 4, 4, rng_of(seed), slowest))
        assert (np.diff(picked) >= 0).all()
        assert (picked // 1000 == np.arange(4)[:, None]).all()
        spans.append((picked[:, -1] - picked[:, 0]).max() / 1000)
    assert 0.5 * slowest < min(spans) < 0.75 * slowest  # between the outer two of four parts, a half to all of it
    assert max(spans) > 0.9
    ends = [picked for seed in range(400) for picked in pick_segments([12], 4, rng_of(seed), slowest)]
    assert set(np.ravel(ends)) == set(range(12))


def test_speed_one_changes_no_draw() -> None:
    for seed in range(20):
        assert pick_segments([12, 7], 4, rng_of(seed), 1.0) == pick_segments([12, 7], 4, rng_of(seed))
    assert pick_segments([12, 7], 4, None, 0.5) == pick_segments([12, 7], 4, None)


def test_a_speed_is_for_segments_alone() -> None:
    with pytest.raises(MicaclError, match=r"--stream.slowest is 0.5 with the sampler m3dfel"):
        StreamConfig(sampler="m3dfel", slowest=0.5)
    with pytest.raises(MicaclError, match=r"--stream.slowest is 0\b"):
        StreamConfig(slowest=0)
