"""WIAN: from the instances of a bag to the bag, each instance weighted by its importance.

The paper's abstract says that it "dynamically assigns weights based on instance importance". The formula is our
reading, attention-based multi-instance learning (Ilse, Tomczak and Welling, ICML 2018, equations 8 and 9):

    a_n = softmax_n( w^T tanh(V h_n) )                             plain
    a_n = softmax_n( w^T (tanh(V h_n) * sigmoid(U h_n)) )          gated
    bag = sum_n a_n h_n

Missing instances get weight 0. Switched off, the bag is the mean over the valid instances.

Shape suffixes: B bags, N instances, D features.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from micacl.model.backbone import refuse_below
from micacl.model.geiim import zero_missing


@dataclass(frozen=True, kw_only=True, slots=True)
class WIANConfig:
    """The weighted instance aggregation network."""

    enabled: bool = True
    """Off: the mean over the valid instances, without parameters."""
    hidden: int = 128
    """Rows of V (and U): units of the attention."""
    gated: bool = False
    """Multiply the tanh units by learned sigmoid gates."""

    def __post_init__(self) -> None:
        refuse_below("wian.hidden", self.hidden, 1)


class WIAN(nn.Module):
    """Attention over the instances. Has no parameters when switched off."""

    def __init__(self, config: WIANConfig, features: int) -> None:
        super().__init__()
        self.config = config
        if config.enabled:
            self.units = nn.Linear(features, config.hidden)
            self.gates = nn.Linear(features, config.hidden) if config.gated else None
            self.score = nn.Linear(config.hidden, 1, bias=False)

    def forward(self, h_BND: Tensor, valid_BN: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(bag_BD, weights_BN). The weights of a bag sum to 1 and are 0 for missing instances.

        Every bag needs at least one valid instance; the caller sees to it (MICACL.forward does).
        """
        h_BND = zero_missing(h_BND, valid_BN)
        scores_BN = self._scores(h_BND)
        if valid_BN is not None:
            scores_BN = scores_BN.masked_fill(~valid_BN, -torch.inf)
        weights_BN = scores_BN.softmax(1)
        bag_BD = (weights_BN[:, :, None] * h_BND).sum(1)
        return bag_BD, weights_BN

    def _scores(self, h_BND: Tensor) -> Tensor:
        """Equal scores make the mean."""
        if not self.config.enabled:
            return torch.zeros_like(h_BND[:, :, 0])
        units = torch.tanh(self.units(h_BND))
        if self.gates is not None:
            units = units * torch.sigmoid(self.gates(h_BND))
        scores_BN1: Tensor = self.score(units)
        return scores_BN1.squeeze(-1)
