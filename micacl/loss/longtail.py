"""Losses on the class scores, by name, for a long tail of classes.

* `ce`: cross entropy with label smoothing, no knowledge of the class counts.
* `balanced_softmax`: cross entropy of `logits + tau * log(prior)` (Ren et al., NeurIPS 2020, with tau = 1). The model's
  own logits, without the prior, are then fit for uniform classes.
* `logit_adjusted`: the same loss under the name that Menon et al. (ICLR 2021) give it, with their tau. An alias: at
  equal tau its runs are those of `balanced_softmax`, and a table needs one of them. Their other method, which adjusts
  the scores of a trained model, is in micacl.posthoc.
* `cb_focal`: focal loss on the softmax, weighted by the inverse effective number of clips of the label's class
  (Cui et al., CVPR 2019, which uses sigmoids; the softmax is our choice).
* `ldam`: label-distribution-aware margins (Cao et al., NeurIPS 2019): cross entropy of `scale * (logits - margin)`,
  the margin on the label's score only, proportional to n^(-1/4) and at most `ldam_margin`.

Deferred re-weighting (DRW, the same paper): from a share of the epochs on, `ldam` and `ce` weigh each clip by the
inverse effective number of its class. The weights have mean 1 over the clips that training sees; the paper's code
divides by the sum of the weights of the batch instead, which is the same in expectation.

All are means over the clips, never over weights, so that the mean over equal ranks is the mean over the global batch.

The class counts are those of the clips that the loss gets to see. Under a class-balanced plan these are the quotas of
the plan, not the counts of the dataset: to correct for the tail twice is to over-correct.

Shape suffixes: B clips, K classes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from pipeline.contract import MicaclError

PRIOR_NAMES = ("balanced_softmax", "logit_adjusted")
"""Two names of one loss."""
NAMES = ("ce", *PRIOR_NAMES, "cb_focal", "ldam")
DEFERRED = ("ce", "ldam")
"""Those that deferred re-weighting goes with; the others correct for the tail from the first step on."""


def log_prior(class_counts: Sequence[float], flag: str) -> Tensor:
    """log of the share of each class. Raises MicaclError where a class has no clip; `flag` says who asked."""
    counts_K = _require_counts(class_counts, flag)
    return (counts_K / counts_K.sum()).log().float()


def effective_number_weights(class_counts: Sequence[float], beta: float, flag: str) -> Tensor:
    """(1 - beta) / (1 - beta^n) for each class, scaled to a mean of 1 over the classes (Cui et al., equation 2)."""
    counts_K = _require_counts(class_counts, flag)
    weights_K = (1.0 - beta) / (1.0 - beta**counts_K)
    return (weights_K / weights_K.mean()).float()


def deferred_weights(class_counts: Sequence[float], beta: float, flag: str) -> Tensor:
    """Effective-number weights, scaled to a mean of 1 over the clips."""
    prior_K = log_prior(class_counts, flag).exp()
    weights_K = effective_number_weights(class_counts, beta, flag)
    return weights_K / (prior_K * weights_K).sum()


def margins(class_counts: Sequence[float], largest: float, flag: str) -> Tensor:
    """n^(-1/4) for each class, scaled so that the rarest class has `largest`."""
    margins_K = _require_counts(class_counts, flag) ** -0.25
    return (margins_K * (largest / margins_K.max())).float()


def _require_counts(class_counts: Sequence[float], flag: str) -> Tensor:
    empty = [k for k, count in enumerate(class_counts) if not count > 0]
    if empty:
        raise MicaclError(
            f"Classes number {empty} have no training clip.",
            f"{flag} cannot weigh a class by a count of 0.",
            "Leave these classes out of the label set, or use the loss ce.",
        )
    return torch.tensor(list(class_counts), dtype=torch.float64)


def cross_entropy(
    logits_BK: Tensor, labels_B: Tensor, label_smoothing: float, weights_K: Tensor | None = None
) -> Tensor:
    """Mean over clips of the cross entropy, times the weight of the label's class; in float32 or wider."""
    logits_BK = _wide(logits_BK)
    if weights_K is None:
        return functional.cross_entropy(logits_BK, labels_B, label_smoothing=label_smoothing)
    loss_B = functional.cross_entropy(logits_BK, labels_B, label_smoothing=label_smoothing, reduction="none")
    return (weights_K.to(loss_B)[labels_B] * loss_B).mean()


def ldam(
    logits_BK: Tensor,
    labels_B: Tensor,
    margins_K: Tensor,
    scale: float,
    label_smoothing: float,
    weights_K: Tensor | None = None,
) -> Tensor:
    """Mean cross entropy of the scaled logits, with the label's own less its margin."""
    logits_BK = _wide(logits_BK)
    at_label_BK = functional.one_hot(labels_B, logits_BK.shape[1]).to(logits_BK)
    shifted_BK = scale * (logits_BK - at_label_BK * margins_K.to(logits_BK))
    return cross_entropy(shifted_BK, labels_B, label_smoothing, weights_K)


def balanced_softmax(
    logits_BK: Tensor, labels_B: Tensor, log_prior_K: Tensor, tau: float, label_smoothing: float
) -> Tensor:
    """Mean cross entropy of the logits shifted by the prior of training."""
    return cross_entropy(_wide(logits_BK) + tau * log_prior_K.to(logits_BK.device), labels_B, label_smoothing)


def class_balanced_focal(
    logits_BK: Tensor, labels_B: Tensor, weights_K: Tensor, gamma: float, label_smoothing: float
) -> Tensor:
    """Mean over clips of w_label * sum_k q_k (1 - p_k)^gamma (-log p_k), q the smoothed label."""
    log_p_BK = _wide(logits_BK).log_softmax(1)
    classes = log_p_BK.shape[1]
    q_BK = functional.one_hot(labels_B, classes).to(log_p_BK) * (1.0 - label_smoothing) + label_smoothing / classes
    # 1 - p by expm1, kept above 0: the slope of x**gamma at 0 is infinite for gamma below 1.
    hard_BK = (-torch.expm1(log_p_BK)).clamp(min=1e-12) ** gamma
    focal_B = -(q_BK * hard_BK * log_p_BK).sum(1)
    return (weights_K.to(focal_B)[labels_B] * focal_B).mean()


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
