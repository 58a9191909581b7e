"""The class scores of a bag's vector.

    linear    logits = x W^T + b
    cosine    logits = s * (x / |x|) . (w_k / |w_k|)       "NormFace" (Wang et al., ACM MM 2017), and LDAM's head

A cosine head cannot give a class a large weight vector because it has many clips. Its scale s is learned, or fixed with
`cosine_learned: False`. Both heads have one vector a class: `weight`, (K, D), not normalised.

Shape suffixes: B bags, D features, K classes.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from micacl.model.numeric import unit, without_autocast

HEADS = ("linear", "cosine")


class CosineHead(nn.Module):
    """Scaled cosine between the features and one vector a class."""

    def __init__(self, features: int, classes: int, scale: float, *, learned: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(classes, features))
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))  # as nn.Linear; only its direction counts
        self.fixed_scale = scale
        self.log_scale = nn.Parameter(torch.tensor([math.log(scale)])) if learned else None

    @property
    def scale(self) -> Tensor | float:
        """s, above 0."""
        return self.fixed_scale if self.log_scale is None else self.log_scale.exp()

    def forward(self, x_BD: Tensor) -> Tensor:
        """(B, K), in float32 or wider, also under autocast."""
        with without_autocast(x_BD):
            return self.scale * (unit(x_BD) @ unit(self.weight).T)


def build_head(kind: str, features: int, classes: int, scale: float, *, learned: bool) -> nn.Linear | CosineHead:
    """One of HEADS; `scale` and `learned` are of the cosine head."""
    if kind == "linear":
        return nn.Linear(features, classes)
    return CosineHead(features, classes, scale, learned=learned)
