"""What a training step needs of the machine. `fit` knows this protocol and nothing of Ray or DeepSpeed.

`PlainEngine` is the reference: torch alone, one process or several under gloo or NCCL. cluster/deepspeed_engine.py
is the other one; a test holds their losses together.

A run has one stage or two (micacl.train.optim). In the second, `head_only` is set: the model is in evaluation mode, its
features come without a graph, and only the classifier has gradients, a learning rate and new optimiser state.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from micacl.loss.gather import gather_with_gradient, identity
from micacl.model.micacl import MICACL, Output
from micacl.train.optim import OptimConfig, make_optimizer, of_head, set_lr
from micacl.train.precision import ComputeConfig, prepared

MOMENTS = ("exp_avg", "exp_avg_sq")
Tensors = dict[str, Tensor]


class Engine(Protocol):
    """One rank of a training run."""

    rank: int
    ranks: int
    device: torch.device
    model: MICACL
    """The bare model, for its parameters; call the engine, not it."""
    head_only: bool
    """Whether only the classifier learns. The loop sets it before each step."""

    def forward(self, clips_BNCTHW: Tensor) -> Output:
        """The model on this rank's clips."""

    def step(self, loss: Tensor, lr: float) -> None:
        """Backward, average gradients over ranks, clip, update."""

    def gather(self, x: Tensor) -> Tensor:
        """Rows of all ranks, with gradients: see micacl.loss.gather."""

    def mean(self, x: Tensor) -> Tensor:
        """Mean over ranks, for logs. Every rank must call it."""

    def export_state(self) -> tuple[Tensors, Tensors]:
        """(weights and buffers, optimiser moments), whole and on the CPU. Every rank must call it."""

    def import_state(
        self, weights: Mapping[str, Tensor], moments: Mapping[str, Tensor], step: int, head_step: int | None = None
    ) -> None:
        """Continue from an exported state after `step` updates, `head_step` of them since the head began; any ranks."""

    def restart_head(self) -> None:
        """Set the classifier back to the weights that it was built with, and forget its moments. On every rank."""


class Staged(nn.Module):
    """The model as the stage of training wants it called."""

    def __init__(self, model: MICACL) -> None:
        super().__init__()
        self.model, self.head_only = model, False
        self.first_head = {name: t.detach().cpu().clone() for name, t in model.head.state_dict().items()}
        """Of a model as it was built: the engine is made before a checkpoint is loaded into it."""

    def forward(self, clips_BNCTHW: Tensor) -> Output:
        if not self.head_only:
            output: Output = self.model(clips_BNCTHW)
            return output
        self.model.eval()  # each time: whoever scored the model in between may have set it back to training
        with torch.no_grad():
            frozen: Output = self.model(clips_BNCTHW)
        return replace(frozen, logits_BK=self.model.head(frozen.bag_BD))


class PlainEngine:
    """AdamW on every rank, gradients averaged by all-reduce."""

    def __init__(
        self,
        model: MICACL,
        config: OptimConfig,
        device: torch.device | None = None,
        compute: ComputeConfig | None = None,
    ) -> None:
        self.distributed = dist.is_available() and dist.is_initialized()
        self.rank = dist.get_rank() if self.distributed else 0
        self.ranks = dist.get_world_size() if self.distributed else 1
        self.device = device or torch.device("cpu")
        self.model = model.to(self.device)
        self.config, self.head_only = config, False
        self.compute = compute or ComputeConfig()
        self._staged = Staged(self.model)
        self._forward = prepared(self._staged, self.compute, self.device)
        self.optimizer = make_optimizer(self.model, config, fused=self.compute.fused)

    def forward(self, clips_BNCTHW: Tensor) -> Output:
        self._staged.head_only = self.head_only
        return self._forward(clips_BNCTHW)

    def step(self, loss: Tensor, lr: float) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        parameters = [p for p in self.model.parameters() if p.grad is not None]
        for grad in (p.grad for p in parameters if self.distributed and p.grad is not None):
            dist.all_reduce(grad)
            grad.div_(self.ranks)
        nn.utils.clip_grad_norm_(parameters, self.config.clip_norm)
        set_lr(self.optimizer, lr, head_only=self.head_only)
        self.optimizer.step()

    def gather(self, x: Tensor) -> Tensor:
        return gather_with_gradient(x) if self.distributed else identity(x)

    def mean(self, x: Tensor) -> Tensor:
        return mean_over_ranks(x, self.ranks) if self.distributed else x

    def export_state(self) -> tuple[Tensors, Tensors]:
        weights = {name: _whole(t) for name, t in self.model.state_dict().items()}
        moments = {
            f"{kind}.{name}": _whole(self.optimizer.state[p][kind])
            for name, p in self.model.named_parameters()
            if p in self.optimizer.state
            for kind in MOMENTS
        }
        return weights, moments

    def import_state(
        self, weights: Mapping[str, Tensor], moments: Mapping[str, Tensor], step: int, head_step: int | None = None
    ) -> None:
        self.model.load_state_dict(dict(weights), strict=True)
        for name, p in self.model.named_parameters():
            if f"exp_avg.{name}" in moments:
                state: Tensors = {kind: torch.empty_like(p).copy_(moments[f"{kind}.{name}"]) for kind in MOMENTS}
                done = step if head_step is None or not of_head(name) else head_step
                place = self.device if self.compute.fused else None
                self.optimizer.state[p] = {**state, "step": torch.tensor(float(done), device=place)}

    def restart_head(self) -> None:
        self.model.head.load_state_dict(self._staged.first_head)
        for p in self.model.head.parameters():
            self.optimizer.state.pop(p, None)


def mean_over_ranks(x: Tensor, ranks: int) -> Tensor:
    total = x.detach().clone()
    dist.all_reduce(total)
    return total / ranks


def _whole(x: Tensor) -> Tensor:
    """A copy on the CPU in the plain layout, as a checkpoint takes it."""
    return x.detach().cpu().clone(memory_format=torch.contiguous_format)
