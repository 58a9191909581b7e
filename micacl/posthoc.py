"""What can be done for the tail after training, without training: two changes of the classifier, by name.

    tau-normalisation (Kang et al., ICLR 2020)        w_k <- w_k / |w_k|^tau, bias 0
    logit adjustment (Menon et al., ICLR 2021)        logit_k <- logit_k - tau * log(prior_k)

Both help a model that was trained on classes as they are. Class vectors of the head are longer than those of the tail
in such a model; tau = 1 makes them equally long. We multiply all of them by g^tau, g the geometric mean of the lengths,
which changes no prediction and keeps the size of the logits, so that probabilities stay usable.

The prior of the adjustment is that of the clips as the plan drew them in the last epoch: after a class-balanced plan
it is uniform, and there is nothing to adjust. After `balanced_softmax` the scores are adjusted already, so it is
refused. Probabilities after an adjustment are those for uniform classes.

Shape suffixes: B bags, D features, K classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from micacl.loss.longtail import PRIOR_NAMES, log_prior
from micacl.model.micacl import MICACL
from pipeline.contract import MicaclError


@dataclass(frozen=True, kw_only=True, slots=True)
class PostHoc:
    """Which changes. None by default."""

    tau_norm: float = 0.0
    """tau of the normalisation; 0 leaves the classifier alone, 1 makes all class vectors equally long."""
    adjust: float = 0.0
    """tau of the adjustment; 0 leaves the scores alone, 1 takes the whole prior out."""
    counts: tuple[float, ...] = ()
    """Of `adjust`: clips of each class as training saw them."""

    def __post_init__(self) -> None:
        for flag, value in (("--tau-norm", self.tau_norm), ("--adjust", self.adjust)):
            if not 0.0 <= value <= 10.0:
                raise MicaclError(
                    f"{flag} is {value}.", "Nothing was changed.", "Use a number from 0 to 10, such as 1."
                )

    def __bool__(self) -> bool:
        return bool(self.tau_norm or self.adjust)


def posthoc_of(tau_norm: float, adjust: float, loss: str, class_counts: Mapping[str, Any]) -> PostHoc:
    """Args: `loss` and `class_counts` are those of the run. Raises MicaclError where an adjustment makes no sense."""
    if not adjust:
        return PostHoc(tau_norm=tau_norm)
    if loss in PRIOR_NAMES:
        raise MicaclError(
            f"--adjust is {adjust:g} and the model was trained with --loss.name {loss}.",
            "Its scores are without the prior already; taking it out again would favour rare classes.",
            "Leave --adjust out.",
        )
    if "seen" not in class_counts:
        raise MicaclError(
            "The model does not say how many clips of each class it was trained on.",
            "Its scores cannot be adjusted.",
            "Leave --adjust out, or train with this release.",
        )
    return PostHoc(tau_norm=tau_norm, adjust=adjust, counts=tuple(float(n) for n in class_counts["seen"]))


def tau_normalised(weight_KD: Tensor, tau: float) -> Tensor:
    """Class vectors divided by their length to the power tau, times the geometric mean of those; tau 0 is no change."""
    log_length_K1 = weight_KD.norm(dim=1, keepdim=True).clamp(min=1e-12).log()
    return weight_KD * torch.exp(tau * (log_length_K1.mean() - log_length_K1))


def adjusted(logits_BK: Tensor, counts: Sequence[float], tau: float) -> Tensor:
    """Logits without tau times the log prior. Raises MicaclError for a class without clips."""
    return logits_BK - tau * log_prior(counts, "--adjust").to(logits_BK)


def apply(model: MICACL, posthoc: PostHoc) -> MICACL:
    """The same model, its classifier changed in place. Raises MicaclError for a head without lengths to normalise."""
    if posthoc.tau_norm:
        head: nn.Module = model.head
        if not isinstance(head, nn.Linear):
            raise MicaclError(
                f"--tau-norm is {posthoc.tau_norm:g} and the model's head is a {type(head).__name__}.",
                "Its class vectors are equally long by construction: nothing would change.",
                "Leave --tau-norm out.",
            )
        with torch.no_grad():
            head.weight.copy_(tau_normalised(head.weight, posthoc.tau_norm))
            head.bias.zero_()
    if posthoc.adjust:
        model.add_module("head", AdjustedHead(model.head, posthoc))
    return model


class AdjustedHead(nn.Module):
    """A head whose scores are adjusted."""

    def __init__(self, head: nn.Module, posthoc: PostHoc) -> None:
        super().__init__()
        self.head, self.posthoc = head, posthoc

    @property
    def weight(self) -> Tensor:
        """(K, D) class vectors of the head."""
        return self.head.get_parameter("weight")

    def forward(self, x_BD: Tensor) -> Tensor:
        return adjusted(self.head(x_BD), self.posthoc.counts, self.posthoc.adjust)
