"""What training minimises: a loss on the class scores plus the contrastive losses, each part kept for the log.

    total = classification + weight(step) * sum over scales of share(scale) * MCCL(scale)

The classification loss is the mean over the clips of this rank. MCCL is computed on the embeddings of all ranks,
through the `gather` that the caller passes; see micacl.loss.gather for why the gradients come out right when the
engine averages them over ranks. Both need the same number of clips on every rank.

An instance and a frame carry the label of their bag. Missing instances and their frames take no part. Prototypes join
when the model has them (`model.prototypes`), keys when there is a queue.

The value is a pure function of the output, the labels, the step (`Progress`) and the queue. Only `remember` changes
something: it puts the batch into the queue, as keys of the momentum encoder if there is one. The loop calls it after
the update.

Shape suffixes: B bags, N instances, F frames, E embeddings a bag (1, N, or N * F), P projection, K classes.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from micacl.loss import longtail
from micacl.loss.config import SCALES, LossConfig
from micacl.loss.gather import Gather, identity
from micacl.loss.mccl import IGNORED, More, mccl
from micacl.loss.momentum import MomentumEncoder
from micacl.loss.progress import Progress, scheduled
from micacl.loss.queue import ClassQueue, in_plan_order
from micacl.model.micacl import MICACL, ModelConfig, Output
from pipeline.contract import MicaclError

__all__ = ["SCALES", "LossConfig", "Losses", "Objective"]

Counts = Sequence[float] | Callable[[int], Sequence[float]]
"""Clips of each class as training sees them, or a function that gives those of an epoch."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Losses:
    """The scalar to minimise, and its parts."""

    total: Tensor
    parts: dict[str, Tensor]
    """Detached scalars: `classification`, `mccl_bag`, `mccl_instance`, `mccl_frame`; unweighted."""


class Objective(nn.Module):
    """A model's output and the labels to Losses. Nothing in it learns; it holds the queue and the momentum encoder."""

    def __init__(self, config: LossConfig, class_counts: Counts, model: MICACL | None = None) -> None:
        """`class_counts` are those of the clips that training sees, see micacl.loss.longtail; `ce` ignores them.

        `model` is the one that trains, as the run begins or continues; for the momentum encoder, else not needed.
        """
        super().__init__()
        self.config = config
        self._class_counts = class_counts
        self.classes = len(self._counts_of(0))
        self._tables = _Tables.of(config, self._counts_of(0), 0)
        queued = config.scales if config.mccl and config.queue_clips_per_class else ()
        self.queues = nn.ModuleDict({s: ClassQueue(self.classes, config.queue_clips_per_class) for s in queued})
        self.momentum: MomentumEncoder | None = None
        if queued and config.queue_momentum:
            if model is None:
                raise ValueError("A momentum encoder is an average of a model's weights: give the model.")
            self.momentum = MomentumEncoder(model, config.queue_momentum)

    def forward(
        self, output: Output, labels_B: Tensor, gather: Gather = identity, progress: Progress | None = None
    ) -> Losses:
        """`labels_B` are class numbers. Raises MicaclError when classes or projection heads do not fit."""
        progress = progress or Progress()
        if output.logits_BK.shape[1] != self.classes:
            raise MicaclError(
                f"The model scores {output.logits_BK.shape[1]} classes, the loss has counts of {self.classes}.",
                "No loss was computed.",
                "Build both from one label set.",
            )
        classification = self._classification(output.logits_BK, labels_B, progress)
        parts = {"classification": classification}
        total = classification
        if self.config.mccl and not progress.head_only:
            contrastive = {scale: self._mccl(scale, output, labels_B, gather) for scale in self.config.scales}
            mean = torch.stack([self.config.scale_shares[s] * value for s, value in contrastive.items()]).sum()
            total = total + self._mccl_weight(progress) * mean
            parts |= {f"mccl_{scale}": value for scale, value in contrastive.items()}
        return Losses(total=total, parts={name: part.detach() for name, part in parts.items()})

    @torch.no_grad()
    def remember(self, output: Output, labels_B: Tensor, gather: Gather = identity) -> None:
        """Put a batch into the queue, if there is one. A collective with a gather over ranks."""
        if not self.queues:
            return
        all_labels = gather(labels_B)
        ranks = len(all_labels) // len(labels_B)
        for scale in self.queues:
            embeddings_BEP, labels_BE = _by_bag(_projection(scale, output), output, labels_B)
            keys = in_plan_order(gather(embeddings_BEP.detach()), ranks)
            present = in_plan_order(gather(labels_BE), ranks) != IGNORED
            self._queue(scale).put(keys, present, in_plan_order(all_labels, ranks))

    def after_update(
        self, output: Output, labels_B: Tensor, gather: Gather, clips_BNCTHW: Tensor, model: MICACL
    ) -> None:
        """Let the momentum encoder follow the model, and remember the batch. On every rank."""
        if self.momentum is not None:
            self.momentum.follow(model)
            output = self.momentum(clips_BNCTHW, output.valid_BN)
        self.remember(output, labels_B, gather)

    def export_state(self) -> dict[str, Tensor]:
        """What a checkpoint must keep of it, on the CPU: queue and momentum encoder. The same on every rank."""
        return {name: tensor.detach().cpu().clone() for name, tensor in self.state_dict().items()}

    def import_state(self, state: Mapping[str, Tensor]) -> None:
        """Continue from `export_state`."""
        for scale in self.queues:
            at = f"queues.{scale}."
            self._queue(scale).load({name.removeprefix(at): t for name, t in state.items() if name.startswith(at)})
        average = {name.removeprefix("momentum."): t for name, t in state.items() if name.startswith("momentum.")}
        if self.momentum is not None and average:
            self.momentum.load_state_dict(average)

    def _queue(self, scale: str) -> ClassQueue:
        return cast("ClassQueue", self.queues[scale])

    def _mccl_weight(self, progress: Progress) -> float:
        config = self.config
        return scheduled(config.mccl_weight, progress, ramp_share=config.mccl_ramp_share, schedule=config.mccl_schedule)

    def _counts_of(self, epoch: int) -> Sequence[float]:
        return self._class_counts(epoch) if callable(self._class_counts) else self._class_counts

    def _classification(self, logits_BK: Tensor, labels_B: Tensor, progress: Progress) -> Tensor:
        config, tables = self.config, self._tables_of(progress.epoch, logits_BK.device)
        smoothing = config.label_smoothing
        deferred_K = tables.deferred_K if config.drw_from < 1.0 and progress.reached(config.drw_from) else None
        if config.name in longtail.PRIOR_NAMES:
            return longtail.balanced_softmax(logits_BK, labels_B, tables.log_prior_K, config.tau, smoothing)
        if config.name == "cb_focal":
            return longtail.class_balanced_focal(logits_BK, labels_B, tables.weights_K, config.gamma, smoothing)
        if config.name == "ldam":
            return longtail.ldam(logits_BK, labels_B, tables.margins_K, config.ldam_scale, smoothing, deferred_K)
        return longtail.cross_entropy(logits_BK, labels_B, smoothing, deferred_K)

    def _tables_of(self, epoch: int, device: torch.device) -> _Tables:
        """Kept from step to step: making them anew would stop the GPU for a copy each time."""
        if self._tables.epoch != epoch and callable(self._class_counts):
            self._tables = _Tables.of(self.config, self._counts_of(epoch), epoch)
        if self._tables.log_prior_K.device != device:
            self._tables = self._tables.on(device)
        return self._tables

    def _mccl(self, scale: str, output: Output, labels_B: Tensor, gather: Gather) -> Tensor:
        embeddings_BEP, labels_BE = _by_bag(_projection(scale, output), output, labels_B)
        return mccl(
            gather(embeddings_BEP).flatten(0, 1),
            gather(labels_BE).flatten(),
            self.config.temperature,
            self.config.class_average,
            self.config.mccl_anchors,
            self._more(scale, output),
        )

    def _more(self, scale: str, output: Output) -> More | None:
        """Prototypes of the classes, one each, and the keys of the queue."""
        more: list[More] = []
        if scale in output.prototypes:
            prototypes_KP = output.prototypes[scale]
            more.append(More(prototypes_KP, torch.arange(self.classes, device=prototypes_KP.device)))
        if scale in self.queues and (keys := self._queue(scale).keys()) is not None:
            more.append(keys)
        if len(more) < 2:
            return more[0] if more else None
        features = [one.features_QP.to(more[0].features_QP) for one in more]
        return More(torch.cat(features), torch.cat([one.labels_Q.to(features[0].device) for one in more]))


