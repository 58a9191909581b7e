"""The parts of the objective, their weights and their schedules, as fields."""

from __future__ import annotations

from dataclasses import dataclass

from micacl.loss import longtail
from micacl.loss.mccl import ANCHORS
from micacl.loss.progress import SCHEDULES
from micacl.model.backbone import refuse_below, refuse_unknown
from pipeline.contract import MicaclError

SCALES = ("bag", "instance", "frame")


@dataclass(frozen=True, kw_only=True, slots=True)
class LossConfig:
    """The parts of the objective and their weights."""

    name: str = "ce"
    """Of the classification loss: `ce`, `balanced_softmax` (`logit_adjusted` is another name of it), `cb_focal` or
    `ldam`; formulas and sources in micacl/loss/longtail.py."""
    label_smoothing: float = 0.1
    """Share of each label spread over all classes. Of every classification loss; 0 is that loss as published."""
    tau: float = 1.0
    """`balanced_softmax`: strength of the shift by the log prior."""
    beta: float = 0.999
    """`cb_focal`, `drw_from`: of the effective number of clips; 0 weighs all classes the same, towards 1 by inverse
    count."""
    gamma: float = 2.0
    """`cb_focal`: how much easy clips are played down; 0 is cross entropy."""
    ldam_margin: float = 0.5
    """`ldam`: margin of the rarest class, in units of the logits."""
    ldam_scale: float = 1.0
    """`ldam`: of the logits less the margin. The paper's code has 30, on a cosine head whose scores are in [-1, 1]."""
    drw_from: float = 1.0
    """`ce`, `ldam`: share of the epochs from which the clips are weighted by class (DRW); 1 is never, the paper's code
    has 0.8."""
    mccl: bool = True
    """Switch of the contrastive part."""
    mccl_weight: float = 0.1
    """Of the mean of the contrastive losses, beside the classification loss's 1."""
    mccl_schedule: str = "constant"
    """Of that weight: `constant`, or `cosine` down to 0 at the last step."""
    mccl_ramp_share: float = 0.0
    """Share of the steps over which that weight grows from 0."""
    mccl_anchors: str = "clips"
    """What the contrastive loss is a mean of: `clips`, or `classes`, each the mean of its own clips."""
    temperature: float = 0.1
    """Of MCCL; similarities are divided by it."""
    scales: tuple[str, ...] = ("bag", "instance")
    """Embeddings that MCCL sees: one or more of `bag`, `instance`, `frame`; model.projection-scales must have them."""
    scale_weights: tuple[float, ...] = ()
    """One for each of `scales`, in the mean of their losses; none: all the same."""
    class_average: bool = True
    """MCCL: average the denominator by class; off is the plain supervised contrastive loss."""
    queue_clips_per_class: int = 0
    """MCCL: newest clips of each class that are kept as keys beside the batch; 0 is no queue."""
    queue_momentum: float = 0.0
    """Of the average of past weights that makes those keys, such as 0.99; 0: the model's own embeddings are keys."""

    def __post_init__(self) -> None:
        refuse_unknown("loss.name", self.name, longtail.NAMES)
        refuse_unknown("loss.mccl-schedule", self.mccl_schedule, SCHEDULES)
        refuse_unknown("loss.mccl-anchors", self.mccl_anchors, ANCHORS)
        for flag, value, least in (
            ("loss.tau", self.tau, 0.0),
            ("loss.gamma", self.gamma, 0.0),
            ("loss.ldam-margin", self.ldam_margin, 0.0),
            ("loss.ldam-scale", self.ldam_scale, 1e-3),
            ("loss.mccl-weight", self.mccl_weight, 0.0),
            ("loss.temperature", self.temperature, 1e-3),
            ("loss.queue-clips-per-class", self.queue_clips_per_class, 0),
        ):
            refuse_below(flag, value, least)
        for flag, share in (
            ("loss.label-smoothing", self.label_smoothing),
            ("loss.beta", self.beta),
            ("loss.queue-momentum", self.queue_momentum),
        ):
            if not 0.0 <= share < 1.0:
                raise MicaclError(f"{flag} is {share}.", "Nothing was built.", "Use a number in [0, 1).")
        for flag, share in (("loss.drw-from", self.drw_from), ("loss.mccl-ramp-share", self.mccl_ramp_share)):
            if not 0.0 <= share <= 1.0:
                raise MicaclError(f"{flag} is {share}.", "Nothing was built.", "Use a share from 0 to 1.")
        self._check_deferred()
        self._check_scales()

    @property
    def scale_shares(self) -> dict[str, float]:
        """Weight of each scale; they sum to 1."""
        weights = self.scale_weights or (1.0,) * len(self.scales)
        return {scale: weight / sum(weights) for scale, weight in zip(self.scales, weights, strict=True)}

    def _check_deferred(self) -> None:
        if self.drw_from < 1.0 and self.name not in longtail.DEFERRED:
            raise MicaclError(
                f"loss.drw-from is {self.drw_from} and loss.name is {self.name!r}.",
                "That loss corrects for the tail already; weights on top would over-correct.",
                f"Use one of {', '.join(longtail.DEFERRED)} with it, or leave it out.",
            )

    def _check_scales(self) -> None:
        if self.queue_momentum and not self.queue_clips_per_class:
            raise MicaclError(
                f"loss.queue-momentum is {self.queue_momentum} without a queue.",
                "Nothing was built: there are no keys to make.",
                "Set loss.queue-clips-per-class above 0.",
            )
        if not self.scales or len(set(self.scales)) != len(self.scales) or not set(self.scales) <= set(SCALES):
            raise MicaclError(
                f"loss.scales is {self.scales}.", "Nothing was built.", f"Use one or more of {', '.join(SCALES)}."
            )
        if self.scale_weights and (len(self.scale_weights) != len(self.scales) or not min(self.scale_weights) > 0):
            raise MicaclError(
                f"loss.scale-weights is {self.scale_weights} for the scales {', '.join(self.scales)}.",
                "Nothing was built.",
                "Give one weight above 0 for each scale, or none.",
            )
