"""GEIIM: what the instances of one bag tell each other.

The paper's abstract names "adaptive adjacency matrices and multiscale convolutions". The rest is our reading. A layer:

    graph step:  H = act(A X W)                          A: micacl.model.adjacency
    mixer:       S = fuse(act(concat_k conv_k(X)))       `conv`: 1-D convolutions along the instances, several sizes
                 or a multi-scale state space            `ssm`: micacl.model.state_space
    out = norm(X + mixer(graph(X)))          or graph(mixer(X)), by `order`

The module is `layers` of them in a row. Any number of instances N >= 1 will do, but for the static adjacency, which has
a row and a column of parameters an instance; a mask says which are missing.

Missing instances: their columns leave A (the rest of the row sums to 1 again), they enter the mixer as zeros, which
are also its padding, and they come out as zeros.

Shape suffixes: B bags, N instances, D features.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from micacl.model import adjacency
from micacl.model.backbone import refuse_below, refuse_unknown
from micacl.model.masks import zero_missing
from micacl.model.state_space import MultiScaleStateSpace
from pipeline.contract import MicaclError

ORDERS = ("graph_first", "mixer_first")
MIXERS = ("conv", "ssm")
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": functional.gelu,
    "relu": functional.relu,
    "silu": functional.silu,
    "tanh": torch.tanh,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class GEIIMConfig:
    """The graph-enhanced instance interaction module. Every choice here is ours, see the module's page."""

    enabled: bool = True
    """Off: instance features pass unchanged and the module has no parameters."""
    layers: int = 1
    """Layers in a row, each with parameters of its own."""
    adjacency: str = "static"
    """`static`: a parameter, the same for all bags, tied to model.instances; `dynamic`: of the features;
    `static+dynamic`: a learned mix of both."""
    node_dim: int = 10
    """Length of a node embedding, the inner size of the static N1 @ N2."""
    query_dim: int = 64
    """Length of a query and a key of the dynamic adjacency."""
    mixer: str = "conv"
    """`conv`: convolutions of several sizes along the instances; `ssm`: state spaces of several time scales."""
    kernels: tuple[int, ...] = (1, 3)
    """`conv`: kernel sizes, odd, in instances."""
    dilations: tuple[int, ...] = (1, 2)
    """`ssm`: instances between two steps, one state space each."""
    state: int = 8
    """`ssm`: states of a feature."""
    bidirectional: bool = True
    """`ssm`: a second state space runs from the last instance to the first."""
    order: str = "graph_first"
    """`graph_first` or `mixer_first`: which step sees the input."""
    residual: bool = True
    """Add the input to the result, in each layer."""
    norm: bool = True
    """Layer norm over the features at the end of each layer."""
    activation: str = "gelu"
    """Of the graph step and of the mixer: `gelu`, `relu`, `silu` or `tanh`."""

    def __post_init__(self) -> None:
        refuse_unknown("geiim.order", self.order, ORDERS)
        refuse_unknown("geiim.adjacency", self.adjacency, adjacency.KINDS)
        refuse_unknown("geiim.mixer", self.mixer, MIXERS)
        refuse_unknown("geiim.activation", self.activation, tuple(ACTIVATIONS))
        for flag, value in (
            ("layers", self.layers),
            ("node-dim", self.node_dim),
            ("query-dim", self.query_dim),
            ("state", self.state),
        ):
            refuse_below(f"geiim.{flag}", value, 1)
        if not self.kernels or any(k < 1 or k % 2 == 0 for k in self.kernels):
            raise MicaclError(
                f"geiim.kernels is {self.kernels}.",
                "Nothing was built: an even kernel would shift the instances.",
                "Use one or more odd numbers, such as 1 3.",
            )
        if not self.dilations or min(self.dilations) < 1:
            raise MicaclError(
                f"geiim.dilations is {self.dilations}.", "Nothing was built.", "Use one or more numbers from 1 on."
            )

    @property
    def any_instances(self) -> bool:
        """Whether bags of any number of instances will do."""
        return not self.enabled or self.adjacency == "dynamic"


class MultiScaleConv(nn.Module):
    """Parallel 1-D convolutions along the instances, concatenated and fused by a 1x1 convolution."""

    def __init__(self, features: int, kernels: tuple[int, ...], act: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.act = act
        self.scales = nn.ModuleList(nn.Conv1d(features, features, k, padding=k // 2) for k in kernels)
        self.fuse = nn.Conv1d(features * len(kernels), features, 1)

    def forward(self, x_BND: Tensor) -> Tensor:
        x_BDN = x_BND.transpose(1, 2)
        scales = self.act(torch.cat([conv(x_BDN) for conv in self.scales], dim=1))
        fused_BDN: Tensor = self.fuse(scales)
        return fused_BDN.transpose(1, 2)


class GEIIMLayer(nn.Module):
    """Graph step and mixer over the instances of a bag; the shape stays (B, N, D)."""

    def __init__(self, config: GEIIMConfig, instances: int, features: int) -> None:
        super().__init__()
        self.config = config
        self.act = ACTIVATIONS[config.activation]
        self.adjacency = adjacency.build_adjacency(
            config.adjacency, instances, features, config.node_dim, config.query_dim
        )
        self.graph = nn.Linear(features, features, bias=False)
        self.mixer = _mixer(config, features, self.act)
        self.norm = nn.LayerNorm(features) if config.norm else nn.Identity()

    def forward(self, x_BND: Tensor, valid_BN: Tensor | None = None) -> Tensor:
        """As GEIIM's."""
        x_BND = zero_missing(x_BND, valid_BN)
        if self.config.order == "graph_first":
            h_BND = self.mixer(self._graph_step(x_BND, valid_BN))
        else:
            h_BND = self._graph_step(zero_missing(self.mixer(x_BND), valid_BN), valid_BN)
        out_BND: Tensor = self.norm(x_BND + h_BND if self.config.residual else h_BND)
        return zero_missing(out_BND, valid_BN)

    def _graph_step(self, x_BND: Tensor, valid_BN: Tensor | None) -> Tensor:
        mixed_BND = torch.matmul(self.adjacency(x_BND, valid_BN), self.graph(x_BND))
        return zero_missing(self.act(mixed_BND), valid_BN)


def _mixer(config: GEIIMConfig, features: int, act: Callable[[Tensor], Tensor]) -> nn.Module:
    if config.mixer == "conv":
        return MultiScaleConv(features, config.kernels, act)
    return MultiScaleStateSpace(features, config.dilations, config.state, act, bidirectional=config.bidirectional)


class GEIIM(nn.Module):
    """Layers of interaction between the instances of a bag; the shape stays (B, N, D)."""

    def __init__(self, config: GEIIMConfig, instances: int, features: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(GEIIMLayer(config, instances, features) for _ in range(config.layers))

    def forward(self, x_BND: Tensor, valid_BN: Tensor | None = None) -> Tensor:
        """Missing instances (False in `valid_BN`) neither give nor receive; they come out as zeros.

        Every bag needs at least one valid instance; the caller sees to it (MICACL.forward does).
        """
        for layer in self.layers:
            x_BND = layer(x_BND, valid_BN)
        return x_BND
