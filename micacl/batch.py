"""Decoded clips -> one batch -> the model's input, made on the device that takes it.

    frames_BNTHWC uint8, labels, draws ──to_input──> clips_BNCTHW float on the device
              collate, on the CPU            1 byte a colour travels; everything else happens there

The evaluation transform (resize with antialias, normalise) is the same wherever a bag comes from. Training goes through
micacl/augment.py instead, with what was drawn from the plan's keys.

Legend: B clips, N instances, T frames per instance, C channels, H W height and width, S side of the model's input.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from micacl.augment import AugmentConfig, AugmentParams, apply, draw_augmentations
from pipeline.contract import MicaclError
from pipeline.loader import ClipBatch

_CPU_BYTES = 2**20
"""Of uint8 frames that a CPU transforms at once; as floats they are four times as many."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchConfig(AugmentConfig):
    """From uint8 frames to the model's input."""

    side: int = 112
    """Of the model's input, pixels."""
    mean: tuple[float, float, float] = (0.43216, 0.394666, 0.37645)
    std: tuple[float, float, float] = (0.22803, 0.22145, 0.216989)
    """Per channel, of frames in [0, 1]: those of torchvision's Kinetics-400 weights."""

    def __post_init__(self) -> None:
        AugmentConfig.__post_init__(self)
        if self.side < 8 or min(self.std) <= 0:
            raise MicaclError(
                f"--batch.side is {self.side} and --batch.std {self.std}.",
                "No batch was made.",
                "Use side >= 8 and std > 0.",
            )


@dataclass(frozen=True, slots=True)
class Batch:
    """What a step consumes, before it is on the device."""

    frames_BNTHWC: Tensor
    """uint8, on the CPU; shares the loader's memory."""
    labels_B: Tensor
    keys: tuple[str, ...]
    params: tuple[AugmentParams, ...] | None
    """What augments each clip; None: the evaluation transform."""
    config: BatchConfig


def collate(clips: ClipBatch, config: BatchConfig, *, train: bool) -> Batch:
    """A batch on the CPU; in training with the augmentation drawn. No pixel is touched."""
    shape = clips.frames_BNTHWC.shape[3:5]
    return Batch(
        frames_BNTHWC=torch.from_numpy(clips.frames_BNTHWC),
        labels_B=torch.from_numpy(clips.labels_B),
        keys=clips.keys,
        params=draw_augmentations(clips.rng_keys_B2, config, shape) if train and config.augment else None,
        config=config,
    )


def to_input(batch: Batch, device: torch.device) -> Tensor:
    """(B, N, C, T, S, S) float32 on the device: the model's input.

    A GPU takes the batch at once. A CPU takes few clips at a time, which stay in its cache: that is twice as fast.
    """
    frames_BNTHWC, config = batch.frames_BNTHWC.to(device), batch.config
    b, n, t = frames_BNTHWC.shape[:3]
    at_once = b if device.type != "cpu" else max(1, _CPU_BYTES // frames_BNTHWC[0].nbytes)
    if at_once >= b:
        return _transform(frames_BNTHWC, batch.params, config).contiguous()
    clips_BNCTHW = torch.empty(b, n, 3, t, config.side, config.side)
    for start in range(0, b, at_once):
        part = slice(start, start + at_once)
        params = None if batch.params is None else batch.params[part]
        clips_BNCTHW[part] = _transform(frames_BNTHWC[part], params, config)
    return clips_BNCTHW


def _transform(frames_BNTHWC: Tensor, params: Sequence[AugmentParams] | None, config: BatchConfig) -> Tensor:
    if params is None:
        x_BNCTHW = _resize(frames_BNTHWC, config.side)
    else:
        x_BNCTHW = apply(frames_BNTHWC, params, config.side, fill=config.mean)
    mean, std = (x_BNCTHW.new_tensor(v).view(3, 1, 1, 1) for v in (config.mean, config.std))
    return x_BNCTHW.sub_(mean).div_(std)


def _resize(frames_BNTHWC: Tensor, side: int) -> Tensor:
    b, n, t, h, w, _ = frames_BNTHWC.shape
    x_FCHW = frames_BNTHWC.flatten(0, 2).permute(0, 3, 1, 2).float().div_(255)
    if (h, w) != (side, side):
        x_FCHW = functional.interpolate(x_FCHW, size=(side, side), mode="bilinear", antialias=True, align_corners=False)
    return x_FCHW.view(b, n, t, 3, side, side).transpose(2, 3)
