"""Augmentation of clips: drawn from the plan's key in numpy, applied to a whole batch in torch where the frames are.

    rng key ──draw_augmentations──> AugmentParams of a clip ─┐
    uint8 frames of B clips, on the CPU or a GPU ────────────┴──apply──> float clips in [0, 1], side x side

A draw is a function of (key, config) and of nothing else: not of the rank, the batch, or what was drawn before. All
frames of all instances of a clip get the same crop, flip, colours and erased box, so what stands still stays still.

The steps, in order:

    crop and flip    random resized crop; bilinear with antialias, as the evaluation transform resizes. A resize is
                     linear, so a clip's box and flip are two matrices, and the batch is two batched products:
                     rows_BSH @ x_BHW @ columns_BWS.
    brightness b     x <- b x
    contrast k       x <- k x + (1 - k) m             m: the mean grey of the whole clip; grey: ITU-R 601
    saturation s     x <- s x + (1 - s) grey(x)       these three are linear; their result is clipped to [0, 1]
    hue              the angle of HSV turned
    erase            a box filled with `fill`, at the same place in every frame

These are the factors of torchvision's ColorJitter and RandomErasing, in a fixed order and clipped once. Which frames a
step uses (temporal jitter and speed) is drawn before decoding: StreamConfig.sampler and StreamConfig.slowest.

Mixup and cutmix are not here: they need soft labels, and a partner in the batch, which differs from rank to rank.

Legend: B clips, N instances, T frames per instance, M = N C T, C channels, H W height and width, S side of the result.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.contract import require_between

GREY = (0.299, 0.587, 0.114)
LEAST_ERASED = 0.02
_ATTEMPTS = 10
"""To draw a box that fits, as torchvision's transforms try."""
_NUMBERS = 6 + 2 * 4 * _ATTEMPTS
"""Of a key's stream that a clip uses: six of its own fields, and boxes to crop and to erase."""
_STREAM = np.array([0, 0x9E3779B97F4A7C15], np.uint64)


@dataclass(frozen=True, kw_only=True, slots=True)
class AugmentConfig:
    """What changes from one use of a clip to the next; the same for all frames of the clip."""

    augment: bool = True
    """In training: all that follows. Off, training sees what evaluation sees."""
    crop_share: float = 0.75
    """Least area of the random crop, of the frame. 1: no crop."""
    crop_ratio: float = 1.0
    """Most width over height of the crop; its inverse is the least."""
    flip: float = 0.5
    """Share of clips that are mirrored."""
    jitter: float = 0.25
    """Most relative change of brightness and of contrast."""
    saturation: float = 0.0
    """Most relative change of saturation."""
    hue: float = 0.0
    """Most turn of the hue either way, of a full circle; 0.5 is all colours."""
    erase: float = 0.0
    """Share of clips in which a box is erased."""
    erase_share: float = 0.33
    """Most area of the erased box, of the frame; the least is 0.02."""

    def __post_init__(self) -> None:
        for flag, value, low, high in (
            ("--batch.crop-share", self.crop_share, 1e-3, 1),
            ("--batch.crop-ratio", self.crop_ratio, 1, 100),
            ("--batch.flip", self.flip, 0, 1),
            ("--batch.jitter", self.jitter, 0, 1),
            ("--batch.saturation", self.saturation, 0, 1),
            ("--batch.hue", self.hue, 0, 0.5),
            ("--batch.erase", self.erase, 0, 1),
            ("--batch.erase-share", self.erase_share, LEAST_ERASED, 1),
        ):
            require_between(low, high, flag, value)


@dataclass(frozen=True, kw_only=True, slots=True)
class AugmentParams:
    """What is done to one clip. The defaults do nothing."""

    box: tuple[int, int, int, int]
    """Top, left, height and width of the crop; pixels of the frame."""
    flip: bool = False
    brightness: float = 1.0
    contrast: float = 1.0
    saturation: float = 1.0
    hue: float = 0.0
    """Turn, of a full circle."""
    erased: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)
    """Top, left, bottom and right of the erased box; shares of the result."""

    @property
    def row(self) -> tuple[float, ...]:
        """All of it as numbers, in the order of the fields."""
        return (*self.box, self.flip, self.brightness, self.contrast, self.saturation, self.hue, *self.erased)


def draw_augmentation(rng_key: NDArray[np.uint64], config: AugmentConfig, shape: tuple[int, int]) -> AugmentParams:
    """What the clip of this place in the plan gets. `rng_key` is (2,), of the plan; `shape` the frames' (H, W)."""
    return draw_augmentations(rng_key[None], config, shape)[0]


