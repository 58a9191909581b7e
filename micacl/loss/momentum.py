"""An average of the model's past weights, which makes the keys of the queue (MoCo, He et al., CVPR 2020).

    average <- momentum * average + (1 - momentum) * model,    after each update

Keys that were made some steps ago then fit those made now, because the average moves slowly. It is a whole second
model: one more forward pass without a graph a step, one more set of weights in memory and in the checkpoint. It sees
the same augmented clips as the model, in evaluation mode (the batch norm's statistics are averaged like the weights),
so that its keys do not depend on how clips are spread over ranks. It computes in float32 or wider.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from micacl.model.micacl import MICACL, Output, build_model


class MomentumEncoder(nn.Module):
    """Starts as a copy of `model`, on its device, in float32 or wider."""

    def __init__(self, model: MICACL, momentum: float) -> None:
        super().__init__()
        self.momentum = momentum
        self.average = build_model(model.config, seed=0).requires_grad_(False)
        like = next(model.parameters())
        self.average.to(like.device, torch.promote_types(like.dtype, torch.float32))
        self.average.load_state_dict(model.state_dict())

    @torch.no_grad()
    def forward(self, clips_BNCTHW: Tensor, valid_BN: Tensor | None = None) -> Output:
        """What the average says about a batch."""
        dtype = next(self.average.parameters()).dtype
        output: Output = self.average.eval()(clips_BNCTHW.to(dtype), valid_BN)
        return output

    @torch.no_grad()
    def follow(self, model: MICACL) -> None:
        """One step towards `model`."""
        for average, now in zip(self.average.state_dict().values(), model.state_dict().values(), strict=True):
            if average.is_floating_point():
                average.lerp_(now.to(average), 1.0 - self.momentum)
            else:
                average.copy_(now)
