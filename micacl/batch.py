"""Decoded clips -> one batch that the model takes. The evaluation transform is the same wherever a bag comes from.

Legend: B clips, N instances, T frames per instance, C channels, H W height and width, S side of the model's input.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from pipeline.contract import MicaclError
from pipeline.decode import Pixels
from pipeline.loader import ClipBatch


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchConfig:
    """From uint8 frames to the model's input."""

    side: int = 112
    """Of the model's input, pixels."""
    mean: tuple[float, float, float] = (0.43216, 0.394666, 0.37645)
    std: tuple[float, float, float] = (0.22803, 0.22145, 0.216989)
    """Per channel, of frames in [0, 1]: those of torchvision's Kinetics-400 weights."""
    augment: bool = True
    """In training: crop, flip, brightness and contrast, the same for all frames of a clip."""
    crop_share: float = 0.75
    """Least area of the random crop, of the frame."""
    jitter: float = 0.25
    """Most relative change of brightness and of contrast."""

    def __post_init__(self) -> None:
        if self.side < 8 or not 0 < self.crop_share <= 1 or not 0 <= self.jitter < 1:
            raise MicaclError(
                f"--batch.side {self.side}, --batch.crop-share {self.crop_share} or --batch.jitter {self.jitter} "
                "is out of range.",
                "No batch was made.",
                "Use side >= 8, 0 < crop-share <= 1, 0 <= jitter < 1.",
            )


@dataclass(frozen=True, slots=True)
class Batch:
    """What a step consumes."""

    clips_BNCTHW: Tensor
    labels_B: Tensor
    keys: tuple[str, ...]


def collate(clips: ClipBatch, config: BatchConfig, *, train: bool) -> Batch:
    """A float batch on the CPU, augmented in training."""
    keys = clips.rng_keys_B2 if train and config.augment else [None] * len(clips.keys)
    x_BNCTHW = torch.stack([_to_input(f, k, config) for f, k in zip(clips.frames_BNTHWC, keys, strict=True)])
    return Batch(x_BNCTHW, torch.from_numpy(clips.labels_B), clips.keys)


def _to_input(clip_NTHWC: Pixels, rng_key: NDArray[np.uint64] | None, config: BatchConfig) -> Tensor:
    frames_NTHWC = torch.from_numpy(clip_NTHWC)
    n, t = frames_NTHWC.shape[:2]
    x_FCHW = frames_NTHWC.flatten(0, 1).permute(0, 3, 1, 2).float().div_(255)
    if rng_key is not None:
        x_FCHW = _augment(x_FCHW, np.random.Generator(np.random.Philox(key=_augment_key(rng_key))), config)
    if x_FCHW.shape[-1] != config.side or x_FCHW.shape[-2] != config.side:
        x_FCHW = functional.interpolate(
            x_FCHW, size=(config.side, config.side), mode="bilinear", antialias=True, align_corners=False
        )
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (config.mean, config.std))
    x_FCHW = x_FCHW.sub_(mean).div_(std)
    return x_FCHW.reshape(n, t, *x_FCHW.shape[1:]).transpose(1, 2).contiguous()


def _augment_key(rng_key: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Another stream of bits than the frame picks', of the same place in the plan."""
    return rng_key ^ np.array([0, 0x9E3779B97F4A7C15], np.uint64)


def _augment(x_FCHW: Tensor, rng: np.random.Generator, config: BatchConfig) -> Tensor:
    height, width = x_FCHW.shape[-2:]
    scale = float(np.sqrt(rng.uniform(config.crop_share, 1.0)))
    h, w = max(1, round(height * scale)), max(1, round(width * scale))
    top, left = int(rng.integers(0, height - h + 1)), int(rng.integers(0, width - w + 1))
    x_FCHW = x_FCHW[..., top : top + h, left : left + w]
    if rng.random() < 0.5:
        x_FCHW = x_FCHW.flip(-1)
    contrast, brightness = 1 + config.jitter * rng.uniform(-1, 1, size=2)
    centre = x_FCHW.mean()
    return ((x_FCHW - centre) * float(contrast) + centre * float(brightness)).clamp(0, 1)
