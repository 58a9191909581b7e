"""One batch out of the batches of all ranks, with gradients: what a contrastive loss over the global batch needs.

The arithmetic. W ranks, rank r holds z_r, everyone gathers Z = (z_1 ... z_W) and computes the same loss L(Z). On rank
q the backward pass arrives with the full gradient G_q = dL/dZ. The adjoint of the gather sums over ranks and takes the
own slice:

    dz_r = sum_q G_q[r] = W * dL/dz_r                  (all G_q are equal)

A parameter theta then gets W * dL/dz_r * dz_r/dtheta on rank r. The engine AVERAGES parameter gradients over ranks:

    1/W sum_r W * dL/dz_r * dz_r/dtheta = sum_r dL/dz_r * dz_r/dtheta = dL/dtheta,

the gradient of a single process that holds all clips. A gather without gradients would keep only the own slice
(G_r[r]) and, after averaging, train with 1/W of the contrastive gradient.

The sum is an all_reduce of the full gradient and a slice, on every backend: embeddings are small (1,024 x 128 floats
are 512 KiB), and one code path is tested with gloo and used with NCCL.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

Gather = Callable[[Tensor], Tensor]
"""(rows of this rank, ...) -> (rows of all ranks in rank order, ...)."""


def identity(x: Tensor) -> Tensor:
    """The gather of a single process."""
    return x


def gather_with_gradient(x: Tensor) -> Tensor:
    """Rows of all ranks in rank order; every rank must give the same shape and type.

    Without a process group of more than one rank it returns `x` itself. A collective: every rank calls it, in the
    same order, and every rank runs backward through it.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return x
    return cast("Tensor", _GatherWithGradient.apply(x))  # type: ignore[no-untyped-call]


class _GatherWithGradient(torch.autograd.Function):
    @staticmethod
    def forward(_ctx: Any, x: Tensor) -> Tensor:
        parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(_ctx: Any, *gradients: Tensor) -> Tensor:
        total = gradients[0].clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total.chunk(dist.get_world_size())[dist.get_rank()]
