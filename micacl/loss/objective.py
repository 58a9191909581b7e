"""What training minimises: a loss on the class scores plus the contrastive losses, each part kept for the log.

    total = classification + mccl_weight * mean over scales of MCCL(scale)

The classification loss is the mean over the clips of this rank. MCCL is computed on the embeddings of all ranks,
through the `gather` that the caller passes; see micacl.loss.gather for why the gradients come out right when the
engine averages them over ranks. Both need the same number of clips on every rank.

An instance carries the label of its bag. Missing instances take no part.

Shape suffixes: B bags, N instances, P projection.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from micacl.loss import longtail
from micacl.loss.gather import Gather, identity
from micacl.loss.mccl import IGNORED, mccl
from micacl.model.backbone import refuse_below, refuse_unknown
from micacl.model.micacl import Output
from pipeline.contract import MicaclError

SCALES = ("bag", "instance")


@dataclass(frozen=True, kw_only=True, slots=True)
class LossConfig:
    """The parts of the objective and their weights."""

    name: str = "ce"
    """Of the classification loss: `ce`, `balanced_softmax` or `cb_focal`."""
    label_smoothing: float = 0.1
    """Share of each label spread over all classes."""
    tau: float = 1.0
    """`balanced_softmax`: strength of the shift by the log prior."""
    beta: float = 0.999
    """`cb_focal`: of the effective number of clips; 0 weighs all classes the same, towards 1 by inverse count."""
    gamma: float = 2.0
    """`cb_focal`: how much easy clips are played down; 0 is cross entropy."""
    mccl: bool = True
    """Switch of the contrastive part."""
    mccl_weight: float = 0.1
    """Of the mean of the contrastive losses, beside the classification loss's 1."""
    temperature: float = 0.1
    """Of MCCL; similarities are divided by it."""
    scales: tuple[str, ...] = SCALES
    """Embeddings that MCCL sees: `bag`, `instance` or both."""
    class_average: bool = True
    """MCCL: average the denominator by class; off is the plain supervised contrastive loss."""

    def __post_init__(self) -> None:
        refuse_unknown("loss.name", self.name, longtail.NAMES)
        refuse_below("loss.tau", self.tau, 0.0)
        refuse_below("loss.gamma", self.gamma, 0.0)
        refuse_below("loss.mccl-weight", self.mccl_weight, 0.0)
        refuse_below("loss.temperature", self.temperature, 1e-3)
        for flag, share in (("loss.label-smoothing", self.label_smoothing), ("loss.beta", self.beta)):
            if not 0.0 <= share < 1.0:
                raise MicaclError(f"{flag} is {share}.", "Nothing was built.", "Use a number in [0, 1).")
        if not self.scales or len(set(self.scales)) != len(self.scales) or not set(self.scales) <= set(SCALES):
            raise MicaclError(
                f"loss.scales is {self.scales}.", "Nothing was built.", f"Use one or more of {', '.join(SCALES)}."
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class Losses:
    """The scalar to minimise, and its parts."""

    total: Tensor
    parts: dict[str, Tensor]
    """Detached scalars: `classification`, `mccl_bag`, `mccl_instance`; unweighted."""


class Objective(nn.Module):
    """A model's output and the labels to Losses. Without parameters; its buffers are not part of a checkpoint."""

    log_prior_K: Tensor
    weights_K: Tensor

    def __init__(self, config: LossConfig, class_counts: Sequence[float]) -> None:
        """`class_counts` are those of the clips that training sees, see micacl.loss.longtail; `ce` ignores them."""
        super().__init__()
        self.config = config
        self.classes = len(class_counts)
        if config.name == "balanced_softmax":
            self.register_buffer("log_prior_K", longtail.log_prior(class_counts, config.name), persistent=False)
        if config.name == "cb_focal":
            weights_K = longtail.effective_number_weights(class_counts, config.beta, config.name)
            self.register_buffer("weights_K", weights_K, persistent=False)

    def forward(self, output: Output, labels_B: Tensor, gather: Gather = identity) -> Losses:
        """`labels_B` are class numbers. Raises MicaclError when classes or projection heads do not fit."""
        if output.logits_BK.shape[1] != self.classes:
            raise MicaclError(
                f"The model scores {output.logits_BK.shape[1]} classes, the loss has counts of {self.classes}.",
                "No loss was computed.",
                "Build both from one label set.",
            )
        classification = self._classification(output.logits_BK, labels_B)
        parts = {"classification": classification}
        total = classification
        if self.config.mccl:
            contrastive = {f"mccl_{scale}": self._mccl(scale, output, labels_B, gather) for scale in self.config.scales}
            total = total + self.config.mccl_weight * torch.stack(list(contrastive.values())).mean()
            parts |= contrastive
        return Losses(total=total, parts={name: part.detach() for name, part in parts.items()})

    def _classification(self, logits_BK: Tensor, labels_B: Tensor) -> Tensor:
        config = self.config
        if config.name == "balanced_softmax":
            prior_K = self.log_prior_K.to(logits_BK.device)
            return longtail.balanced_softmax(logits_BK, labels_B, prior_K, config.tau, config.label_smoothing)
        if config.name == "cb_focal":
            weights_K = self.weights_K.to(logits_BK.device)
            return longtail.class_balanced_focal(logits_BK, labels_B, weights_K, config.gamma, config.label_smoothing)
        return longtail.cross_entropy(logits_BK, labels_B, config.label_smoothing)

    def _mccl(self, scale: str, output: Output, labels_B: Tensor, gather: Gather) -> Tensor:
        if scale not in output.projections:
            raise MicaclError(
                f"The model has no projection head for the scale {scale!r}.",
                "No contrastive loss was computed.",
                "Set model.projection-dim above 0, or switch loss.mccl off.",
            )
        embeddings = output.projections[scale]
        if scale == "instance":
            labels_B, embeddings = instance_labels(output, labels_B), embeddings.flatten(0, 1)
        return mccl(gather(embeddings), gather(labels_B), self.config.temperature, self.config.class_average)


def instance_labels(output: Output, labels_B: Tensor) -> Tensor:
    """(B * N,) the label of the bag for every instance, IGNORED where it is missing."""
    instances = output.weights_BN.shape[1]
    labels_BN = labels_B[:, None].expand(-1, instances)
    if output.valid_BN is not None:
        labels_BN = labels_BN.masked_fill(~output.valid_BN, IGNORED)
    return labels_BN.flatten()
