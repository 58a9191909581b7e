"""How a step is computed: precision, memory layout, compiler, optimiser kernel. What it computes stays the same.

    fp32     everything in float32
    bf16     convolutions and products in bfloat16 by autocast; weights, gradients and the optimiser in float32, the
             losses too: what the model says is widened before they see it. bfloat16 has float32's range, so the loss is
             not scaled

The settings are the plain engine's. DeepSpeed has a bf16 of its own (cluster/deepspeed_engine.py): bfloat16 weights,
float32 masters. Both begin with `check_bf16_conv3d`: some cuDNN builds compute wrong bfloat16 3-D convolutions and say
nothing (pytorch issue 163539: cuDNN 9.8 to 9.10; 169688: a oneDNN on AMX CPUs). The first was reported for outputs of
1.8e9 numbers, far more than the check makes: it guards the kernels that it calls, no others.

Legend: B clips, N instances, M = B N, C channels, T frames per instance, H W height and width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from micacl.model.backbone import refuse_unknown
from micacl.model.micacl import Output
from pipeline.contract import MicaclError

PRECISIONS = ("fp32", "bf16")
COMPILES = ("off", "default", "reduce-overhead")
BF16_LIMIT = 0.03
"""Most relative error of a bfloat16 convolution, in the root mean square. Rounding gives 0.002 to 0.007 on a CPU."""
_SHAPES = (
    ((2, 3, 4, 28, 28), (16, 3, 3, 7, 7), (1, 2, 2), (1, 3, 3)),
    ((2, 32, 4, 14, 14), (32, 32, 3, 3, 3), (1, 1, 1), (1, 1, 1)),
    ((2, 32, 4, 14, 14), (64, 32, 3, 3, 3), (2, 2, 2), (1, 1, 1)),
    ((2, 32, 4, 14, 14), (64, 32, 1, 1, 1), (2, 2, 2), (0, 0, 0)),
    ((2, 64, 1, 7, 7), (64, 64, 3, 3, 3), (1, 1, 1), (1, 1, 1)),
)
"""(input, weight, stride, padding) of the five kinds of convolution of an R3D-18, with fewer channels."""

Conv3d = Callable[..., Tensor]


@dataclass(frozen=True, kw_only=True, slots=True)
class ComputeConfig:
    """For the plain engine."""

    precision: str = "fp32"
    """fp32 | bf16"""
    channels_last: bool = False
    """Weights and clips of the convolutions in the layout (M, T, H, W, C)."""
    compile: str = "off"
    """off | default | reduce-overhead: torch.compile of the model; the last with CUDA graphs. Needs a C++ compiler."""
    fused: bool = False
    """The optimiser's update of all weights in one kernel."""

    def __post_init__(self) -> None:
        refuse_unknown("--scaling.compute.precision", self.precision, PRECISIONS)
        refuse_unknown("--scaling.compute.compile", self.compile, COMPILES)


def prepared(model: nn.Module, compute: ComputeConfig, device: torch.device) -> Callable[[Tensor], Output]:
    """The model's forward, computed as the config says; lays out the model's weights. Raises MicaclError."""
    if compute.precision == "bf16":
        check_bf16_conv3d(device)
    if compute.channels_last:
        lay_out_channels_last(model)
    call: Callable[[Tensor], Output] = model
    if compute.compile != "off":
        call = torch.compile(model, mode=compute.compile)

    def forward(clips_BNCTHW: Tensor) -> Output:
        x_BNCTHW = channels_last(clips_BNCTHW) if compute.channels_last else clips_BNCTHW
        with torch.autocast(device.type, torch.bfloat16, enabled=compute.precision == "bf16"):
            output = call(x_BNCTHW)
        return widened(output)

    return forward


def channels_last(clips_BNCTHW: Tensor) -> Tensor:
    """The same numbers, so laid out that the model's (M, C, T, H, W) is channels_last_3d."""
    x_MCTHW = clips_BNCTHW.flatten(0, 1).contiguous(memory_format=torch.channels_last_3d)
    return x_MCTHW.view(clips_BNCTHW.shape)


def lay_out_channels_last(model: nn.Module) -> None:
    """The weights of the 3-D convolutions, in place."""
    for module in model.modules():
        if isinstance(module, nn.Conv3d):
            module.weight.data = module.weight.data.contiguous(memory_format=torch.channels_last_3d)


def widened(output: Output) -> Output:
    """Half precision to float32, in every field."""
    names = [field.name for field in dataclasses.fields(output)]
    return dataclasses.replace(output, **{name: _wide(getattr(output, name)) for name in names})


def _wide(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _wide(one) for name, one in value.items()}
    if isinstance(value, Tensor) and value.dtype in (torch.bfloat16, torch.float16):
        return value.float()
    return value


def check_bf16_conv3d(device: torch.device, conv: Conv3d = functional.conv3d) -> None:
    """Compare 3-D convolutions and their gradients in bfloat16 on the device with float32 on the CPU.

    Raises MicaclError, naming the shape and the versions, where they are further apart than rounding explains.
    """
    cudnn = torch.backends.cudnn.version()  # type: ignore[no-untyped-call]
    for shapes in _SHAPES:
        for layout in (torch.contiguous_format, torch.channels_last_3d):
            error = _bf16_error(device, conv, shapes, layout)
            if not error <= BF16_LIMIT:
                raise MicaclError(
                    f"A bfloat16 3-D convolution of {shapes[0]} by {shapes[1]} ({str(layout).removeprefix('torch.')}) "
                    f"is off by {error:.2g} of its size on {device} (torch {torch.__version__}, cuDNN {cudnn}); "
                    f"rounding explains {BF16_LIMIT:g}.",
                    "The run was not started: it would train on wrong features, and nothing would say so.",
                    "Train in fp32, or with another build of torch and cuDNN (9.15 or newer).",
                )


def _bf16_error(device: torch.device, conv: Conv3d, shapes: tuple[Any, ...], layout: torch.memory_format) -> float:
    """The worst of output, gradient of the input and gradient of the weight: relative, in the root mean square."""
    input_shape, weight_shape, stride, padding = shapes
    generator = torch.Generator().manual_seed(0)
    given = [torch.randn(shape, generator=generator).bfloat16() for shape in (input_shape, weight_shape)]

    def run(run_conv: Conv3d, x: Tensor, w: Tensor) -> list[Tensor]:
        x, w = (t.contiguous(memory_format=layout).requires_grad_() for t in (x, w))
        out = run_conv(x, w, stride=stride, padding=padding)
        upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).bfloat16()
        return [out.detach(), *torch.autograd.grad(out, (x, w), upstream.to(out))]

    wanted = run(functional.conv3d, *(t.float() for t in given))
    got = run(conv, *(t.to(device) for t in given))
    return max(float((a.cpu().float() - b).norm() / b.norm()) for a, b in zip(got, wanted, strict=True))
