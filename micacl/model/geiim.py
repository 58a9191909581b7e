"""GEIIM: what the instances of one bag tell each other.

The paper's abstract names "adaptive adjacency matrices and multiscale convolutions". The rest is our reading:

    A = softmax_row(relu(N1 @ N2))          learned node embeddings, one node an instance
    graph step:  H = gelu(A X W)
    scale step:  S = fuse(gelu(concat_k conv_k(X)))      1-D convolutions along the instances, several kernel sizes
    out = norm(X + scale(graph(X)))          or graph(scale(X)), by `order`

The form of A is the self-adaptive adjacency of Graph WaveNet (Wu et al., IJCAI 2019). It depends on parameters only:
after training it is one constant N x N matrix for all bags. ReLU before the softmax does not make it sparse: an entry
that ReLU sets to 0 still gets e^0 over the row sum, so every entry is above 0.

Missing instances: their columns leave A (the rest of the row sums to 1 again), they enter the convolutions as the
zeros of the padding, and they come out as zeros.

Shape suffixes: B bags, N instances, D features, d node embedding length.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from micacl.model.backbone import refuse_below, refuse_unknown
from pipeline.contract import MicaclError

ORDERS = ("graph_first", "conv_first")


@dataclass(frozen=True, kw_only=True, slots=True)
class GEIIMConfig:
    """The graph-enhanced instance interaction module. Every choice here is ours, see the module's page."""

    enabled: bool = True
    """Off: instance features pass unchanged and the module has no parameters."""
    node_dim: int = 10
    """Length of a node embedding, the inner size of N1 @ N2."""
    kernels: tuple[int, ...] = (1, 3)
    """Kernel sizes of the convolutions along the instances, odd, in instances."""
    order: str = "graph_first"
    """`graph_first` or `conv_first`: which step sees the input."""
    residual: bool = True
    """Add the input to the result."""
    norm: bool = True
    """Layer norm over the features at the end."""
    adjacency: str = "static"
    """`static`: the adjacency is a parameter, the same for all bags."""

    def __post_init__(self) -> None:
        refuse_unknown("geiim.order", self.order, ORDERS)
        refuse_unknown("geiim.adjacency", self.adjacency, ("static",))
        refuse_below("geiim.node-dim", self.node_dim, 1)
        if not self.kernels or any(k < 1 or k % 2 == 0 for k in self.kernels):
            raise MicaclError(
                f"geiim.kernels is {self.kernels}.",
                "Nothing was built: an even kernel would shift the instances.",
                "Use one or more odd numbers, such as 1 3.",
            )


class AdaptiveAdjacency(nn.Module):
    """softmax_row(relu(N1 @ N2)): rows sum to 1, every entry is above 0."""

    def __init__(self, instances: int, node_dim: int) -> None:
        super().__init__()
        self.source_Nd = nn.Parameter(torch.randn(instances, node_dim))
        self.target_dN = nn.Parameter(torch.randn(node_dim, instances))

    def forward(self, valid_BN: Tensor | None = None) -> Tensor:
        """(N, N), or (B, N, N) where the columns of missing instances are 0 and the others sum to 1."""
        scores_NN = functional.relu(self.source_Nd @ self.target_dN)
        if valid_BN is None:
            return scores_NN.softmax(-1)
        return scores_NN.masked_fill(~valid_BN[:, None, :], -torch.inf).softmax(-1)


class MultiScaleConv(nn.Module):
    """Parallel 1-D convolutions along the instances, concatenated and fused by a 1x1 convolution."""

    def __init__(self, features: int, kernels: tuple[int, ...]) -> None:
        super().__init__()
        self.scales = nn.ModuleList(nn.Conv1d(features, features, k, padding=k // 2) for k in kernels)
        self.fuse = nn.Conv1d(features * len(kernels), features, 1)

    def forward(self, x_BND: Tensor) -> Tensor:
        x_BDN = x_BND.transpose(1, 2)
        scales = functional.gelu(torch.cat([conv(x_BDN) for conv in self.scales], dim=1))
        fused_BDN: Tensor = self.fuse(scales)
        return fused_BDN.transpose(1, 2)


class GEIIM(nn.Module):
    """Graph step and scale step over the instances of a bag; the shape stays (B, N, D)."""

    def __init__(self, config: GEIIMConfig, instances: int, features: int) -> None:
        super().__init__()
        self.config = config
        self.adjacency = AdaptiveAdjacency(instances, config.node_dim)
        self.graph = nn.Linear(features, features, bias=False)
        self.scales = MultiScaleConv(features, config.kernels)
        self.norm = nn.LayerNorm(features) if config.norm else nn.Identity()

    def forward(self, x_BND: Tensor, valid_BN: Tensor | None = None) -> Tensor:
        """Missing instances (False in `valid_BN`) neither give nor receive; they come out as zeros.

        Every bag needs at least one valid instance; the caller sees to it (MICACL.forward does).
        """
        x_BND = zero_missing(x_BND, valid_BN)
        if self.config.order == "graph_first":
            h_BND = self.scales(self._graph_step(x_BND, valid_BN))
        else:
            h_BND = self._graph_step(self.scales(x_BND), valid_BN)
        out_BND: Tensor = self.norm(x_BND + h_BND if self.config.residual else h_BND)
        return zero_missing(out_BND, valid_BN)

    def _graph_step(self, x_BND: Tensor, valid_BN: Tensor | None) -> Tensor:
        mixed_BND = torch.matmul(self.adjacency(valid_BN), self.graph(x_BND))
        return zero_missing(functional.gelu(mixed_BND), valid_BN)


def zero_missing(x_BND: Tensor, valid_BN: Tensor | None) -> Tensor:
    """Zeros in the place of missing instances, whatever stood there, NaN included."""
    return x_BND if valid_BN is None else x_BND.masked_fill(~valid_BN[:, :, None], 0.0)
