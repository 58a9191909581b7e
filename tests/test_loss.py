"""The losses: against slow references and on the edge cases."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from micacl.loss import LossConfig, Losses, Objective, gather_with_gradient, mccl
from micacl.loss.longtail import class_balanced_focal, effective_number_weights
from micacl.loss.mccl import mccl_per_anchor
from micacl.model import Output
from pipeline.contract import MicaclError

torch.set_num_threads(1)


def embeddings(count: int, dim: int = 5, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    rng = torch.Generator().manual_seed(seed)
    return functional.normalize(torch.randn(count, dim, generator=rng, dtype=dtype), dim=1)


def slow_mccl(features: Tensor, labels: list[int], temperature: float, class_average: bool) -> list[float | None]:
    """l_i of every anchor by loops over the formula; None where it does not count."""
    z = features.tolist()
    losses: list[float | None] = []
    for i, y in enumerate(labels):
        exps = {
            j: math.exp(sum(a * b for a, b in zip(z[i], z[j], strict=True)) / temperature)
            if j != i and labels[j] >= 0
            else 0.0
            for j in range(len(z))
        }
        members = {c: [j for j in range(len(z)) if labels[j] == c and j != i] for c in sorted(set(labels)) if c >= 0}
        if y < 0 or not members[y] or not any(members[c] for c in members if c != y):
            losses.append(None)
            continue
        shares = (sum(exps[j] for j in m) / (len(m) if class_average else 1) for m in members.values() if m)
        bottom = sum(shares)
        losses.append(-sum(math.log(exps[p] / bottom) for p in members[y]) / len(members[y]))
    return losses


def mean_of_counted(losses: list[float | None]) -> float:
    counted = [loss for loss in losses if loss is not None]
    return sum(counted) / max(len(counted), 1)


# ---- MCCL


@settings(deadline=None)
@given(
    labels=st.lists(st.integers(-1, 3), min_size=1, max_size=9),
    class_average=st.booleans(),
    temperature=st.sampled_from([0.07, 0.1, 1.0]),
    seed=st.integers(0, 99),
)
def test_mccl_is_its_formula(labels: list[int], class_average: bool, temperature: float, seed: int) -> None:
    z = embeddings(len(labels), seed=seed)
    want = slow_mccl(z, labels, temperature, class_average)
    got, counted = mccl_per_anchor(z, torch.tensor(labels), temperature, class_average)
    assert counted.tolist() == [loss is not None for loss in want]
    assert got.tolist() == pytest.approx([loss or 0.0 for loss in want])
    assert float(mccl(z, torch.tensor(labels), temperature, class_average)) == pytest.approx(mean_of_counted(want))


def test_without_class_average_it_is_supcon() -> None:
    """Khosla et al., equation 2, written with log_softmax."""
    z, labels = embeddings(6), torch.tensor([0, 0, 0, 1, 1, 1])
    log_p = (z @ z.T / 0.1).masked_fill(torch.eye(6, dtype=torch.bool), -torch.inf).log_softmax(1)
    same = (labels[:, None] == labels) & ~torch.eye(6, dtype=torch.bool)
    want = -log_p[same].view(6, 2).mean()
    torch.testing.assert_close(mccl(z, labels, 0.1, class_average=False), want)


@pytest.mark.parametrize("class_average", [False, True])
def test_mccl_gradients(class_average: bool) -> None:
    z = embeddings(7).requires_grad_()
    labels = torch.tensor([0, 0, 1, 1, 1, 2, -1])
    assert torch.autograd.gradcheck(lambda x: mccl(x, labels, 0.5, class_average), (z,))


@pytest.mark.parametrize(
    "labels",
    [[0], [0, 1], [0, 1, 2], [1, 1, 1], [-1, -1], [0, -1], [0, 0, -1]],
    ids=["one clip", "two classes", "no positives", "no negatives", "all ignored", "one left", "one class left"],
)
@pytest.mark.parametrize("class_average", [False, True])
@pytest.mark.filterwarnings("ignore:Anomaly Detection")
def test_nothing_to_contrast_is_exactly_zero(labels: list[int], class_average: bool) -> None:
    z = embeddings(len(labels), dtype=torch.float32).requires_grad_()
    with torch.autograd.detect_anomaly():  # a NaN on the way that a mask hides later is an error too
        loss = mccl(z, torch.tensor(labels), 0.07, class_average)
        torch.autograd.backward(loss)
    assert loss.item() == 0.0
    assert z.grad is not None
    assert torch.equal(z.grad, torch.zeros_like(z))


@pytest.mark.parametrize("times", [2, 5])
def test_class_average_does_not_see_how_often_another_class_is_repeated(times: int) -> None:
    """What holds exactly: l_i and its gradient for i, for every anchor of a class that is not the repeated one."""
    z, labels = embeddings(7), torch.tensor([0, 0, 0, 1, 1, 2, 2])
    again = torch.cat([torch.arange(7), torch.tensor([5, 6]).repeat(times - 1)])
    for class_average in (True, False):
        small, large = z.clone().requires_grad_(), z[again].clone().requires_grad_()
        few, _ = mccl_per_anchor(small, labels, 0.1, class_average)
        many, _ = mccl_per_anchor(large, labels[again], 0.1, class_average)
        grads = [torch.autograd.grad(loss[:5].sum(), x)[0][:5] for loss, x in ((few, small), (many, large))]
        assert torch.allclose(few[:5], many[:5], atol=1e-12) is class_average
        assert torch.allclose(grads[0], grads[1], atol=1e-12) is class_average


def test_mccl_does_not_see_the_order() -> None:
    z, labels, order = embeddings(8), torch.tensor([0, 0, 1, 1, 2, 2, 2, -1]), torch.tensor([7, 3, 1, 0, 5, 4, 6, 2])
    torch.testing.assert_close(mccl(z, labels, 0.1), mccl(z[order], labels[order], 0.1))


def test_mccl_falls_when_classes_part() -> None:
    labels = torch.tensor([0, 0, 1, 1])
    together, apart = torch.eye(4)[[0, 0, 0, 0]], torch.eye(4)[[0, 0, 1, 1]]
    assert mccl(apart, labels, 0.1) < 0.01 < mccl(together, labels, 0.1)


def test_mccl_is_float32_inside_under_autocast() -> None:
    z, labels = embeddings(8, dtype=torch.float32), torch.arange(8) // 2
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = mccl(z, labels, 0.07)
    assert torch.equal(inside, mccl(z, labels, 0.07))
    assert mccl(z.bfloat16(), labels, 0.07).dtype == torch.float32


def test_extreme_temperature_stays_finite() -> None:
    z = embeddings(6, dtype=torch.float32).requires_grad_()
    loss = mccl(z, torch.tensor([0, 0, 1, 1, 2, 2]), 1e-3)
    torch.autograd.backward(loss)
    assert z.grad is not None
    assert torch.isfinite(loss)
    assert torch.isfinite(z.grad).all()


# ---- long tail


def an_output(logits: Tensor, valid: Tensor | None = None, instances: int = 2) -> Output:
    bags = len(logits)
    z = embeddings(bags * (instances + 1), dtype=logits.dtype)
    return Output(
        logits_BK=logits,
        bag_BD=logits,
        instances_BND=logits[:, None].expand(-1, instances, -1),
        weights_BN=torch.full((bags, instances), 1 / instances),
        projections={"bag": z[:bags], "instance": z[bags:].view(bags, instances, -1)},
        valid_BN=valid,
    )


def classification(config: LossConfig, counts: list[float], logits: Tensor, labels: Tensor) -> Tensor:
    losses: Losses = Objective(replace(config, mccl=False), counts)(an_output(logits), labels)
    return losses.total


LOGITS = torch.tensor([[2.0, 0.5, -1.0], [0.0, 1.0, 0.3], [1.0, 1.0, 1.0]])
LABELS = torch.tensor([0, 2, 1])


def test_cross_entropy_by_hand() -> None:
    """K = 2, logits 0 and ln 3: p = 1/4 and 3/4; smoothing 0.2 gives targets 0.1 and 0.9."""
    loss = classification(
        LossConfig(label_smoothing=0.2), [1, 1], torch.tensor([[0.0, math.log(3)]]), torch.tensor([1])
    )
    assert float(loss) == pytest.approx(-(0.1 * math.log(0.25) + 0.9 * math.log(0.75)))


def test_balanced_softmax_by_hand() -> None:
    """Equal logits, counts 9 and 1: p of the tail class is 0.1 in training."""
    config = LossConfig(name="balanced_softmax", label_smoothing=0.0)
    assert float(classification(config, [9, 1], torch.zeros(1, 2), torch.tensor([1]))) == pytest.approx(math.log(10))


def test_balanced_softmax_with_equal_counts_or_no_tau_is_cross_entropy() -> None:
    plain = classification(LossConfig(), [1, 1, 1], LOGITS, LABELS)
    balanced = LossConfig(name="balanced_softmax")
    torch.testing.assert_close(classification(balanced, [5, 5, 5], LOGITS, LABELS), plain)
    torch.testing.assert_close(classification(replace(balanced, tau=0.0), [9, 1, 4], LOGITS, LABELS), plain)
    assert not torch.allclose(classification(balanced, [9, 1, 4], LOGITS, LABELS), plain)


def test_focal_without_focus_and_weights_is_cross_entropy() -> None:
    config = LossConfig(name="cb_focal", gamma=0.0, beta=0.0)
    plain = classification(LossConfig(), [1, 1, 1], LOGITS, LABELS)
    torch.testing.assert_close(classification(config, [9, 1, 4], LOGITS, LABELS), plain)


def test_focal_by_hand() -> None:
    """p = 3/4, gamma 2: (1/4)^2 * -log(3/4), times the weight of the class."""
    loss = class_balanced_focal(
        torch.tensor([[0.0, math.log(3)]]), torch.tensor([1]), torch.tensor([0.5, 1.5]), 2.0, 0.0
    )
    assert float(loss) == pytest.approx(1.5 / 16 * -math.log(0.75))


def test_effective_number_weights() -> None:
    weights = effective_number_weights([2135, 116], 0.999, "test")
    raw = [(1 - 0.999) / (1 - 0.999**n) for n in (2135, 116)]
    assert weights.tolist() == pytest.approx([2 * w / sum(raw) for w in raw])


def test_focal_of_a_certain_right_answer_has_finite_gradients() -> None:
    logits = torch.tensor([[60.0, 0.0]], requires_grad=True)
    torch.autograd.backward(class_balanced_focal(logits, torch.tensor([0]), torch.ones(2), 0.5, 0.1))
    assert logits.grad is not None
    assert torch.isfinite(logits.grad).all()


@pytest.mark.parametrize("name", ["balanced_softmax", "cb_focal"])
def test_a_class_without_clips_is_refused(name: str) -> None:
    with pytest.raises(MicaclError, match=r"\[1\] have no training clip"):
        Objective(LossConfig(name=name), [3, 0, 2])
    Objective(LossConfig(name="ce"), [3, 0, 2])


# ---- objective


def test_total_is_the_weighted_sum_of_the_parts() -> None:
    logits = LOGITS.double()[[0, 1, 2, 0]]
    labels, valid = torch.tensor([0, 0, 1, 1]), torch.tensor([[True, True], [True, False], [True, True], [False, True]])
    output = an_output(logits, valid)
    losses = Objective(LossConfig(mccl_weight=0.5, temperature=0.2), [1, 1, 1])(output, labels)
    instances = slow_mccl(output.projections["instance"].flatten(0, 1), [0, 0, 0, -1, 1, 1, -1, 1], 0.2, True)
    want = {
        "classification": float(functional.cross_entropy(logits, labels, label_smoothing=0.1)),
        "mccl_bag": mean_of_counted(slow_mccl(output.projections["bag"], labels.tolist(), 0.2, True)),
        "mccl_instance": mean_of_counted(instances),
    }
    assert {name: float(part) for name, part in losses.parts.items()} == pytest.approx(want)
    assert float(losses.total) == pytest.approx(
        want["classification"] + 0.5 * (want["mccl_bag"] + want["mccl_instance"]) / 2
    )


def test_switches_of_the_objective() -> None:
    output, labels = an_output(LOGITS), torch.tensor([0, 0, 1])
    assert set(Objective(LossConfig(mccl=False), [1, 1, 1])(output, labels).parts) == {"classification"}
    assert set(Objective(LossConfig(scales=("bag",)), [1, 1, 1])(output, labels).parts) == {
        "classification",
        "mccl_bag",
    }


def test_objective_refuses_in_words() -> None:
    with pytest.raises(MicaclError, match=r"loss\.name is 'focal'"):
        LossConfig(name="focal")
    with pytest.raises(MicaclError, match=r"loss\.scales"):
        LossConfig(scales=("bag", "clip"))
    with pytest.raises(MicaclError, match="counts of 4"):
        Objective(LossConfig(), [1, 1, 1, 1])(an_output(LOGITS), LABELS)
    with pytest.raises(MicaclError, match="no projection head"):
        Objective(LossConfig(), [1, 1, 1])(replace(an_output(LOGITS), projections={}), LABELS)


def test_gather_without_ranks_is_the_identity() -> None:
    x = torch.ones(2)
    assert gather_with_gradient(x) is x
