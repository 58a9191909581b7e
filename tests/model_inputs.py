"""Small models and inputs for the tests of micacl/model."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from micacl.model import BackboneConfig, GEIIMConfig, ModelConfig, WIANConfig

TINY = ModelConfig(
    backbone=BackboneConfig.tiny(width=4), instances=3, projection_dim=8, wian=WIANConfig(hidden=8, heads=4)
)
BATCH_NORM = replace(TINY, backbone=BackboneConfig(name="tiny", width=4, norm="batch"))
GEIIMS = [
    GEIIMConfig(),
    GEIIMConfig(order="mixer_first", activation="silu"),
    GEIIMConfig(residual=False, norm=False, kernels=(3,)),
    GEIIMConfig(order="mixer_first", residual=False, kernels=(1, 3, 5), layers=2),
    GEIIMConfig(adjacency="dynamic", query_dim=4),
    GEIIMConfig(adjacency="static+dynamic", query_dim=4, order="mixer_first"),
    GEIIMConfig(mixer="ssm", state=3, activation="tanh"),
    GEIIMConfig(mixer="ssm", adjacency="dynamic", query_dim=4, bidirectional=False, dilations=(1, 2, 4), layers=2),
    GEIIMConfig(mixer="ssm", adjacency="static+dynamic", query_dim=4, order="mixer_first", state=2),
]
WIANS = [WIANConfig(kind=kind, hidden=8, heads=4) for kind in ("mean", "attention", "gated", "dliam")]


def variant(config: GEIIMConfig | WIANConfig) -> str:
    """For test ids."""
    if isinstance(config, WIANConfig):
        return config.kind
    return "-".join((config.adjacency, config.mixer, config.order, str(config.layers)))


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_clips(bags: int, instances: int = 3, frames: int = 2, side: int = 16) -> Tensor:
    return torch.rand(bags, instances, 3, frames, side, side, generator=generator())


def random_bags(bags: int = 4, instances: int = 3, features: int = 4, *, grad: bool = False) -> Tensor:
    """In float64."""
    x = torch.randn(bags, instances, features, dtype=torch.float64, generator=generator())
    return x.requires_grad_(grad)


def a_mask() -> Tensor:
    return torch.tensor([[True, True, True], [True, False, True], [False, False, True], [True, True, False]])


def spoilt(x: Tensor, valid: Tensor) -> Tensor:
    """NaN in the place of missing instances."""
    mask = valid.reshape(*valid.shape, *(1,) * (x.ndim - 2))
    return x.detach().masked_fill(~mask, torch.nan).requires_grad_(x.requires_grad)
