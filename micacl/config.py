"""A run, written down: one frozen tree of dataclasses, each beside what it configures. No files, no registries."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any

from micacl.batch import BatchConfig
from micacl.loss.config import LossConfig
from micacl.model.micacl import ModelConfig
from micacl.train.optim import OptimConfig
from pipeline.contract import MicaclError, canonical_json, digest, require_at_least, require_between
from pipeline.plan import PlanConfig
from pipeline.stream import StreamConfig

SEED_MOST = 2**63 - 1
"""What torch takes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig(OptimConfig):
    """How long and how."""

    epochs: int = 10
    seed: int = 0
    """Of the weights and of dropout; the plan has its own."""
    split: str = "train"
    fold: int | None = None
    """Of a dataset in folds (DFEW, MAFW): the test fold, which is not trained on."""
    where: str = ""
    """Bags that are trained on, e.g. `face_px >= 48` (docs/data.md); all by default. Evaluation takes all."""
    log_every: int = 10
    """Steps."""
    checkpoint_every: int = 200
    """Steps; the last step always writes one."""
    keep_checkpoints: int = 2
    """The newest; the best on validation is kept beside them."""
    val_share: float = 0.0
    """Of the clips of `train`, held out as split `val`: whole subjects (pipeline/holdout.py). A dataset with a `val` of
    its own is validated on that."""
    val_seed: int = 0
    """Which subjects; the same for all runs that are compared."""
    val_every: int = 1
    """Epochs between validations; 0 validates never, and then no checkpoint is called the best."""

    def __post_init__(self) -> None:
        OptimConfig.__post_init__(self)
        if min(self.epochs, self.log_every, self.checkpoint_every, self.keep_checkpoints) < 1:
            raise MicaclError(
                "--train.epochs, log-every, checkpoint-every and keep-checkpoints must be 1 or more.",
                "The run was not started.",
                "Correct the flag.",
            )
        if self.retrain_head_from is not None and not 0 <= self.retrain_head_from < self.epochs:
            raise MicaclError(
                f"--train.retrain-head-from is {self.retrain_head_from} and --train.epochs {self.epochs}.",
                "The run was not started.",
                f"Use an epoch from 0 to {self.epochs - 1}, or None to leave it out.",
            )
        require_between(0, 0.9, "--train.val-share", self.val_share)
        require_between(0, SEED_MOST, "--train.seed", self.seed)
        require_between(0, SEED_MOST, "--train.val-seed", self.val_seed)
        require_at_least(0, ("--train.val-every", self.val_every))
        if self.val_share and self.split != "train":
            raise MicaclError(
                f"--train.val-share {self.val_share:g} stands with --train.split {self.split}.",
                "Validation is held out of the split `train`; the run was not started.",
                "Leave one of them out.",
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class RunConfig:
    """Everything that decides a run, besides the dataset and the machines."""

    model: ModelConfig = field(default_factory=ModelConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    plan: PlanConfig = field(default_factory=PlanConfig)
    stream: StreamConfig = field(default_factory=StreamConfig)
    batch: BatchConfig = field(default_factory=BatchConfig)
    train: TrainConfig = field(default_factory=TrainConfig)

    @property
    def hash(self) -> str:
        return digest(canonical_json(to_dict(self)).encode())[:12]


def to_dict(config: Any) -> dict[str, Any]:
    """Plain JSON values, nested as the tree."""
    return dataclasses.asdict(config)


def from_dict(cls: type[Any], values: Mapping[str, Any], where: str = "config") -> Any:
    """The inverse of `to_dict` for any of our config classes. An unknown name is refused with the nearest ones."""
    hints, names = typing.get_type_hints(cls), [f.name for f in dataclasses.fields(cls)]
    for name in values:
        if name not in names:
            near = get_close_matches(name, names, n=3)
            raise MicaclError(
                f"{where} has the unknown field {name!r}.",
                "It was written by another release, or by hand.",
                f"Known here: {', '.join(near or names)}.",
            )
    missing = [name for name in names if name not in values]
    if missing:
        raise MicaclError(
            f"{where} lacks the field {missing[0]!r}.",
            "A default in its place could be another model.",
            "Use what this release wrote: train or export again.",
        )
    return cls(**{name: _value(hints[name], value, f"{where}.{name}") for name, value in values.items()})


def _value(hint: Any, value: Any, where: str) -> Any:
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return from_dict(hint, value, where)
    if typing.get_origin(hint) is tuple and isinstance(value, list):
        return tuple(value)
    if isinstance(hint, types.UnionType) and isinstance(value, list):
        return tuple(value)
    return value


def first_difference(a: Any, b: Any, at: str = "") -> str:
    """The first field in which two JSON values differ, and both its values."""
    if isinstance(a, dict) and isinstance(b, dict):
        for key in sorted({*a, *b}):
            if a.get(key) != b.get(key):
                return first_difference(a.get(key), b.get(key), f"{at}.{key}" if at else key)
    return f"{at}: {a!r}, now {b!r}"
