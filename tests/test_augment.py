"""micacl.augment against a loop over clips, colorsys, interpolate; keys, ranks and resumes; the evaluation's bits."""

from __future__ import annotations

import colorsys
import dataclasses
import itertools
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.colors import hsv_to_rgb, rgb_to_hsv
from torch import Tensor
from torch.nn import functional

from micacl.augment import GREY, AugmentParams, apply, augment_key, draw_augmentation, draw_augmentations, turn_hue
from micacl.batch import Batch, BatchConfig, collate, to_input
from micacl.config import RunConfig, TrainConfig
from micacl.model.backbone import BackboneConfig
from micacl.model.micacl import ModelConfig
from micacl.train.data import TrainData, train_data
from pipeline.contract import MicaclError
from pipeline.dataset import open_dataset
from pipeline.loader import EvalLoader, Loader
from pipeline.plan import PlanConfig
from pipeline.rows import split_rows
from pipeline.stream import StreamConfig
from tests.tiny_dataset import make_dataset

CPU = torch.device("cpu")
SIDE, FRAME = 24, 32
STRONG = BatchConfig(side=SIDE, crop_share=0.08, crop_ratio=4 / 3, jitter=0.4, saturation=0.4, hue=0.4, erase=0.5)
"""M3DFEL's strengths, and erasing."""
OFF = BatchConfig(side=SIDE, crop_share=1, flip=0, jitter=0)
TOLERANCE = 2e-6
"""Absolute, of float32 colours in [0, 1]."""
LABELS = ("happy", "sad", "neutral")


def keys_of(count: int, seed: int = 0) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).integers(0, 2**64, (count, 2), dtype=np.uint64)


def clips_of(count: int, seed: int = 0, frames: int = 3, size: int = FRAME) -> Tensor:
    """Smooth pictures with noise: colours of all kinds."""
    rng = np.random.default_rng(seed)
    low = torch.from_numpy(rng.uniform(-40, 300, (count * 2 * frames, 3, 4, 4)).astype(np.float32))
    smooth = functional.interpolate(low, size=(size, size), mode="bilinear").permute(0, 2, 3, 1)
    noise = torch.from_numpy(rng.normal(0, 8, smooth.shape).astype(np.float32))
    return (smooth + noise).clamp(0, 255).byte().view(count, 2, frames, size, size, 3)


def batch_of(frames: Tensor, config: BatchConfig, seed: int = 0) -> Batch:
    draws = tuple(draw_augmentation(key, config, (FRAME, FRAME)) for key in keys_of(len(frames), seed))
    return Batch(frames, torch.zeros(len(frames), dtype=torch.long), ("",) * len(frames), draws, config)


def naive(clip_NTHWC: Tensor, one: AugmentParams, side: int, fill: tuple[float, float, float]) -> Tensor:
    """(N, C, T, S, S) of one clip: sliced, resized by interpolate, recoloured op by op, hue by matplotlib."""
    top, left, height, width = one.box
    n, t = clip_NTHWC.shape[:2]
    x = clip_NTHWC.flatten(0, 1)[:, top : top + height, left : left + width].permute(0, 3, 1, 2).double() / 255
    x = functional.interpolate(x, size=(side, side), mode="bilinear", antialias=True, align_corners=False)
    x = x.flip(-1) if one.flip else x
    x = x.permute(0, 2, 3, 1) * one.brightness
    grey = torch.tensor(GREY, dtype=torch.float64)
    x = one.contrast * x + (1 - one.contrast) * (x @ grey).mean()
    x = one.saturation * x + (1 - one.saturation) * (x @ grey)[..., None]
    hsv = rgb_to_hsv(x.clamp(0, 1).numpy())
    hsv[..., 0] = (hsv[..., 0] + one.hue) % 1
    x = torch.from_numpy(hsv_to_rgb(hsv))
    e_top, e_left, e_bottom, e_right = one.erased
    for i, j in itertools.product(range(side), repeat=2):
        if e_top <= (i + 0.5) / side < e_bottom and e_left <= (j + 0.5) / side < e_right:
            x[:, i, j] = torch.tensor(fill, dtype=torch.float64)
    return x.view(n, t, side, side, 3).permute(0, 4, 1, 2, 3)


