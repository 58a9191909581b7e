"""What the plan promises, each promise as a function that fails when it is broken.

tests/test_plan.py calls them on the plan, tests/test_plan_mutations.py on plans that were broken on purpose.

Legend: C classes, G clips per global batch, N rows, S shards, T steps.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.plan import Draw, EpochPlan, PlanConfig, PlanIndex, PlanState, require_same_plan
from pipeline.policies import UNIT, shares

Ints = npt.NDArray[np.int64]

CHI2_999 = {1: 10.83, 4: 18.47, 6: 22.46, 7: 24.32}
"""Critical values of chi-square at p = 0.001 by degrees of freedom."""

DFEW = (1956, 1515, 2135, 1738, 1175, 116, 721)
"""Clips of the seven classes in the training part of DFEW's first fold."""


@dataclass(frozen=True, eq=False)
class Rows:
    """A made-up split: the class, shard and group of each row."""

    labels_N: Ints
    shards_N: Ints
    groups_N: Ints
    classes: int

    def index(self, version: str = "") -> PlanIndex:
        """Made anew, as a new process would."""
        return PlanIndex.of_columns(
            self.labels_N, self.shards_N, self.classes, groups=self.groups_N, version=version, name="'train' "
        )

    def plan(self, config: PlanConfig, epoch: int = 0) -> EpochPlan:
        return EpochPlan(self.index(), config, epoch)

    def of_class(self, label: int) -> Ints:
        return np.flatnonzero(self.labels_N == label)


def make_rows(counts: Sequence[int], shard_rows: int | Sequence[int] = 8, groups: int = 3, seed: int = 0) -> Rows:
    """Class-pure shards of `shard_rows` (one size, or sizes that come round); rows in random order, or by shard.

    Groups of a class have unequal sizes. `seed` -1: rows in the order of classes and shards.
    """
    sizes = [shard_rows] if isinstance(shard_rows, int) else list(shard_rows)
    rng = np.random.default_rng(max(seed, 0))
    label = np.repeat(np.arange(len(counts)), counts)
    shard, group = [], []
    for c, count in enumerate(counts):
        size_S = np.resize(sizes, count)
        shard.append(c * 1000 + np.repeat(np.arange(count), size_S)[:count])
        group.append(c * 1000 + np.minimum(rng.geometric(0.4, count), groups))
    order = np.arange(len(label)) if seed < 0 else rng.permutation(len(label))
    return Rows(label[order], np.concatenate(shard)[order], np.concatenate(group)[order], len(counts))


def batches(plan: EpochPlan) -> Ints:
    """Rows of every step, shape (T, G)."""
    rows_T = [plan.batch(step) for step in range(plan.steps)]
    assert {len(row_G) for row_G in rows_T} == {plan.config.global_batch}
    return np.stack(rows_T)


def chi2(observed: npt.ArrayLike, expected: npt.ArrayLike) -> float:
    o, e = np.asarray(observed, float), np.asarray(expected, float)
    return float(((o - e) ** 2 / e).sum())


def drawn_by_class(rows: Rows, plan: EpochPlan) -> list[list[int]]:
    """Of each class its rows in the order of the epoch."""
    row_N = batches(plan).ravel()
    return [row_N[rows.labels_N[row_N] == label].tolist() for label in range(rows.classes)]


def require_even(drawn: Iterable[int], among: Iterable[int]) -> None:
    """At every draw, uses differ by at most one: what is drawn is never ahead of another."""
    use = dict.fromkeys(among, 0)
    lap, behind = 0, len(use)
    for item in drawn:
        assert use[item] == lap, f"{item} comes again before all others have come"
        use[item] += 1
        behind -= 1
        if not behind:
            lap, behind = lap + 1, len(use)


