"""Metrics against numbers worked out by hand and against properties."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from micacl.metrics import (
    Confusion,
    Counts,
    f1_by_class,
    group_recalls,
    long_tail_groups,
    recall_by_class,
    score,
    uar,
    war,
)
from pipeline.contract import MicaclError

CLASSES = ("happy", "sad", "fear")
BY_HAND = np.array([[3, 1, 0], [2, 2, 0], [1, 0, 1]])
matrices = arrays(np.int64, (4, 4), elements=st.integers(0, 9)).filter(lambda m: m.sum() > 0)
row_lists = st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2)), min_size=1, max_size=30)


def test_by_hand() -> None:
    scores = score(BY_HAND, CLASSES)
    assert scores.clips == 10
    assert scores.war == pytest.approx(0.6)
    assert scores.recall == pytest.approx({"happy": 0.75, "sad": 0.5, "fear": 0.5})
    assert scores.uar == pytest.approx((0.75 + 0.5 + 0.5) / 3)
    assert scores.macro_f1 == pytest.approx((6 / 10 + 4 / 7 + 2 / 3) / 3)
    assert scores.f1 == pytest.approx({"happy": 6 / 10, "sad": 4 / 7, "fear": 2 / 3})
    assert scores.absent == ()


def test_confusion_has_the_truth_in_rows() -> None:
    confusion = Confusion(CLASSES)
    confusion.extend((f"{t}{p}{i}", t, p) for t in range(3) for p in range(3) for i in range(BY_HAND[t, p]))
    assert confusion.matrix().tolist() == BY_HAND.tolist()
    assert confusion.scores() == score(BY_HAND, CLASSES)


def test_always_neutral_on_dfew_fold_1() -> None:
    """The chance line of DFEW fold 1: 534 of 2,341 test clips are neutral."""
    matrix = np.zeros((7, 7), dtype=np.int64)
    matrix[:, 2] = [489, 379, 534, 435, 294, 29, 181]
    assert war(matrix) == pytest.approx(534 / 2341)
    assert uar(matrix) == pytest.approx(1 / 7)


def test_a_class_absent_from_the_truth_is_left_out_and_named() -> None:
    scores = score(np.array([[3, 0, 1], [0, 2, 2], [0, 0, 0]]), CLASSES)
    assert scores.absent == ("fear",)
    assert scores.recall["fear"] is None
    assert scores.uar == pytest.approx((0.75 + 0.5) / 2)
    assert scores.macro_f1 == pytest.approx((6 / 7 + 4 / 6) / 2)
    assert scores.to_text() == "WAR 62.50  UAR 62.50  macro F1 76.19  (8 clips, none of fear: left out)"


def test_head_mid_and_tail_are_relative_to_the_largest_class() -> None:
    """DFEW's fold 1 and FERV39k, training clips."""
    dfew = dict(
        zip(
            ("happy", "sad", "neutral", "angry", "surprise", "disgust", "fear"),
            (1956, 1515, 2135, 1738, 1175, 116, 721),
            strict=True,
        )
    )
    ferv = dict(zip(dfew, (5854, 5523, 7790, 5906, 2502, 1833, 1680), strict=True))
    assert long_tail_groups(dfew) == {
        "head": ["happy", "sad", "neutral", "angry", "surprise"], "mid": ["fear"], "tail": ["disgust"],
    }  # fmt: skip
    assert {name: len(words) for name, words in long_tail_groups(ferv).items()} == {"head": 4, "mid": 1, "tail": 2}
    assert long_tail_groups({"a": 8, "b": 4, "c": 2, "d": 0}) == {"head": ["a", "b"], "mid": [], "tail": ["c"]}
    assert long_tail_groups({}) == {"head": [], "mid": [], "tail": []}
    recalls = group_recalls({"a": 0.5, "b": 1.0, "c": None}, {"head": ["a", "b"], "mid": [], "tail": ["c"]})
    assert recalls == {"head": 0.75, "mid": None, "tail": None}


def test_to_dict_goes_through_json() -> None:
    fields = score(BY_HAND, CLASSES).to_dict()
    assert json.loads(json.dumps(fields, allow_nan=False)) == fields
    assert fields["matrix"] == BY_HAND.tolist()


def test_no_clip_is_refused() -> None:
    with pytest.raises(MicaclError, match="No clip was scored"):
        Confusion(CLASSES).scores()


def test_a_clip_counts_once() -> None:
    confusion = Confusion(CLASSES)
    confusion.add("a_0", 0, 1)
    with pytest.raises(MicaclError, match="'a_0' was scored twice"):
        confusion.add("a_0", 0, 0)
    assert confusion.rows() == [("a_0", 0, 1)]


@pytest.mark.parametrize(("truth", "predicted"), [(3, 0), (-1, 0), (0, 3), (0, -1)])
def test_a_class_that_does_not_exist_is_refused(truth: int, predicted: int) -> None:
    confusion = Confusion(CLASSES)
    with pytest.raises(MicaclError, match="of 3"):
        confusion.add("a_0", truth, predicted)
    assert len(confusion) == 0


def test_merging_refuses_overlap_and_other_classes() -> None:
    one, two = Confusion(CLASSES), Confusion(CLASSES)
    one.add("a_0", 0, 0)
    two.add("a_0", 0, 0)
    with pytest.raises(MicaclError, match="twice"):
        one.merged([two])
    with pytest.raises(MicaclError, match="classes"):
        one.merged([Confusion(CLASSES[::-1])])


@given(row_lists, st.integers(1, 4))
def test_ranks_merge_to_the_single_process(pairs: list[tuple[int, int]], ranks: int) -> None:
    """Any number of ranks, also more ranks than clips; rows travel as JSON."""
    rows = [(f"clip{i}", truth, predicted) for i, (truth, predicted) in enumerate(pairs)]
    whole = Confusion(CLASSES)
    whole.extend(rows)
    parts = [Confusion(CLASSES) for _ in range(ranks)]
    for rank, part in enumerate(parts):
        part.extend(json.loads(json.dumps(rows[rank::ranks])))
    merged = parts[-1].merged(parts[:-1])
    assert merged.rows() == whole.rows()
    assert merged.scores() == whole.scores()


@given(matrices)
def test_properties(matrix: Counts) -> None:
    scores = score(matrix, tuple("abcd"))
    present = matrix.sum(1) > 0
    shares = matrix.sum(1)[present] / matrix.sum()
    assert 0 <= scores.uar <= 1
    assert 0 <= scores.macro_f1 <= 1
    assert scores.war == pytest.approx(float((shares * recall_by_class(matrix)[present]).sum()))  # hence its name
    assert list(scores.absent) == [c for c, p in zip("abcd", present, strict=True) if not p]
    assert np.isnan(f1_by_class(matrix)).tolist() == (~present).tolist()


@given(matrices, st.permutations(range(4)))
def test_the_order_of_classes_does_not_matter(matrix: Counts, order: list[int]) -> None:
    one, two = score(matrix, tuple("abcd")), score(matrix[np.ix_(order, order)], tuple("abcd"[i] for i in order))
    assert (one.war, one.recall, set(one.absent)) == (two.war, two.recall, set(two.absent))
    assert (one.uar, one.macro_f1) == pytest.approx((two.uar, two.macro_f1))


@given(matrices, st.integers(2, 5))
def test_uar_does_not_see_how_many_clips_a_class_has(matrix: Counts, times: int) -> None:
    longer = matrix.copy()
    longer[0] *= times
    assert uar(longer) == pytest.approx(uar(matrix))
