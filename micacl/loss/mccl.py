"""MCCL: pull the embeddings of one class together, push classes apart, head classes no harder than tail classes.

The paper's abstract says that MCCL is a category-aware contrastive strategy "to balance training between major and
minor categories". The formula is our reading: the supervised contrastive loss (Khosla et al., NeurIPS 2020, L_out)
with the class-averaged denominator of balanced contrastive learning (Zhu et al., CVPR 2022), without its prototypes.
For an anchor i of class y, with s_ij = z_i . z_j / temperature and B_c the embeddings of class c without i:

    l_i = -1/|B_y| sum_{p in B_y} log( exp(s_ip) / sum_c mean_{k in B_c} exp(s_ik) )

With `class_average=False` the mean over B_c is a sum, which is the plain supervised contrastive loss: a class with
ten times the clips then pushes ten times as hard. What class averaging keeps fixed exactly: l_i does not change when
every embedding of another class is repeated any number of times.

Anchors without a positive (alone in their class) or without a negative (one class only) are left out; the loss is the
mean over the others, and 0 with zero gradients when there are none.

Shape suffixes: M embeddings, P projection.
"""

from __future__ import annotations

import torch
from torch import Tensor

IGNORED = -1
"""Label of an embedding that takes no part: a missing instance. Any negative label is ignored."""

_NEVER = -1e30
"""Logarithm of no weight: exp of it is 0 in float32, and unlike -inf it makes no NaN when a whole row is masked."""


def mccl(features_MP: Tensor, labels_M: Tensor, temperature: float, class_average: bool = True) -> Tensor:
    """Mean loss over the anchors that have a positive and a negative; a scalar in float32 or wider.

    `features_MP` are of unit length. `labels_M` are class numbers; negative ones are ignored.
    """
    losses_M, counted_M = mccl_per_anchor(features_MP, labels_M, temperature, class_average)
    return losses_M.sum() / counted_M.sum().clamp(min=1)


def mccl_per_anchor(
    features_MP: Tensor, labels_M: Tensor, temperature: float, class_average: bool = True
) -> tuple[Tensor, Tensor]:
    """(losses_M, counted_M): l_i of every anchor, 0 where it does not count, and whether it counts."""
    with torch.autocast(features_MP.device.type, enabled=False):
        wide_MP = features_MP if features_MP.dtype == torch.float64 else features_MP.float()
        similar_MM = wide_MP @ wide_MP.T / temperature
        positive_MM, other_MM = _pairs(labels_M)
        positives_M = positive_MM.sum(1)
        log_weight_MM = _log_weights(labels_M, other_MM, class_average).to(similar_MM.dtype)
        denominator_M = torch.logsumexp(torch.where(other_MM, similar_MM, _NEVER) + log_weight_MM, dim=1)
        attraction_M = torch.where(positive_MM, similar_MM, 0.0).sum(1) / positives_M.clamp(min=1)
        counted_M = (positives_M > 0) & (other_MM & ~positive_MM).any(1)
        return torch.where(counted_M, denominator_M - attraction_M, 0.0), counted_M


def _pairs(labels_M: Tensor) -> tuple[Tensor, Tensor]:
    """(positive_MM, other_MM): pairs of one class, and all pairs, both without self and without ignored ones."""
    taken_M = labels_M >= 0
    self_MM = torch.eye(len(labels_M), dtype=torch.bool, device=labels_M.device)
    other_MM = taken_M[:, None] & taken_M[None, :] & ~self_MM
    return other_MM & (labels_M[:, None] == labels_M[None, :]), other_MM


def _log_weights(labels_M: Tensor, other_MM: Tensor, class_average: bool) -> Tensor:
    """log of 1 / |B_c|: what each column k weighs in the denominator of row i (i itself is not in B_y)."""
    if not class_average:
        return torch.zeros(other_MM.shape, device=other_MM.device)
    same_MM = labels_M[:, None] == labels_M[None, :]
    in_class_MM = same_MM.sum(0)[None, :] - same_MM.long()
    return -in_class_MM.clamp(min=1).double().log()
