"""The promises of the epoch plan, over many splits and configs. tests/test_plan_mutations.py sees each of them fail."""

from __future__ import annotations

import dataclasses
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.class_order import random_words
from pipeline.plan import Draw, EpochPlan, PlanConfig, PlanIndex, SequentialPlan, class_weights
from pipeline.policies import POLICIES, SECOND_KEYS
from pipeline.quotas import _BLOCK
from tests import plan_checks as check
from tests.plan_checks import CHI2_999, DFEW, Rows, batches, chi2, make_rows

GOLDEN = {
    "": [[2, 9, 3, 1], [0, 6, 8, 3], [5, 5, 7, 4]],
    "subject": [[4, 6, 3, 8], [0, 2, 1, 3], [5, 5, 7, 4]],
}
GOLDEN_KEY = 9382924999277630816


@st.composite
def cases(draw: st.DrawFn, batch_of: int = 1, most: int = 120) -> tuple[Rows, PlanConfig]:
    """A split and a config that fits it. `batch_of`: the global batch is a multiple of it."""
    counts = draw(st.lists(st.integers(1, most), min_size=2, max_size=8))
    sizes = draw(st.lists(st.integers(1, 17), min_size=1, max_size=5))
    policy, then = draw(st.sampled_from(POLICIES)), draw(st.sampled_from(["", *POLICIES]))
    weights = st.lists(st.floats(0.01, 100), min_size=len(counts), max_size=len(counts))
    global_batch = draw(st.integers(1, max(1, 40 // batch_of))) * batch_of
    config = PlanConfig(
        policy=policy,
        beta=draw(st.sampled_from([0.0, 0.9, 0.999, 0.999999])),
        power=draw(st.sampled_from([-2.0, -0.5, 0.3, 1.0, 1.5])),
        weights=tuple(draw(weights)) if "custom" in (policy, then) else (),
        then=then,
        then_from=draw(st.integers(0, 3)),
        then_over=draw(st.integers(0, 4)),
        clips_per_class=draw(st.integers(0, min(3, global_batch // len(counts)))),
        second=draw(st.sampled_from(["", "", *SECOND_KEYS])),
        global_batch=global_batch,
        steps_per_epoch=draw(st.none() | st.integers(1, 40)),
        shard_window=draw(st.integers(1, 5)),
        seed=draw(st.integers(0, 2**40)),
    )
    return make_rows(counts, sizes, groups=draw(st.integers(1, 5))), config


@settings(max_examples=100, deadline=None, derandomize=True)
@given(case=cases(), epoch=st.integers(0, 20))
def test_every_batch_keeps_its_quotas(case: tuple[Rows, PlanConfig], epoch: int) -> None:
    check.check_batch_counts(*case, epoch)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(case=cases(), epochs=st.integers(1, 40))
def test_epochs_together_keep_the_shares(case: tuple[Rows, PlanConfig], epochs: int) -> None:
    check.check_epoch_totals(*case, epochs)


@settings(max_examples=80, deadline=None, derandomize=True)
@given(case=cases(), epoch=st.integers(0, 20))
def test_use_differs_by_at_most_one_at_every_draw(case: tuple[Rows, PlanConfig], epoch: int) -> None:
    check.check_use(*case, epoch)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(case=cases(most=60), epochs=st.integers(2, 7))
def test_use_differs_by_at_most_one_after_any_number_of_epochs(case: tuple[Rows, PlanConfig], epochs: int) -> None:
    check.check_use_over_epochs(*case, epochs)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(case=cases(), epoch=st.integers(0, 9))
def test_few_shards_of_a_class_are_open_and_each_is_entered_once_a_cycle(
    case: tuple[Rows, PlanConfig], epoch: int
) -> None:
    rows, config = case
    check.check_working_set(rows, dataclasses.replace(config, second=""), epoch)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(case=cases(), epoch=st.integers(0, 9))
def test_a_draw_does_not_depend_on_the_draws_before(case: tuple[Rows, PlanConfig], epoch: int) -> None:
    check.check_pure(*case, epoch)


@settings(max_examples=12, deadline=None, derandomize=True)
@given(case=cases(batch_of=24, most=60), stop=st.sampled_from(["first", "middle", "last", "epoch", "end"]))
def test_any_number_of_ranks_and_any_stop_give_one_sequence(case: tuple[Rows, PlanConfig], stop: str) -> None:
    rows, config = case
    config = dataclasses.replace(config, steps_per_epoch=min(config.steps_per_epoch or 5, 12))
    steps = rows.plan(config).steps
    at = {"first": 0, "middle": steps // 2, "last": steps - 1, "epoch": steps, "end": 2 * steps - 1}[stop]
    check.check_ranks(rows, config, (1, 2, 3, 4, 8), at)


@pytest.mark.parametrize("second", ["", "scene"])
def test_a_step_beyond_the_first_block_is_that_of_a_pass_in_order(second: str) -> None:
    rows = make_rows([700, 40, 9], 20)
    config = PlanConfig(policy="sqrt", global_batch=5, steps_per_epoch=3 * _BLOCK + 7, second=second)
    in_order = batches(rows.plan(config, 1))
    for step in (_BLOCK - 1, _BLOCK, _BLOCK + 1, 2 * _BLOCK + 5, 3 * _BLOCK + 6):
        assert np.array_equal(rows.plan(config, 1).batch(step), in_order[step])
    used = rows.plan(config, 1)
    for step in np.random.default_rng(0).permutation(len(in_order))[:60].tolist():
        assert np.array_equal(used.batch(step), in_order[step])
    check.check_batch_counts(rows, config, 1)


@pytest.mark.slow
@pytest.mark.parametrize("second", ["", "subject"])
def test_threads_that_share_a_plan_see_one_sequence(second: str) -> None:
    rows = make_rows([300, 40, 9], 7)
    config = PlanConfig(policy="sqrt", global_batch=6, steps_per_epoch=2 * _BLOCK + 3, second=second)
    in_order = batches(rows.plan(config, 3))
    shared = rows.plan(config, 3)
    steps = np.random.default_rng(0).permutation(len(in_order))[:400].tolist()
    with ThreadPoolExecutor(8) as pool:
        for step, row_G in zip(steps, pool.map(shared.batch, steps), strict=True):
            assert np.array_equal(row_G, in_order[step])


def test_the_rng_key_is_of_seed_epoch_and_position_only() -> None:
    a = make_rows([30, 9]).plan(PlanConfig(global_batch=4, seed=3), 7)
    b = make_rows([200, 2, 2]).plan(PlanConfig(policy="sqrt", global_batch=6, seed=3), 7)
    assert [a[i].rng_key for i in range(len(a))] == [b[i].rng_key for i in range(len(a))]
    plans = [make_rows([30, 9]).plan(PlanConfig(seed=seed), epoch) for seed in range(9) for epoch in range(9)]
    check.check_keys(plans)
    first = [np.random.Philox(key=plan[0].rng_key).random_raw() for plan in plans]
    assert len(set(first)) == len(plans)


def test_the_sequence_follows_seed_and_epoch() -> None:
    def sequence(seed: int, epoch: int) -> list[list[int]]:
        return list(batches(make_rows([60, 20, 5]).plan(PlanConfig(seed=seed), epoch)).tolist())

    assert sequence(1, 1) == sequence(1, 1)
    assert sequence(1, 1) != sequence(2, 1)
    assert sequence(1, 1) != sequence(1, 2)


@pytest.mark.parametrize("second", sorted(GOLDEN))
def test_the_sequence_is_the_one_of_earlier_releases(second: str) -> None:
    """A checkpoint must resume into the same order. When this fails on purpose, raise PLAN_ALGORITHM."""
    labels, shards = [0, 1, 0, 2, 0, 1, 0, 0, 1, 0], [0, 2, 0, 4, 1, 3, 1, 1, 2, 0]
    index = PlanIndex.of_columns(labels, shards, 3, groups=[0, 0, 0, 1, 1, 1, 2, 2, 2, 2])
    config = PlanConfig(policy="sqrt", global_batch=4, seed=11, shard_window=1, second=second)
    plan = EpochPlan(index, config, 2)
    assert batches(plan).tolist() == GOLDEN[second]
    assert plan[3] == Draw(GOLDEN[second][0][3], (GOLDEN_KEY, 3), 3)
    assert random_words(2, 11, 5, 6).tolist() == [1293535785711131050, 3932309254309493854]


@pytest.mark.parametrize("policy", POLICIES)
def test_a_million_draws_follow_the_policy(policy: str) -> None:
    weights = (3, 1, 4, 1, 5, 9, 2.5) if policy == "custom" else ()
    config = PlanConfig(policy=policy, weights=weights, global_batch=1000, steps_per_epoch=1000, seed=1, power=-0.3)
    rows = make_rows(DFEW, 256, seed=-1)
    n_C = np.array(DFEW)
    weight_C = {
        "natural": n_C,
        "sqrt": np.sqrt(n_C),
        "power": n_C**-0.3,
        "effective": n_C / np.array([sum(0.999**k for k in range(n)) for n in DFEW]),
        "uniform": np.ones(7),
        "custom": np.array(weights),
    }[policy]
    drawn_C = np.bincount(rows.labels_N[batches(rows.plan(config))].ravel(), minlength=7)
    assert drawn_C.sum() == 10**6
    assert chi2(drawn_C, weight_C / weight_C.sum() * 10**6) < CHI2_999[6]
    assert class_weights(DFEW, config) == pytest.approx(weight_C / weight_C.sum(), abs=1e-11)


@pytest.mark.parametrize("seed", range(3))
def test_a_rank_sees_no_fixed_pattern_of_classes(seed: int) -> None:
    check.check_no_pattern(seed)


@pytest.mark.slow
@pytest.mark.parametrize("second", ["", "subject"])
def test_each_clip_of_a_class_comes_first_equally_often(second: str) -> None:
    """Over seeds, and over the epochs of one seed: eight clips in four shards, or in four groups of two."""
    label, shard = np.repeat([0, 1], [8, 1]), np.array([0, 0, 1, 1, 2, 2, 3, 3, 4])
    rows = Rows(label, shard, shard, 2)
    for plans in (
        [rows.plan(PlanConfig(global_batch=4, seed=seed, second=second)) for seed in range(1000)],
        [rows.plan(PlanConfig(global_batch=4, seed=1, steps_per_epoch=4, second=second), e) for e in range(1000)],
    ):
        first = [next(row for row in plan.batch(0).tolist() if row < 8) for plan in plans]
        assert chi2(np.bincount(first, minlength=8), np.full(8, 125)) < CHI2_999[7]


def test_clips_of_a_window_are_mixed() -> None:
    rows = make_rows([1024], 64)
    shard_T = rows.shards_N[batches(rows.plan(PlanConfig(policy="natural"))).ravel()]
    same = int((shard_T[1:] == shard_T[:-1]).sum())
    assert chi2([same, 1023 - same], [1023 / 4, 1023 * 3 / 4]) < CHI2_999[1]


def test_a_class_of_one_clip_is_drawn_at_its_quota() -> None:
    rows = make_rows([100, 1])
    plan = rows.plan(PlanConfig(global_batch=6))
    assert np.all((batches(plan) == rows.of_class(1)[0]).sum(axis=1) == 3)


def test_more_ranks_than_clips_of_a_class() -> None:
    rows = make_rows([100, 2])
    plan = rows.plan(PlanConfig(global_batch=24))
    clips = [draw.row for rank in range(8) for draw in plan.draws(0, rank, 8)]
    assert np.bincount(rows.labels_N[clips]).tolist() == [12, 12]
    assert sorted(clips.count(row) for row in rows.of_class(1)) == [6, 6]


def test_a_natural_epoch_of_whole_batches_takes_each_clip_once() -> None:
    for epoch in range(4):
        row_N = batches(make_rows([64, 32, 160]).plan(PlanConfig(policy="natural"), epoch)).ravel()
        assert sorted(row_N.tolist()) == list(range(256))


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 8, 13])
@pytest.mark.parametrize("rows", [0, 1, 2, 3, 7, 12, 13, 97, 101])
def test_sequential_plan_gives_each_row_once_and_equal_steps(rows: int, ranks: int) -> None:
    stripes = [SequentialPlan(rows).rank_positions(rank, ranks) for rank in range(ranks)]
    assert len({len(stripe) for stripe in stripes}) == 1
    assert sum(map(len, stripes)) - rows < ranks
    together = np.stack(stripes, axis=1).ravel()
    assert together[together >= 0].tolist() == list(range(rows))
    assert np.all(together[rows:] == -1)