def draw_augmentations(
    rng_keys_B2: NDArray[np.uint64], config: AugmentConfig, shape: tuple[int, int]
) -> tuple[AugmentParams, ...]:
    """The same of each key: the numbers of np.random.Philox(key=augment_key(key)).

    One generator is set to key after key: to make a new one takes several times as long as all the rest.
    """
    philox = np.random.Philox(0)
    rng = np.random.Generator(philox)
    zeros = np.zeros(4, np.uint64)
    out = []
    for key in augment_key(rng_keys_B2):
        philox.state = {
            "bit_generator": "Philox",
            "state": {"counter": zeros, "key": key},
            "buffer": zeros,
            "buffer_pos": 4,
            "has_uint32": 0,
            "uinteger": 0,
        }
        out.append(_params(rng.random(_NUMBERS).tolist(), config, shape))
    return tuple(out)


def _params(numbers: list[float], config: AugmentConfig, shape: tuple[int, int]) -> AugmentParams:
    """Each field has its own numbers, so a field that is off does not change the others."""
    flip, brightness, contrast, saturation, hue, erase, *boxes = numbers
    return AugmentParams(
        box=_draw_crop(boxes[: 4 * _ATTEMPTS], config, shape),
        flip=flip < config.flip,
        brightness=1 + config.jitter * (2 * brightness - 1),
        contrast=1 + config.jitter * (2 * contrast - 1),
        saturation=1 + config.saturation * (2 * saturation - 1),
        hue=config.hue * (2 * hue - 1),
        erased=_draw_erased(boxes[4 * _ATTEMPTS :], config) if erase < config.erase else (0.0, 0.0, 0.0, 0.0),
    )


