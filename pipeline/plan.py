"""Which clip comes when: the class-balanced plan of an epoch, a pure function of the index.

    plan = EpochPlan(labels=labels, shards=shards, classes=7, config=PlanConfig(policy="uniform"), epoch=3)
    plan[position] -> Draw(row, rng_key)

One sequence of positions is the whole epoch. Ranks and loader workers take stripes of it, and resuming drops a prefix
of it, so the clips seen by step s are the same at any number of ranks. The row at a position is decided in three steps,
each a function of (labels, shards, config, epoch) and of nothing that happened before:

* *how many of each class are in batch s*: floor or ceil of the quota, and after s batches less than one clip away from
  s * quota (`pipeline.quotas`).
* *in which order*: the classes of a batch are shuffled by a key of (seed, epoch, step): a stripe sees no pattern.
* *which clip of the class*: without replacement, cycle after cycle, shards first, so that a reader has few shards of a
  class open at a time (`_ClassOrder`).

Only the raw bits of Philox, keyed by SeedSequence, are used. numpy promises those to be the same in every release; it
does not promise that of `Generator.permutation`. docs/sampling.md has the invariants and their proofs.

Legend: C classes, G clips per global batch, N rows.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from pipeline.contract import MicaclError, canonical_json
from pipeline.quotas import POLICIES, UNIT, Quotas, quota_units

Ints = npt.NDArray[np.int64]
Column = npt.NDArray[np.integer[Any]]

PLAN_ALGORITHM = 1
"""Part of every plan hash. Raised when the same input would give another sequence."""

_MASTER, _CYCLE, _MIX, _DRAW = range(4)  # the first word of each key: no two uses share their bits


@dataclass(frozen=True, kw_only=True, slots=True)
class PlanConfig:
    """What decides the order of an epoch, besides the index."""

    policy: str = "uniform"
    """Share of each class: `natural`, `sqrt`, `effective` (number of samples) or `uniform`."""
    beta: float = 0.999
    """Of the effective number, 0 <= beta < 1; 0 is natural and near 1 is uniform. Other policies do not read it."""
    global_batch: int = 16
    """Clips per step over all ranks."""
    steps_per_epoch: int | None = None
    """None: ceil(rows / global_batch)."""
    shard_window: int = 4
    """Shards of a class whose clips are mixed with each other; a reader keeps at most two windows per class."""
    seed: int = 0

    def __post_init__(self) -> None:
        if self.policy not in POLICIES:
            _refuse(f"--plan.policy is {self.policy!r}.", f"Use one of {', '.join(POLICIES)}.")
        if not 0 <= self.beta < 1:
            _refuse(f"--plan.beta is {self.beta}.", "Use 0 <= beta < 1, such as 0.999.")
        for name, least in {"global_batch": 1, "steps_per_epoch": 1, "shard_window": 1, "seed": 0}.items():
            value = getattr(self, name)
            if value is not None and value < least:
                _refuse(f"--plan.{name.replace('_', '-')} is {value}.", f"Use {least} or more.")


class Draw(NamedTuple):
    """One clip of the plan."""

    row: int
    """Of the index."""
    rng_key: tuple[int, int]
    """Key for np.random.Philox(key=...), of (seed, epoch, position) alone: the clip's augmentation is fixed by it."""


def class_weights(counts: npt.ArrayLike, config: PlanConfig) -> npt.NDArray[np.float64]:
    """Share of each class in the draws, shape (C,), summing to 1; times `global_batch` it is the quota per batch.

    natural: n; sqrt: sqrt(n); uniform: 1; effective: n / E(n) with E(n) = (1 - beta^n) / (1 - beta), that is, each clip
    is drawn in proportion to the weight of Cui et al., Class-Balanced Loss Based on Effective Number of Samples
    (CVPR 2019). Shares are rounded so that quotas are whole multiples of 2^-20 clip per batch, at least one each.
    `counts` are rows per class. Raises MicaclError for a class without rows.
    """
    return _units(counts, config) / (UNIT * config.global_batch)


