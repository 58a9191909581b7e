"""The objective: classification losses for a long tail, the contrastive loss MCCL, and the gather across ranks."""

from __future__ import annotations

from micacl.loss.gather import Gather, gather_with_gradient, identity
from micacl.loss.mccl import mccl
from micacl.loss.objective import LossConfig, Losses, Objective

__all__ = ["Gather", "LossConfig", "Losses", "Objective", "gather_with_gradient", "identity", "mccl"]
