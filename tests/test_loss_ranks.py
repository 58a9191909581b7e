"""Losses, gradients and queue of 1, 2 and 4 gloo ranks are those of one process."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from micacl.loss import LossConfig, Objective, Progress, gather_with_gradient, identity
from micacl.model import BackboneConfig, ModelConfig, WIANConfig, build_model
from tests.gloo import run_ranks

LABELS = [[0, 1, 2, 0, 0, 2, 1, 2], [1, 1, 0, 2, 0, 0, 0, 0]]
"""Of two global batches. With 4 ranks few ranks hold two clips of one class: without a gather MCCL would be 0 on bags;
and the second batch has more clips of class 0 than the queue has places."""

CASES: dict[str, tuple[str, LossConfig]] = {
    "plain": ("none", LossConfig(mccl_weight=1.0)),
    "all": (
        "learned",
        LossConfig(
            name="ldam",
            drw_from=0.0,
            mccl_weight=1.0,
            mccl_anchors="classes",
            scales=("bag", "instance", "frame"),
            scale_weights=(1.0, 2.0, 3.0),
            queue_clips_per_class=3,
        ),
    ),
    "classifier": ("classifier", LossConfig(name="balanced_softmax", mccl_weight=1.0, class_average=False)),
    "momentum": ("none", LossConfig(mccl_weight=1.0, queue_clips_per_class=3, queue_momentum=0.5)),
}


def run_of(case: str, rank: int, ranks: int) -> tuple[list[float], Tensor, dict[str, Tensor]]:
    """This rank's losses of two steps, its gradients of both in one vector, and the state of the objective."""
    prototypes, config = CASES[case]
    rng = torch.Generator().manual_seed(0)
    model_config = ModelConfig(
        backbone=replace(BackboneConfig.tiny(width=2), frame_stage=1),
        instances=2,
        projection_dim=6,
        projection_scales=("bag", "instance", "frame"),
        prototypes=prototypes,
        classes=("a", "b", "c"),
        wian=WIANConfig(hidden=4),
    )
    model = build_model(model_config, seed=0).double()  # so that rounding cannot stand in for an error, or hide one
    objective = Objective(config, [3.0, 2.0, 3.0], model)
    gather = gather_with_gradient if ranks > 1 else identity
    losses = []
    for labels in LABELS:
        clips = torch.rand(8, 2, 3, 2, 16, 16, generator=rng, dtype=torch.float64)
        valid = torch.ones(8, 2, dtype=torch.bool)
        valid[1, 0] = valid[6, 1] = valid[7, 1] = False
        own = torch.arange(rank, 8, ranks)  # the plan deals clips out to the ranks in turn
        output = model(clips[own], valid[own])
        total = objective(output, torch.tensor(labels)[own], gather, Progress()).total
        total.backward()
        objective.after_update(output, torch.tensor(labels)[own], gather, clips[own], model)
        losses.append(total.item())
    gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    return losses, gradient, objective.export_state()


def rank_main(rank: int, ranks: int) -> dict[str, Any]:
    """As an engine does: average over ranks."""
    found: dict[str, Any] = {}
    for case in CASES:
        losses, gradient, state = run_of(case, rank, ranks)
        averaged = torch.cat([torch.tensor(losses, dtype=torch.float64), gradient])
        dist.all_reduce(averaged)
        found[case] = {
            "averaged": (averaged / ranks).tolist(),
            "queue": {name: t.tolist() for name, t in state.items() if name.startswith("queues.")},
        }
    return found


@pytest.mark.parametrize("ranks", [2, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 4))])
def test_ranks_agree_with_a_single_process(ranks: int, tmp_path: Path) -> None:
    found = run_ranks(rank_main, ranks, tmp_path)
    for case in CASES:
        losses, gradient, state = run_of(case, 0, 1)
        assert gradient.abs().max() > 1e-2  # else the line below could not fail
        got = torch.tensor(found[0][case]["averaged"], dtype=torch.float64)
        want = torch.cat([torch.tensor(losses, dtype=torch.float64), gradient])
        torch.testing.assert_close(got, want, atol=1e-10, rtol=0, msg=lambda text, case=case: f"{case}: {text}")
        for of_rank in found:
            queue = of_rank[case]["queue"]
            assert set(queue) == {name for name in state if name.startswith("queues.")}
            assert ("queues.bag.keys_KSEP" in queue) is (case in ("all", "momentum"))
            for name, t in queue.items():
                one = torch.tensor(t, dtype=state[name].dtype)
                torch.testing.assert_close(one, state[name], atol=1e-10, rtol=0)
