"""Who listens to whom: adjacency matrices between the instances of a bag. Rows sum to 1, every valid entry is above 0.

    static           A = softmax_row(relu(N1 @ N2))                learned node embeddings, one node an instance
    dynamic          A = softmax_row(relu(Q K^T / sqrt(d)))        Q = X Wq, K = X Wk: of the bag's own features
    static+dynamic   A = g * A_static + (1 - g) * A_dynamic        g_n = sigmoid(w . x_n + b), one a row

`static` is the one form that a secondary source gives for the paper, and the self-adaptive adjacency of Graph WaveNet
(Wu et al., IJCAI 2019). It depends on parameters only: after training it is one constant N x N matrix for all bags, so
it is tied to the number of instances; `dynamic` takes any. ReLU before the softmax does not make a row sparse: an entry
that ReLU sets to 0 still gets e^0 over the row sum. `static+dynamic` takes the idea of SDGF (Wang et al., arXiv
2509.18135): a static and a dynamic graph, fused by a gate that sees the input. Its wavelets are not here, and the form
of the dynamic matrix is ours.

Columns of missing instances are 0, the rest of a row sums to 1 again.

Shape suffixes: B bags, N instances, D features, d inner size.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from micacl.model.masks import softmax_over_valid

KINDS = ("static", "dynamic", "static+dynamic")


class StaticAdjacency(nn.Module):
    """softmax_row(relu(N1 @ N2)), the same for all bags."""

    def __init__(self, instances: int, node_dim: int) -> None:
        super().__init__()
        self.source_Nd = nn.Parameter(torch.randn(instances, node_dim))
        self.target_dN = nn.Parameter(torch.randn(node_dim, instances))

    def forward(self, x_BND: Tensor, valid_BN: Tensor | None = None) -> Tensor:  # noqa: ARG002
        """(N, N); (B, N, N) with a mask. The features are not looked at."""
        scores_NN = functional.relu(self.source_Nd @ self.target_dN)
        return softmax_over_valid(scores_NN if valid_BN is None else scores_NN[None], valid_BN)


class DynamicAdjacency(nn.Module):
    """softmax_row(relu(Q K^T / sqrt(d))) of the features."""

    def __init__(self, features: int, query_dim: int) -> None:
        super().__init__()
        self.query = nn.Linear(features, query_dim, bias=False)
        self.key = nn.Linear(features, query_dim, bias=False)

    def forward(self, x_BND: Tensor, valid_BN: Tensor | None = None) -> Tensor:
        """(B, N, N). Values of missing instances must be finite (GEIIM makes them zeros)."""
        q_BNd, k_BNd = self.query(x_BND), self.key(x_BND)
        scores_BNN = functional.relu(q_BNd @ k_BNd.transpose(1, 2) / q_BNd.shape[-1] ** 0.5)
        return softmax_over_valid(scores_BNN, valid_BN)


class MixedAdjacency(nn.Module):
    """A convex mix of the two, row by row, so that rows still sum to 1."""

    def __init__(self, instances: int, features: int, node_dim: int, query_dim: int) -> None:
        super().__init__()
        self.static = StaticAdjacency(instances, node_dim)
        self.dynamic = DynamicAdjacency(features, query_dim)
        self.gate = nn.Linear(features, 1)

    def forward(self, x_BND: Tensor, valid_BN: Tensor | None = None) -> Tensor:
        """(B, N, N)."""
        static, dynamic_BNN = self.static(x_BND, valid_BN), self.dynamic(x_BND, valid_BN)
        gate_BN1 = torch.sigmoid(self.gate(x_BND))
        mixed_BNN: Tensor = gate_BN1 * static + (1 - gate_BN1) * dynamic_BNN
        return mixed_BNN


def build_adjacency(kind: str, instances: int, features: int, node_dim: int, query_dim: int) -> nn.Module:
    """One of KINDS."""
    if kind == "static":
        return StaticAdjacency(instances, node_dim)
    if kind == "dynamic":
        return DynamicAdjacency(features, query_dim)
    return MixedAdjacency(instances, features, node_dim, query_dim)
