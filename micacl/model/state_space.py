"""A multi-scale state space along the instances of a bag: GEIIM's `mixer: ssm`.

The idea is that of MS-SSM (Karami et al., COLM 2025, arXiv 2512.23824): linear state spaces at several time scales,
each with dynamics and an initialisation of its own, joined by weights that depend on the input. Its wavelet-like
decomposition is not here; a scale is a dilation instead. One scale, for every feature by itself, with S decaying
states (S4D-Real, Gu et al., NeurIPS 2022: rates r_s start at 1, 2, ..., S) and dilation k:

    a = exp(-k dt r)    b = (1 - a) / r                            zero-order hold over k instances
    h_n = a * h_{n-k} + b * u_n          y_n = sum_s c_s h_n,s + skip * u_n         h before the bag is 0

`bidirectional` adds a second state space that runs from the last instance to the first. Then

    out_n = fuse(act(sum_k m_n,k y_n,k))       m_n = softmax_k(W u_n + w)

Missing instances are zeros of u: time passes, nothing comes in. The scan goes instance by instance, which is exact and
cheap for the few instances of a bag; its length is any N >= 1.

Shape suffixes: B bags, N instances, D features, S states of a feature, k scales.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from micacl.model.numeric import wide

_DT = (0.1, 1.0)
"""Range in which the time step of a feature starts, log-uniform, in instances."""


class DiagonalStateSpace(nn.Module):
    """One state space a feature: (B, N, D) to (B, N, D), causal. `dilation` instances lie between two steps."""

    def __init__(self, features: int, state: int, dilation: int) -> None:
        super().__init__()
        self.dilation = dilation
        low, high = (math.log(dt) for dt in _DT)
        self.log_dt_D = nn.Parameter(torch.empty(features).uniform_(low, high))
        rates_DS = torch.arange(1, state + 1).float().log().repeat(features, 1)
        self.log_rates = nn.Parameter(rates_DS.flatten())  # flat, because the optimiser decays weights of two axes
        self.readout_DS = nn.Parameter(torch.randn(features, state) / math.sqrt(state))
        self.skip_D = nn.Parameter(torch.ones(features))

    def coefficients(self) -> tuple[Tensor, Tensor]:
        """(a_DS, b_DS) of the recurrence, in float32 or wider: a decay near 1 does not survive half precision."""
        rates_DS = wide(self.log_rates).exp().view(self.readout_DS.shape)
        a_DS = torch.exp(-self.dilation * wide(self.log_dt_D).exp()[:, None] * rates_DS)
        return a_DS, (1 - a_DS) / rates_DS

    def forward(self, u_BND: Tensor) -> Tensor:
        a_DS, b_DS = self.coefficients()
        in_BND = wide(u_BND)
        states_BDS: list[Tensor] = []
        for n in range(in_BND.shape[1]):
            h_BDS = b_DS * in_BND[:, n, :, None]
            if n >= self.dilation:
                h_BDS = h_BDS + a_DS * states_BDS[n - self.dilation]
            states_BDS.append(h_BDS)
        y_BND = (torch.stack(states_BDS, 1) * wide(self.readout_DS)).sum(-1) + wide(self.skip_D) * in_BND
        return y_BND.to(u_BND.dtype)


class MultiScaleStateSpace(nn.Module):
    """State spaces of several dilations, joined by input-dependent weights and a linear layer."""

    def __init__(
        self,
        features: int,
        dilations: Sequence[int],
        state: int,
        act: Callable[[Tensor], Tensor],
        *,
        bidirectional: bool,
    ) -> None:
        super().__init__()
        self.act = act
        self.forwards = nn.ModuleList(DiagonalStateSpace(features, state, k) for k in dilations)
        back = dilations if bidirectional else ()
        self.backwards = nn.ModuleList(DiagonalStateSpace(features, state, k) for k in back)
        self.weights = nn.Linear(features, len(dilations))
        self.fuse = nn.Linear(features, features)

    def forward(self, u_BND: Tensor) -> Tensor:
        scales = [scan(u_BND) for scan in self.forwards]
        for i, scan in enumerate(self.backwards):
            scales[i] = scales[i] + scan(u_BND.flip(1)).flip(1)
        weights_BNk = self.weights(u_BND).softmax(-1)
        mixed_BND = (torch.stack(scales, -1) * weights_BNk[:, :, None, :]).sum(-1)
        out_BND: Tensor = self.fuse(self.act(mixed_BND.to(u_BND.dtype)))
        return out_BND