def check_batch_counts(rows: Rows, config: PlanConfig, epoch: int) -> None:
    """Floor or ceil of the quota in each batch, less than one clip away at each step, exact at the end, all G."""
    plan = rows.plan(config, epoch)
    row_TG = batches(plan)
    assert row_TG.shape == (plan.steps, config.global_batch)
    assert row_TG.size == len(plan) == plan.draws_C.sum()
    count_TC = np.stack([np.bincount(rows.labels_N[row_G], minlength=rows.classes) for row_G in row_TG])
    assert np.all(count_TC >= plan.draws_C // plan.steps)
    assert np.all(count_TC <= -(-plan.draws_C // plan.steps))
    assert np.all(count_TC >= config.clips_per_class)
    done_T1 = np.arange(1, plan.steps + 1)[:, None]
    away_TC = np.abs(np.cumsum(count_TC, axis=0) * plan.steps - done_T1 * plan.draws_C)  # in 1/steps clip: exact
    assert np.all(away_TC < plan.steps)
    assert np.all(away_TC[-1] == 0)


def check_epoch_totals(rows: Rows, config: PlanConfig, epochs: int) -> None:
    """After each epoch a class is less than one clip away from the sum of its shares; no epoch is below the floor."""
    index = rows.index()
    given_C, due_C = [0] * rows.classes, [0] * rows.classes
    for epoch in range(epochs):
        plan = EpochPlan(index, config, epoch)
        assert plan.draws_C.sum() == len(plan)
        assert plan.draws_C.min() >= plan.steps * config.clips_per_class
        given_C = [a + int(b) for a, b in zip(given_C, plan.draws_C, strict=True)]
        due_C = [a + int(b) * len(plan) for a, b in zip(due_C, shares(index.counts, config, epoch), strict=True)]
        slack = (epoch + 1) * len(plan) * rows.classes if config.clips_per_class else 0  # shares at the floor: 1/UNIT
        assert max(abs(a * UNIT - b) for a, b in zip(given_C, due_C, strict=True)) < UNIT + slack


def check_use(rows: Rows, config: PlanConfig, epoch: int) -> None:
    """Within an epoch, at every draw, uses within a class differ by at most one; with a second key, see below."""
    for label, drawn in enumerate(drawn_by_class(rows, rows.plan(config, epoch))):
        members = rows.of_class(label)
        if not config.second:
            require_even(drawn, members.tolist())
            continue
        group_of = dict(zip(members.tolist(), rows.groups_N[members].tolist(), strict=True))
        require_even([group_of[row] for row in drawn], set(group_of.values()))
        for group in set(group_of.values()):
            of_group = [row for row in members.tolist() if group_of[row] == group]
            require_even([row for row in drawn if group_of[row] == group], of_group)


def check_use_over_epochs(rows: Rows, config: PlanConfig, epochs: int) -> None:
    """The same after each of a number of epochs."""
    use_N = np.zeros(len(rows.labels_N), np.int64)
    for epoch in range(epochs):
        use_N += np.bincount(batches(rows.plan(config, epoch)).ravel(), minlength=len(use_N))
        for label in range(rows.classes):
            members = rows.of_class(label)
            if not config.second:
                assert np.ptp(use_N[members]) <= 1
                continue
            sets = [members[rows.groups_N[members] == group] for group in np.unique(rows.groups_N[members])]
            assert np.ptp([use_N[members_of_group].sum() for members_of_group in sets]) <= 1
            assert all(np.ptp(use_N[members_of_group]) <= 1 for members_of_group in sets)


def check_working_set(rows: Rows, config: PlanConfig, epoch: int) -> None:
    """One window is open at a time, a shard is entered once a cycle, and a cache of `open_shards_C` never refetches."""
    plan = rows.plan(config, epoch)
    for label, drawn in enumerate(drawn_by_class(rows, plan)):
        n, shards = len(rows.of_class(label)), rows.shards_N[drawn]
        fetched = 0
        for cycle_T in [shards[i : i + n] for i in range(0, len(shards), n)]:
            of_cycle = len(np.unique(cycle_T)) + int(len(cycle_T) < n)  # an arc may begin and end in one shard
            fetched += of_cycle
            assert _fetches(cycle_T.tolist(), config.shard_window) <= of_cycle
            assert len(cycle_T) < n or most_open(cycle_T) <= config.shard_window
        assert _fetches(shards.tolist(), int(plan.open_shards_C[label])) <= fetched


def most_open(shard_T: Ints) -> int:
    """Most shards between their first and their last draw at one time."""
    _, first = np.unique(shard_T, return_index=True)
    _, back = np.unique(shard_T[::-1], return_index=True)
    change = np.bincount(first, minlength=len(shard_T) + 1)
    change -= np.bincount(len(shard_T) - back, minlength=len(shard_T) + 1)
    return int(np.cumsum(change).max())


def _fetches(shard_T: list[int], room: int) -> int:
    """Times that a cache of so many shards fetches one: the longest unused goes."""
    cache: OrderedDict[int, None] = OrderedDict()
    fetched = 0
    for shard in shard_T:
        fetched += shard not in cache
        cache[shard] = None
        cache.move_to_end(shard)
        if len(cache) > room:
            cache.popitem(last=False)
    return fetched


def check_pure(rows: Rows, config: PlanConfig, epoch: int) -> None:
    """Any draw in any order, of a used plan or of a fresh one, is the draw of a pass in order."""
    in_order = list(rows.plan(config, epoch))
    assert [draw.position for draw in in_order] == list(range(len(in_order)))
    plan = rows.plan(config, epoch)
    for position in np.random.default_rng(0).permutation(len(plan))[:100].tolist():
        assert plan[position] == in_order[position]
    for position in (len(plan) - 1, len(plan) // 2):
        assert rows.plan(config, epoch)[position] == in_order[position]


def check_keys(plans: Sequence[EpochPlan]) -> None:
    """Keys are distinct over all draws of all plans, which differ in seed or epoch."""
    keys = [draw.rng_key for plan in plans for draw in plan]
    assert len(set(keys)) == len(keys)


def check_ranks(rows: Rows, config: PlanConfig, ranks: Iterable[int], stop: int) -> None:
    """Two epochs are the same at any number of ranks, stopped at step `stop` of them and gone on with another."""
    steps = rows.plan(config).steps
    plans = [rows.plan(config, epoch) for epoch in (0, 1)]
    whole = [draw for plan in plans for draw in plan]
    many = list(ranks)
    for before, after in zip(many, many[1:] + many[:1], strict=True):
        epoch, step = divmod(stop, steps)
        seen = [clip for s in range(stop) for clip in _step_of_ranks(plans[s // steps], s % steps, before)]
        saved: dict[str, Any] = json.loads(json.dumps(rows.plan(config, epoch).state(step).to_dict()))
        state = PlanState.from_dict(saved)
        require_same_plan(state, rows.plan(config, state.epoch))
        first = state.epoch * steps + state.step
        fresh = [rows.plan(config, epoch) for epoch in (0, 1)]  # all that a new process knows
        for s in range(first, 2 * steps):
            seen += _step_of_ranks(fresh[s // steps], s % steps, after)
        assert seen == whole


def _step_of_ranks(plan: EpochPlan, step: int, ranks: int) -> list[Draw]:
    """The clips of all ranks in one step, in the order of their places."""
    of_rank = [plan.draws(step, rank, ranks) for rank in range(ranks)]
    assert {len(clips) for clips in of_rank} == {plan.config.global_batch // ranks}
    return [clip for clips in zip(*of_rank, strict=True) for clip in clips]


def check_no_pattern(seed: int) -> None:
    """A rank sees the classes in proportion, and the class after a class is free."""
    rows = make_rows([40, 40, 40, 40, 40])
    plan = rows.plan(PlanConfig(global_batch=10, steps_per_epoch=2000, seed=seed))
    class_T = rows.labels_N[batches(plan)[:, 3]]  # one place of each step
    assert chi2(np.bincount(class_T, minlength=5), np.full(5, 400)) < CHI2_999[4]
    repeats = int((class_T[1:] == class_T[:-1]).sum())
    assert chi2([repeats, 1999 - repeats], [1999 / 5, 1999 * 4 / 5]) < CHI2_999[1]
