"""The model's input as it was made before micacl/augment.py: clip by clip on the CPU, slices and interpolate.

Kept to be compared with: bench/train_step.py.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from micacl.augment import augment_key
from micacl.batch import BatchConfig


def collate_before(frames_BNTHWC: Tensor, rng_keys_B2: NDArray[np.uint64] | None, config: BatchConfig) -> Tensor:
    """(B, N, C, T, S, S); augmented if there are keys."""
    keys = [None] * len(frames_BNTHWC) if rng_keys_B2 is None else rng_keys_B2
    return torch.stack([_to_input(f, k, config) for f, k in zip(frames_BNTHWC, keys, strict=True)])


def _to_input(frames_NTHWC: Tensor, rng_key: NDArray[np.uint64] | None, config: BatchConfig) -> Tensor:
    n, t = frames_NTHWC.shape[:2]
    x_FCHW = frames_NTHWC.flatten(0, 1).permute(0, 3, 1, 2).float().div_(255)
    if rng_key is not None:
        x_FCHW = _augment(x_FCHW, np.random.Generator(np.random.Philox(key=augment_key(rng_key))), config)
    if x_FCHW.shape[-1] != config.side or x_FCHW.shape[-2] != config.side:
        x_FCHW = functional.interpolate(
            x_FCHW, size=(config.side, config.side), mode="bilinear", antialias=True, align_corners=False
        )
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (config.mean, config.std))
    x_FCHW = x_FCHW.sub_(mean).div_(std)
    return x_FCHW.reshape(n, t, *x_FCHW.shape[1:]).transpose(1, 2).contiguous()


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
