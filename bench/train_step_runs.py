"""What bench/train_step.py measures: whole steps, the part of MICACL in them, the model's input, the machine's peak.

On a GPU a second is a second between synchronisations. On a CPU it is a second of the process's CPU time, because other
work shares the cores: clips/s are then those of a core that is ours alone. What is compared runs in turns, so that what
else the machine does hits all alike; a ratio is the median over the turns.
"""

from __future__ import annotations

import dataclasses
import gc
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from train_step_before import collate_before

from micacl.augment import draw_augmentations
from micacl.batch import Batch, BatchConfig, to_input
from micacl.loss.objective import LossConfig, Objective
from micacl.model.backbone import BackboneConfig
from micacl.model.geiim import GEIIMConfig
from micacl.model.micacl import MICACL, ModelConfig, build_model
from micacl.model.wian import WIANConfig
from micacl.train.engine import PlainEngine
from micacl.train.optim import OptimConfig
from micacl.train.precision import ComputeConfig

GPU_TFLOPS = {"H200": 989, "H100": 989, "A100": 312, "L40S": 362, "L4": 121, "A10": 125, "4090": 165, "V100": 125}
"""Dense bfloat16 (V100: float16) peak of its tensor cores by a part of the device's name, 10^12 FLOP/s."""
M3DFEL = BatchConfig(crop_share=0.08, crop_ratio=4 / 3, jitter=0.4, saturation=0.4, hue=0.4)


@dataclass(frozen=True, kw_only=True)
class Work:
    """The sizes of a step."""

    device: torch.device
    clips: int
    model: ModelConfig = ModelConfig()  # noqa: RUF009
    side: int = 112
    frame_side: int = 128
    frames: int = 4

    @classmethod
    def small(cls, device: torch.device) -> Work:
        """For the test."""
        model = ModelConfig(backbone=BackboneConfig.tiny(8), projection_dim=16)
        return cls(device=device, clips=2, model=model, side=24, frame_side=32)

    @property
    def plain_model(self) -> ModelConfig:
        """The backbone, the mean of its instances, a linear layer."""
        return dataclasses.replace(
            self.model, geiim=GEIIMConfig(enabled=False), wian=WIANConfig(kind="mean"), projection_dim=0
        )

    @property
    def labels_B(self) -> Tensor:
        return torch.arange(self.clips, device=self.device) % len(self.model.classes)

    def frames_BNTHWC(self) -> Tensor:
        shape = (self.clips, self.model.instances, self.frames, self.frame_side, self.frame_side, 3)
        return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@dataclass(frozen=True, kw_only=True)
class Rung:
    """One setting of the ladder."""

    name: str
    compute: ComputeConfig
    feed: str = "float"
    """What each step brings to the device: `float` clips, `uint8` frames, or those to be `augment`ed there."""
    gpu_only: bool = False


def ladder(*, cumulative: bool) -> list[Rung]:
    """Each rung adds one thing: to the one before it, or to the first alone."""
    changes: list[tuple[str, dict[str, object], str, bool]] = [
        ("fp32, NCDHW, float clips (as M3DFEL runs it)", {}, "float", False),
        ("bf16 autocast", {"precision": "bf16"}, "float", False),
        ("channels_last_3d", {"channels_last": True}, "float", False),
        ("fused AdamW", {"fused": True}, "float", False),
        ("torch.compile", {"compile": "default"}, "float", False),
        ("CUDA graphs", {"compile": "reduce-overhead"}, "float", True),
        ("uint8 frames, resized on the device", {}, "uint8", False),
        ("augmentation on the device", {}, "augment", False),
    ]
    rungs, so_far = [], ComputeConfig()
    for name, change, feed, gpu_only in changes:
        compute = dataclasses.replace(so_far if cumulative else ComputeConfig(), **change)  # type: ignore[arg-type]
        so_far = compute
        rungs.append(Rung(name=name, compute=compute, feed=feed, gpu_only=gpu_only))
    return rungs


