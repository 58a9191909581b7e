"""The backbone: an R3D-18 that turns one instance clip into one feature vector.

The network is that of "A Closer Look at Spatiotemporal Convolutions" (Tran et al., CVPR 2018, R3D-18), written here
so that no torchvision build is needed. Its parameters carry torchvision's names, so the Kinetics-400 weights of
`torchvision.models.video.r3d_18` load with `load_torchvision_weights`. The classification layer `fc` is left out.

`tiny` is the same network with one block a stage. With a small width and group norm it trains in seconds on a CPU.

Temporal stride is 2 in the last three stages. A clip of 4 frames leaves the last stage with 1; so does a clip of 1.

Shape suffixes: M clips, C colour channels, T frames, H height, W width, D features, F places in time of a stage,
d features of that stage.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from pipeline.contract import MicaclError

BLOCKS_PER_STAGE = {"r3d_18": (2, 2, 2, 2), "tiny": (1, 1, 1, 1)}
NORMS = ("batch", "group")


@dataclass(frozen=True, kw_only=True, slots=True)
class BackboneConfig:
    """Which R3D network. The defaults are torchvision's `r3d_18`."""

    name: str = "r3d_18"
    """`r3d_18` has two blocks a stage, `tiny` one."""
    width: int = 64
    """Channels of the first stage; the last stage has eight times as many."""
    norm: str = "batch"
    """`batch`, or `group`, which does not look at the other clips of the batch and so is the same on any ranks."""
    groups: int = 8
    """Most groups of a group norm; a divisor of the channels is taken."""
    frame_stage: int = 2
    """Stage (1 to 4) whose spatially pooled maps are the frame features of the contrastive loss. Time is halved by each
    stage from the second on: stage 2 of a clip of 4 frames has 2 places in time, stage 4 has one."""

    def __post_init__(self) -> None:
        refuse_unknown("backbone.name", self.name, tuple(BLOCKS_PER_STAGE))
        refuse_unknown("backbone.norm", self.norm, NORMS)
        refuse_below("backbone.width", self.width, 1)
        refuse_below("backbone.groups", self.groups, 1)
        refuse_unknown("backbone.frame-stage", str(self.frame_stage), ("1", "2", "3", "4"))

    @classmethod
    def tiny(cls, width: int = 16) -> BackboneConfig:
        """A small network for tests, the demo and a first look on a CPU."""
        return cls(name="tiny", width=width, norm="group")

    @property
    def features(self) -> int:
        """Length of the feature vector of one clip."""
        return 8 * self.width

    @property
    def frame_features(self) -> int:
        """Length of the feature vector of one place in time, at `frame_stage`."""
        return self.width * int(2 ** (self.frame_stage - 1))


def refuse_unknown(flag: str, value: str, known: tuple[str, ...]) -> None:
    """Raise MicaclError when `value` is not one of `known`."""
    if value not in known:
        raise MicaclError(f"{flag} is {value!r}.", "Nothing was built.", f"Use one of {', '.join(known)}.")


def refuse_below(flag: str, value: float, least: float) -> None:
    """Raise MicaclError when `value` is below `least` (or not a number)."""
    if not value >= least:
        raise MicaclError(f"{flag} is {value}.", "Nothing was built.", f"Use {least} or more.")


def _norm(config: BackboneConfig, channels: int) -> nn.Module:
    if config.norm == "batch":
        return nn.BatchNorm3d(channels)
    return nn.GroupNorm(math.gcd(config.groups, channels), channels)


def _conv(inputs: int, outputs: int, stride: int) -> nn.Conv3d:
    return nn.Conv3d(inputs, outputs, kernel_size=3, stride=stride, padding=1, bias=False)


class BasicBlock(nn.Module):
    """Two 3x3x3 convolutions and a shortcut, which is a strided 1x1x1 convolution where the shape changes."""

    def __init__(self, config: BackboneConfig, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Sequential(_conv(inputs, outputs, stride), _norm(config, outputs), nn.ReLU(inplace=True))
        self.conv2 = nn.Sequential(_conv(outputs, outputs, 1), _norm(config, outputs))
        self.downsample: nn.Sequential | None = None
        if stride != 1 or inputs != outputs:
            shortcut = nn.Conv3d(inputs, outputs, kernel_size=1, stride=stride, bias=False)
            self.downsample = nn.Sequential(shortcut, _norm(config, outputs))
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x_MDTHW: Tensor) -> Tensor:
        shortcut = x_MDTHW if self.downsample is None else self.downsample(x_MDTHW)
        out: Tensor = self.relu(self.conv2(self.conv1(x_MDTHW)) + shortcut)
        return out


class Backbone(nn.Module):
    """Clips of any length of at least one frame to one vector of `config.features` each."""

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        self.config = config
        width = config.width
        self.stem = nn.Sequential(
            nn.Conv3d(3, width, kernel_size=(3, 7, 7), stride=(1, 2, 2), padding=(1, 3, 3), bias=False),
            _norm(config, width),
            nn.ReLU(inplace=True),
        )
        blocks = BLOCKS_PER_STAGE[config.name]
        self.layer1 = _stage(config, width, width, 1, blocks[0])
        self.layer2 = _stage(config, width, 2 * width, 2, blocks[1])
        self.layer3 = _stage(config, 2 * width, 4 * width, 2, blocks[2])
        self.layer4 = _stage(config, 4 * width, 8 * width, 2, blocks[3])
        self.avgpool = nn.AdaptiveAvgPool3d(1)
        self._initialise()

    def _initialise(self) -> None:
        """He's initialisation, fan out, as torchvision does; norms start as the identity by themselves."""
        for module in self.modules():
            if isinstance(module, nn.Conv3d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, clips_MCTHW: Tensor) -> tuple[Tensor, Tensor]:
        """(M, 3, T, H, W) to features (M, features) and frame features (M, F, frame_features)."""
        x = self.stem(clips_MCTHW)
        frames_MFd = x.new_zeros(0)
        for number, layer in enumerate((self.layer1, self.layer2, self.layer3, self.layer4), start=1):
            x = layer(x)
            if number == self.config.frame_stage:
                frames_MFd = x.mean((-2, -1)).transpose(1, 2)
        pooled: Tensor = self.avgpool(x)
        return pooled.flatten(1), frames_MFd


def _stage(config: BackboneConfig, inputs: int, outputs: int, stride: int, blocks: int) -> nn.Sequential:
    first = BasicBlock(config, inputs, outputs, stride)
    return nn.Sequential(first, *(BasicBlock(config, outputs, outputs, 1) for _ in range(blocks - 1)))


def load_torchvision_weights(backbone: Backbone, weights: Mapping[str, Tensor]) -> None:
    """Load a state dict of `torchvision.models.video.r3d_18`; its `fc.*` is left aside.

    Raises MicaclError when a name is missing, unknown or of another shape; the backbone is then unchanged.
    """
    given = {name: value for name, value in weights.items() if not name.startswith("fc.")}
    own = backbone.state_dict()
    wrong = sorted(
        name
        for name in own.keys() | given.keys()
        if name not in own or name not in given or own[name].shape != given[name].shape
    )
    if wrong:
        raise MicaclError(
            f"{len(wrong)} of {len(own)} backbone tensors do not fit, the first is {wrong[0]!r}.",
            "No weight was loaded.",
            "Use the state dict of torchvision's r3d_18 with backbone.name r3d_18, width 64 and norm batch.",
        )
    backbone.load_state_dict(given)
