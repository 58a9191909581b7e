"""MICACL, the whole model: backbone, instance interaction, aggregation, class scores and contrastive projections.

    clips -> Backbone, each instance by itself -> GEIIM, between instances -> WIAN, instances to bag -> logits
                                                   |                            |
                                                   z of every instance          z of the bag      (for MCCL)

A re-implementation after the abstract of arXiv 2509.04344; what the abstract leaves open is ours and is a field of a
config. With every switch off it is a backbone, a mean over instances and a linear layer.

Missing instances are left out before the backbone, so their pixels reach neither the logits nor the running
statistics of a batch norm.

Shape suffixes: B bags, N instances, C colour channels, T frames, H height, W width, D features, K classes,
P projection, F places in time of a backbone stage, d features of that stage.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional

from micacl.model.backbone import Backbone, BackboneConfig, refuse_below, refuse_unknown
from micacl.model.geiim import GEIIM, GEIIMConfig
from micacl.model.wian import WIAN, WIANConfig
from pipeline.contract import DFEW_LABELS, MicaclError

SCALES = ("bag", "instance", "frame")
PROTOTYPES = ("none", "learned", "classifier")


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """Everything that decides the parameters of a model and their meaning."""

    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    geiim: GEIIMConfig = field(default_factory=GEIIMConfig)
    wian: WIANConfig = field(default_factory=WIANConfig)
    instances: int = 4
    """Instances per bag; the size of the adjacency."""
    classes: tuple[str, ...] = DFEW_LABELS
    """Label words; a word's place is its logit."""
    projection_dim: int = 128
    """Length of the contrastive embeddings; 0 builds no projection heads (for training without MCCL)."""
    projection_scales: tuple[str, ...] = ("bag", "instance")
    """Features that get a projection head: `bag`, `instance`, `frame`."""
    prototypes: str = "none"
    """Of each class and scale, for the contrastive loss: `none`, `learned` (a parameter), or `classifier`: an MLP of
    the head's weights, as in balanced contrastive learning (Zhu et al., CVPR 2022)."""
    dropout: float = 0.0
    """Share of bag features set to 0 before the class scores in training. Draws from torch's global generator."""

    def __post_init__(self) -> None:
        refuse_below("model.instances", self.instances, 1)
        refuse_below("model.projection-dim", self.projection_dim, 0)
        refuse_unknown("model.prototypes", self.prototypes, PROTOTYPES)
        for scale in self.projection_scales:
            refuse_unknown("model.projection-scales", scale, SCALES)
        if not 0.0 <= self.dropout < 1.0:
            raise MicaclError(f"model.dropout is {self.dropout}.", "Nothing was built.", "Use a share in [0, 1).")
        if len(self.classes) < 2 or len(set(self.classes)) != len(self.classes):
            raise MicaclError(
                f"model.classes is {self.classes}.",
                "Nothing was built: there is nothing to tell apart.",
                "Give two or more different label words.",
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class Output:
    """What the model says about a batch of bags."""

    logits_BK: Tensor
    bag_BD: Tensor
    instances_BND: Tensor
    """After GEIIM; zeros where an instance is missing."""
    weights_BN: Tensor
    """Of each instance in the bag; sum to 1."""
    projections: dict[str, Tensor]
    """Unit-length embeddings by scale: `bag` (B, P), `instance` (B, N, P), `frame` (B, N, F, P)."""
    prototypes: dict[str, Tensor] = field(default_factory=dict)
    """L2-normalised (K, P) by scale, one embedding a class. Empty without prototypes."""
    valid_BN: Tensor | None
    """As given to forward."""


class MICACL(nn.Module):
    """Bags of instance clips to class scores. Build it with `build_model`."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        features = config.backbone.features
        self.backbone = Backbone(config.backbone)
        self.geiim = GEIIM(config.geiim, config.instances, features) if config.geiim.enabled else None
        self.wian = WIAN(config.wian, features)
        self.dropout = nn.Dropout(config.dropout)
        self.head = nn.Linear(features, len(config.classes))
        widths = {"bag": features, "instance": features, "frame": config.backbone.frame_features}
        scales = config.projection_scales if config.projection_dim else ()
        self.projections = nn.ModuleDict({s: _projection(widths[s], config.projection_dim) for s in scales})
        self.prototypes = nn.ParameterDict()
        self.prototype_heads = nn.ModuleDict()
        for scale in scales:
            if config.prototypes == "learned":
                self.prototypes[scale] = nn.Parameter(torch.randn(len(config.classes), config.projection_dim))
            elif config.prototypes == "classifier":
                self.prototype_heads[scale] = _projection(features, config.projection_dim)

    def forward(self, clips_BNCTHW: Tensor, valid_BN: Tensor | None = None) -> Output:
        """Score a batch of bags.

        `clips_BNCTHW` is floating point, colours in [0, 1], or normalised further by the caller. `valid_BN` is
        boolean, False for a missing instance; None means that all are there. Raises MicaclError when a shape or type
        does not fit, or when a bag has no valid instance.
        """
        self._check(clips_BNCTHW, valid_BN)
        x_BND, frames_BNFd = self._encode(clips_BNCTHW, valid_BN)
        h_BND = x_BND if self.geiim is None else self.geiim(x_BND, valid_BN)
        bag_BD, weights_BN = self.wian(h_BND, valid_BN)
        features = {"bag": bag_BD, "instance": h_BND, "frame": frames_BNFd}
        return Output(
            logits_BK=self.head(self.dropout(bag_BD)),
            bag_BD=bag_BD,
            instances_BND=h_BND,
            weights_BN=weights_BN,
            projections={scale: _unit(head(features[scale])) for scale, head in self.projections.items()},
            prototypes=self._class_prototypes(),
            valid_BN=valid_BN,
        )

    def _class_prototypes(self) -> dict[str, Tensor]:
        learned = {scale: _unit(p_KP) for scale, p_KP in self.prototypes.items()}
        return learned | {scale: _unit(mlp(self.head.weight)) for scale, mlp in self.prototype_heads.items()}

    def _encode(self, clips_BNCTHW: Tensor, valid_BN: Tensor | None) -> tuple[Tensor, Tensor]:
        """(B, N, D) features of every instance by itself and (B, N, F, d) frame features; zeros where it is missing."""
        bags, instances = clips_BNCTHW.shape[:2]
        if valid_BN is None:
            x_MD, frames_MFd = self.backbone(clips_BNCTHW.flatten(0, 1))
            return x_MD.unflatten(0, (bags, instances)), frames_MFd.unflatten(0, (bags, instances))
        present = self.backbone(clips_BNCTHW[valid_BN])
        x_BND, frames_BNFd = (_spread(part, valid_BN) for part in present)
        return x_BND, frames_BNFd

    def _check(self, clips_BNCTHW: Tensor, valid_BN: Tensor | None) -> None:
        shape = tuple(clips_BNCTHW.shape)
        if len(shape) != 6 or shape[1] != self.config.instances or shape[2] != 3:
            raise MicaclError(
                f"Clips have shape {shape}.",
                "Nothing was computed.",
                f"Give (bags, {self.config.instances} instances, 3 colours, frames, height, width).",
            )
        if not clips_BNCTHW.is_floating_point():
            raise MicaclError(
                f"Clips are {clips_BNCTHW.dtype}.", "Nothing was computed.", "Convert to float and divide by 255."
            )
        if valid_BN is None:
            return
        if valid_BN.dtype != torch.bool or tuple(valid_BN.shape) != shape[:2]:
            raise MicaclError(
                f"The mask of valid instances is {valid_BN.dtype} of shape {tuple(valid_BN.shape)}.",
                "Nothing was computed.",
                f"Give booleans of shape {shape[:2]}.",
            )
        if not bool(valid_BN.any(1).all()):
            raise MicaclError(
                f"{int((~valid_BN.any(1)).sum())} of {shape[0]} bags have no valid instance.",
                "Nothing was computed: there is nothing to look at.",
                "Leave such bags out of the batch.",
            )


def _spread(present_Mx: Tensor, valid_BN: Tensor) -> Tensor:
    """(M, ...) rows of the valid instances to (B, N, ...), zeros in the place of the others."""
    out = present_Mx.new_zeros(*valid_BN.shape, *present_Mx.shape[1:])
    mask = valid_BN.reshape(*valid_BN.shape, *(1,) * (present_Mx.ndim - 1))
    return out.masked_scatter(mask, present_Mx)


def _projection(features: int, projection_dim: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(features, features), nn.ReLU(inplace=True), nn.Linear(features, projection_dim))


def _unit(x: Tensor) -> Tensor:
    """Unit length in the last axis, in float32 or wider: half precision is too coarse for a temperature of 0.1."""
    wide = x if x.dtype == torch.float64 else x.float()
    return functional.normalize(wide, dim=-1)


def parameter_count(model: nn.Module, *, trainable_only: bool = False) -> int:
    """Numbers in the parameters of a module, each shared tensor once."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad or not trainable_only)


def build_model(config: ModelConfig, seed: int) -> MICACL:
    """A model with random weights, on the CPU: the same for the same config and seed, whatever was drawn before.

    The state of torch's global generator is the same before and after.
    """
    with _seeded(seed):
        return MICACL(config)


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    # torch.manual_seed would seed the accelerators too, which fork_rng(devices=[]) does not restore.
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield
