"""DLIAM: how M3DFEL (Wang et al., CVPR 2023) makes one vector of a bag. Here for comparison, as `wian.kind: dliam`.

After the authors' released code, with D features an instance and E = 2 D:

    x = BiLSTM(h)                              (B, N, E), `lstm_layers` layers of D units each way
    a = multi-head self-attention(x)           `heads` heads, no bias, no output projection, no residual
    y = x * sigmoid(DMIN(a))                   dynamic multi-instance normalisation, below
    bag = conv(y)                              a 1-D convolution of size 3 along the E features; instances are channels

    DMIN: mean_in, var_in     over the instances, one a bag and feature (unbiased)
          mean_ln, var_ln     of the same, over the features too
          (a - mean) / sqrt(var + 1e-5) * weight + bias,   mean, var: a learned softmax mix of the two

Different from that code: missing instances are left out of every step; the variance over one instance is 0 (theirs is
NaN); nothing is squeezed, so one bag is a batch. M3DFEL's class layer comes after it (model.head).

Tied to the number of instances: the convolution has a channel an instance.

Shape suffixes: B bags, N instances, D features in, E features out, H heads, e features of a head.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from micacl.model.masks import softmax_over_valid, zero_missing
from micacl.model.numeric import wide

_EPSILON = 1e-5


class DLIAM(nn.Module):
    """(B, N, D) to the bag (B, 2 D) and what each instance adds to it."""

    def __init__(self, instances: int, features: int, lstm_layers: int, heads: int) -> None:
        super().__init__()
        self.lstm = nn.LSTM(features, features, lstm_layers, batch_first=True, bidirectional=True)
        self.attention = SelfAttention(2 * features, heads)
        self.dmin = DMIN(2 * features)
        self.conv = nn.Conv1d(instances, 1, kernel_size=3, padding=1)

    def forward(self, h_BND: Tensor, valid_BN: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(bag_BE, weights_BN): the weights are shares of the length of what an instance adds, without gradient."""
        parts_BNE = self.parts(h_BND, valid_BN)
        assert self.conv.bias is not None
        bag_BE = parts_BNE.sum(1) + self.conv.bias
        return bag_BE, _shares(parts_BNE.detach(), valid_BN)

    def parts(self, h_BND: Tensor, valid_BN: Tensor | None = None) -> Tensor:
        """(B, N, E) what each instance adds to the bag: the convolution of its channel alone, without the bias."""
        x_BNE = self._lstm(zero_missing(h_BND, valid_BN), valid_BN)
        gate_BNE = torch.sigmoid(self.dmin(self.attention(x_BNE, valid_BN), valid_BN))
        y_BNE = zero_missing(x_BNE * gate_BNE, valid_BN)
        return nn.functional.conv1d(y_BNE, self.conv.weight.transpose(0, 1), padding=1, groups=y_BNE.shape[1])

    def _lstm(self, h_BND: Tensor, valid_BN: Tensor | None) -> Tensor:
        """The valid instances of each bag as one sequence without gaps; zeros in the place of the others."""
        if valid_BN is None:
            whole_BNE: Tensor = self.lstm(h_BND)[0]
            return whole_BNE
        order_BN = (~valid_BN).to(torch.uint8).argsort(dim=1, stable=True)
        front_BND = h_BND.take_along_dim(order_BN[:, :, None], 1)
        packed = pack_padded_sequence(front_BND, valid_BN.sum(1).cpu(), batch_first=True, enforce_sorted=False)
        out_BNE, _ = pad_packed_sequence(self.lstm(packed)[0], batch_first=True, total_length=h_BND.shape[1])
        back_BN = order_BN.argsort(dim=1)
        placed_BNE: Tensor = out_BNE.take_along_dim(back_BN[:, :, None], 1)
        return placed_BNE


def _shares(parts_BNE: Tensor, valid_BN: Tensor | None) -> Tensor:
    """(B, N) lengths as shares of their sum; 0 for missing instances."""
    lengths_BN = torch.linalg.vector_norm(wide(parts_BNE), dim=-1) + torch.finfo(torch.float32).tiny
    if valid_BN is not None:
        lengths_BN = lengths_BN * valid_BN
    shares_BN: Tensor = lengths_BN / lengths_BN.sum(1, keepdim=True)
    return shares_BN.to(parts_BNE.dtype)


class SelfAttention(nn.Module):
    """Multi-head self-attention between the instances: queries, keys and values of one layer, heads concatenated."""

    def __init__(self, features: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(features, 3 * features, bias=False)

    def forward(self, x_BNE: Tensor, valid_BN: Tensor | None = None) -> Tensor:
        parts = self.qkv(x_BNE).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        q_BHNe, k_BHNe, v_BHNe = parts.unbind(0)
        scores_BHNN = q_BHNe @ k_BHNe.transpose(-2, -1) / q_BHNe.shape[-1] ** 0.5
        out_BHNe: Tensor = softmax_over_valid(scores_BHNN, valid_BN) @ v_BHNe
        return out_BHNe.transpose(1, 2).flatten(2)


class DMIN(nn.Module):
    """Dynamic multi-instance normalisation: statistics of the instances and of the whole bag, mixed."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.weight_E = nn.Parameter(torch.ones(features))
        self.bias_E = nn.Parameter(torch.zeros(features))
        self.mean_mix = nn.Parameter(torch.ones(2))
        self.var_mix = nn.Parameter(torch.ones(2))

    def forward(self, x_BNE: Tensor, valid_BN: Tensor | None = None) -> Tensor:
        """(B, N, E) of the same type; the statistics are computed in float32 or wider."""
        given, x_BNE = x_BNE.dtype, wide(zero_missing(x_BNE, valid_BN))
        mean_B1E, var_B1E = _statistics(x_BNE, valid_BN)
        mean_B11 = mean_B1E.mean(-1, keepdim=True)
        var_B11 = (var_B1E + mean_B1E.square()).mean(-1, keepdim=True) - mean_B11.square()
        means, variances = self.mean_mix.softmax(0), self.var_mix.softmax(0)
        mean = means[0] * mean_B1E + means[1] * mean_B11
        variance = variances[0] * var_B1E + variances[1] * var_B11
        out_BNE: Tensor = (x_BNE - mean) / (variance + _EPSILON).sqrt() * self.weight_E + self.bias_E
        return out_BNE.to(given)


def _statistics(x_BNE: Tensor, valid_BN: Tensor | None) -> tuple[Tensor, Tensor]:
    """Mean and unbiased variance over the valid instances, (B, 1, E) each; the variance of one instance is 0."""
    valid_BN1 = torch.ones_like(x_BNE[:, :, :1]) if valid_BN is None else valid_BN[:, :, None].to(x_BNE.dtype)
    count_B11 = valid_BN1.sum(1, keepdim=True)
    mean_B1E = x_BNE.sum(1, keepdim=True) / count_B11
    squares_B1E = ((x_BNE - mean_B1E) * valid_BN1).square().sum(1, keepdim=True)
    return mean_B1E, squares_B1E / (count_B11 - 1).clamp(min=1)
