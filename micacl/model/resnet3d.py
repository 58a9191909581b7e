"""Residual networks over space and time: R3D-18, MC3-18, R(2+1)D-18 and `tiny`.

"A Closer Look at Spatiotemporal Convolutions for Action Recognition" (Tran et al., CVPR 2018, arXiv 1711.11248). The
layout and the names of the parameters are those of `torchvision.models.video` (VideoResNet), so that its Kinetics-400
files load; no torchvision build is needed. The classification layer `fc` is left out. What differs between them:

    r3d_18, tiny    every convolution 3x3x3
    mc3_18          3x3x3 in the first stage, 1x3x3 in the others, which leave time as it is
    r2plus1d_18     every 3x3x3 is a 1x3x3 into `midplanes` channels, norm, ReLU, then a 3x1x1, with
                    midplanes = floor(27 in out / (9 in + 3 out)) of the block, so that it has the 3x3x3's parameters

Temporal stride is 2 in the last three stages (not in mc3_18): a clip of 4 frames leaves the last stage with 1; so does
a clip of 1.

Shape suffixes: M clips, C colour channels, T frames, H height, W width, D features, F places in time of a stage,
d features of that stage.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import Tensor, nn

from micacl.model.backbone import Backbone, BackboneConfig

BLOCKS_PER_STAGE = {"r3d_18": 2, "mc3_18": 2, "r2plus1d_18": 2, "tiny": 1}
_STEM_MIDPLANES = 45 / 64  # of R(2+1)D's stem, of the width; torchvision's number, not the formula's
Conv = Callable[[BackboneConfig, int, int, int, int], nn.Module]
"""(config, channels in, channels out, midplanes, stride) -> convolution of a block."""


def norm(config: BackboneConfig, channels: int) -> nn.Module:
    """Batch norm or group norm, by `config.norm`."""
    if config.norm == "batch":
        return nn.BatchNorm3d(channels)
    return nn.GroupNorm(math.gcd(config.groups, channels), channels)


def conv3d(config: BackboneConfig, inputs: int, outputs: int, midplanes: int, stride: int) -> nn.Module:  # noqa: ARG001
    """3x3x3: torchvision's Conv3DSimple."""
    return nn.Conv3d(inputs, outputs, kernel_size=3, stride=stride, padding=1, bias=False)


def conv2d(config: BackboneConfig, inputs: int, outputs: int, midplanes: int, stride: int) -> nn.Module:  # noqa: ARG001
    """1x3x3, which leaves time as it is: torchvision's Conv3DNoTemporal."""
    return _spatial(inputs, outputs, kernel=3, stride=stride)


def conv2plus1d(config: BackboneConfig, inputs: int, outputs: int, midplanes: int, stride: int) -> nn.Module:
    """Space, then time: torchvision's Conv2Plus1D."""
    space = (_spatial(inputs, midplanes, kernel=3, stride=stride), norm(config, midplanes), nn.ReLU(inplace=True))
    return nn.Sequential(*space, _temporal(midplanes, outputs, stride))


CONVS: dict[str, tuple[Conv, Conv]] = {
    "r3d_18": (conv3d, conv3d),
    "tiny": (conv3d, conv3d),
    "mc3_18": (conv3d, conv2d),
    "r2plus1d_18": (conv2plus1d, conv2plus1d),
}
"""Of the first stage, and of the others."""


def _spatial(inputs: int, outputs: int, *, kernel: int, stride: int) -> nn.Conv3d:
    size, padding = (1, kernel, kernel), (0, kernel // 2, kernel // 2)
    return nn.Conv3d(inputs, outputs, kernel_size=size, stride=(1, stride, stride), padding=padding, bias=False)


def _temporal(inputs: int, outputs: int, stride: int) -> nn.Conv3d:
    return nn.Conv3d(inputs, outputs, kernel_size=(3, 1, 1), stride=(stride, 1, 1), padding=(1, 0, 0), bias=False)


class BasicBlock(nn.Module):
    """Two convolutions and a shortcut, which is a strided 1x1x1 convolution where the shape changes."""

    def __init__(self, config: BackboneConfig, conv: Conv, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        midplanes = (inputs * outputs * 27) // (inputs * 9 + 3 * outputs)
        self.conv1 = nn.Sequential(
            conv(config, inputs, outputs, midplanes, stride), norm(config, outputs), nn.ReLU(inplace=True)
        )
        self.conv2 = nn.Sequential(conv(config, outputs, outputs, midplanes, 1), norm(config, outputs))
        self.downsample: nn.Sequential | None = None
        if stride != 1 or inputs != outputs:
            strides = (1 if conv is conv2d else stride, stride, stride)
            shortcut = nn.Conv3d(inputs, outputs, kernel_size=1, stride=strides, bias=False)
            self.downsample = nn.Sequential(shortcut, norm(config, outputs))
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x_MDTHW: Tensor) -> Tensor:
        shortcut = x_MDTHW if self.downsample is None else self.downsample(x_MDTHW)
        out: Tensor = self.relu(self.conv2(self.conv1(x_MDTHW)) + shortcut)
        return out


class VideoResNet(Backbone):
    """Clips of any length of at least one frame to one vector of `config.features` each."""

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        self.config = config
        width, (first, later) = config.width, CONVS[config.name]
        self.stem = _stem(config)
        self.layer1 = _stage(config, first, width, width, 1)
        self.layer2 = _stage(config, later, width, 2 * width, 2)
        self.layer3 = _stage(config, later, 2 * width, 4 * width, 2)
        self.layer4 = _stage(config, later, 4 * width, 8 * width, 2)
        self.avgpool = nn.AdaptiveAvgPool3d(1)
        self._initialise()

    def _initialise(self) -> None:
        """He's initialisation, fan out, as torchvision does; norms start as the identity by themselves."""
        for module in self.modules():
            if isinstance(module, nn.Conv3d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, clips_MCTHW: Tensor) -> tuple[Tensor, Tensor]:
        x = self.stem(clips_MCTHW)
        frames_MFd = x.new_zeros(0)
        for number, layer in enumerate((self.layer1, self.layer2, self.layer3, self.layer4), start=1):
            x = layer(x)
            if number == self.config.frame_stage:
                frames_MFd = x.mean((-2, -1)).transpose(1, 2)
        pooled: Tensor = self.avgpool(x)
        return pooled.flatten(1), frames_MFd


def _stem(config: BackboneConfig) -> nn.Sequential:
    """7x7 in space, 3 in time, stride 2 in space: torchvision's BasicStem, or R2Plus1dStem."""
    width = config.width
    if config.name == "r2plus1d_18":
        middle = max(1, int(_STEM_MIDPLANES * width))
        space = (_spatial(3, middle, kernel=7, stride=2), norm(config, middle), nn.ReLU(inplace=True))
        return nn.Sequential(*space, _temporal(middle, width, 1), norm(config, width), nn.ReLU(inplace=True))
    conv = nn.Conv3d(3, width, kernel_size=(3, 7, 7), stride=(1, 2, 2), padding=(1, 3, 3), bias=False)
    return nn.Sequential(conv, norm(config, width), nn.ReLU(inplace=True))


def _stage(config: BackboneConfig, conv: Conv, inputs: int, outputs: int, stride: int) -> nn.Sequential:
    first, more = BasicBlock(config, conv, inputs, outputs, stride), BLOCKS_PER_STAGE[config.name] - 1
    return nn.Sequential(first, *(BasicBlock(config, conv, outputs, outputs, 1) for _ in range(more)))
