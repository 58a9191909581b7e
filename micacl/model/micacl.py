"""MICACL, the whole model: backbone, instance interaction, aggregation, class scores and contrastive projections.

    clips -> Backbone, each instance by itself -> GEIIM, between instances -> WIAN, instances to bag -> logits
                                                   |                            |
                                                   z of every instance          z of the bag      (for MCCL)

A re-implementation after the abstract of arXiv 2509.04344; what the abstract leaves open is ours and is a field of a
config. With every switch off (`geiim.enabled: False`, `wian.kind: mean`) it is a backbone, a mean over instances and a
linear layer.

Missing instances are left out before the backbone, so their pixels reach neither the logits nor the running
statistics of a batch norm.

Shape suffixes: B bags, N instances, C colour channels, T frames, H height, W width, D features, K classes, P
projection, F places in time of a backbone stage, d features of that stage.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from micacl.model.backbone import BackboneConfig, build_backbone, refuse_below, refuse_unknown, require_clip
from micacl.model.geiim import GEIIM, GEIIMConfig
from micacl.model.head import HEADS, build_head
from micacl.model.numeric import unit
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
    """Instances per bag: the size of the static adjacency and of DLIAM. A model with neither takes any number."""
    classes: tuple[str, ...] = DFEW_LABELS
    """Label words; a word's place is its logit."""
    head: str = "linear"
    """Class scores: `linear`, or `cosine` between the bag's features and a vector a class."""
    cosine_scale: float = 16.0
    """Of the cosine head: what the cosines are multiplied by; where it starts if it is learned."""
    cosine_learned: bool = True
    """Learn that scale."""
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
        refuse_unknown("model.head", self.head, HEADS)
        refuse_below("model.cosine-scale", self.cosine_scale, 1e-3)
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

    @property
    def any_instances(self) -> bool:
        """Whether bags of any number of instances will do, or only of `instances`."""
        return self.geiim.any_instances and self.wian.any_instances


@dataclass(frozen=True, kw_only=True, slots=True)
class Output:
    """What the model says about a batch of bags."""

    logits_BK: Tensor
    bag_BD: Tensor
    """What the head sees; twice as long with DLIAM."""
    instances_BND: Tensor
    """After GEIIM; zeros where an instance is missing."""
    weights_BN: Tensor
    """Of each instance in the bag; sum to 1. What they mean depends on `wian.kind`: micacl.model.wian."""
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
        features, classes = config.backbone.features, len(config.classes)
        bag_features = config.wian.bag_features(features)
        self.backbone = build_backbone(config.backbone)
        self.geiim = GEIIM(config.geiim, config.instances, features) if config.geiim.enabled else None
        self.wian = WIAN(config.wian, config.instances, features)
        self.dropout = nn.Dropout(config.dropout)
        self.head = build_head(config.head, bag_features, classes, config.cosine_scale, learned=config.cosine_learned)
        widths = {"bag": bag_features, "instance": features, "frame": config.backbone.frame_features}
        scales = config.projection_scales if config.projection_dim else ()
        self.projections = nn.ModuleDict({s: _projection(widths[s], config.projection_dim) for s in scales})
        self.prototypes = nn.ParameterDict()
        self.prototype_heads = nn.ModuleDict()
        for scale in scales:
            if config.prototypes == "learned":
                self.prototypes[scale] = nn.Parameter(torch.randn(classes, config.projection_dim))
            elif config.prototypes == "classifier":
                self.prototype_heads[scale] = _projection(bag_features, config.projection_dim)

    def forward(self, clips_BNCTHW: Tensor, valid_BN: Tensor | None = None) -> Output:
        """Score a batch of bags.

        `clips_BNCTHW` is floating point, colours normalised by the caller. `valid_BN` is boolean, False for a missing
        instance; None means that all are there. Raises MicaclError when a shape or type does not fit, or when a bag
        has no valid instance.
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
            projections={scale: unit(head(features[scale])) for scale, head in self.projections.items()},
            prototypes=self._class_prototypes(),
            valid_BN=valid_BN,
        )

    def class_weights_KD(self) -> Tensor:
        """(K, D) the head's vector of each class, as it is: not normalised, without bias, with gradient."""
        return self.head.weight

    def _class_prototypes(self) -> dict[str, Tensor]:
        learned = {scale: unit(p_KP) for scale, p_KP in self.prototypes.items()}
        return learned | {scale: unit(mlp(self.class_weights_KD())) for scale, mlp in self.prototype_heads.items()}

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
        if len(shape) != 6 or shape[2] != 3:
            raise MicaclError(
                f"Clips have shape {shape}.",
                "Nothing was computed.",
                "Give (bags, instances, 3 colours, frames, height, width).",
            )
        require_input(self.config, shape[1], *shape[3:])
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


def require_input(config: ModelConfig, instances: int, frames: int, height: int, width: int) -> None:
    """Raise MicaclError when a model of this config cannot take bags of this size."""
    require_clip(config.backbone, frames, height, width)
    if instances < 1 or (instances != config.instances and not config.any_instances):
        raise MicaclError(
            f"Bags have {instances} instances, and the model is built for {config.instances}.",
            "Nothing was computed: its static adjacency or DLIAM has parameters for each place.",
            "Set model.instances to the number in the dataset, pad bags and give a mask of valid instances, or use "
            "--model.geiim.adjacency dynamic without DLIAM, which takes any number from 1 on.",
        )


def _spread(present_Mx: Tensor, valid_BN: Tensor) -> Tensor:
    """(M, ...) rows of the valid instances to (B, N, ...), zeros in the place of the others."""
    out = present_Mx.new_zeros(*valid_BN.shape, *present_Mx.shape[1:])
    mask = valid_BN.reshape(*valid_BN.shape, *(1,) * (present_Mx.ndim - 1))
    return out.masked_scatter(mask, present_Mx)


def _projection(features: int, projection_dim: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(features, features), nn.ReLU(inplace=True), nn.Linear(features, projection_dim))


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
