"""MCCL: pull the embeddings of one class together, push classes apart, head classes no harder than tail classes.

The paper's abstract says that MCCL is a category-aware contrastive strategy "to balance training between major and
minor categories". The formula is our reading: the supervised contrastive loss (Khosla et al., NeurIPS 2020, L_out)
with the class-averaged denominator and, if the model has them, the class prototypes of balanced contrastive learning
(Zhu et al., CVPR 2022). For an anchor i of class y, with s_ij = z_i . z_j / temperature and B_c the embeddings of
class c without i:

    l_i = -1/|B_y| sum_{p in B_y} log( exp(s_ip) / sum_c mean_{k in B_c} exp(s_ik) )

B_c holds the embeddings of the batch and those that `more` adds: prototypes, one a class, so that no class is ever
absent and every anchor has a positive; keys of earlier batches from the queue. These are no anchors. A prototype is a
parameter and learns; a key does not.

With `class_average=False` the mean over B_c is a sum, which is the plain supervised contrastive loss: a class with
ten times the clips then pushes ten times as hard. What class averaging keeps fixed exactly: l_i does not change when
every embedding of another class is repeated any number of times (with prototypes: the prototype too).

The loss is the mean of l_i over the anchors, or (`anchors="classes"`) the mean over the classes of the mean over the
anchors of the class: then a class with ten times the clips does not count ten times as an anchor either. Anchors
without a positive (alone in their class) or without a negative (one class only) are left out; the loss is 0 with zero
gradients when none is left.

Shape suffixes: M embeddings of the batch, Q further ones, A = M + Q all of them, P projection.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from micacl.model.numeric import without_autocast

IGNORED = -1
"""Label of an embedding that takes no part: a missing instance. Any negative label is ignored."""

ANCHORS = ("clips", "classes")

_NEVER = -1e30
"""Logarithm of no weight: exp of it is 0 in float32, and unlike -inf it makes no NaN when a whole row is masked."""


@dataclass(frozen=True, slots=True)
class More:
    """Embeddings that anchors are compared with besides those of the batch: prototypes, keys of a queue."""

    features_QP: Tensor
    labels_Q: Tensor


def mccl(
    features_MP: Tensor,
    labels_M: Tensor,
    temperature: float,
    class_average: bool = True,
    anchors: str = "clips",
    more: More | None = None,
) -> Tensor:
    """Mean loss over the anchors, or over their classes, that have a positive and a negative; float32 or wider.

    `features_MP` are of unit length. `labels_M` are class numbers; negative ones are ignored.
    """
    losses_M, counted_M = mccl_per_anchor(features_MP, labels_M, temperature, class_average, more)
    weights_M = counted_M.to(losses_M.dtype)
    if anchors == "classes":
        of_class_M = ((labels_M[:, None] == labels_M) & counted_M).sum(1)
        weights_M = weights_M / of_class_M.clamp(min=1)
    return (weights_M * losses_M).sum() / torch.where(counted_M.any(), weights_M.sum(), 1.0)


def mccl_per_anchor(
    features_MP: Tensor,
    labels_M: Tensor,
    temperature: float,
    class_average: bool = True,
    more: More | None = None,
) -> tuple[Tensor, Tensor]:
    """(losses_M, counted_M): l_i of every anchor, 0 where it does not count, and whether it counts."""
    with without_autocast(features_MP):
        wide_MP = _wide(features_MP)
        all_AP = wide_MP if more is None else torch.cat([wide_MP, more.features_QP.to(wide_MP)])
        labels_A = labels_M if more is None else torch.cat([labels_M, more.labels_Q.to(labels_M)])
        similar_MA = wide_MP @ all_AP.T / temperature
        positive_MA, other_MA = _pairs(labels_M, labels_A)
        positives_M = positive_MA.sum(1)
        weighed_MA = torch.where(other_MA, similar_MA, _NEVER)
        if class_average:
            weighed_MA = weighed_MA - _log_members(labels_M, labels_A, similar_MA.dtype)
        attraction_M = torch.where(positive_MA, similar_MA, 0.0).sum(1) / positives_M.clamp(min=1)
        counted_M = (positives_M > 0) & (other_MA & ~positive_MA).any(1)
        return torch.where(counted_M, torch.logsumexp(weighed_MA, dim=1) - attraction_M, 0.0), counted_M


def _pairs(labels_M: Tensor, labels_A: Tensor) -> tuple[Tensor, Tensor]:
    """(positive_MA, other_MA): pairs of one class, and all pairs, both without self and without ignored ones."""
    self_MA = torch.eye(len(labels_M), len(labels_A), dtype=torch.bool, device=labels_M.device)
    other_MA = (labels_M >= 0)[:, None] & (labels_A >= 0)[None, :] & ~self_MA
    return other_MA & (labels_M[:, None] == labels_A[None, :]), other_MA


def _log_members(labels_M: Tensor, labels_A: Tensor, dtype: torch.dtype) -> Tensor:
    """(M, A) log of |B_c| for the class c of each column, as seen from each row: the row itself is not in its B_y."""
    members_A = (labels_A[:, None] == labels_A[None, :]).sum(0)
    same_MA = labels_M[:, None] == labels_A[None, :]
    return torch.where(same_MA, (members_A - 1).clamp(min=1).to(dtype).log(), members_A.clamp(min=1).to(dtype).log())


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