def test_a_batch_is_what_a_loop_over_clips_makes() -> None:
    frames, config = clips_of(12), STRONG
    batch = batch_of(frames, config)
    assert batch.params is not None
    assert {one.flip for one in batch.params} == {True, False}
    assert sum(any(one.erased) for one in batch.params) in range(2, 11)
    for one, clip, got in zip(batch.params, frames, apply(frames, batch.params, SIDE, config.mean), strict=True):
        wanted = naive(clip, one, SIDE, config.mean)
        assert float((got - wanted).abs().max()) < 2e-5  # hue divides by the chroma, so nearly grey pixels are rough
        assert float((got - wanted).abs().mean()) < TOLERANCE


@settings(max_examples=60, deadline=None)
@given(st.integers(8, 40), st.integers(1, FRAME), st.integers(1, FRAME), st.booleans(), st.data())
def test_crop_and_flip_are_those_of_interpolate(side: int, height: int, width: int, flip: bool, data: Any) -> None:
    top, left = data.draw(st.integers(0, FRAME - height)), data.draw(st.integers(0, FRAME - width))
    frames = clips_of(1, frames=1)
    one = AugmentParams(box=(top, left, height, width), flip=flip)
    (got,) = apply(frames, [one], side)
    assert float((got - naive(frames[0], one, side, (0, 0, 0))).abs().max()) < TOLERANCE


def test_what_stands_still_stays_still() -> None:
    still = clips_of(6, frames=1).repeat(1, 1, 5, 1, 1, 1)
    still[:, 1] = still[:, 0]
    batch = batch_of(still, STRONG)
    x_BNCTHW = to_input(batch, CPU)
    assert torch.equal(x_BNCTHW, x_BNCTHW[:, :1, :, :1].expand_as(x_BNCTHW))
    assert not torch.equal(x_BNCTHW[0, 0, :, 0], x_BNCTHW[1, 0, :, 0])


@pytest.mark.parametrize("split", [(6,), (1, 5), (3, 3), (1, 1, 1, 1, 1, 1)])
def test_a_clip_does_not_hang_on_its_neighbours(split: tuple[int, ...]) -> None:
    frames = clips_of(6)
    whole = batch_of(frames, STRONG)
    assert whole.params is not None
    wanted = torch.cat([apply(frames[i : i + 1], whole.params[i : i + 1], SIDE) for i in range(6)])
    ends = list(itertools.accumulate(split))
    parts = [apply(frames[e - n : e], whole.params[e - n : e], SIDE) for n, e in zip(split, ends, strict=True)]
    assert float((torch.cat(parts) - wanted).abs().max()) < TOLERANCE


def test_a_cpu_takes_a_batch_in_parts_and_makes_the_same() -> None:
    frames = clips_of(5, frames=4, size=128)
    batch = Batch(frames, torch.zeros(5), ("",) * 5, tuple(AugmentParams(box=(i, 2, 90, 99)) for i in range(5)), STRONG)
    assert frames.nbytes > 2**20
    mean, std = (torch.tensor(v).view(3, 1, 1, 1) for v in (STRONG.mean, STRONG.std))
    assert batch.params is not None
    wanted = (apply(frames, batch.params, SIDE) - mean) / std
    assert float((to_input(batch, CPU) - wanted).abs().max()) < 5 * TOLERANCE  # divided by the standard deviation


def test_switched_off_it_is_the_evaluation_transform() -> None:
    frames = clips_of(4)
    batch = batch_of(frames, OFF)
    evaluated = dataclasses.replace(batch, params=None)
    assert float((to_input(batch, CPU) - to_input(evaluated, CPU)).abs().max()) < 5 * TOLERANCE


