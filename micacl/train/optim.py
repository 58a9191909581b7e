"""AdamW and the learning rate as a function of the step."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn

from pipeline.contract import require_between


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimConfig:
    """M3DFEL's recipe is lr 5e-4, weight decay 0.05, cosine with warm-up (CVPR 2023, released code)."""

    lr: float = 5e-4
    """At the end of the warm-up."""
    min_lr: float = 5e-6
    weight_decay: float = 0.05
    warmup_share: float = 0.05
    """Of all steps."""
    clip_norm: float = 1.0
    """Of the gradient over all parameters."""

    def __post_init__(self) -> None:
        for flag, value, low, high in (
            ("--train.lr", self.lr, 1e-12, 1e3),
            ("--train.min-lr", self.min_lr, 0, 1e3),
            ("--train.weight-decay", self.weight_decay, 0, 1e3),
            ("--train.warmup-share", self.warmup_share, 0, 1),
            ("--train.clip-norm", self.clip_norm, 1e-12, 1e12),
        ):
            require_between(low, high, flag, value)


def make_optimizer(model: nn.Module, config: OptimConfig, *, fused: bool = False) -> torch.optim.AdamW:
    """AdamW without decay on norms and biases. `fused`: one kernel for all weights; else torch chooses."""
    decayed = [p for p in model.parameters() if p.requires_grad and p.ndim > 1]
    others = [p for p in model.parameters() if p.requires_grad and p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=config.lr, fused=fused or None)


def lr_at(step: int, steps: int, config: OptimConfig) -> float:
    """Linear warm-up, then cosine to min_lr. Step 0 is the first."""
    warmup = max(1, round(config.warmup_share * steps))
    if step < warmup:
        return config.lr * (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    return config.min_lr + (config.lr - config.min_lr) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
