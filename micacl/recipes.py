"""A recipe is a function that returns a complete RunConfig. `micacl train NAME` starts from it; flags change it."""

from __future__ import annotations

from collections.abc import Callable

from micacl.batch import BatchConfig
from micacl.config import RunConfig, TrainConfig
from micacl.model.backbone import BackboneConfig
from micacl.model.micacl import ModelConfig
from pipeline.plan import PlanConfig
from pipeline.stream import StreamConfig


def tiny_cpu() -> RunConfig:
    """R3D-18's shape with 16 channels at 48 px: a minute on two cores. For the demo and the tests (docs/lab.md)."""
    return RunConfig(
        model=ModelConfig(backbone=BackboneConfig.tiny(), projection_dim=32),
        plan=PlanConfig(policy="uniform", global_batch=16),
        stream=StreamConfig(frames=4),
        batch=BatchConfig(side=48, crop_share=0.9, jitter=0.1),
        train=TrainConfig(epochs=30, lr=1e-3, min_lr=2e-5, checkpoint_every=50, log_every=10),
    )


def r3d_18() -> RunConfig:
    """M3DFEL's shape (4 instances x 4 frames, 112 px, R3D-18) with MICACL's heads and loss. For GPUs."""
    return RunConfig(
        plan=PlanConfig(policy="uniform", global_batch=256),
        train=TrainConfig(epochs=300, lr=5e-4, log_every=20),
        stream=StreamConfig(frames=4, lookahead=256, processes=8),
    )


RECIPES: dict[str, Callable[[], RunConfig]] = {"tiny-cpu": tiny_cpu, "r3d-18": r3d_18}
