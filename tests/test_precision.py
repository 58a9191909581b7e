"""micacl.train.precision: each way of computing a step against float32, and the check that a bf16 run begins with."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from cluster.scaling import ScalingConfig
from micacl.loss.objective import LossConfig, Objective
from micacl.model.backbone import BackboneConfig
from micacl.model.micacl import ModelConfig, build_model
from micacl.train.engine import PlainEngine
from micacl.train.optim import OptimConfig
from micacl.train.precision import ComputeConfig, channels_last, check_bf16_conv3d
from pipeline.contract import MicaclError
from tests.gloo import run_ranks

CPU = torch.device("cpu")
LABELS = ("happy", "sad", "neutral")
STEPS = 8
OPTIM = OptimConfig(lr=1e-3)
FP32 = 1e-4
"""Absolute, on losses near 1.3: float32 sums in another order."""
BF16 = 0.03
"""Absolute, the same: bfloat16 has 8 bits of a number, and 8 updates go on from its gradients."""


def losses_of(compute: ComputeConfig, *, state: Any = None, start: int = 0, clips: int = 6) -> tuple[list[float], Any]:
    """Losses of steps `start` to STEPS on fixed clips, and the state after half of them."""
    engine = PlainEngine(build_model(model_config(), seed=0), OPTIM, compute=compute)
    if state is not None:
        engine.import_state(*state, start)
    objective, half, losses = Objective(LossConfig(), [1.0] * 3), None, []
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randn(clips, 2, 3, 4, 16, 16, generator=generator) for _ in range(STEPS)]
    for step in range(start, STEPS):
        part = batches[step][engine.rank :: engine.ranks]
        labels_B = torch.arange(clips)[engine.rank :: engine.ranks] % 3
        one = objective(engine.forward(part + labels_B.view(-1, 1, 1, 1, 1, 1)), labels_B, engine.gather)
        engine.step(one.total, 1e-3)
        losses.append(float(engine.mean(one.total.detach())))
        if step == STEPS // 2 - 1:
            half = engine.export_state()
    return losses, half


def model_config() -> ModelConfig:
    return ModelConfig(backbone=BackboneConfig.tiny(8), classes=LABELS, instances=2, projection_dim=16)


@pytest.fixture(scope="module")
def reference() -> list[float]:
    losses = losses_of(ComputeConfig())[0]
    assert losses[0] - min(losses) > 4 * BF16  # it learns, else equality would say little
    return losses


@pytest.mark.parametrize(
    ("compute", "tolerance"),
    [
        (ComputeConfig(channels_last=True), FP32),
        (ComputeConfig(fused=True), FP32),
        (ComputeConfig(precision="bf16"), BF16),
        (ComputeConfig(precision="bf16", channels_last=True, fused=True), BF16),
    ],
    ids=["channels_last", "fused", "bf16", "all"],
)
def test_the_losses_are_those_of_fp32(compute: ComputeConfig, tolerance: float, reference: list[float]) -> None:
    losses, half = losses_of(compute)
    assert losses == pytest.approx(reference, abs=tolerance)
    assert compute == ComputeConfig() or losses != reference
    assert all(t.dtype == torch.float32 and t.is_contiguous() for part in half for t in part.values())
    again, _ = losses_of(compute, state=half, start=STEPS // 2)
    assert again == pytest.approx(losses[STEPS // 2 :], abs=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_it_compiles_as_one_graph(mode: str, reference: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    """With its gradients, by another backend than inductor: that takes minutes of C++ (bench/train_step.py)."""
    compiled, modes = torch.compile, []

    def compile_here(model: Any, *, mode: str) -> Any:
        modes.append(mode)
        return compiled(model, backend="aot_eager", fullgraph=True)

    monkeypatch.setattr(torch, "compile", compile_here)
    assert losses_of(ComputeConfig(compile=mode))[0] == pytest.approx(reference, abs=FP32)
    assert modes == [mode]


def rank_losses(rank: int, ranks: int, compute: ComputeConfig) -> list[float]:
    return losses_of(compute)[0]


@pytest.mark.slow
def test_two_ranks_are_one(tmp_path: Path, reference: list[float]) -> None:
    compute = ComputeConfig(channels_last=True, fused=True)
    for losses in run_ranks(rank_losses, 2, tmp_path, compute):
        assert losses == pytest.approx(reference, abs=FP32)


def test_what_the_losses_see_is_float32() -> None:
    engine = PlainEngine(build_model(model_config(), seed=0), OPTIM, compute=ComputeConfig(precision="bf16"))
    output = engine.forward(torch.randn(2, 2, 3, 4, 16, 16))
    values = [getattr(output, field.name) for field in dataclasses.fields(output)]
    tensors = [v for v in values if isinstance(v, Tensor)] + [
        t for v in values if isinstance(v, dict) for t in v.values()
    ]
    assert len(tensors) >= 5
    assert {t.dtype for t in tensors} == {torch.float32}
    wide = PlainEngine(build_model(model_config(), seed=0), OPTIM).forward(torch.randn(2, 2, 3, 4, 16, 16))
    assert wide.logits_BK.dtype == torch.float32


def test_channels_last_keeps_numbers_and_is_what_the_backbone_sees() -> None:
    clips = torch.randn(2, 3, 3, 4, 8, 8)
    laid_out = channels_last(clips)
    assert torch.equal(laid_out, clips)
    assert laid_out.flatten(0, 1).is_contiguous(memory_format=torch.channels_last_3d)
    engine = PlainEngine(build_model(model_config(), seed=0), OPTIM, compute=ComputeConfig(channels_last=True))
    seen = []
    engine.model.backbone.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    engine.model.backbone.layer4.register_forward_hook(lambda *call: seen.append(call[2]))
    engine.forward(torch.randn(2, 2, 3, 4, 32, 32))
    assert [x.is_contiguous(memory_format=torch.channels_last_3d) for x in seen] == [True, True]


def test_sound_convolutions_pass() -> None:
    check_bf16_conv3d(CPU)


def forgets_a_channel(x: Tensor, w: Tensor, **rest: Any) -> Tensor:
    """As a kernel that is wrong in bfloat16 alone."""
    if x.dtype == torch.bfloat16:
        x = torch.cat([x[:, :-1], torch.zeros_like(x[:, -1:])], 1)
    return functional.conv3d(x, w, **rest)


def wrong_gradient(x: Tensor, w: Tensor, **rest: Any) -> Tensor:
    if x.dtype == torch.bfloat16:
        w = w + 0.2 * (w - w.detach())
    return functional.conv3d(x, w, **rest)


def not_a_number(x: Tensor, w: Tensor, **rest: Any) -> Tensor:
    return functional.conv3d(x, w, **rest) * float("nan" if x.dtype == torch.bfloat16 else 1)


@pytest.mark.parametrize("conv", [forgets_a_channel, wrong_gradient, not_a_number])
def test_a_wrong_convolution_stops_the_run(conv: Any) -> None:
    with pytest.raises(MicaclError, match=r"off by .* of its size on cpu .torch 2.*was not started.*Train in fp32"):
        check_bf16_conv3d(CPU, conv)


def test_settings_that_are_not_there_are_refused() -> None:
    with pytest.raises(MicaclError, match=r"--scaling.compute.precision is 'fp16'.*fp32, bf16"):
        ComputeConfig(precision="fp16")
    with pytest.raises(MicaclError, match=r"--scaling.compute.compile is 'max'"):
        ComputeConfig(compile="max")
    with pytest.raises(MicaclError, match=r"--scaling.engine plain"):
        ScalingConfig(compute=ComputeConfig(fused=True))
    assert ScalingConfig(engine="plain", compute=ComputeConfig(fused=True)).compute.fused
