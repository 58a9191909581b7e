"""Which clip comes when: the class-balanced plan of an epoch, a pure function of the index.

    plan = EpochPlan(index, PlanConfig(policy="uniform"), epoch=3)
    plan[position] -> Draw(row, rng_key)

One sequence of positions is the whole epoch. Ranks and loader workers take stripes of it, and resuming drops a prefix
of it, so the clips seen by step s are the same at any number of ranks. The row at a position is decided in three steps,
each a function of (index, config, epoch) and of nothing that happened before:

* *how many of each class are in batch s*: floor or ceil of the quota, exact over the epoch (`pipeline.quotas`).
* *in which order*: the classes of a batch are shuffled by a key of (seed, epoch, step): a stripe sees no pattern.
* *which clip of the class*: without replacement, cycle after cycle, some shards at a time (`pipeline.class_order`).

docs/sampling.md has the invariants, their proofs and pictures.

Legend: C classes, G clips per global batch, N rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from pipeline.class_order import ClassOrder, Cycles, GroupedOrder, Order, random_words, shuffled
from pipeline.contract import MicaclError, canonical_json, digest
from pipeline.policies import POLICIES, PlanConfig, class_weights, refuse, shares
from pipeline.quotas import BatchCounts, totals_of
from pipeline.runs import ClassRows, Ints, Runs

__all__ = ["POLICIES", "Draw", "EpochPlan", "PlanConfig", "PlanIndex", "PlanState", "SequentialPlan", "class_weights"]

PLAN_ALGORITHM = 2
"""Part of every plan hash. Raised when the same input would give another sequence."""

MAX_EPOCH = 10**6
"""The totals of all epochs before are added up, some 20 us each."""

_MIX, _DRAW = 16, 17  # the first word of each key; pipeline.class_order has 0 to 3


class Draw(NamedTuple):
    """One clip of the plan."""

    row: int
    """Of the index."""
    rng_key: tuple[int, int]
    """Key for np.random.Philox(key=...), of (seed, epoch, position) alone: the clip's augmentation is fixed by it."""
    position: int = -1
    """In the epoch."""


class PlanIndex:
    """What all plans of a dataset version share: its rows as runs, by class. Memory: some 50 bytes a run."""

    def __init__(
        self, runs: Runs, classes: int, *, groups: npt.ArrayLike | None = None, version: str = "", name: str = ""
    ) -> None:
        """`classes`: size of the label set. `groups`: number of the subject or scene of each row, shape (N,).

        `version`: what the rows were taken from, kept in the state and not in the hash. Raises MicaclError for an
        empty split and for labels outside the label set, ValueError for rows that do not fit together.
        """
        self.runs, self.classes, self.version = runs, classes, version
        self.groups_N = None if groups is None else np.asarray(groups)
        if self.groups_N is not None and self.groups_N.shape != (runs.rows,):
            raise ValueError(f"groups have shape {self.groups_N.shape}, expected ({runs.rows},)")
        if not runs.rows:
            refuse(f"The split {name}has no clips.", "Choose a split with clips, or prepare the dataset again.")
        try:
            self.counts = tuple(runs.class_counts(classes).tolist())
        except ValueError as error:
            refuse(f"Label {error} is outside the {classes} classes.", "Use the label set of the dataset.")
        self._of_class: dict[int, ClassRows] = {}

    @classmethod
    def of_columns(cls, labels: npt.ArrayLike, shards: npt.ArrayLike, classes: int, **rest: Any) -> PlanIndex:
        """From the class index and shard index of each row, shape (N,), in the order of the index."""
        return cls(Runs.of_columns(labels, shards), classes, **rest)

    def of_class(self, label: int) -> ClassRows:
        if label not in self._of_class:
            self._of_class[label] = self.runs.of_class(label)
        return self._of_class[label]

    @cached_property
    def hash(self) -> str:
        """sha256 over all that a plan reads."""
        groups = "" if self.groups_N is None else digest(np.ascontiguousarray(self.groups_N, "<i8").tobytes())
        return digest(canonical_json([self.classes, self.runs.hash, groups]).encode())


