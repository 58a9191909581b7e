"""Losses for a long tail: margins, deferred weights, names, and priors that follow the plan's schedule."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from micacl.loss import LossConfig, Objective, Progress
from micacl.loss.longtail import (
    class_balanced_focal,
    deferred_weights,
    effective_number_weights,
    ldam,
    margins,
)
from micacl.model.micacl import Output
from pipeline.contract import MicaclError

DFEW = [1956, 1515, 2135, 1738, 1175, 116, 721]
"""Training clips of fold 1."""
LOGITS = torch.tensor([[2.0, 0.5, -1.0], [0.0, 1.0, 0.3], [1.0, 1.0, 1.0]])
LABELS = torch.tensor([0, 2, 1])


def loss_of(config: LossConfig, counts: Any, progress: Progress | None = None, logits: Tensor = LOGITS) -> Tensor:
    output = Output(
        logits_BK=logits,
        bag_BD=logits,
        instances_BND=logits[:, None],
        weights_BN=torch.ones(len(logits), 1),
        projections={},
        valid_BN=None,
    )
    return Objective(replace(config, mccl=False), counts)(output, LABELS, progress=progress).total


def test_margins_are_larger_for_rarer_classes() -> None:
    """Cao et al., section 3.1: n^(-1/4), here by hand for 16 and 1 clips, whose ratio is 2."""
    torch.testing.assert_close(margins([16, 1], 0.5, "ldam"), torch.tensor([0.25, 0.5]))
    dfew = margins(DFEW, 0.5, "ldam")
    rarest_first = sorted(range(7), key=lambda k: DFEW[k])
    assert dfew[rarest_first].tolist() == sorted(dfew.tolist(), reverse=True)
    assert dfew.max() == 0.5


def test_ldam_by_hand() -> None:
    """Scores 1 and 1, margin 0.5 on the label, scale 2: cross entropy of (1, 2) for the first class."""
    got = ldam(torch.ones(1, 2), torch.tensor([0]), torch.tensor([0.5, 0.1]), 2.0, 0.0)
    want = functional.cross_entropy(torch.tensor([[1.0, 2.0]]), torch.tensor([0]))
    torch.testing.assert_close(got, want)


def test_ldam_without_margin_is_cross_entropy() -> None:
    plain = loss_of(LossConfig(), [9, 1, 4])
    torch.testing.assert_close(loss_of(LossConfig(name="ldam", ldam_margin=0.0), [9, 1, 4]), plain)
    assert loss_of(LossConfig(name="ldam"), [9, 1, 4]) > plain


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_gradients_of_ldam_and_focal(smoothing: float) -> None:
    logits, few = torch.randn(4, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64), [9.0, 1.0, 4.0]
    labels, weights = torch.tensor([0, 2, 1, 1]), effective_number_weights(few, 0.9, "test")
    m = margins(few, 0.5, "test")
    x = logits.requires_grad_()
    assert torch.autograd.gradcheck(lambda z: ldam(z, labels, m, 3.0, smoothing), (x,))
    assert torch.autograd.gradcheck(lambda z: ldam(z, labels, m, 3.0, smoothing, weights), (x,))
    for gamma in (0.5, 2.0):
        assert torch.autograd.gradcheck(lambda z, g=gamma: class_balanced_focal(z, labels, weights, g, smoothing), (x,))


def test_deferred_weights_keep_the_size_of_the_loss() -> None:
    """Mean 1 over the clips that are seen, in the ratios of the effective numbers."""
    weights, plain = deferred_weights(DFEW, 0.9999, "test"), effective_number_weights(DFEW, 0.9999, "test")
    share = torch.tensor(DFEW) / sum(DFEW)
    assert float((share * weights).sum()) == pytest.approx(1.0)
    torch.testing.assert_close(weights / weights[0], plain / plain[0])
    torch.testing.assert_close(deferred_weights([5, 5], 0.999, "test"), torch.ones(2))


@pytest.mark.parametrize("name", ["ce", "ldam"])
def test_deferred_weights_begin_at_their_epoch(name: str) -> None:
    """drw_from 0.28 of 25 epochs is epoch 7, although 0.28 * 25 is a little more than 7 in floating point."""
    config, counts = LossConfig(name=name, drw_from=0.28, label_smoothing=0.0), [90.0, 1.0, 40.0]
    plain = loss_of(replace(config, drw_from=1.0), counts)
    at = [loss_of(config, counts, Progress(epoch=epoch, epochs=25)) for epoch in range(10)]
    assert [torch.equal(loss, plain) for loss in at] == [True] * 7 + [False] * 3
    assert torch.equal(at[7], at[9])
    if name == "ce":
        weights = deferred_weights(counts, config.beta, "test")
        each = functional.cross_entropy(LOGITS, LABELS, reduction="none")
        torch.testing.assert_close(at[7], (weights[LABELS] * each).mean())


def test_logit_adjusted_is_another_name_of_balanced_softmax() -> None:
    for tau in (0.5, 1.0):
        losses = [loss_of(LossConfig(name=name, tau=tau), [9, 1, 4]) for name in ("balanced_softmax", "logit_adjusted")]
        assert torch.equal(losses[0], losses[1])


@pytest.mark.parametrize("name", ["balanced_softmax", "cb_focal", "ldam"])
def test_priors_are_those_of_the_epoch(name: str) -> None:
    """A plan that turns from natural to uniform: then there is nothing left to correct for."""
    counts = {0: [90.0, 1.0, 40.0], 1: [43.0, 43.0, 43.0]}
    config = LossConfig(name=name)
    by_epoch = [loss_of(config, counts.__getitem__, Progress(epoch=epoch, epochs=2)) for epoch in (0, 1)]
    assert [float(loss) for loss in by_epoch] == [float(loss_of(config, counts[epoch])) for epoch in (0, 1)]
    assert by_epoch[0] != by_epoch[1]


def test_priors_do_not_remember_the_epochs_before() -> None:
    """One objective that goes through epochs in any order: what a resumed run meets."""
    counts = {0: [90.0, 1.0, 40.0], 1: [1.0, 90.0, 40.0]}
    objective = Objective(LossConfig(name="ldam", mccl=False), counts.__getitem__)
    logits = LOGITS
    output = Output(
        logits_BK=logits,
        bag_BD=logits,
        instances_BND=logits[:, None],
        weights_BN=torch.ones(3, 1),
        projections={},
        valid_BN=None,
    )
    values = [float(objective(output, LABELS, progress=Progress(epoch=e, epochs=2)).total) for e in (1, 0, 1, 0)]
    assert values[:2] == values[2:]
    assert values[0] != values[1]


@pytest.mark.parametrize("name", ["cb_focal", "balanced_softmax", "logit_adjusted"])
def test_deferred_weights_on_top_of_a_correction_are_refused(name: str) -> None:
    with pytest.raises(MicaclError, match=r"loss\.drw-from is 0\.8 and loss\.name"):
        LossConfig(name=name, drw_from=0.8)


def test_ranges_are_refused_in_words() -> None:
    for said, match in (
        ({"ldam_margin": -1.0}, r"loss\.ldam-margin"),
        ({"ldam_scale": 0.0}, r"loss\.ldam-scale"),
        ({"drw_from": 2.0}, r"loss\.drw-from"),
    ):
        with pytest.raises(MicaclError, match=match):
            LossConfig(**said)
    with pytest.raises(MicaclError, match=r"\[1\] have no training clip"):
        Objective(LossConfig(name="ldam"), [3, 0, 2])
