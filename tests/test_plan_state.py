"""The plan's hash and state, what it refuses, and in which words. Each test has been seen to fail."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from pipeline.contract import MicaclError
from pipeline.plan import EpochPlan, PlanConfig, PlanIndex, PlanState, require_same_plan
from pipeline.runs import Runs
from tests.plan_checks import batches, make_rows

ROWS = make_rows([20, 4])


def plan_of(config: PlanConfig | None = None, epoch: int = 3, version: str = "v7", **columns: Any) -> EpochPlan:
    return EpochPlan(dataclasses.replace(ROWS, **columns).index(version), config or PlanConfig(), epoch)


def test_the_hash_covers_rows_and_config_and_not_the_epoch() -> None:
    moved = ROWS.groups_N.copy()
    moved[0] += 1
    other = [
        plan_of(labels_N=ROWS.labels_N[::-1]),
        plan_of(shards_N=ROWS.shards_N[::-1]),
        plan_of(groups_N=moved),
        EpochPlan(PlanIndex.of_columns(ROWS.labels_N, ROWS.shards_N, 2), PlanConfig(), 3),
        *(
            plan_of(PlanConfig(**change))
            for change in (
                {"seed": 1}, {"policy": "sqrt"}, {"global_batch": 8}, {"shard_window": 2}, {"steps_per_epoch": 3},
                {"second": "subject"}, {"clips_per_class": 1}, {"then": "sqrt"}, {"then": "sqrt", "then_from": 1},
                {"then": "sqrt", "then_over": 1}, {"beta": 0.9}, {"power": 1.0},
                {"policy": "custom", "weights": (1.0, 2.0)}, {"policy": "custom", "weights": (2.0, 1.0)},
            )
        ),
    ]  # fmt: skip
    hashes = {plan.hash for plan in [plan_of(), *other]}
    assert len(hashes) == 1 + len(other)
    assert {plan_of(epoch=epoch).hash for epoch in (0, 3, 900)} == {plan_of().hash}


def test_the_hash_does_not_depend_on_the_cut_of_runs_or_the_width_of_columns() -> None:
    singles = Runs(ROWS.labels_N, ROWS.shards_N, np.ones(24, np.int64))
    cut = EpochPlan(PlanIndex(singles, 2, groups=ROWS.groups_N, version="v7"), PlanConfig(), 3)
    narrow = plan_of(
        labels_N=ROWS.labels_N.astype(np.int8),
        shards_N=ROWS.shards_N.astype(np.uint16),
        groups_N=ROWS.groups_N.astype(np.int16),
    )
    for plan in (cut, narrow):
        assert plan.hash == plan_of().hash
        assert np.array_equal(batches(plan), batches(plan_of()))


def test_state_survives_json_and_refuses_another_plan() -> None:
    plan = plan_of()
    state = plan.state(2)
    assert PlanState.from_dict(state.to_dict()) == state == PlanState("v7", plan.hash, 3, 2, 16)
    require_same_plan(state, plan)
    require_same_plan(state, plan_of(epoch=9))

    with pytest.raises(MicaclError, match=r"dataset version v7 and this run has v8\. .* not resumed.* start a new run"):
        require_same_plan(state, plan_of(version="v8"))
    with pytest.raises(MicaclError, match=r"dataset version v7 and this run has \(none\)"):
        require_same_plan(state, plan_of(version=""))
    with pytest.raises(MicaclError, match="at step 99 of an epoch of 2 steps"):
        require_same_plan(plan.state(99), plan)
    with pytest.raises(MicaclError, match="with global batch 16 and this run has 8"):
        require_same_plan(state, plan_of(PlanConfig(global_batch=8)))
    with pytest.raises(MicaclError, match="with plan"):
        require_same_plan(state, plan_of(PlanConfig(seed=1)))


@pytest.mark.parametrize(
    "change",
    [{"step": "2"}, {"step": True}, {"plan": None}, {"extra": 1}, {"global_batch": 1.0}],
    ids=["text", "bool", "none", "unknown", "float"],
)
def test_a_damaged_state_is_refused(change: dict[str, Any]) -> None:
    good = PlanState("v7", "00", 3, 2, 16).to_dict()
    with pytest.raises(MicaclError, match=r"does not have the parts version, plan, epoch, step, global_batch"):
        PlanState.from_dict({**good, **change})
    with pytest.raises(MicaclError, match="does not have the parts"):
        PlanState.from_dict({name: part for name, part in good.items() if name != "epoch"})
    for odd in ({"step": -1}, {"epoch": -1}, {"epoch": 10**9}):
        with pytest.raises(MicaclError, match="is of no epoch from 0 to 1000000"):
            PlanState.from_dict({**good, **odd})


def test_bad_rows_are_refused_in_words() -> None:
    def index(labels: list[int], classes: int, **rest: Any) -> EpochPlan:
        return EpochPlan(PlanIndex.of_columns(labels, labels, classes, **rest), PlanConfig(), 0)

    with pytest.raises(MicaclError, match=r"Of the 3 classes \(counted from 0\), number 1 has no clips.* Add clips"):
        index([0, 2], 3)
    with pytest.raises(MicaclError, match=r"Label 3 is outside the 3 classes\. No epoch.* Use the label set"):
        index([0, 1, 2, 3], 3)
    with pytest.raises(MicaclError, match="Label -1 is outside"):
        index([0, -1], 1)
    with pytest.raises(MicaclError, match=r"The split 'train' of s3://x has no clips\. .* prepare the dataset again"):
        index([], 3, name="'train' of s3://x ")
    with pytest.raises(ValueError, match=r"groups have shape \(1,\), expected \(2,\)"):
        index([0, 0], 1, groups=[4])


def test_a_second_key_without_groups_and_an_epoch_before_the_first_are_refused() -> None:
    index = PlanIndex.of_columns([0, 1], [0, 1], 2)
    with pytest.raises(ValueError, match="'scene', and the index has no groups"):
        EpochPlan(index, PlanConfig(second="scene"), 0)
    with pytest.raises(ValueError, match="epoch is -1"):
        EpochPlan(index, PlanConfig(), -1)


def test_uneven_ranks_and_places_outside_are_refused() -> None:
    plan = plan_of()
    with pytest.raises(MicaclError, match=r"global-batch 16 is not a multiple of 3 ranks.*such as 18"):
        plan.rank_positions(0, 0, 3)
    for rank, ranks in ((-1, 2), (2, 2), (0, 0)):
        with pytest.raises(ValueError, match="expected 0 <= rank < ranks"):
            plan.rank_positions(0, rank, ranks)
    for position in (-1, len(plan)):
        with pytest.raises(IndexError, match="outside this epoch of 32 clips"):
            plan[position]
    for step in (-1, plan.steps):
        with pytest.raises(IndexError, match="outside this epoch of 2 steps"):
            plan.batch(step)


@pytest.mark.parametrize("second", ["", "subject"])
def test_open_shards_are_two_windows_or_all_of_a_class(second: str) -> None:
    rows = make_rows([100, 30, 1], 10)
    plan = rows.plan(PlanConfig(shard_window=2, second=second))
    assert plan.open_shards_C.tolist() == ([10, 3, 1] if second else [4, 3, 1])
    assert plan.quota_C.sum() == 16
