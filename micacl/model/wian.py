"""WIAN: from the instances of a bag to the bag, each instance weighted by its importance.

The paper's abstract says that it "dynamically assigns weights based on instance importance". The formula is our
reading, attention-based multi-instance learning (Ilse, Tomczak and Welling, ICML 2018, equations 8 and 9):

    a_n = softmax_n( w^T tanh(V h_n) )                             `attention`
    a_n = softmax_n( w^T (tanh(V h_n) * sigmoid(U h_n)) )          `gated`
    bag = sum_n a_n h_n

`mean` is the mean over the valid instances, without parameters: WIAN switched off. `dliam` is M3DFEL's aggregation, for
comparison (micacl.model.dliam).

The weights are returned to explain a prediction. For the first three they are a_n, the coefficients of the sum. DLIAM
has no such coefficients: its weights say how long the vector is that each instance adds to the bag, as a share. By then
an LSTM and an attention have mixed the instances, so it is not what that instance's pixels did alone. All sum to 1 and
are 0 for missing instances.

Shape suffixes: B bags, N instances, D features, E features of the bag (D, for `dliam` 2 D).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from micacl.model.backbone import refuse_below, refuse_unknown
from micacl.model.dliam import DLIAM
from micacl.model.masks import softmax_over_valid, zero_missing
from pipeline.contract import MicaclError

KINDS = ("mean", "attention", "gated", "dliam")


@dataclass(frozen=True, kw_only=True, slots=True)
class WIANConfig:
    """The weighted instance aggregation network."""

    kind: str = "attention"
    """`attention`; `gated`, its tanh units multiplied by learned sigmoid gates; `mean`, without parameters (WIAN off);
    `dliam`, M3DFEL's, tied to model.instances."""
    hidden: int = 128
    """`attention`, `gated`: rows of V (and U), units of the attention."""
    lstm_layers: int = 2
    """`dliam`: layers of its BiLSTM."""
    heads: int = 8
    """`dliam`: heads of its attention; twice the backbone's features must be a multiple."""

    def __post_init__(self) -> None:
        refuse_unknown("wian.kind", self.kind, KINDS)
        refuse_below("wian.hidden", self.hidden, 1)
        refuse_below("wian.lstm-layers", self.lstm_layers, 1)
        refuse_below("wian.heads", self.heads, 1)

    @property
    def any_instances(self) -> bool:
        """Whether bags of any number of instances will do."""
        return self.kind != "dliam"

    def bag_features(self, features: int) -> int:
        """E, length of the bag's vector, for D features an instance."""
        return 2 * features if self.kind == "dliam" else features


class WIAN(nn.Module):
    """The bag of its instances, by `config.kind`."""

    def __init__(self, config: WIANConfig, instances: int, features: int) -> None:
        """Raises MicaclError when the heads of `dliam` do not divide its features."""
        super().__init__()
        self.config = config
        if config.kind == "dliam":
            _require_heads(config, features)
            self.dliam = DLIAM(instances, features, config.lstm_layers, config.heads)
        elif config.kind != "mean":
            self.units = nn.Linear(features, config.hidden)
            self.gates = nn.Linear(features, config.hidden) if config.kind == "gated" else None
            self.score = nn.Linear(config.hidden, 1, bias=False)

    def forward(self, h_BND: Tensor, valid_BN: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(bag_BE, weights_BN). The weights of a bag sum to 1 and are 0 for missing instances; see the module's page.

        Every bag needs at least one valid instance; the caller sees to it (MICACL.forward does).
        """
        h_BND = zero_missing(h_BND, valid_BN)
        if self.config.kind == "dliam":
            bag_BE, shares_BN = self.dliam(h_BND, valid_BN)
            return bag_BE, shares_BN
        weights_BN = softmax_over_valid(self._scores(h_BND), valid_BN)
        bag_BD = (weights_BN[:, :, None] * h_BND).sum(1)
        return bag_BD, weights_BN

    def _scores(self, h_BND: Tensor) -> Tensor:
        """Equal scores make the mean."""
        if self.config.kind == "mean":
            return torch.zeros_like(h_BND[:, :, 0])
        units = torch.tanh(self.units(h_BND))
        if self.gates is not None:
            units = units * torch.sigmoid(self.gates(h_BND))
        scores_BN1: Tensor = self.score(units)
        return scores_BN1.squeeze(-1)


def _require_heads(config: WIANConfig, features: int) -> None:
    if 2 * features % config.heads:
        raise MicaclError(
            f"wian.heads is {config.heads}, and dliam has {2 * features} features to divide by it.",
            "Nothing was built.",
            "Use a divisor of that number.",
        )
