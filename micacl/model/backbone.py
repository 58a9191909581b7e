"""The backbone: what turns one instance clip into one feature vector, chosen by `BackboneConfig.name`.

    r3d_18, mc3_18, r2plus1d_18    "A Closer Look at Spatiotemporal Convolutions" (Tran et al., CVPR 2018),
                                   micacl.model.resnet3d, with torchvision's parameter names and shapes
    tiny                           r3d_18 with one block a stage: with few channels and group norm it trains on a CPU
    videomae                       "VideoMAE" (Tong et al., NeurIPS 2022), micacl.model.videomae; needs the extra
                                   `videomae` (transformers)

All take (M, 3, T, H, W), colours normalised by the caller (BatchConfig has the mean and deviation of torchvision's
Kinetics-400 weights), and return the pooled features (M, D) and the frame features (M, F, d) of the contrastive loss.

`weights` names a file that a new training run begins with (micacl.model.weights); a bundle never looks at it.

Shape suffixes: M clips, C colour channels, T frames, H height, W width, D features, F places in time of a stage,
d features of that stage.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from dataclasses import dataclass, field

from torch import Tensor, nn

from pipeline.contract import MicaclError

RESNETS = ("r3d_18", "mc3_18", "r2plus1d_18", "tiny")
NAMES = (*RESNETS, "videomae")
NORMS = ("batch", "group")
MOST_WIDTH = 1024
"""Sixteen times torchvision's; 8.5 thousand million parameters."""


@dataclass(frozen=True, kw_only=True, slots=True)
class VideoMAEConfig:
    """Sizes of a VideoMAE encoder. The defaults are a small one for a CPU; `base()` is the published ViT-B."""

    hidden: int = 96
    """Length of a token and of the clip's features; a multiple of `heads`."""
    layers: int = 2
    heads: int = 3
    mlp: int = 192
    """Units between the two layers of a block's MLP."""
    patch: int = 16
    """Side of a patch, pixels; batch.side must be a multiple."""
    tubelet: int = 2
    """Frames of a token; stream.frames must be a multiple."""
    grid: tuple[int, int, int] = (8, 14, 14)
    """Places in time, height and width of the pre-training: the position table is that of this grid, interpolated for
    other clips. 16 frames of 224 pixels make 8, 14, 14."""

    def __post_init__(self) -> None:
        for flag, value in (
            ("hidden", self.hidden),
            ("layers", self.layers),
            ("heads", self.heads),
            ("mlp", self.mlp),
            ("patch", self.patch),
            ("tubelet", self.tubelet),
            ("grid", min(self.grid)),
        ):
            refuse_below(f"backbone.videomae.{flag}", value, 1)
        if self.hidden % self.heads:
            raise MicaclError(
                f"backbone.videomae.hidden {self.hidden} is no multiple of heads {self.heads}.",
                "Nothing was built.",
                "Change one of them.",
            )

    @classmethod
    def base(cls) -> VideoMAEConfig:
        """ViT-B, as `MCG-NJU/videomae-base` on the Hugging Face hub."""
        return cls(hidden=768, layers=12, heads=12, mlp=3072)