@pytest.mark.parametrize("side", [24, 32, 48])
def test_the_evaluation_transform_has_the_bits_that_it_had(side: int) -> None:
    """One clip at a time: to float, resized with antialias, normalised. Served and stored predictions hang on it."""
    frames, config = clips_of(9, frames=4, size=96), BatchConfig(side=side)
    got = to_input(Batch(frames, torch.zeros(9), ("",) * 9, None, config), CPU)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (config.mean, config.std))
    for clip, x_NCTHW in zip(frames, got, strict=True):
        x = clip.flatten(0, 1).permute(0, 3, 1, 2).float().div_(255)
        x = functional.interpolate(x, size=(side, side), mode="bilinear", antialias=True, align_corners=False)
        assert torch.equal(x_NCTHW, x.sub(mean).div(std).view(2, 4, 3, side, side).transpose(1, 2))


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 255), min_size=3, max_size=3), st.floats(-0.5, 0.5))
def test_hue_is_that_of_colorsys(rgb: list[int], turn: float) -> None:
    red, green, blue = (v / 255 for v in rgb)
    hue, saturation, value = colorsys.rgb_to_hsv(red, green, blue)
    wanted = colorsys.hsv_to_rgb((hue + turn) % 1, saturation, value)
    x = torch.tensor([red, green, blue], dtype=torch.float64).view(1, 1, 3, 1, 1, 1)
    got = turn_hue(x, torch.tensor([turn], dtype=torch.float64)).flatten().tolist()
    assert got == pytest.approx(wanted, abs=1e-9)


def test_draws_are_a_function_of_key_and_config() -> None:
    keys = keys_of(50)
    draws = [draw_augmentation(key, STRONG, (FRAME, FRAME)) for key in keys]
    assert draws == [draw_augmentation(key, STRONG, (FRAME, FRAME)) for key in keys]
    assert len(set(draws)) == len(draws)
    assert draw_augmentations(keys, STRONG, (FRAME, FRAME)) == tuple(draws)
    picks, augments = (np.random.Generator(np.random.Philox(key=k)).random() for k in (keys[0], augment_key(keys[0])))
    assert picks != augments


def test_draws_are_those_of_this_release() -> None:
    """Written down: a run that goes on with another release goes on with the same clips."""
    one = draw_augmentation(np.array([1, 3], np.uint64), STRONG, (128, 128))
    assert one.box == (10, 1, 77, 60)
    rest = (0, 1.159802, 1.0730987, 0.8284671, 0.2425646, 0.4449453, 0.2382251, 0.8985887, 0.7377283)
    assert one.row[4:] == pytest.approx(rest, abs=1e-6)


def test_a_field_that_is_off_does_not_change_the_draws_of_the_others() -> None:
    plain, with_hue = (dataclasses.replace(STRONG, hue=hue, erase=erase) for hue, erase in ((0, 0), (0.4, 1)))
    for key in keys_of(20):
        one, other = (draw_augmentation(key, config, (FRAME, FRAME)) for config in (plain, with_hue))
        assert (one.row[:8], one.hue, one.erased) == (other.row[:8], 0, (0, 0, 0, 0))


def test_draws_have_the_distributions_that_the_page_says() -> None:
    size = 1000
    draws = [draw_augmentation(key, STRONG, (size, size)) for key in keys_of(4000)]
    top, left, height, width = np.array([one.box for one in draws]).T
    assert min(top.min(), left.min(), height.min(), width.min()) >= 0
    assert max((top + height).max(), (left + width).max()) <= size
    area, ratio = height * width / size**2, width / height
    assert (0.079 < area.min() < 0.1, 0.97 < area.max() <= 1) == (True, True)
    assert np.mean(area[area < 0.54] < 0.31) == pytest.approx(0.5, abs=0.04)  # uniform where every ratio fits
    assert (ratio.min(), ratio.max()) == pytest.approx((3 / 4, 4 / 3), abs=0.02)
    assert np.mean(np.log(ratio)) == pytest.approx(0, abs=0.01)
    free = (height < size) & (width < size)
    assert np.mean(top[free] / (size - height[free])) == pytest.approx(0.5, abs=0.03)
    assert np.mean([one.flip for one in draws]) == pytest.approx(0.5, abs=0.03)
    for name, middle, most in (("brightness", 1, 0.4), ("contrast", 1, 0.4), ("saturation", 1, 0.4), ("hue", 0, 0.4)):
        values = np.array([getattr(one, name) for one in draws]) - middle
        assert np.abs(values).max() <= most
        assert np.quantile(values, [0.1, 0.5, 0.9]) == pytest.approx(np.array([-0.8, 0, 0.8]) * most, abs=0.03)
    erased = np.array([one.erased for one in draws if any(one.erased)])
    assert len(erased) / len(draws) == pytest.approx(0.5, abs=0.03)
    share = (erased[:, 2] - erased[:, 0]) * (erased[:, 3] - erased[:, 1])
    assert (erased.min() >= 0, erased.max() <= 1) == (True, True)
    assert (share.min(), share.max()) == pytest.approx((0.02, 0.33), abs=0.005)


