"""How often each class is drawn: a policy by name, a floor, and a schedule from one policy to another.

    policy      share of a class of n clips, before they are scaled to sum to 1
    natural     n
    sqrt        sqrt(n)
    power       n^power                  1 is natural, 0 is uniform, below 0 the tail comes more often than the head
    effective   n / E(n)                 E(n) = (1 - beta^n) / (1 - beta); each clip weighs what Cui et al. give it in
                                         Class-Balanced Loss Based on Effective Number of Samples (CVPR 2019)
    uniform     1
    custom      weights, one a class in the order of the label set

`clips_per_class` lifts every class to at least so many clips a batch and takes them from the others in proportion: a
supervised contrastive loss has no positive pair in a class with one clip. `then` is another policy that takes over at
epoch `then_from`, at once or in equal steps over `then_over` epochs: first learn from the data as it is, then balance
(deferred re-balancing: Cao et al., LDAM, NeurIPS 2019; decoupling: Kang et al., ICLR 2020).

Shares leave this room as whole numbers of 1/UNIT, so that all that follows is exact on every machine.

Legend: C classes.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import SupportsIndex

import numpy as np
import numpy.typing as npt

from pipeline.contract import MicaclError

POLICIES = ("natural", "sqrt", "power", "effective", "uniform", "custom")

SECOND_KEYS = ("subject", "scene")
"""Columns of the index that a class can be balanced over."""

UNIT = 2**40
"""Shares are whole numbers of 1/UNIT and sum to 1."""

_WHOLE = {
    "global_batch": (1, 2**20),
    "steps_per_epoch": (1, 2**30),
    "shard_window": (1, None),
    "seed": (0, None),
    "clips_per_class": (0, None),
    "then_from": (0, None),
    "then_over": (0, 10_000),
}
"""Least and most of each field that is a whole number. The most keeps counts of clips far below 2^63, and looking ahead
through a schedule short."""

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, slots=True)
class PlanConfig:
    """What decides the order of an epoch, besides the index."""

    policy: str = "uniform"
    """Share of each class: `natural`, `sqrt`, `power`, `effective` (number of samples), `uniform` or `custom`."""
    beta: float = 0.999
    """Of `effective`, 0 <= beta < 1; 0 is natural and near 1 is uniform. Other policies do not read it."""
    power: float = 0.5
    """Of `power`: the share is n^power."""
    weights: tuple[float, ...] = ()
    """Of `custom`: one a class, in the order of the label set."""
    then: str = ""
    """The policy of later epochs; none by default."""
    then_from: int = 0
    """Of `then`: the first epoch (counted from 0) whose shares differ from `policy`."""
    then_over: int = 0
    """Of `then`: epochs over which the shares move in equal steps; 0 is at once."""
    clips_per_class: int = 0
    """Fewest clips of each class in each global batch."""
    second: str = ""
    """Balance each class over its `subject`s or `scene`s too: they take turns, whatever the number of their clips."""
    global_batch: int = 16
    """Clips per step over all ranks."""
    steps_per_epoch: int | None = None
    """None: ceil(rows / global_batch)."""
    shard_window: int = 4
    """Shards of a class whose clips are mixed with each other; a reader keeps at most two windows per class."""
    seed: int = 0

    def __post_init__(self) -> None:
        self._to_plain()
        for name, policy in (("policy", self.policy), *([("then", self.then)] if self.then else [])):
            if policy not in POLICIES:
                refuse(f"--plan.{name} is {policy!r}.", f"Use one of {', '.join(POLICIES)}.")
        if not 0 <= self.beta < 1:
            refuse(f"--plan.beta is {self.beta}.", "Use 0 <= beta < 1, such as 0.999.")
        if not -4 <= self.power <= 4:
            refuse(f"--plan.power is {self.power}.", "Use a number from -4 to 4, such as 0.5.")
        if self.second and self.second not in SECOND_KEYS:
            refuse(f"--plan.second is {self.second!r}.", f"Use {' or '.join(SECOND_KEYS)}, or leave it out.")
        self._check_weights()

    def _to_plain(self) -> None:
        """Numbers of numpy become Python's, weights a tuple: equal configs have equal hashes. Refuses other kinds."""
        for name, (low, most) in _WHOLE.items():
            value = getattr(self, name)
            if value is None and name == "steps_per_epoch":
                continue
            flag = f"--plan.{name.replace('_', '-')} is {value!r}."
            if isinstance(value, bool) or not isinstance(value, SupportsIndex):
                refuse(flag, "Give a whole number.")
            if value < low:
                refuse(flag, f"Use {low} or more.")
            if most is not None and value > most:
                refuse(flag, f"Use a number from {low} to {most}.")
            object.__setattr__(self, name, operator.index(value))
        for name in ("beta", "power"):
            if not isinstance(value := getattr(self, name), int | float):
                refuse(f"--plan.{name} is {value!r}.", "Give a number.")
        try:
            object.__setattr__(self, "weights", tuple(float(weight) for weight in self.weights))
        except (TypeError, ValueError):
            refuse(f"--plan.weights is {self.weights!r}.", "Give a list of numbers, one a class.")

    def _check_weights(self) -> None:
        custom = "custom" in (self.policy, self.then)
        if custom != bool(self.weights) or not all(0 < w < float("inf") for w in self.weights):
            refuse(
                f"--plan.policy {self.policy!r} has the weights {list(self.weights)}.",
                "Give `custom` one weight above 0 for each class, in the order of the label set; other policies none.",
            )