@dataclass(frozen=True, kw_only=True, slots=True)
class BackboneConfig:
    """Which network. The defaults are torchvision's `r3d_18`."""

    name: str = "r3d_18"
    """`r3d_18`, `mc3_18`, `r2plus1d_18`, `tiny` or `videomae`."""
    width: int = 64
    """Channels of the first stage; the last stage has eight times as many. Not of `videomae`."""
    norm: str = "batch"
    """`batch`, or `group`, which does not look at the other clips of the batch and so is the same on any ranks."""
    groups: int = 8
    """Most groups of a group norm; a divisor of the channels is taken."""
    frame_stage: int = 2
    """Stage (1 to 4) whose spatially pooled maps are the frame features of the contrastive loss. Time is halved by each
    stage from the second on (in `mc3_18` by none): stage 2 of a clip of 4 frames has 2 places in time, stage 4 has one.
    `videomae` has one place a tubelet."""
    weights: str = ""
    """File that a new run begins with: a path, s3://... or https://..., .pth or .safetensors; empty: random weights."""
    weights_sha256: str = ""
    """Of that file: 64 hex digits, or the first 8 or more (torchvision's file names end with 8); empty: not checked."""
    videomae: VideoMAEConfig = field(default_factory=VideoMAEConfig)
    """Sizes of `videomae`; the others do not look at it."""

    def __post_init__(self) -> None:
        refuse_unknown("backbone.name", self.name, NAMES)
        refuse_unknown("backbone.norm", self.norm, NORMS)
        refuse_below("backbone.width", self.width, 1)
        if self.width > MOST_WIDTH:
            raise MicaclError(f"backbone.width is {self.width}.", "Nothing was built.", f"Use {MOST_WIDTH} at most.")
        refuse_below("backbone.groups", self.groups, 1)
        refuse_unknown("backbone.frame-stage", str(self.frame_stage), ("1", "2", "3", "4"))
        if self.weights_sha256 and not (self.weights and re.fullmatch(r"[0-9a-f]{8,64}", self.weights_sha256)):
            raise MicaclError(
                f"backbone.weights-sha256 is {self.weights_sha256!r}, backbone.weights {self.weights!r}.",
                "Nothing was built: there is nothing to compare.",
                "Give both, the hash as 8 to 64 hex digits in lower case.",
            )

    @classmethod
    def tiny(cls, width: int = 16) -> BackboneConfig:
        """A small network for tests, the demo and a first look on a CPU."""
        return cls(name="tiny", width=width, norm="group")

    @property
    def features(self) -> int:
        """D, length of the feature vector of one clip."""
        return self.videomae.hidden if self.name == "videomae" else 8 * self.width

    @property
    def frame_features(self) -> int:
        """d, length of the feature vector of one place in time, at `frame_stage`."""
        return self.videomae.hidden if self.name == "videomae" else self.width * int(2 ** (self.frame_stage - 1))


class Backbone(nn.Module, ABC):
    """Clips to one vector of `config.features` each. Build one with `build_backbone`."""

    config: BackboneConfig

    @abstractmethod
    def forward(self, clips_MCTHW: Tensor) -> tuple[Tensor, Tensor]:
        """(M, 3, T, H, W) to features (M, features) and frame features (M, F, frame_features)."""


def build_backbone(config: BackboneConfig) -> Backbone:
    """The network that the config names, with random weights. Raises MicaclError where its package is missing."""
    if config.name == "videomae":
        from micacl.model.videomae import VideoMAE

        return VideoMAE(config)
    from micacl.model.resnet3d import VideoResNet

    return VideoResNet(config)


def require_clip(config: BackboneConfig, frames: int, height: int, width: int) -> None:
    """Raise MicaclError when the network cannot take clips of this size."""
    step, patch = (config.videomae.tubelet, config.videomae.patch) if config.name == "videomae" else (1, 1)
    if frames < step or frames % step or min(height, width) < patch or height % patch or width % patch:
        raise MicaclError(
            f"Clips have {frames} frames of {height} x {width} pixels.",
            f"The backbone {config.name} cannot look at them.",
            f"Give a multiple of {step} frames, and sides that are multiples of {patch} pixels."
            if config.name == "videomae"
            else "Give at least one frame of at least one pixel.",
        )


def refuse_unknown(flag: str, value: str, known: tuple[str, ...]) -> None:
    """Raise MicaclError when `value` is not one of `known`."""
    if value not in known:
        raise MicaclError(f"{flag} is {value!r}.", "Nothing was built.", f"Use one of {', '.join(known)}.")


def refuse_below(flag: str, value: float, least: float) -> None:
    """Raise MicaclError when `value` is below `least` (or not a number)."""
    if not value >= least:
        raise MicaclError(f"{flag} is {value}.", "Nothing was built.", f"Use {least} or more.")
