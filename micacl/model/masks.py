"""Missing instances: how every module leaves them out.

`valid_BN` is False where an instance is missing; None means that all are there. A missing instance neither gives nor
receives: its values, NaN included, change nothing else, and it comes out as zeros. Every bag has at least one valid
instance; MICACL.forward sees to it.

Shape suffixes: B bags, N instances, D features.
"""

from __future__ import annotations

import torch
from torch import Tensor


def zero_missing(x_BND: Tensor, valid_BN: Tensor | None) -> Tensor:
    """Zeros in the place of missing instances, whatever stood there, NaN included."""
    return x_BND if valid_BN is None else x_BND.masked_fill(~valid_BN[:, :, None], 0.0)


def softmax_over_valid(scores: Tensor, valid_BN: Tensor | None) -> Tensor:
    """Softmax over the last axis, N, of (B, ..., N) scores; missing instances get 0, the others sum to 1."""
    if valid_BN is None:
        return scores.softmax(-1)
    bags, instances = valid_BN.shape
    valid = valid_BN.reshape(bags, *(1,) * (scores.ndim - 2), instances)
    return scores.masked_fill(~valid, -torch.inf).softmax(-1)
