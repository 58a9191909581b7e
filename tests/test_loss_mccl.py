"""MCCL with all that may be added to it: prototypes, a queue, frames, class-averaged anchors, schedules."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from micacl.loss import LossConfig, More, Objective, Progress, mccl
from micacl.loss.mccl import mccl_per_anchor
from micacl.loss.momentum import MomentumEncoder
from micacl.loss.progress import scheduled
from micacl.loss.queue import ClassQueue, in_plan_order
from micacl.model import BackboneConfig, ModelConfig, Output, build_model
from pipeline.contract import MicaclError

torch.set_num_threads(1)


def embeddings(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    rng = torch.Generator().manual_seed(seed)
    return functional.normalize(torch.randn(*shape, generator=rng, dtype=dtype), dim=-1)


def slow(
    z: Tensor, labels: list[int], more: Tensor, more_labels: list[int], temperature: float, class_average: bool
) -> list[float | None]:
    """l_i by loops over the formula of micacl.loss.mccl; None where the anchor does not count."""
    every, of = [*z.tolist(), *more.tolist()], [*labels, *more_labels]
    losses: list[float | None] = []
    for i, y in enumerate(labels):
        members = {c: [j for j in range(len(every)) if of[j] == c and j != i] for c in set(of) if c >= 0}
        if y < 0 or not members[y] or not any(m for c, m in members.items() if c != y):
            losses.append(None)
            continue
        s = [sum(a * b for a, b in zip(every[i], one, strict=True)) / temperature for one in every]
        bottom = sum(sum(math.exp(s[j]) for j in m) / (len(m) if class_average else 1) for m in members.values() if m)
        losses.append(-sum(s[p] - math.log(bottom) for p in members[y]) / len(members[y]))
    return losses


def slow_mean(losses: list[float | None], labels: list[int], anchors: str) -> float:
    of_class: dict[int, list[float]] = {}
    for loss, y in zip(losses, labels, strict=True):
        if loss is not None:
            of_class.setdefault(y if anchors == "classes" else 0, []).append(loss)
    means = [sum(some) / len(some) for some in of_class.values()]
    return sum(means) / max(len(means), 1)


@settings(deadline=None, max_examples=150)
@given(
    labels=st.lists(st.integers(-1, 3), min_size=1, max_size=8),
    more_labels=st.lists(st.integers(-1, 4), max_size=6),
    class_average=st.booleans(),
    anchors=st.sampled_from(["clips", "classes"]),
    temperature=st.sampled_from([0.07, 1.0]),
    seed=st.integers(0, 99),
)
def test_the_loss_is_its_formula(
    labels: list[int], more_labels: list[int], class_average: bool, anchors: str, temperature: float, seed: int
) -> None:
    z, extra = embeddings(len(labels), 5, seed=seed), embeddings(len(more_labels), 5, seed=seed + 100)
    want = slow(z, labels, extra, more_labels, temperature, class_average)
    more = More(extra, torch.tensor(more_labels, dtype=torch.int64))
    got, counted = mccl_per_anchor(z, torch.tensor(labels), temperature, class_average, more)
    assert counted.tolist() == [loss is not None for loss in want]
    assert got.tolist() == pytest.approx([loss or 0.0 for loss in want])
    mean = mccl(z, torch.tensor(labels), temperature, class_average, anchors, more)
    assert float(mean) == pytest.approx(slow_mean(want, labels, anchors))


@pytest.mark.parametrize("anchors", ["clips", "classes"])
@pytest.mark.parametrize("class_average", [False, True])
def test_gradients_of_all_options(class_average: bool, anchors: str) -> None:
    """By finite differences in float64: of the embeddings and of the prototypes; keys of the queue have none."""
    labels, more_labels = torch.tensor([0, 0, 1, 1, 1, 2, -1]), torch.tensor([0, 1, 2, 3, 1, 1, -1])
    keys = embeddings(3, 4, seed=2)

    def loss(z: Tensor, prototypes: Tensor) -> Tensor:
        return mccl(z, labels, 0.5, class_average, anchors, More(torch.cat([prototypes, keys]), more_labels))

    inputs = embeddings(7, 4).requires_grad_(), embeddings(4, 4, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(loss, inputs)
    assert torch.autograd.gradcheck(lambda z: mccl(z, labels, 0.5, class_average, anchors), inputs[:1])


@pytest.mark.parametrize(
    "labels", [[0], [0, 1], [1, 1], [-1, -1]], ids=["one clip", "no positive", "one class", "none"]
)
@pytest.mark.parametrize("anchors", ["clips", "classes"])
@pytest.mark.filterwarnings("ignore:Anomaly Detection")
def test_nothing_to_contrast_is_zero_with_zero_gradients(labels: list[int], anchors: str) -> None:
    z = embeddings(len(labels), 5, dtype=torch.float32).requires_grad_()
    empty = More(torch.zeros(3, 5), torch.full((3,), -1))  # a queue of a class or two that nothing was put into
    with torch.autograd.detect_anomaly():
        loss = mccl(z, torch.tensor(labels), 0.07, True, anchors, empty)
        torch.autograd.backward(loss)
    assert loss.item() == 0.0
    assert z.grad is not None
    assert torch.equal(z.grad, torch.zeros_like(z))


@pytest.mark.parametrize("scale", [1e-3, 1e3, 1e6])
def test_huge_similarities_stay_finite(scale: float) -> None:
    z = (embeddings(6, 5, dtype=torch.float32) * scale).requires_grad_()
    more = More(embeddings(3, 5, seed=1, dtype=torch.float32) * scale, torch.arange(3))
    loss = mccl(z, torch.tensor([0, 0, 1, 1, 2, 2]), 1e-3, more=more)
    torch.autograd.backward(loss)
    assert z.grad is not None
    assert torch.isfinite(loss)
    assert torch.isfinite(z.grad).all()


@pytest.mark.parametrize("times", [2, 5])
def test_class_average_does_not_see_how_often_another_class_is_repeated(times: int) -> None:
    """l_i and its gradient for i, with a queue and prototypes: all of another class is repeated, its prototype too."""
    z, labels = embeddings(6, 5), torch.tensor([0, 0, 0, 1, 1, 2])
    more, more_labels = embeddings(5, 5, seed=1), torch.tensor([0, 1, 2, 3, 2])
    again = torch.cat([torch.arange(5), torch.tensor([2, 4]).repeat(times - 1)])
    batch = torch.cat([torch.arange(6), torch.tensor([5]).repeat(times - 1)])
    for class_average in (True, False):
        few, many = z.clone().requires_grad_(), z[batch].clone().requires_grad_()
        small, _ = mccl_per_anchor(few, labels, 0.1, class_average, More(more, more_labels))
        large, _ = mccl_per_anchor(many, labels[batch], 0.1, class_average, More(more[again], more_labels[again]))
        grads = [torch.autograd.grad(loss[:5].sum(), x)[0][:5] for loss, x in ((small, few), (large, many))]
        assert torch.allclose(small[:5], large[:5], atol=1e-12) is class_average
        assert torch.allclose(grads[0], grads[1], atol=1e-12) is class_average


def test_class_anchors_weigh_a_class_once() -> None:
    """A class whose every anchor comes twice weighs twice among clips, and once among classes."""
    losses, labels = [1.0, 3.0, 8.0], [0, 0, 1]
    assert slow_mean(losses, labels, "clips") == 4.0
    assert slow_mean(losses, labels, "classes") == 5.0
    z, some = embeddings(5, 5), torch.tensor([0, 0, 0, 1, 1])
    per_anchor, _ = mccl_per_anchor(z, some, 0.1)
    want = (per_anchor[:3].mean() + per_anchor[3:].mean()) / 2
    torch.testing.assert_close(mccl(z, some, 0.1, anchors="classes"), want)
    assert not torch.allclose(mccl(z, some, 0.1), want)


@pytest.mark.parametrize("anchors", ["clips", "classes"])
def test_the_order_does_not_matter(anchors: str) -> None:
    z, labels, order = embeddings(8, 5), torch.tensor([0, 0, 1, 1, 2, 2, 2, -1]), torch.tensor([7, 3, 1, 0, 5, 4, 6, 2])
    more, turned = More(embeddings(4, 5, seed=1), torch.arange(4)), torch.tensor([2, 0, 3, 1])
    whole = mccl(z, labels, 0.1, True, anchors, more)
    again = mccl(z[order], labels[order], 0.1, True, anchors, More(more.features_QP[turned], more.labels_Q[turned]))
    torch.testing.assert_close(whole, again)


# ---- the objective: prototypes, frames, scale weights, schedules


def an_output(
    labels: Tensor, *, instances: int = 2, frames: int = 3, prototypes: Tensor | None = None, seed: int = 0
) -> Output:
    bags, logits = len(labels), torch.zeros(len(labels), 3, dtype=torch.float64)
    valid = torch.ones(bags, instances, dtype=torch.bool)
    valid[0, 1] = False
    return Output(
        logits_BK=logits,
        bag_BD=logits,
        instances_BND=logits[:, None].expand(-1, instances, -1),
        weights_BN=torch.full((bags, instances), 1 / instances),
        projections={
            "bag": embeddings(bags, 5, seed=seed).requires_grad_(),
            "instance": embeddings(bags, instances, 5, seed=seed + 1).requires_grad_(),
            "frame": embeddings(bags, instances, frames, 5, seed=seed + 2).requires_grad_(),
        },
        prototypes={} if prototypes is None else {"bag": prototypes},
        valid_BN=valid,
    )


def contrastive(config: LossConfig, output: Output, labels: Tensor, progress: Progress | None = None) -> Tensor:
    """The weighted contrastive part of the total."""
    losses = Objective(config, [1.0] * 3)(output, labels, progress=progress)
    return losses.total - losses.parts["classification"]


def test_frames_have_the_label_of_their_bag_unless_their_instance_is_missing() -> None:
    labels = torch.tensor([0, 1, 0])
    output = an_output(labels)
    of_frames = [0, 0, 0, -1, -1, -1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0]
    want = mccl(output.projections["frame"].flatten(0, 2), torch.tensor(of_frames), 0.1)
    got = Objective(LossConfig(scales=("frame",)), [1.0] * 3)(output, labels).parts
    torch.testing.assert_close(got["mccl_frame"], want.detach())
    of_instances = torch.tensor([0, -1, 1, 1, 0, 0])
    want = mccl(output.projections["instance"].flatten(0, 1), of_instances, 0.1)
    got = Objective(LossConfig(scales=("instance",)), [1.0] * 3)(output, labels).parts
    torch.testing.assert_close(got["mccl_instance"], want.detach())


def test_scale_weights_are_of_a_mean() -> None:
    labels = torch.tensor([0, 0, 1])
    output, config = an_output(labels), LossConfig(scales=("bag", "frame"), scale_weights=(3.0, 1.0), mccl_weight=2.0)
    parts = Objective(config, [1.0] * 3)(output, labels).parts
    want = 2.0 * (0.75 * parts["mccl_bag"] + 0.25 * parts["mccl_frame"])
    torch.testing.assert_close(contrastive(config, output, labels), want)
    equal = replace(config, scale_weights=())
    torch.testing.assert_close(contrastive(equal, output, labels), 2.0 * (parts["mccl_bag"] + parts["mccl_frame"]) / 2)


def test_prototypes_are_positives_of_their_class_and_stand_for_absent_classes() -> None:
    labels, config = torch.tensor([0, 1]), LossConfig(scales=("bag",))
    prototypes = embeddings(3, 5, seed=9).requires_grad_()
    loss = contrastive(config, an_output(labels, prototypes=prototypes), labels)
    torch.autograd.backward(loss)
    assert loss > 0  # nobody has a positive clip in this batch
    assert prototypes.grad is not None
    assert (prototypes.grad.abs().sum(1) > 1e-6).all()  # class 2, which is absent, too
    along = (prototypes.grad * an_output(labels).projections["bag"][0].detach()).sum(1)
    assert along[0] < 0 < along[2]  # down the gradient: its own prototype comes nearer, that of an absent class goes
    assert float(contrastive(config, an_output(labels), labels)) == 0.0


def test_schedules_of_the_weight() -> None:
    def weights(steps: int, ramp_share: float, schedule: str) -> list[float]:
        at = [Progress(step=step, steps=steps) for step in range(steps)]
        return [scheduled(2.0, one, ramp_share=ramp_share, schedule=schedule) for one in at]

    assert weights(4, 0.0, "constant") == [2.0] * 4
    assert weights(8, 0.5, "constant") == [0.5, 1.0, 1.5, 2.0, 2.0, 2.0, 2.0, 2.0]
    assert weights(4, 0.0, "cosine") == pytest.approx([2.0, 1 + math.sqrt(0.5), 1.0, 1 - math.sqrt(0.5)])
    assert weights(4, 0.5, "cosine")[0] == pytest.approx(1.0)
    labels = torch.tensor([0, 0, 1])
    config = LossConfig(mccl_ramp_share=1.0)
    early, late = (contrastive(config, an_output(labels), labels, Progress(step=step, steps=4)) for step in (0, 3))
    torch.testing.assert_close(4 * early, late)
    assert contrastive(config, an_output(labels), labels, Progress(head_only=True)) == 0


@pytest.mark.parametrize(
    ("said", "match"),
    [
        ({"scale_weights": (1.0,)}, r"loss\.scale-weights is \(1\.0,\) for the scales bag, instance"),
        ({"scale_weights": (1.0, 0.0)}, r"loss\.scale-weights"),
        ({"mccl_schedule": "linear"}, r"loss\.mccl-schedule"),
        ({"mccl_ramp_share": 1.5}, r"loss\.mccl-ramp-share"),
        ({"mccl_anchors": "bags"}, r"loss\.mccl-anchors"),
        ({"queue_clips_per_class": -1}, r"loss\.queue-clips-per-class"),
        ({"queue_momentum": 0.9}, "without a queue"),
    ],
)
def test_what_does_not_fit_is_refused(said: dict[str, object], match: str) -> None:
    with pytest.raises(MicaclError, match=match):
        LossConfig(**said)  # type: ignore[arg-type]


# ---- the queue


@settings(deadline=None)
@given(
    batches=st.lists(st.lists(st.integers(-1, 2), min_size=1, max_size=9), min_size=1, max_size=6),
    clips_per_class=st.integers(1, 4),
)
def test_the_queue_holds_the_newest_clips_of_each_class(batches: list[list[int]], clips_per_class: int) -> None:
    queue, want, number = ClassQueue(3, clips_per_class), [deque[float](maxlen=clips_per_class) for _ in range(3)], 0.0
    for batch in batches:
        keys = number + torch.arange(len(batch), dtype=torch.float64)
        queue.put(keys[:, None, None], torch.ones(len(batch), 1, dtype=torch.bool), torch.tensor(batch))
        for key, label in zip(keys.tolist(), batch, strict=True):
            if label >= 0:
                want[label].append(key)
        number += len(batch)
        more = queue.keys()
        assert more is not None
        got = [sorted(more.features_QP[more.labels_Q == c, 0].tolist()) for c in range(3)]
        assert got == [list(some) for some in want]


def test_a_queue_continues_from_its_state() -> None:
    def put(queue: ClassQueue, seed: int) -> None:
        queue.put(embeddings(4, 2, 3, seed=seed), torch.tensor([[True, seed % 2 == 0]] * 4), torch.tensor([0, 0, 1, 0]))

    one, two = ClassQueue(2, 3), ClassQueue(2, 3)
    put(one, 0)
    two.load(one.state_dict())
    put(one, 1)
    put(two, 1)
    assert all(torch.equal(t, two.state_dict()[name]) for name, t in one.state_dict().items())
    two.load({})
    assert two.begun
    assert ClassQueue(2, 3).keys() is None


def test_gathered_rows_in_the_order_of_the_plan() -> None:
    """Two ranks that hold the clips 0 2 4 and 1 3 5."""
    assert in_plan_order(torch.tensor([0, 2, 4, 1, 3, 5]), 2).tolist() == [0, 1, 2, 3, 4, 5]
    assert in_plan_order(torch.arange(4), 1).tolist() == [0, 1, 2, 3]


def test_the_queue_gives_positives_and_takes_no_gradient() -> None:
    config, labels = LossConfig(scales=("bag", "instance"), queue_clips_per_class=2), torch.tensor([0, 1, 2])
    objective, output = Objective(config, [1.0] * 3), an_output(labels)
    assert float(objective(output, labels).parts["mccl_bag"]) == 0.0
    earlier = an_output(labels, seed=5)
    objective.remember(earlier, labels)
    losses = objective(output, labels)
    torch.autograd.backward(losses.total)
    want = slow(output.projections["bag"], [0, 1, 2], earlier.projections["bag"], [0, 1, 2], 0.1, True)
    assert float(losses.parts["mccl_bag"]) == pytest.approx(slow_mean(want, [0, 1, 2], "clips"))
    assert output.projections["bag"].grad is not None
    assert earlier.projections["bag"].grad is None
    keys = objective.queues["instance"].keys()  # type: ignore[operator]
    assert sorted(keys.labels_Q[keys.labels_Q >= 0].tolist()) == [0, 1, 1, 2, 2]  # one instance of class 0 is missing


def test_the_momentum_encoder_follows_and_makes_the_keys() -> None:
    classes = ("a", "b", "c")
    backbone = replace(BackboneConfig.tiny(2), norm="batch")
    model = build_model(ModelConfig(backbone=backbone, instances=2, projection_dim=4, classes=classes), seed=0)
    config, clips = (
        LossConfig(scales=("bag",), queue_clips_per_class=2, queue_momentum=0.75),
        torch.rand(3, 2, 3, 1, 8, 8),
    )
    objective = Objective(config, [1.0] * 3, model)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    with torch.no_grad():
        for t in model.state_dict().values():
            t.add_(4)
    objective.after_update(model.eval()(clips), torch.arange(3), lambda x: x, clips, model)
    assert isinstance(objective.momentum, MomentumEncoder)
    average = objective.momentum.average
    for name, t in average.state_dict().items():
        torch.testing.assert_close(t, before[name] + (1 if t.is_floating_point() else 4))
    keys = objective.queues["bag"].keys()  # type: ignore[operator]
    torch.testing.assert_close(keys.features_QP[::2], average(clips).projections["bag"])
    assert not any(p.requires_grad for p in average.parameters())
    again = Objective(config, [1.0] * 3, model)
    again.import_state(objective.export_state())
    assert all(torch.equal(t, again.state_dict()[name]) for name, t in objective.state_dict().items())
    with pytest.raises(ValueError, match="give the model"):
        Objective(config, [1.0] * 3)