class EpochPlan:
    """The sequence of one epoch: `steps` global batches of `config.global_batch` clips.

    Cheap to make: what a class draws is worked out shard window by shard window as it is asked for.
    """

    def __init__(self, index: PlanIndex, config: PlanConfig, epoch: int) -> None:
        """Raises MicaclError for a class without rows, and for a config that does not fit the index."""
        if epoch < 0:
            raise ValueError(f"epoch is {epoch}, which must be 0 or more")
        if config.second and index.groups_N is None:
            raise ValueError(f"plan.second is {config.second!r}, and the index has no groups")
        self.index, self.config, self.epoch = index, config, epoch
        self.steps: int = config.steps_per_epoch or -(-index.runs.rows // config.global_batch)
        totals = totals_of(index.counts, config, self.steps)
        self.draws_C, self._before_C = totals.of(epoch), totals.before(epoch)
        self._counts = BatchCounts(self.draws_C, self.steps)
        self._orders: dict[int, Order] = {}
        self._last: tuple[int, Ints] = (-1, np.empty(0, np.int64))
        self._key = int(random_words(1, config.seed, _DRAW, epoch)[0])

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
        return Draw(int(last[1][place]), (self._key, position), position)

    def __iter__(self) -> Iterator[Draw]:
        """Every Draw in order."""
        return map(self.__getitem__, range(len(self)))

    def batch(self, step: int) -> Ints:
        """Rows of one global batch in the order of its positions, shape (G,). Raises IndexError outside the epoch."""
        self._require_step(step)
        before_C, after_C = self._counts.before(step), self._counts.before(step + 1)
        class_G = np.repeat(np.arange(self.index.classes), after_C - before_C)
        class_G = class_G[shuffled(len(class_G), self.config.seed, _MIX, self.epoch, step)]
        row_G = np.empty(len(class_G), np.int64)
        for label in np.flatnonzero(after_C - before_C).tolist():
            row_G[class_G == label] = self._order(label).rows(int(before_C[label]), int(after_C[label]))
        return row_G

    def draws(self, step: int, rank: int = 0, ranks: int = 1) -> list[Draw]:
        """The clips of one rank in one step."""
        return [self[position] for position in self.rank_positions(step, rank, ranks).tolist()]

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

    @property
    def quota_C(self) -> npt.NDArray[np.float64]:
        """Clips of each class per global batch, shape (C,): the batches have floor or ceil of it."""
        return np.asarray(self.draws_C / self.steps, np.float64)

    @property
    def open_shards_C(self) -> Ints:
        """Most shards of each class that the next clips can come from, shape (C,): one window, or two between cycles.

        With a second key the turns go across all shards of the class.
        """
        of_class = np.array([len(self.index.of_class(label).sizes_S) for label in range(self.index.classes)])
        return of_class if self.config.second else np.minimum(of_class, 2 * self.config.shard_window)

    @cached_property
    def hash(self) -> str:
        """sha256 over the index, config, steps and shares, in hex. The epoch is not part of it."""
        return plan_hash(self.index, self.config, self.steps)

    def state(self, step: int) -> PlanState:
        """What a checkpoint keeps after `step` steps of this epoch."""
        return PlanState(self.index.version, self.hash, self.epoch, step, self.config.global_batch)

    def _order(self, label: int) -> Order:
        if label not in self._orders:
            self._orders[label] = self._make_order(label)
        return self._orders[label]

    def _make_order(self, label: int) -> Order:
        def cycles_of(sizes_S: Ints, before: int, draws: int, key: tuple[int, ...]) -> Cycles:
            window, seed = self.config.shard_window, self.config.seed
            where = (label, *key)
            return Cycles(sizes_S, before=before, draws=draws, window=window, seed=seed, key=where, epoch=self.epoch)

        members, past = self.index.of_class(label), (int(self._before_C[label]), int(self.draws_C[label]))
        if not self.config.second or self.index.groups_N is None:
            return ClassOrder(members, cycles_of, *past)
        rows_N = members.rows(np.arange(len(members)))
        return GroupedOrder(rows_N, self.index.groups_N[rows_N], cycles_of, *past)

    def _require_step(self, step: int) -> None:
        if not 0 <= step < self.steps:
            raise IndexError(f"Step {step} is outside this epoch of {self.steps} steps.")


def plan_hash(index: PlanIndex, config: PlanConfig, steps: int) -> str:
    """sha256 over all that decides the order of every epoch, in hex."""
    ends = [0, config.then_from + config.then_over] if config.then else [0]
    units = [shares(index.counts, config, epoch).tolist() for epoch in ends]
    return digest(canonical_json([PLAN_ALGORITHM, asdict(config), steps, units, index.hash]).encode())


@dataclass(frozen=True, slots=True)
class PlanState:
    """How far a run is: everything else follows from the dataset version and the config. The same at any rank count."""

    version: str
    """Dataset version, and what was chosen of it."""
    plan: str
    """EpochPlan.hash."""
    epoch: int
    step: int
    """Steps of this epoch that are done; the next is plan.batch(step)."""
    global_batch: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> PlanState:
        """Raises MicaclError for anything but what `to_dict` gives."""
        types = {"version": str, "plan": str, "epoch": int, "step": int, "global_batch": int}
        if not isinstance(value, Mapping) or {name: type(part) for name, part in value.items()} != types:
            _refuse_state(f"The sampling state {value!r} does not have the parts {', '.join(types)}.")
        if min(value["epoch"], value["step"]) < 0 or value["epoch"] > MAX_EPOCH:
            _refuse_state(f"The sampling state {dict(value)!r} is of no epoch from 0 to {MAX_EPOCH}.")
        return cls(**value)


def require_same_plan(state: PlanState, plan: EpochPlan) -> None:
    """Refuse to resume `state` with another dataset version, global batch or plan. Raises MicaclError.

    The epoch is not compared, because any epoch of the plan has the same hash: build the plan with `state.epoch`.
    """
    for what, saved, now in (
        ("dataset version", state.version, plan.index.version),
        ("global batch", state.global_batch, plan.config.global_batch),
        ("plan", state.plan, plan.hash),
    ):
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


def _require_rank(rank: int, ranks: int) -> None:
    if not 0 <= rank < ranks:
        raise ValueError(f"rank {rank} of {ranks} ranks: expected 0 <= rank < ranks")


def _refuse_state(cause: str) -> None:
    raise MicaclError(
        f"The checkpoint does not fit this run. {cause}",
        "Clips would be left out or seen twice, so the run was not resumed.",
        "Give the dataset version, seed, policy, global batch and steps of the checkpoint, or start a new run.",
    )