def test_every_place_of_a_crop_is_used() -> None:
    config = dataclasses.replace(STRONG, crop_share=0.25, crop_ratio=1)
    boxes = [draw_augmentation(key, config, (3, 3)).box for key in keys_of(900)]
    places = Counter((top, left) for top, left, height, width in boxes if (height, width) == (2, 2))
    assert set(places) == {(0, 0), (0, 1), (1, 0), (1, 1)}
    assert max(places.values()) < 1.5 * min(places.values())


def test_augment_off_is_evaluation_in_training(dataset: str) -> None:
    (batch,) = itertools.islice(iter(Loader(open_dataset(dataset), plan=PlanConfig(global_batch=4))), 1)
    assert collate(batch, dataclasses.replace(STRONG, augment=False), train=True).params is None
    assert collate(batch, STRONG, train=False).params is None
    assert collate(batch, STRONG, train=True).params is not None


def test_frames_travel_as_bytes(dataset: str) -> None:
    rows = split_rows(open_dataset(dataset), "train")
    batch = next(iter(EvalLoader(rows, StreamConfig(frames=2))))
    collated = collate(batch, STRONG, train=True)
    assert collated.frames_BNTHWC.dtype == torch.uint8
    assert collated.frames_BNTHWC.data_ptr() == batch.frames_BNTHWC.ctypes.data  # no copy


@pytest.mark.parametrize(
    ("field", "value"),
    [("crop_share", 0), ("crop_ratio", 0.5), ("flip", 1.1), ("jitter", -0.1), ("hue", 0.6), ("erase_share", 0.01),
     ("side", 4), ("std", (1, 0, 1))],
)  # fmt: skip
def test_a_value_out_of_range_is_refused(field: str, value: Any) -> None:
    with pytest.raises(MicaclError, match=f"--batch.{field.replace('_', '-')}"):
        BatchConfig(**{field: value})


# Ranks and resumes, through the loader.


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> str:
    counts = {"train": {"happy": 9, "sad": 4, "neutral": 2}}
    return make_dataset(tmp_path_factory.mktemp("dataset"), counts, seed=0)


@pytest.fixture(scope="module")
def data(dataset: str) -> TrainData:
    config = RunConfig(
        model=ModelConfig(backbone=BackboneConfig.tiny(8), classes=LABELS, projection_dim=16),
        plan=PlanConfig(global_batch=4, steps_per_epoch=4),
        stream=StreamConfig(frames=2, threads=1, slowest=0.5),
        batch=STRONG,
        train=TrainConfig(epochs=2),
    )
    return train_data(open_dataset(dataset), config)


def inputs(data: TrainData, start: int, rank: int, ranks: int) -> list[tuple[tuple[str, ...], Tensor]]:
    return [(batch.keys, to_input(batch, CPU)) for batch in data.batches(start, rank, ranks)]


@pytest.mark.parametrize("ranks", [2, 4])
def test_any_ranks_see_the_same_clips(data: TrainData, ranks: int) -> None:
    alone = inputs(data, 0, 0, 1)
    together = [inputs(data, 0, rank, ranks) for rank in range(ranks)]
    for step, (keys, clips) in enumerate(alone):
        for rank in range(ranks):
            assert together[rank][step][0] == keys[rank::ranks]
            assert float((together[rank][step][1] - clips[rank::ranks]).abs().max()) < 5 * TOLERANCE


def test_a_run_that_goes_on_sees_the_clips_of_one_that_never_stopped(data: TrainData) -> None:
    whole, rest = inputs(data, 0, 0, 1), inputs(data, 5, 0, 1)
    assert (len(whole), len(rest)) == (8, 3)
    for (keys, clips), (keys_again, clips_again) in zip(whole[5:], rest, strict=True):
        assert keys == keys_again
        assert torch.equal(clips, clips_again)


def test_a_clip_that_comes_again_looks_otherwise(data: TrainData) -> None:
    seen: dict[str, Tensor] = {}
    again = 0
    for keys, clips in inputs(data, 0, 0, 1):
        for key, clip in zip(keys, clips, strict=True):
            again += key in seen
            assert key not in seen or not torch.equal(seen[key], clip)
            seen[key] = clip
    assert again > 5
