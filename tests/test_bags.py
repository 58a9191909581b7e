"""A bag and its pixels: one square an instance."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.bags import Bag, _bag, _crop, _square
from pipeline.codec import MAX_SIDE
from pipeline.contract import BagMeta, CropConfig, MicaclError
from pipeline.faces import Box, Cut, Track

CONFIG = CropConfig(size=32, instances=3, frames_per_instance=4, min_frames=3)


def track_of(boxes: list[tuple[float, float, float]], fps: float = 25.0) -> Track:
    """A track through frames whose red says the column and whose green says the row."""
    frame_HWC = np.zeros((200, 200, 3), np.uint8)
    frame_HWC[..., 0], frame_HWC[..., 1] = np.arange(200)[None], np.arange(200)[:, None]
    track = Track(CONFIG.instances * CONFIG.frames_per_instance)
    for i, box in enumerate(boxes):
        track.add(Cut(i / fps, Box(*box), frame_HWC, 0, 0))
    return track


def test_a_size_that_cannot_be_read_again_is_refused() -> None:
    with pytest.raises(MicaclError, match="size"):
        CropConfig(size=MAX_SIDE + 1)


@pytest.mark.parametrize(
    "field",
    [
        {"size": 0}, {"instances": 0}, {"frames_per_instance": 0}, {"detect_every": 0}, {"detect_side": 0},
        {"margin": 0.0}, {"jpeg_quality": 101}, {"detector": "another"}, {"instances": 5000, "min_frames": 5000},
    ],
)  # fmt: skip
def test_a_config_that_cannot_work_is_refused(field: dict[str, object]) -> None:
    with pytest.raises(MicaclError):
        CropConfig(**field)  # type: ignore[arg-type]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(frames=st.integers(3, 200))
def test_a_bag_is_cut_evenly(frames: int) -> None:
    bag = _bag(track_of([(100, 100, 40)] * frames), "v_0", 0, "v.mp4", CONFIG)
    assert bag.meta.frames == min(bag.meta.frames, 12) >= min(frames, 12)
    assert max(bag.meta.instance_frames) - min(bag.meta.instance_frames) <= 1
    assert bag.meta.seconds == pytest.approx((frames - 1) / 25, abs=1e-3)


def test_one_square_an_instance() -> None:
    """The median of its boxes: one wild detection of three moves nothing."""
    steady, wild = (100.0, 90.0, 40.0), (150.0, 20.0, 90.0)
    bag = _bag(track_of([steady, wild, steady] * 3), "v_0", 0, "v.mp4", CONFIG)
    assert bag.meta.boxes == ((100.0, 90.0, 52.0),) * 3
    assert len({jpeg for instance in bag.encoded for jpeg in instance}) == 1


def test_the_crop_shows_the_square_it_names() -> None:
    cut = track_of([(110, 80, 40)]).cuts[0]
    square = _square([cut], CONFIG)
    assert square == (110, 80, 52)
    patch_HWC = _crop(cut, square, 52)
    assert patch_HWC[..., 0].tolist() == [list(range(84, 136))] * 52
    assert patch_HWC[:, 0, 1].tolist() == list(range(54, 106))


@pytest.mark.parametrize(("cx", "cy"), [(0, 100), (199, 100), (100, 0), (100, 199), (-60, 100), (300, 300)])
def test_what_lies_outside_repeats_the_edge(cx: float, cy: float) -> None:
    patch_HWC = _crop(track_of([(cx, cy, 40)]).cuts[0], (cx, cy, 52), 52)
    assert patch_HWC[0, :, 0].tolist() == np.clip(np.arange(cx - 26, cx + 26), 0, 199).tolist()
    assert patch_HWC[:, 0, 1].tolist() == np.clip(np.arange(cy - 26, cy + 26), 0, 199).tolist()


def test_a_bag_counts_its_own_frames() -> None:
    meta = _bag(track_of([(100, 100, 40)] * 6), "v_0", 0, "v.mp4", CONFIG).meta
    with pytest.raises(AssertionError):
        Bag(meta, ((b"1",),))


def test_what_is_known_of_a_bag_survives_json() -> None:
    meta = _bag(track_of([(100, 100, 40)] * 6), "v_0", 0, "ä/名.mp4", CONFIG).meta
    assert BagMeta.from_json(meta.to_json()) == meta
    assert BagMeta.from_json(meta.to_json().encode()) == meta
    with pytest.raises(MicaclError, match="schema 9"):
        BagMeta.from_json(meta.to_json().replace('"schema":2', '"schema":9'))