def shares(counts_C: npt.ArrayLike, config: PlanConfig, epoch: int = 0) -> Ints:
    """Share of each class in the draws of an epoch in 1/UNIT, shape (C,): at least 1 each, UNIT in all.

    `counts_C` are rows per class. Raises MicaclError for a class without rows, for weights that do not fit the classes,
    and for a batch that cannot hold `clips_per_class` of each.
    """
    counts = np.asarray(counts_C, np.int64)
    _require_every_class(counts)
    share_C = _normal(counts, config.policy, config)
    if config.then:
        done = _moved(config, epoch)
        share_C = (1 - done) * share_C + done * _normal(counts, config.then, config)
    return _whole(_lifted(share_C, config), UNIT)


def class_weights(counts: npt.ArrayLike, config: PlanConfig, epoch: int = 0) -> Floats:
    """Share of each class in the draws, shape (C,), summing to 1; times `global_batch` it is the quota per batch."""
    return shares(counts, config, epoch) / UNIT


def _moved(config: PlanConfig, epoch: int) -> float:
    """How far the schedule is, 0 to 1."""
    late = epoch - config.then_from + 1
    return float(min(max(late, 0) / (config.then_over + 1), 1))


def _normal(counts_C: Ints, policy: str, config: PlanConfig) -> Floats:
    """Shares that sum to 1."""
    n_C = counts_C.astype(np.float64)
    if policy == "custom":
        if len(config.weights) != len(n_C):
            refuse(
                f"--plan.weights has {len(config.weights)} weights for {len(n_C)} classes.",
                "Give one for each class, in the order of the label set.",
            )
        share_C = np.array(config.weights) / max(config.weights)
    elif policy == "effective":
        share_C = n_C * (1 - config.beta) / -np.expm1(n_C * np.log(config.beta)) if config.beta else n_C
    else:
        exponent = {"natural": 1.0, "sqrt": 0.5, "power": config.power, "uniform": 0.0}[policy]
        share_C = n_C**exponent
    return np.asarray(share_C / share_C.sum(), np.float64)


def _lifted(share_C: Floats, config: PlanConfig) -> Floats:
    """Every class at least at the floor; what is left is shared in proportion, and again while that sinks another."""
    floor = config.clips_per_class / config.global_batch
    if config.clips_per_class * len(share_C) > config.global_batch:
        refuse(
            f"--plan.clips-per-class {config.clips_per_class} for {len(share_C)} classes needs a global batch of "
            f"{config.clips_per_class * len(share_C)}, it is {config.global_batch}.",
            "Raise --plan.global-batch, or lower the floor.",
        )
    low_C = np.zeros(len(share_C), bool)
    while True:
        free = 1 - floor * low_C.sum()
        rest = share_C[~low_C].sum()
        lifted_C = np.where(low_C, floor, share_C * (free / rest) if rest > 0 else 0)
        sunk_C = ~low_C & (lifted_C < floor)
        if not sunk_C.any():
            return np.asarray(lifted_C, np.float64)
        low_C |= sunk_C


def _whole(share_C: Floats, total: int) -> Ints:
    """Rounded to whole units, at least 1 each and `total` in all."""
    units_C = np.maximum(np.floor(share_C * total).astype(np.int64), 1)
    left = total - int(units_C.sum())
    units_C[np.argsort(units_C - share_C * total, kind="stable")[: max(left, 0)]] += 1
    units_C[np.argmax(units_C)] += min(left, 0)  # paid by the largest class when small ones were raised to one unit
    return np.asarray(units_C, np.int64)


def _require_every_class(counts_C: Ints) -> None:
    if np.any(counts_C < 1):
        empty = ", ".join(f"number {label}" for label in np.flatnonzero(counts_C < 1))
        refuse(
            f"Of the {len(counts_C)} classes (counted from 0), {empty} has no clips in this split.",
            "Add clips of it, or use a label set without it.",
        )


def refuse(cause: str, remedy: str) -> None:
    raise MicaclError(cause, "No epoch can be planned.", remedy)