def now_s(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return time.perf_counter()
    return time.process_time()


def in_turns(
    device: torch.device, runs: Mapping[str, Callable[[], object]], repeats: int, limit_s: float
) -> dict[str, list[float]]:
    """Seconds of each run by name, after a round that does not count; fewer than `repeats` rounds after `limit_s`."""
    found: dict[str, list[float]] = {name: [] for name in runs}
    for i in range(repeats + 1):
        if i == 1:
            start_s = time.perf_counter()
        elif i > 1 and time.perf_counter() - start_s > limit_s:
            break
        for name, run in runs.items():
            before_s = now_s(device)
            run()
            found[name].append(now_s(device) - before_s)
    return {name: seconds[1:] for name, seconds in found.items()}


def ratio(above: Sequence[float], below: Sequence[float]) -> float:
    """Median of one turn's seconds over the other's."""
    return float(np.median(np.array(above) / np.array(below)))


def feed_of(work: Work, kind: str) -> Callable[[], Tensor]:
    """The clips of a step on the device, as its frames come from the loader."""
    frames, config = work.frames_BNTHWC(), dataclasses.replace(M3DFEL, side=work.side)
    shape = (work.frame_side, work.frame_side)
    keys = np.random.default_rng(0).integers(0, 2**63, (work.clips, 2), dtype=np.uint64)

    def batch() -> Batch:
        keys[:, 1] += 1
        draws = draw_augmentations(keys, config, shape) if kind == "augment" else None
        return Batch(frames, work.labels_B, ("",) * work.clips, draws, config)

    if kind == "float":
        clips = to_input(dataclasses.replace(batch(), params=None), torch.device("cpu"))
        return lambda: clips.to(work.device)
    return lambda: to_input(batch(), work.device)


def make_step(work: Work, rung: Rung, model: ModelConfig, loss: LossConfig, tail: bool = False) -> Callable[[], None]:
    """A whole training step of micacl.train.loop. `tail`: all but the backbone, whose features are given."""
    built = build_model(model, seed=0)
    if tail:
        built.backbone = GivenFeatures(work, built)  # type: ignore[assignment]
    engine = PlainEngine(built, OptimConfig(), work.device, rung.compute)
    objective = Objective(loss, [1.0] * len(model.classes)).to(work.device)
    feed, labels_B = feed_of(work, rung.feed), work.labels_B
    engine.model.train()

    def step() -> None:
        losses = objective(engine.forward(feed()), labels_B, engine.gather)
        engine.step(losses.total, 1e-4)

    return step


class GivenFeatures(nn.Module):
    """Stands in the place of a backbone: the same features each time, with gradients."""

    def __init__(self, work: Work, model: MICACL) -> None:
        super().__init__()
        clips = torch.zeros(work.clips * work.model.instances, 3, work.frames, work.side, work.side)
        with torch.no_grad():
            given = [torch.randn(part.shape) for part in model.backbone(clips)]
        self.given = [part.to(work.device).requires_grad_() for part in given]

    def forward(self, clips_MCTHW: Tensor) -> tuple[Tensor, ...]:
        del clips_MCTHW
        return tuple(self.given)


def step_flops(work: Work) -> int:
    """FLOP of forward and backward of the whole model; a multiply-add is two. Counted without computing."""
    with torch.device("meta"):
        model = MICACL(work.model)
        clips = torch.zeros(work.clips, work.model.instances, 3, work.frames, work.side, work.side)
    with FlopCounterMode(display=False) as counter:
        output = model(clips)
        (output.logits_BK.sum() + sum(p.sum() for p in output.projections.values())).backward()
    return counter.get_total_flops()


def peak_flops(device: torch.device, size: int = 1536) -> tuple[float, str]:
    """(FLOP/s, where the number is from)."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        found = [tflops for part, tflops in GPU_TFLOPS.items() if part in name]
        return (found[0] * 1e12, f"{name}, bf16 dense, data sheet") if found else (float("nan"), f"{name} is not known")
    a, b = torch.randn(size, size), torch.randn(size, size)
    seconds = in_turns(device, {"": lambda: a @ b}, 6, 10)[""]
    return 2 * size**3 / min(seconds), f"fp32 product of {size} x {size}, measured"


class PeakMemory:
    """MiB used at most since it was made, beyond those in use then: of a GPU by torch, else of the process."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)
        else:
            Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
        self.before = self._peak()

    def _peak(self) -> float:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 2**20
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) / 1024

    @property
    def mib(self) -> float:
        return self._peak() - self.before


def input_ms(work: Work, repeats: int) -> dict[str, float]:
    """Milliseconds a clip to make the model's input on the device, by name; beside it the former way, on the CPU."""
    frames, config = work.frames_BNTHWC(), BatchConfig(side=work.side)
    keys = np.random.default_rng(0).integers(0, 2**63, (work.clips, 2), dtype=np.uint64)

    def make(config: BatchConfig, *, augment: bool) -> Callable[[], object]:
        shape = (work.frame_side, work.frame_side)

        def run() -> Tensor:
            draws = draw_augmentations(keys, config, shape) if augment else None
            return to_input(Batch(frames, work.labels_B, ("",) * work.clips, draws, config), work.device)

        return run

    ways: dict[str, Callable[[], object]] = {
        "evaluation": make(config, augment=False),
        "evaluation, as before": lambda: collate_before(frames, None, config).to(work.device),
        "augmentation, the default's": make(config, augment=True),
        "the same, as before": lambda: collate_before(frames, keys, config).to(work.device),
        "augmentation, M3DFEL's": make(dataclasses.replace(M3DFEL, side=work.side), augment=True),
    }
    found = in_turns(work.device, ways, repeats, 60)
    return {name: min(seconds) / work.clips * 1e3 for name, seconds in found.items()}
