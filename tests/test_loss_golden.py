"""20 steps of training on seeded synthetic tensors, one file of losses for each family, and bfloat16 beside float32.

    python -m tests.test_loss_golden      writes tests/golden/*.txt anew; do so only when a formula is meant to change

The tensors are float64 and the network is a few matrices of this file, so the numbers depend on micacl.loss alone.
TOLERANCE covers another order of summation on another machine, grown over 20 steps.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from micacl.loss import LossConfig, Objective, Progress
from micacl.model import BackboneConfig, ModelConfig, Output, build_model

GOLDEN = Path(__file__).parent / "golden"
STEPS, EPOCHS, BATCH = 20, 5, 8
COUNTS = [12, 7, 4, 1]
TOLERANCE = 1e-7
"""Relative."""

ALL = LossConfig(
    mccl_weight=1.0,
    mccl_schedule="cosine",
    mccl_ramp_share=0.25,
    mccl_anchors="classes",
    scales=("bag", "instance", "frame"),
    scale_weights=(2.0, 1.0, 1.0),
    queue_clips_per_class=2,
)
FAMILIES = {
    "ce": LossConfig(mccl=False),
    "balanced_softmax": LossConfig(name="balanced_softmax", tau=1.5, label_smoothing=0.0, mccl=False),
    "cb_focal": LossConfig(name="cb_focal", beta=0.9, mccl=False),
    "ldam_drw": LossConfig(name="ldam", beta=0.9, drw_from=0.6, ldam_scale=2.0, label_smoothing=0.0, mccl=False),
    "supcon": LossConfig(mccl_weight=1.0, class_average=False),
    "mccl": LossConfig(mccl_weight=1.0),
    "mccl_all": ALL,
}


class Net(nn.Module):
    """Matrices for every part of an Output."""

    def __init__(self, rng: torch.Generator) -> None:
        super().__init__()
        shapes = {
            "features": (6, 8),
            "head": (8, 4),
            "bag": (8, 5),
            "instance": (8, 5),
            "frame": (8, 5),
            "centre": (4, 5),
        }
        drawn = {name: torch.randn(*shape, generator=rng, dtype=torch.float64) for name, shape in shapes.items()}
        self.p = nn.ParameterDict({name: nn.Parameter(0.3 * t) for name, t in drawn.items()})

    def forward(self, x_BNFd: Tensor, valid_BN: Tensor) -> Output:
        h_BNFD = torch.tanh(x_BNFd @ self.p["features"])
        h_BND = h_BNFD.mean(2)
        bag_BD = (h_BND * valid_BN[..., None]).sum(1) / valid_BN.sum(1, keepdim=True)
        features = {"bag": bag_BD, "instance": h_BND, "frame": h_BNFD}
        return Output(
            logits_BK=bag_BD @ self.p["head"],
            bag_BD=bag_BD,
            instances_BND=h_BND,
            weights_BN=valid_BN / valid_BN.sum(1, keepdim=True),
            projections={s: functional.normalize(f @ self.p[s], dim=-1) for s, f in features.items()},
            prototypes={"bag": functional.normalize(self.p["centre"], dim=-1)},
            valid_BN=valid_BN,
        )


def losses_of(family: str) -> list[dict[str, float]]:
    """The total and its parts at each step."""
    config, rng = FAMILIES[family], torch.Generator().manual_seed(20)
    net, objective = Net(rng), Objective(config, [float(n) for n in COUNTS])
    labels = torch.repeat_interleave(torch.arange(4), torch.tensor(COUNTS))
    centres = torch.randn(4, 6, generator=rng, dtype=torch.float64)
    x = centres[labels][:, None, None] + torch.randn(len(labels), 2, 3, 6, generator=rng, dtype=torch.float64)
    order = torch.cat([torch.randperm(len(labels), generator=rng) for _ in range(7)])
    optimizer, rows = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9), []
    for step in range(STEPS):
        own = order[step * BATCH : (step + 1) * BATCH]
        valid = torch.ones(BATCH, 2, dtype=torch.bool)
        valid[step % BATCH, step % 2] = False
        output = net(x[own], valid)
        if family != "mccl_all":
            output = replace(output, prototypes={})
        epoch = step * EPOCHS // STEPS
        losses = objective(output, labels[own], progress=Progress(step=step, steps=STEPS, epoch=epoch, epochs=EPOCHS))
        optimizer.zero_grad()
        losses.total.backward()
        optimizer.step()
        objective.remember(output, labels[own])
        rows.append({"total": losses.total.item(), **{name: part.item() for name, part in losses.parts.items()}})
    return rows


def as_text(rows: list[dict[str, float]]) -> str:
    lines = [" ".join(["step", *rows[0]]), *(" ".join([str(i), *map(repr, r.values())]) for i, r in enumerate(rows))]
    return "".join(f"{line}\n" for line in lines)


@pytest.mark.parametrize("family", FAMILIES)
def test_losses_are_those_of_the_file(family: str) -> None:
    names, *lines = (line.split() for line in (GOLDEN / f"{family}.txt").read_text().splitlines())
    rows = losses_of(family)
    assert names == ["step", *rows[0]]
    assert len(lines) == STEPS
    for row, (_, *want) in zip(rows, lines, strict=True):
        assert list(row.values()) == pytest.approx([float(text) for text in want], rel=TOLERANCE)
    assert float(lines[-1][1]) < float(lines[0][1])  # it learns


BF16_LOSS, BF16_GRADIENT = 0.02, 0.05
"""Relative, and 1 - cosine with the float32 gradient; bfloat16 has 8 bits of fraction, and the network is in it."""


@pytest.mark.parametrize("family", ["ce", "cb_focal", "ldam_drw", "mccl_all"])
def test_bfloat16_stays_near_float32(family: str) -> None:
    """Autocast on the CPU, as on a GPU: a forward pass in bfloat16, the losses in float32."""
    config = replace(FAMILIES[family], mccl_schedule="constant", mccl_ramp_share=0.0)
    model_config = ModelConfig(
        backbone=BackboneConfig.tiny(4),
        instances=2,
        projection_dim=8,
        projection_scales=("bag", "instance", "frame"),
        prototypes="learned",
        classes=("a", "b", "c", "d"),
    )
    model, labels = build_model(model_config, seed=0), torch.tensor([0, 1, 2, 0, 0, 1, 3, 0])
    clips = torch.rand(8, 2, 3, 2, 24, 24, generator=torch.Generator().manual_seed(0))
    found = []
    for enabled in (False, True):
        model.zero_grad()
        objective = Objective(config, [float(n) for n in COUNTS])
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            objective.remember(model(clips.flip(0)), labels)
            total = objective(model(clips), labels).total
        assert total.dtype == torch.float32
        total.backward()
        found.append((total.detach(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])))
    (want, gradient), (got, rough) = found
    assert float(got) == pytest.approx(float(want), rel=BF16_LOSS)
    assert not torch.equal(gradient, rough)
    assert 1 - functional.cosine_similarity(gradient, rough, dim=0) < BF16_GRADIENT


if __name__ == "__main__":
    for name in FAMILIES:
        (GOLDEN / f"{name}.txt").write_text(as_text(losses_of(name)))
