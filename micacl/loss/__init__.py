"""The objective: classification losses for a long tail, the contrastive loss MCCL, and the gather across ranks."""

from __future__ import annotations

from micacl.loss.config import LossConfig
from micacl.loss.gather import Gather, gather_with_gradient, identity
from micacl.loss.mccl import More, mccl
from micacl.loss.objective import Losses, Objective
from micacl.loss.progress import Progress

__all__ = [
    "Gather",
    "LossConfig",
    "Losses",
    "More",
    "Objective",
    "Progress",
    "gather_with_gradient",
    "identity",
    "mccl",
]
