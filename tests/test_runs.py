"""Rows as runs: any cut and any order of the same rows is the same dataset."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.plan import EpochPlan, PlanConfig, PlanIndex
from pipeline.runs import Runs
from tests.plan_checks import Ints, batches

COLUMNS = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 4)), min_size=1, max_size=80)


def columns(pairs: list[tuple[int, int]]) -> tuple[Ints, Ints]:
    return np.array([label for label, _ in pairs]), np.array([shard for _, shard in pairs])


def expanded(runs: Runs) -> list[tuple[int, int]]:
    pairs = zip(runs.labels_R, runs.shards_R, runs.counts_R, strict=True)
    return [(int(label), int(shard)) for label, shard, count in pairs for _ in range(int(count))]


@settings(max_examples=100, deadline=None, derandomize=True)
@given(pairs=COLUMNS, cuts=st.lists(st.integers(0, 80), max_size=6))
def test_runs_say_the_rows_however_they_were_cut(pairs: list[tuple[int, int]], cuts: list[int]) -> None:
    labels, shards = columns(pairs)
    whole = Runs.of_columns(labels, shards)
    assert expanded(whole) == pairs
    edges = [0, *sorted(cut for cut in cuts if cut < len(pairs)), len(pairs)]
    parts = Runs.of_parts((labels[a:b], shards[a:b]) for a, b in zip(edges, edges[1:], strict=False))
    assert expanded(parts) == pairs
    singles = Runs(labels, shards, np.ones(len(labels), np.int64))
    assert whole.hash == parts.hash == singles.hash
    assert whole.rows == parts.rows == len(pairs)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(pairs=COLUMNS)
def test_rows_of_a_class_come_shard_by_shard(pairs: list[tuple[int, int]]) -> None:
    labels, shards = columns(pairs)
    runs = Runs.of_columns(labels, shards)
    assert runs.class_counts(4).tolist() == np.bincount(labels, minlength=4).tolist()
    for label in set(labels.tolist()):
        mine = np.flatnonzero(labels == label)
        expected = mine[np.argsort(shards[mine], kind="stable")]
        members = runs.of_class(label)
        assert members.rows(np.arange(len(members))).tolist() == expected.tolist()
        assert members.shards_S.tolist() == sorted(set(shards[mine].tolist()))
        assert members.sizes_S.tolist() == [int((shards[mine] == s).sum()) for s in members.shards_S]


@settings(max_examples=40, deadline=None, derandomize=True)
@given(pairs=COLUMNS, seed=st.integers(0, 99))
def test_rows_in_any_order_give_the_same_clips_as_rows_by_shard(pairs: list[tuple[int, int]], seed: int) -> None:
    """The plan of shuffled rows is that of sorted rows, with the rows called by their new numbers."""
    pairs = sorted([*pairs, *((label, label) for label in range(4))])
    labels, shards = columns(pairs)
    order = np.random.default_rng(seed).permutation(len(pairs))
    for pair in set(pairs):  # rows of one class in one shard stay in their order
        mine = np.flatnonzero((labels[order] == pair[0]) & (shards[order] == pair[1]))
        order[mine] = np.sort(order[mine])
    config = PlanConfig(global_batch=7, steps_per_epoch=9)
    grouped = EpochPlan(PlanIndex.of_columns(labels, shards, 4), config, 1)
    other = EpochPlan(PlanIndex.of_columns(labels[order], shards[order], 4), config, 1)
    assert np.array_equal(order[batches(other)], batches(grouped))


def test_no_rows_are_no_runs() -> None:
    for runs in (Runs.of_columns([], []), Runs.of_parts([]), Runs.of_parts([([], []), ([], [])])):
        assert runs.rows == 0
        assert len(runs.hash) == 64


@pytest.mark.parametrize(
    ("labels", "shards", "words"),
    [
        ([0, 0], [0], "2 labels and 1 shards: lengths must agree"),
        ([0.5], [0], r"labels have shape \(1,\) and type float64"),
        ([0], [[0]], r"shards have shape \(1, 1\)"),
        (["happy"], [0], "labels have shape"),
    ],
)
def test_columns_that_are_no_whole_numbers_are_refused(labels: object, shards: object, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Runs.of_columns(labels, shards)  # type: ignore[arg-type]


def test_labels_outside_the_label_set_are_named() -> None:
    for wrong, classes in (([0, 3, 5], 3), ([0, -1], 1)):
        with pytest.raises(ValueError, match="5" if classes == 3 else "-1"):
            Runs.of_columns(wrong, wrong).class_counts(classes)
