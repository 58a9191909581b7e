"""Properties of the epoch plan. Each of them has been seen to fail with the plan broken by hand."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.contract import MicaclError
from pipeline.plan import EpochPlan, PlanConfig, PlanState, SequentialPlan, class_weights, require_same_plan
from pipeline.quotas import POLICIES

CHI2_999 = {1: 10.83, 4: 18.47, 6: 22.46, 7: 24.32}
"""Critical values of chi-square at p = 0.001 by degrees of freedom."""

GOLDEN = [[6, 3, 8, 7], [1, 3, 4, 0], [5, 9, 2, 5]]
GOLDEN_KEY = (3563300510535703228, 7804919401577681149)

Ints = npt.NDArray[np.int64]


def index(counts: list[int], shard_rows: int = 8, seed: int = 0) -> dict[str, Any]:
    """Labels and class-pure shards of an index with its rows in random order."""
    label = np.repeat(np.arange(len(counts)), counts)
    within = np.concatenate([np.arange(count) for count in counts])
    order = np.random.default_rng(seed).permutation(len(label))
    return {"labels": label[order], "shards": (label * 1000 + within // shard_rows)[order], "classes": len(counts)}


def batches(plan: EpochPlan) -> Ints:
    return np.stack([plan.batch(step) for step in range(plan.steps)])


def chi2(observed: npt.ArrayLike, expected: npt.ArrayLike) -> float:
    o, e = np.asarray(observed, float), np.asarray(expected, float)
    return float(((o - e) ** 2 / e).sum())


COUNTS = st.lists(st.integers(1, 200), min_size=2, max_size=8)
CONFIGS = st.builds(
    PlanConfig,
    policy=st.sampled_from(POLICIES),
    beta=st.sampled_from([0.0, 0.9, 0.999, 0.999999]),
    global_batch=st.integers(1, 40),
    steps_per_epoch=st.none() | st.integers(1, 60),
    shard_window=st.integers(1, 5),
    seed=st.integers(0, 2**40),
)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(counts=COUNTS, config=CONFIGS, epoch=st.integers(0, 20))
def test_every_batch_keeps_its_quotas(counts: list[int], config: PlanConfig, epoch: int) -> None:
    rows = index(counts)
    plan = EpochPlan(**rows, config=config, epoch=epoch)
    row_TG = batches(plan)
    assert row_TG.shape == (plan.steps, config.global_batch)
    assert row_TG.size == len(plan)

    quota_C = class_weights(counts, config) * config.global_batch
    count_TC = np.stack([np.bincount(rows["labels"][row_G], minlength=len(counts)) for row_G in row_TG])
    assert np.all(np.abs(count_TC - quota_C) < 1)
    done_T1 = np.arange(1, plan.steps + 1)[:, None]
    assert np.all(np.abs(np.cumsum(count_TC, axis=0) - done_T1 * quota_C) < 1)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(counts=COUNTS, config=CONFIGS, epoch=st.integers(0, 20))
def test_use_within_a_class_differs_by_at_most_one_at_every_step(
    counts: list[int], config: PlanConfig, epoch: int
) -> None:
    rows = index(counts)
    use_N = np.zeros(sum(counts), int)
    for row_G in batches(EpochPlan(**rows, config=config, epoch=epoch)):
        np.add.at(use_N, row_G, 1)
        for label in range(len(counts)):
            assert np.ptp(use_N[rows["labels"] == label]) <= 1


@settings(max_examples=60, deadline=None, derandomize=True)
@given(counts=COUNTS, config=CONFIGS, epochs=st.integers(1, 6))
def test_use_within_a_class_differs_by_at_most_one_over_epochs(
    counts: list[int], config: PlanConfig, epochs: int
) -> None:
    rows = index(counts)
    plans = [EpochPlan(**rows, config=config, epoch=epoch) for epoch in range(epochs)]
    use_N = np.bincount(np.concatenate([batches(plan).ravel() for plan in plans]), minlength=sum(counts))
    assert all(np.ptp(use_N[rows["labels"] == label]) <= 1 for label in range(len(counts)))


@settings(max_examples=40, deadline=None, derandomize=True)
@given(counts=COUNTS, config=CONFIGS, twelfths=st.integers(1, 3), stop=st.floats(0, 1))
def test_the_sequence_is_the_same_at_any_number_of_ranks_and_resumed_at_any_step(
    counts: list[int], config: PlanConfig, twelfths: int, stop: float
) -> None:
    config = dataclasses.replace(config, global_batch=12 * twelfths)
    rows = index(counts)
    whole = EpochPlan(**rows, config=config, epoch=2)
    expected = batches(whole).ravel()
    start = int(stop * whole.steps)
    for ranks in (1, 2, 3, 4):
        resumed = EpochPlan(**rows, config=config, epoch=2)  # what a new process knows: nothing of the steps before
        seen = np.full(len(whole), -1)
        for step in range(start, resumed.steps):
            for rank in range(ranks):
                positions = resumed.rank_positions(step, rank, ranks)
                assert len(positions) == config.global_batch // ranks
                assert np.all(positions % ranks == rank)
                seen[positions] = resumed.batch(step)[positions - step * config.global_batch]
        first = start * config.global_batch
        assert np.array_equal(seen[first:], expected[first:])
        assert np.all(seen[:first] == -1)


def test_a_draw_does_not_depend_on_the_draws_before() -> None:
    rows = index([50, 3, 1, 120])
    config = PlanConfig(global_batch=8, steps_per_epoch=40, seed=5)
    plan = EpochPlan(**rows, config=config, epoch=1)
    in_order = list(plan)
    assert [draw.row for draw in in_order] == batches(plan).ravel().tolist()
    for position in np.random.default_rng(0).permutation(len(plan)).tolist():
        assert plan[position] == in_order[position]
    assert EpochPlan(**rows, config=config, epoch=1)[317] == in_order[317]
    assert len({draw.rng_key for draw in in_order}) == len(plan)
    np.random.Philox(key=in_order[0].rng_key)


def test_the_rng_key_is_of_seed_epoch_and_position_only() -> None:
    a = EpochPlan(**index([30, 9]), config=PlanConfig(global_batch=4, seed=3), epoch=7)
    b = EpochPlan(**index([200, 2, 2]), config=PlanConfig(policy="sqrt", global_batch=6, seed=3), epoch=7)
    assert [a[i].rng_key for i in range(len(a))] == [b[i].rng_key for i in range(len(a))]
    for seed, epoch in ((4, 7), (3, 8)):
        other = EpochPlan(**index([30, 9]), config=PlanConfig(global_batch=4, seed=seed), epoch=epoch)
        assert {draw.rng_key for draw in a}.isdisjoint(draw.rng_key for draw in other)


def test_the_sequence_follows_seed_and_epoch() -> None:
    def rows_of(seed: int, epoch: int) -> Ints:
        return batches(EpochPlan(**index([60, 20, 5]), config=PlanConfig(seed=seed), epoch=epoch))

    assert np.array_equal(rows_of(1, 1), rows_of(1, 1))
    assert not np.array_equal(rows_of(1, 1), rows_of(2, 1))
    assert not np.array_equal(rows_of(1, 1), rows_of(1, 2))


def test_the_sequence_is_the_one_of_earlier_releases() -> None:
    """A checkpoint must resume into the same order. When this fails on purpose, raise PLAN_ALGORITHM."""
    plan = EpochPlan(
        labels=[0, 1, 0, 2, 0, 1, 0, 0, 1, 0], shards=[0, 2, 0, 4, 1, 3, 1, 1, 2, 0], classes=3,
        config=PlanConfig(policy="sqrt", global_batch=4, seed=11, shard_window=1), epoch=2,
    )  # fmt: skip
    assert batches(plan).tolist() == GOLDEN
    assert plan[0].rng_key == GOLDEN_KEY


@pytest.mark.parametrize("policy", POLICIES)
def test_class_shares_follow_the_policy(policy: str) -> None:
    counts = np.array([249, 194, 271, 223, 150, 15, 98])  # a tail as long as that of DFEW, per ten clips or so
    config = PlanConfig(policy=policy, global_batch=32, steps_per_epoch=4000, seed=1)
    rows = index(counts.tolist())
    weight_C = {
        "natural": counts,
        "sqrt": np.sqrt(counts),
        "effective": counts / np.array([sum(0.999**k for k in range(n)) for n in counts]),
        "uniform": np.ones(7),
    }[policy]
    drawn_C = np.bincount(rows["labels"][batches(EpochPlan(**rows, config=config, epoch=0))].ravel(), minlength=7)
    assert drawn_C.sum() == 128_000
    assert chi2(drawn_C, weight_C / weight_C.sum() * 128_000) < CHI2_999[6]
    assert class_weights(counts, config) == pytest.approx(weight_C / weight_C.sum(), rel=1e-5)
    assert class_weights(counts, config).sum() == pytest.approx(1, abs=1e-12)


def test_a_rank_sees_no_fixed_pattern_of_classes() -> None:
    rows = index([40, 40, 40, 40, 40])
    config = PlanConfig(global_batch=10, steps_per_epoch=4000, seed=2)
    row_TG = batches(EpochPlan(**rows, config=config, epoch=0))
    first_of_rank_T = rows["labels"][row_TG[:, 3]]  # of rank 3 of 5: in each step the class is free
    assert chi2(np.bincount(first_of_rank_T, minlength=5), np.full(5, 800)) < CHI2_999[4]
    repeats = int((first_of_rank_T[1:] == first_of_rank_T[:-1]).sum())
    assert chi2([repeats, 3999 - repeats], [3999 / 5, 3999 * 4 / 5]) < CHI2_999[1]


def test_each_clip_of_a_class_comes_first_equally_often() -> None:
    rows = index([8, 1], shard_rows=2)
    firsts = [EpochPlan(**rows, config=PlanConfig(global_batch=4, seed=seed), epoch=0).batch(0) for seed in range(2000)]
    first = [next(row for row in row_G if rows["labels"][row] == 0) for row_G in firsts]
    count_N = np.bincount(first, minlength=9)[rows["labels"] == 0]
    assert chi2(count_N, np.full(8, 250)) < CHI2_999[7]


@pytest.mark.parametrize(("window", "policy"), [(1, "natural"), (4, "natural"), (4, "uniform")])
def test_few_shards_of_a_class_are_open_at_a_time(window: int, policy: str) -> None:
    rows = index([2048, 96], shard_rows=16)
    config = PlanConfig(policy=policy, global_batch=16, shard_window=window)
    for epoch in range(3):
        row_T = batches(EpochPlan(**rows, config=config, epoch=epoch)).ravel()
        shard_T = rows["shards"][row_T[rows["labels"][row_T] == 0]]
        shards, first = np.unique(shard_T, return_index=True)
        last = len(shard_T) - 1 - np.unique(shard_T[::-1], return_index=True)[1]
        assert len(shards) > 8 * window
        open_T = [int(((first <= t) & (t <= last)).sum()) for t in range(len(shard_T))]
        assert max(open_T) <= window


def test_clips_of_a_window_are_mixed() -> None:
    rows = index([1024], shard_rows=64)
    row_T = batches(EpochPlan(**rows, config=PlanConfig(policy="natural"), epoch=0)).ravel()
    shard_T = rows["shards"][row_T]
    same = int((shard_T[1:] == shard_T[:-1]).sum())
    assert chi2([same, 1023 - same], [1023 / 4, 1023 * 3 / 4]) < CHI2_999[1]


def test_a_class_of_one_clip_is_drawn_at_its_quota() -> None:
    rows = index([100, 1])
    plan = EpochPlan(**rows, config=PlanConfig(global_batch=6), epoch=0)
    only = int(np.flatnonzero(rows["labels"] == 1)[0])
    assert np.all((batches(plan) == only).sum(axis=1) == 3)


def test_a_natural_epoch_of_whole_batches_takes_each_clip_once() -> None:
    row_T = batches(EpochPlan(**index([64, 32, 160]), config=PlanConfig(policy="natural"), epoch=3)).ravel()
    assert sorted(row_T.tolist()) == list(range(256))


def test_long_epochs_repeat_the_class_table() -> None:
    """UNIT / gcd is far below the number of steps, so the table wraps around."""
    rows = index([3, 3, 2])
    config = PlanConfig(policy="natural", global_batch=2, steps_per_epoch=37)
    counts_TC = [
        np.bincount(rows["labels"][row_G], minlength=3) for row_G in batches(EpochPlan(**rows, config=config, epoch=0))
    ]
    cum_TC = np.cumsum(counts_TC, axis=0)
    assert np.array_equal(cum_TC[3::4], np.arange(1, 10)[:, None] * [3, 3, 2])


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 8, 13])
@pytest.mark.parametrize("rows", [0, 1, 2, 3, 7, 12, 13, 97, 101])
def test_sequential_plan_gives_each_row_once_and_equal_steps(rows: int, ranks: int) -> None:
    stripes = [SequentialPlan(rows).rank_positions(rank, ranks) for rank in range(ranks)]
    assert len({len(stripe) for stripe in stripes}) == 1
    assert sum(map(len, stripes)) - rows < ranks
    together = np.stack(stripes, axis=1).ravel()
    assert together[together >= 0].tolist() == list(range(rows))
    assert np.all(together[rows:] == -1)


def test_state_survives_json_and_refuses_another_plan() -> None:
    rows = index([20, 4])
    plan = EpochPlan(**rows, config=PlanConfig(), epoch=3, version="v7")
    state = plan.state(2)
    assert PlanState.from_dict(state.to_dict()) == state == PlanState("v7", plan.hash, 3, 2)
    require_same_plan(state, plan)
    require_same_plan(state, EpochPlan(**rows, config=PlanConfig(), epoch=9, version="v7"))

    with pytest.raises(MicaclError, match=r"dataset version v7 and this run has v8\. .* not resumed"):
        require_same_plan(state, EpochPlan(**rows, config=PlanConfig(), epoch=3, version="v8"))
    with pytest.raises(MicaclError, match="at step 99 of an epoch of 2 steps"):
        require_same_plan(plan.state(99), plan)
    for config in (
        PlanConfig(seed=1),
        PlanConfig(policy="sqrt"),
        PlanConfig(global_batch=8),
        PlanConfig(shard_window=2),
    ):
        with pytest.raises(MicaclError, match="with plan"):
            require_same_plan(state, EpochPlan(**rows, config=config, epoch=3, version="v7"))
    for column in ("labels", "shards"):
        swapped = {**rows, column: rows[column][::-1]}
        with pytest.raises(MicaclError, match="with plan"):
            require_same_plan(state, EpochPlan(**swapped, config=PlanConfig(), epoch=3, version="v7"))


def test_the_hash_does_not_depend_on_the_width_of_the_columns() -> None:
    rows = index([20, 4])
    narrow = {**rows, "labels": rows["labels"].astype(np.int8), "shards": rows["shards"].astype(np.uint16)}
    wide_plan = EpochPlan(**rows, config=PlanConfig(), epoch=0)
    narrow_plan = EpochPlan(**narrow, config=PlanConfig(), epoch=0)
    assert wide_plan.hash == narrow_plan.hash
    assert np.array_equal(batches(wide_plan), batches(narrow_plan))


@pytest.mark.parametrize(
    "change",
    [{"step": -1}, {"step": "2"}, {"step": True}, {"plan": None}, {"extra": 1}],
    ids=["negative", "text", "bool", "none", "unknown"],
)
def test_a_damaged_state_is_refused(change: dict[str, Any]) -> None:
    good = PlanState("v7", "00", 3, 2).to_dict()
    with pytest.raises(MicaclError, match="does not have the parts"):
        PlanState.from_dict({**good, **change})
    with pytest.raises(MicaclError, match="does not have the parts"):
        PlanState.from_dict({name: part for name, part in good.items() if name != "epoch"})


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"policy": "even"}, r"--plan\.policy is 'even'.*natural, sqrt, effective, uniform"),
        ({"beta": 1.0}, r"--plan\.beta is 1\.0"),
        ({"beta": float("nan")}, r"--plan\.beta is nan"),
        ({"global_batch": 0}, r"--plan\.global-batch is 0"),
        ({"steps_per_epoch": 0}, r"--plan\.steps-per-epoch is 0"),
        ({"shard_window": 0}, r"--plan\.shard-window is 0"),
        ({"seed": -1}, r"--plan\.seed is -1"),
    ],
)
def test_bad_settings_are_refused_in_words(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(MicaclError, match=words):
        PlanConfig(**fields)


def test_bad_rows_are_refused_in_words() -> None:
    with pytest.raises(MicaclError, match=r"Of the 3 classes \(counted from 0\), number 1 has no clips"):
        EpochPlan(labels=[0, 2], shards=[0, 1], classes=3, config=PlanConfig(), epoch=0)
    with pytest.raises(MicaclError, match="Label 3 is outside the label set of 3 classes"):
        EpochPlan(labels=[0, 1, 2, 3], shards=[0, 1, 2, 3], classes=3, config=PlanConfig(), epoch=0)
    with pytest.raises(MicaclError, match="Label -1 is outside"):
        EpochPlan(labels=[0, -1], shards=[0, 1], classes=1, config=PlanConfig(), epoch=0)
    with pytest.raises(MicaclError, match="has no clips"):
        EpochPlan(labels=[], shards=[], classes=3, config=PlanConfig(), epoch=0)
    with pytest.raises(ValueError, match="2 labels, 1 shards"):
        EpochPlan(labels=[0, 0], shards=[0], classes=1, config=PlanConfig(), epoch=0)
    with pytest.raises(ValueError, match="labels have shape"):
        EpochPlan(labels=[0.5], shards=[0], classes=1, config=PlanConfig(), epoch=0)


def test_uneven_ranks_and_places_outside_are_refused() -> None:
    plan = EpochPlan(**index([20, 4]), config=PlanConfig(), epoch=0)
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
