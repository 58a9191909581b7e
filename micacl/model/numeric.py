"""Where half precision is too coarse."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch.nn import functional


def wide(x: Tensor) -> Tensor:
    """In float32, or float64 if it is that already."""
    return x if x.dtype == torch.float64 else x.float()


def without_autocast(x: Tensor) -> AbstractContextManager[None]:
    """What is computed in the block keeps its precision. A tensor without values (device `meta`) has none to keep."""
    return nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False)


def unit(x: Tensor) -> Tensor:
    """Unit length in the last axis, in float32 or wider: embeddings meet a temperature of 0.1, cosines a scale."""
    return functional.normalize(wide(x), dim=-1)