def augment_key(rng_key: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Another stream of bits than the frame picks', of the same place in the plan."""
    return rng_key ^ _STREAM


def _draw_crop(drawn: list[float], config: AugmentConfig, shape: tuple[int, int]) -> tuple[int, int, int, int]:
    """Top, left, height, width in pixels, the place uniform among whole pixels."""
    height, width = shape
    box_h, box_w, down, right = _draw_box(drawn, config.crop_share, 1, 1 / config.crop_ratio, config.crop_ratio)
    h, w = max(1, round(height * box_h)), max(1, round(width * box_w))
    return int(down * (height - h + 1)), int(right * (width - w + 1)), h, w


def _draw_erased(drawn: list[float], config: AugmentConfig) -> tuple[float, float, float, float]:
    """Top, left, bottom, right as shares; width over height from 0.3 to 3.3."""
    h, w, down, right = _draw_box(drawn, LEAST_ERASED, config.erase_share, 0.3, 3.3)
    top, left = down * (1 - h), right * (1 - w)
    return top, left, top + h, left + w


def _draw_box(
    drawn: list[float], least: float, most: float, narrow: float, wide: float
) -> tuple[float, float, float, float]:
    """(height, width, place down, place right), all shares: area uniform, width over height log-uniform.

    The first of the drawn boxes that fits; else everything, which only a ratio can cause.
    """
    for area, ratio, down, right in zip(*[iter(drawn)] * 4, strict=True):
        side, stretch = math.sqrt(least + (most - least) * area), math.sqrt(narrow * (wide / narrow) ** ratio)
        if side * stretch <= 1 and side / stretch <= 1:
            return side / stretch, side * stretch, down, right
    return 1.0, 1.0, 0.0, 0.0


def apply(
    frames_BNTHWC: Tensor, params: Sequence[AugmentParams], side: int, fill: tuple[float, float, float] = (0, 0, 0)
) -> Tensor:
    """(B, N, C, T, S, S) float32 in [0, 1], on the frames' device. A clip's result does not hang on its neighbours.

    Args:
        frames_BNTHWC: uint8.
        fill: of erased boxes, a colour in [0, 1].
    """
    rows_B = np.array([one.row for one in params], np.float32)
    on_device_B = torch.from_numpy(rows_B).to(frames_BNTHWC.device)
    x_BNCTHW = _crop(frames_BNTHWC, rows_B, side)
    if (rows_B[:, 5:8] != 1).any():
        recolour(x_BNCTHW, *on_device_B[:, 5:8].unbind(1), grey=bool((rows_B[:, 7] != 1).any()))
    if rows_B[:, 8].any():
        x_BNCTHW = turn_hue(x_BNCTHW, on_device_B[:, 8])
    if rows_B[:, 9:].any():
        _erase(x_BNCTHW, on_device_B[:, 9:], fill)
    return x_BNCTHW


def _crop(frames_BNTHWC: Tensor, rows_B: NDArray[np.float32], side: int) -> Tensor:
    """Crop, flip and resize as two batched products. Colours come out in [0, 1]."""
    b, n, t, _, _, c = frames_BNTHWC.shape
    corner_B2, size_B2 = rows_B[:, :2], rows_B[:, 2:4]
    (top, left), (bottom, right) = corner_B2.min(0).astype(int), (corner_B2 + size_B2).max(0).astype(int)
    boxes_B5 = torch.from_numpy(np.hstack([corner_B2 - (top, left), rows_B[:, 2:5]]).astype(np.float32))
    top_B, left_B, height_B, width_B, flip_B = boxes_B5.to(frames_BNTHWC.device).unbind(1)
    rows_BSH = resize_weights(top_B, height_B, int(bottom - top), side) / 255
    columns_BSW = resize_weights(left_B, width_B, int(right - left), side)
    columns_BSW = torch.where(flip_B[:, None, None] > 0, columns_BSW.flip(1), columns_BSW)
    used_BNCTHW = frames_BNTHWC[:, :, :, top:bottom, left:right].permute(0, 1, 5, 2, 3, 4)
    x_BMHW = used_BNCTHW.contiguous().float().flatten(1, 3)
    x_BMSW = torch.matmul(rows_BSH[:, None], x_BMHW)
    return torch.bmm(x_BMSW.flatten(1, 2), columns_BSW.mT).view(b, n, c, t, side, side)


def resize_weights(start_B: Tensor, length_B: Tensor, size: int, side: int) -> Tensor:
    """(B, S, size): row s weighs the pixels that make pixel s of the resized stretch [start, start + length).

    Bilinear with antialias, the weights of torch.nn.functional.interpolate of the stretch alone: a triangle around the
    pixel's centre, as wide as the pixel where the stretch shrinks, cut at the borders and normalised.
    """
    scale_B1 = (length_B / side)[:, None]
    centre_BS = scale_B1 * (torch.arange(side, device=start_B.device) + 0.5)
    place_BW = torch.arange(size, device=start_B.device) - start_B[:, None]
    far_BSW = (place_BW[:, None, :] + 0.5 - centre_BS[:, :, None]).abs() / scale_B1.clamp(min=1)[:, :, None]
    inside_BW = (place_BW >= 0) & (place_BW < length_B[:, None])
    weights_BSW = (1 - far_BSW).clamp(min=0) * inside_BW[:, None, :]
    return weights_BSW / weights_BSW.sum(-1, keepdim=True)


def recolour(x_BNCTHW: Tensor, brightness_B: Tensor, contrast_B: Tensor, saturation_B: Tensor, *, grey: bool) -> None:
    """In place, clipped to [0, 1]. `grey`: whether a saturation is not 1."""
    as_clips = (-1, 1, 1, 1, 1, 1)
    grey_C = x_BNCTHW.new_tensor(GREY)
    mean_B = x_BNCTHW.mean((1, 3, 4, 5)) @ grey_C
    shift_B = brightness_B * (1 - contrast_B) * mean_B
    x_BNCTHW.mul_((brightness_B * contrast_B).view(as_clips)).add_(shift_B.view(as_clips))
    if grey:
        grey_BN1THW = torch.einsum("bncthw,c->bnthw", x_BNCTHW, grey_C).unsqueeze(2)
        x_BNCTHW.lerp_(grey_BN1THW.expand_as(x_BNCTHW), 1 - saturation_B.view(as_clips))
    x_BNCTHW.clamp_(0, 1)


def turn_hue(x_BNCTHW: Tensor, turns_B: Tensor) -> Tensor:
    """HSV's hue turned by a share of the circle; saturation and value stay. Colours in [0, 1].

    With value v, chroma c and hue h in sixths: channel = v - c clip(min(k, 4 - k), 0, 1), k = (n + h) mod 6,
    n = 5, 3, 1 for red, green, blue.
    """
    red, green, blue = x_BNCTHW.unbind(2)
    value, chroma = x_BNCTHW.amax(2), x_BNCTHW.amax(2) - x_BNCTHW.amin(2)
    by = chroma.clamp(min=1e-12)  # grey has no hue: the product with its chroma, 0, is what counts
    sixths = torch.where(value == green, (blue - red) / by + 2, (red - green) / by + 4)
    sixths = torch.where(value == red, (green - blue) / by, sixths).add_(6 * turns_B.view(-1, 1, 1, 1, 1))
    out_BNCTHW = torch.empty_like(x_BNCTHW)
    for channel, n in enumerate((5, 3, 1)):
        k = sixths + n
        k.sub_((k / 6).floor_(), alpha=6)  # what remainder_ does, at a quarter of its time on a CPU
        out_BNCTHW[:, :, channel] = value - chroma * torch.minimum(k, 4 - k).clamp_(0, 1)
    return out_BNCTHW


def _erase(x_BNCTHW: Tensor, boxes_B4: Tensor, fill: tuple[float, float, float]) -> None:
    """In place. A pixel is erased if its centre is inside the box."""
    side = x_BNCTHW.shape[-1]
    at_S = (torch.arange(side, device=x_BNCTHW.device) + 0.5) / side
    top, left, bottom, right = boxes_B4[:, :, None].unbind(1)
    rows_BS, columns_BS = (at_S >= top) & (at_S < bottom), (at_S >= left) & (at_S < right)
    inside_BSS = rows_BS[:, :, None] & columns_BS[:, None, :]
    fill_C = x_BNCTHW.new_tensor(fill).view(3, 1, 1, 1)
    x_BNCTHW.copy_(torch.where(inside_BSS[:, None, None, None], fill_C, x_BNCTHW))
