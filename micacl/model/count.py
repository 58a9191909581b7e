"""How large and how dear a model is, part by part: parameters, and multiply-accumulates (MACs) a clip.

A clip is one bag: N instances of T frames. Nothing is computed: the model is built and run on the meta device, where
tensors have shapes only, and torch's flop counter adds up convolutions and matrix products, two flops a MAC. Norms,
activations, additions, softmax and the scans of `ssm` are not counted, as is usual. torchvision's published numbers
are counted alike (16 frames of 112 pixels, with their layer of 400 classes); a test compares.

Parts: `backbone`, `geiim`, `wian`, `head` (class scores), `projections` (contrastive heads and prototypes; only
training needs them).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from micacl.model.micacl import MICACL, ModelConfig, parameter_count

PARTS: dict[str, tuple[str, ...]] = {
    "backbone": ("backbone",),
    "geiim": ("geiim",),
    "wian": ("wian",),
    "head": ("head",),
    "projections": ("projections", "prototypes", "prototype_heads"),
}
"""Part -> attributes of MICACL."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelCount:
    """Of one config and one size of input."""

    parameters: dict[str, int]
    """By part."""
    macs: dict[str, int]
    """By part, per clip."""
    size: tuple[int, int, int]
    """Instances, frames, side of a clip."""

    @property
    def extra_parameters(self) -> float:
        """Share of the parameters that is not the backbone's."""
        return _beside_backbone(self.parameters)

    @property
    def extra_macs(self) -> float:
        """Share of the MACs that is not the backbone's."""
        return _beside_backbone(self.macs)

    def to_dict(self) -> dict[str, Any]:
        return {
            "parameters": {**self.parameters, "total": sum(self.parameters.values())},
            "macs_per_clip": {**self.macs, "total": sum(self.macs.values())},
            "share_beside_backbone": {"parameters": self.extra_parameters, "macs": self.extra_macs},
        }

    def to_text(self) -> str:
        """A table for people."""
        instances, frames, side = self.size
        rows = [(part, self.parameters[part], self.macs[part]) for part in PARTS]
        rows.append(("total", sum(self.parameters.values()), sum(self.macs.values())))
        _, all_parameters, all_macs = rows[-1]
        lines = [
            f"one clip: {instances} instances x {frames} frames x {side} x {side} pixels",
            f"{'part':<12} {'parameters':>12} {'share':>7} {'MMAC a clip':>12} {'share':>7}",
        ]
        lines += [
            f"{part:<12} {n:>12,} {n / all_parameters:>7.2%} {m / 1e6:>12,.2f} {m / max(1, all_macs):>7.2%}"
            for part, n, m in rows
        ]
        said = f"beside the backbone: {self.extra_parameters:.2%} of the parameters, {self.extra_macs:.2%} of the MACs"
        return "\n".join([*lines, said])


def count_model(config: ModelConfig, frames: int, side: int) -> ModelCount:
    """Count a model at `frames` a instance and `side` pixels. Raises MicaclError when it cannot take such clips."""
    with torch.device("meta"):
        model = MICACL(config).eval()
        clip_BNCTHW = torch.zeros(1, config.instances, 3, frames, side, side)
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model(clip_BNCTHW)
    flops = {name: sum(by_op.values()) for name, by_op in counter.get_flop_counts().items()}
    return ModelCount(
        parameters={part: sum(_parameters(model, a) for a in names) for part, names in PARTS.items()},
        macs={part: sum(_flops(flops, a) for a in names) // 2 for part, names in PARTS.items()},
        size=(config.instances, frames, side),
    )


def _parameters(model: MICACL, attribute: str) -> int:
    part = getattr(model, attribute)
    return 0 if part is None else parameter_count(part)


def _flops(flops: dict[str, int], attribute: str) -> int:
    """Of a module, or of the children of a ModuleDict, which is never called itself."""
    own = f"MICACL.{attribute}"
    if own in flops:
        return flops[own]
    return sum(n for name, n in flops.items() if name.startswith(f"{own}.") and name.count(".") == own.count(".") + 1)


def _beside_backbone(by_part: dict[str, int]) -> float:
    return 1 - by_part["backbone"] / sum(by_part.values())