class EpochPlan:
    """The sequence of one epoch: `steps` global batches of `config.global_batch` clips.

    Memory: about 24 bytes a row of the classes that have been asked for, and 4 bytes a step and class.
    """

    def __init__(
        self,
        *,
        labels: npt.ArrayLike,
        shards: npt.ArrayLike,
        classes: int,
        config: PlanConfig,
        epoch: int,
        version: str = "",
    ) -> None:
        """`labels` and `shards`: class index and shard index of each row, shape (N,), in the order of the index.

        `classes`: size of the label set. `version`: the dataset version, kept in the state and not in the hash.
        Raises MicaclError for rows that do not fit together and for a class without rows.
        """
        self.labels, self.shards = _whole_numbers(labels, "labels"), _whole_numbers(shards, "shards")
        self.classes, self.config, self.epoch, self.version = classes, config, epoch, version
        _require_rows(self.labels, self.shards, classes, epoch)
        self.steps: int = config.steps_per_epoch or -(-len(self.labels) // config.global_batch)
        self._quotas = Quotas(_units(np.bincount(self.labels, minlength=classes), config), self.steps)
        self._orders: dict[int, _ClassOrder] = {}
        self._last: tuple[int, Ints] = (-1, np.empty(0, np.int64))

    def __len__(self) -> int:
        """Positions: steps * global_batch."""
        return self.steps * self.config.global_batch

    def __getitem__(self, position: int) -> Draw:
        """The clip at a position of the epoch, 0 <= position < len. Raises IndexError outside."""
        if not 0 <= position < len(self):
            raise IndexError(f"Position {position} is outside this epoch of {len(self)} clips.")
        step, place = divmod(position, self.config.global_batch)
        last = self._last  # read once: reader threads share a plan
        if last[0] != step:
            self._last = last = (step, self.batch(step))
        low, high = _bits(2, self.config.seed, _DRAW, self.epoch, position).tolist()
        return Draw(int(last[1][place]), (low, high))

    def __iter__(self) -> Iterator[Draw]:
        """Every Draw in order."""
        return map(self.__getitem__, range(len(self)))

    def batch(self, step: int) -> Ints:
        """Rows of one global batch in the order of its positions, shape (G,). Raises IndexError outside the epoch."""
        self._require_step(step)
        before_C, after_C = self._quotas.before(step), self._quotas.before(step + 1)
        class_G = np.repeat(np.arange(self.classes), after_C - before_C)
        class_G = class_G[np.argsort(_bits(len(class_G), self.config.seed, _MIX, self.epoch, step), kind="stable")]
        row_G = np.empty(len(class_G), np.int64)
        for label in np.unique(class_G).tolist():
            row_G[class_G == label] = self._order(label).draws(int(before_C[label]), int(after_C[label]))
        return row_G

    def rank_positions(self, step: int, rank: int, ranks: int) -> Ints:
        """Positions of one rank in one step: those with position % ranks == rank, shape (global_batch / ranks,).

        Raises MicaclError when the global batch cannot be shared evenly, IndexError outside the epoch.
        """
        self._require_step(step)
        _require_rank(rank, ranks)
        clips = self.config.global_batch
        if clips % ranks:
            raise MicaclError(
                f"--plan.global-batch {clips} is not a multiple of {ranks} ranks.",
                "The ranks would take unequal parts of a step.",
                f"Use a global batch such as {-(-clips // ranks) * ranks}, or a number of ranks that divides {clips}.",
            )
        return np.arange(step * clips + rank, (step + 1) * clips, ranks, dtype=np.int64)

    @cached_property
    def hash(self) -> str:
        """sha256 over the labels, shards, classes, config, steps and quotas, in hex. The epoch is not part of it."""
        head = [PLAN_ALGORITHM, asdict(self.config), self.classes, self.steps, self._quotas.units_C.tolist()]
        out = hashlib.sha256(canonical_json(head).encode())
        for column in (self.labels, self.shards):
            out.update(np.ascontiguousarray(column, "<i8").data)
        return out.hexdigest()

    def state(self, step: int) -> PlanState:
        """What a checkpoint keeps after `step` steps of this epoch."""
        return PlanState(self.version, self.hash, self.epoch, step)

    def _order(self, label: int) -> _ClassOrder:
        if label not in self._orders:
            self._orders[label] = _ClassOrder(self, label, int(self._quotas.before(self.steps)[label]))
        return self._orders[label]

    def _require_step(self, step: int) -> None:
        if not 0 <= step < self.steps:
            raise IndexError(f"Step {step} is outside this epoch of {self.steps} steps.")


class _ClassOrder:
    """The draws of one class in one epoch: whole cycles over its rows, then a part of one.

    Each whole cycle has a fresh order. The rows of the last, partial cycle are the next ones of a master order that is
    the same in every epoch, so epoch after epoch goes through the class evenly; their order is fresh again.
    """

    def __init__(self, plan: EpochPlan, label: int, draws: int) -> None:
        self.config, self.epoch, self.label = plan.config, plan.epoch, label
        self.rows = np.flatnonzero(plan.labels == label)
        self.shards: Ints = np.unique(plan.shards[self.rows], return_inverse=True)[1]
        self.whole_cycles, self.rest = divmod(draws, len(self.rows))
        self._last: tuple[int, Ints] = (-1, self.rows)

    def draws(self, start: int, stop: int) -> Ints:
        """Rows of the draws start..stop of this class in this epoch."""
        parts = []
        while start < stop:
            cycle, offset = divmod(start, len(self.rows))
            part = self._cycle(cycle)[offset : offset + stop - start]
            parts.append(part)
            start += len(part)
        return np.concatenate(parts)

    def _cycle(self, cycle: int) -> Ints:
        last = self._last
        if last[0] != cycle:
            members = np.arange(len(self.rows)) if cycle < self.whole_cycles else self._next_of_master()
            self._last = last = (cycle, self.rows[self._mixed(members, _CYCLE, self.epoch, self.label, cycle)])
        return last[1]

    def _next_of_master(self) -> Ints:
        master = self._mixed(np.arange(len(self.rows)), _MASTER, self.label)
        return master[(self.epoch * self.rest % len(master) + np.arange(self.rest)) % len(master)]

    def _mixed(self, members: Ints, *key: int) -> Ints:
        """`members` in an order that permutes shards, cuts them into windows and permutes inside each window."""
        shard = self.shards[members]
        present = np.flatnonzero(np.bincount(shard))
        bits = _bits(len(present) + len(members), self.config.seed, *key)
        rank = np.empty(present[-1] + 1, np.uint64)
        rank[present[np.argsort(bits[: len(present)], kind="stable")]] = np.arange(len(present))
        window = rank[shard] // np.uint64(self.config.shard_window)
        return members[np.argsort(window << np.uint64(40) | bits[len(present) :] >> np.uint64(24), kind="stable")]


@dataclass(frozen=True, slots=True)
class PlanState:
    """How far a run is: everything else follows from the dataset version and the config. The same at any rank count."""

    version: str
    """Dataset version."""
    plan: str
    """EpochPlan.hash."""
    epoch: int
    step: int
    """Steps of this epoch that are done; the next is plan.batch(step)."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> PlanState:
        """Raises MicaclError for anything but what `to_dict` gives."""
        types = {"version": str, "plan": str, "epoch": int, "step": int}
        if {name: type(part) for name, part in value.items()} != types or min(value["epoch"], value["step"]) < 0:
            _refuse_state(f"The sampling state {dict(value)!r} does not have the parts {', '.join(types)}.")
        return cls(**value)


def require_same_plan(state: PlanState, plan: EpochPlan) -> None:
    """Refuse to resume `state` with another dataset version or another plan. Raises MicaclError.

    The epoch is not compared, because any epoch of the plan has the same hash: build the plan with `state.epoch`.
    """
    for what, saved, now in (("dataset version", state.version, plan.version), ("plan", state.plan, plan.hash)):
        if saved != now:
            _refuse_state(f"It was made with {what} {saved or '(none)'} and this run has {now or '(none)'}.")
    if state.step > plan.steps:
        _refuse_state(f"It is at step {state.step} of an epoch of {plan.steps} steps.")


@dataclass(frozen=True, slots=True)
class SequentialPlan:
    """Every row once, in natural order, for evaluation and prediction at any number of ranks."""

    rows: int

    def __post_init__(self) -> None:
        if self.rows < 0:
            raise ValueError(f"rows is {self.rows}, which must be 0 or more")

    def rank_positions(self, rank: int, ranks: int) -> Ints:
        """Rows rank, rank + ranks, ... and then -1, shape (ceil(rows / ranks),): the same length on every rank.

        Where it says -1 a rank takes part in the step with any clip and drops the result.
        """
        _require_rank(rank, ranks)
        position = np.arange(rank, -(-self.rows // ranks) * ranks, ranks, dtype=np.int64)
        return np.where(position < self.rows, position, -1)


def _units(counts: npt.ArrayLike, config: PlanConfig) -> Ints:
    counts_C = np.asarray(counts, np.int64)
    return quota_units(counts_C, policy=config.policy, beta=config.beta, global_batch=config.global_batch)


def _bits(count: int, seed: int, *key: int) -> npt.NDArray[np.uint64]:
    """`count` random 64-bit words that are a function of the key."""
    return np.random.Philox(np.random.SeedSequence(seed, spawn_key=key)).random_raw(count)


def _whole_numbers(values: npt.ArrayLike, what: str) -> Column:
    array = np.asarray(values)
    if array.ndim != 1 or (len(array) and array.dtype.kind not in "iu"):
        raise ValueError(f"{what} have shape {array.shape} and type {array.dtype}, expected whole numbers (rows,)")
    return array


def _require_rows(labels: Column, shards: Column, classes: int, epoch: int) -> None:
    if len(labels) != len(shards) or epoch < 0:
        raise ValueError(f"{len(labels)} labels, {len(shards)} shards, epoch {epoch}: lengths must agree, epoch >= 0")
    if not len(labels):
        _refuse("The split has no clips.", "Choose a split with clips, or prepare the dataset again.")
    if labels.min() < 0 or labels.max() >= classes:
        wrong = int(labels.max() if labels.max() >= classes else labels.min())
        _refuse(f"Label {wrong} is outside the label set of {classes} classes.", "Use the label set of the dataset.")


def _require_rank(rank: int, ranks: int) -> None:
    if not 0 <= rank < ranks:
        raise ValueError(f"rank {rank} of {ranks} ranks: expected 0 <= rank < ranks")


def _refuse_state(cause: str) -> None:
    raise MicaclError(
        f"The checkpoint does not fit this run. {cause}",
        "Clips would be left out or seen twice, so the run was not resumed.",
        "Give the dataset version, seed, policy, global batch and steps of the checkpoint, or start a new run.",
    )


def _refuse(cause: str, remedy: str) -> None:
    raise MicaclError(cause, "No epoch can be planned.", remedy)