@dataclass(frozen=True, kw_only=True, slots=True)
class _Tables:
    """What the losses make of the class counts of one epoch. Empty where the loss does not ask for it."""

    epoch: int
    log_prior_K: Tensor
    weights_K: Tensor
    margins_K: Tensor
    deferred_K: Tensor

    @classmethod
    def of(cls, config: LossConfig, counts: Sequence[float], epoch: int) -> _Tables:
        name, none = config.name, torch.empty(0)
        return cls(
            epoch=epoch,
            log_prior_K=longtail.log_prior(counts, name) if name in longtail.PRIOR_NAMES else none,
            weights_K=longtail.effective_number_weights(counts, config.beta, name) if name == "cb_focal" else none,
            margins_K=longtail.margins(counts, config.ldam_margin, name) if name == "ldam" else none,
            deferred_K=longtail.deferred_weights(counts, config.beta, "drw-from") if config.drw_from < 1.0 else none,
        )

    def on(self, device: torch.device) -> _Tables:
        return _Tables(
            epoch=self.epoch,
            log_prior_K=self.log_prior_K.to(device),
            weights_K=self.weights_K.to(device),
            margins_K=self.margins_K.to(device),
            deferred_K=self.deferred_K.to(device),
        )


def require_projections(loss: LossConfig, model: ModelConfig) -> None:
    """Every scale of the contrastive loss has a projection head. Raises MicaclError; also before anything is built."""
    heads = model.projection_scales if model.projection_dim else ()
    for scale in loss.scales if loss.mccl else ():
        _require_head(scale, heads)


def _require_head(scale: str, heads: Collection[str]) -> None:
    if scale not in heads:
        raise MicaclError(
            f"The model has no projection head for the scale {scale!r}.",
            "No contrastive loss was computed.",
            "Set model.projection-dim above 0 and name the scale in model.projection-scales, or switch loss.mccl off.",
        )


def _projection(scale: str, output: Output) -> Tensor:
    _require_head(scale, output.projections)
    return output.projections[scale]


def _by_bag(embeddings: Tensor, output: Output, labels_B: Tensor) -> tuple[Tensor, Tensor]:
    """Embeddings (B, P), (B, N, P) or (B, N, F, P) to (B, E, P), and their labels (B, E), IGNORED where missing."""
    if embeddings.ndim == 2:
        return embeddings[:, None], labels_B[:, None]
    labels_BN = labels_B[:, None].expand(embeddings.shape[:2])
    if output.valid_BN is not None:
        labels_BN = labels_BN.masked_fill(~output.valid_BN, IGNORED)
    frames = embeddings.shape[2] if embeddings.ndim == 4 else 1
    return embeddings.flatten(1, -2), labels_BN.repeat_interleave(frames, dim=1)
