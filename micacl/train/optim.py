"""AdamW, and the learning rate and the stage of training as functions of the step.

With `retrain_head_from` a run has two stages: the whole model learns, then the classifier alone, from its first
weights again, with a learning rate that starts anew (decoupled training, cRT: Kang et al., ICLR 2020; together with a
plan that is natural first and uniform then).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from micacl.loss.progress import Progress
from pipeline.contract import require_between


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimConfig:
    """M3DFEL's recipe is lr 5e-4, weight decay 0.05, cosine with warm-up (CVPR 2023, released code)."""

    lr: float = 5e-4
    """At the end of the warm-up."""
    min_lr: float = 5e-6
    weight_decay: float = 0.05
    warmup_share: float = 0.05
    """Of all steps; of each stage's, with two."""
    clip_norm: float = 1.0
    """Of the gradient over all parameters."""
    retrain_head_from: int | None = None
    """Epoch, counted from 0, from which on only the classifier learns, after it was set back to its first weights."""

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
    """AdamW without decay on norms and biases. With a second stage the head has groups of its own, marked `head`.

    `fused`: one kernel for all weights; else torch chooses.
    """
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    parts = (False, True) if config.retrain_head_from is not None else (False,)
    groups: list[dict[str, Any]] = []
    for head in parts:
        own = [p for name, p in named if of_head(name) is head or len(parts) == 1]
        decayed, others = [p for p in own if p.ndim > 1], [p for p in own if p.ndim <= 1]
        groups.append({"params": decayed, "weight_decay": config.weight_decay, "head": head})
        groups.append({"params": others, "weight_decay": 0.0, "head": head})
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=config.lr, fused=fused or None)


def set_lr(optimizer: torch.optim.Optimizer, lr: float, *, head_only: bool) -> None:
    """0 for all but the head when only it learns: neither Adam's momentum nor decay moves the rest."""
    for group in optimizer.param_groups:
        group["lr"] = lr if group["head"] or not head_only else 0.0


def of_head(name: str) -> bool:
    """Whether a parameter of this name belongs to the classifier."""
    return name.startswith("head.")


def progress_at(step: int, steps: int, steps_per_epoch: int, config: OptimConfig) -> Progress:
    """Where step `step` of `steps` is. Step 0 is the first."""
    epochs = -(-steps // steps_per_epoch)
    switch = steps if config.retrain_head_from is None else min(steps, config.retrain_head_from * steps_per_epoch)
    first, last = (0, switch) if step < switch else (switch, steps)
    return Progress(
        step=step - first,
        steps=last - first,
        epoch=step // steps_per_epoch,
        epochs=epochs,
        head_only=step >= switch,
    )


def lr_at(step: int, steps: int, config: OptimConfig) -> float:
    """Linear warm-up, then cosine to min_lr. Step 0 is the first."""
    warmup = max(1, round(config.warmup_share * steps))
    if step < warmup:
        return config.lr * (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    return config.min_lr + (config.lr - config.min_lr) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
