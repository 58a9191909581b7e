"""Who is held out for validation: whole subjects of train, a class never emptied, the same everywhere."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from micacl.config import TrainConfig
from pipeline.contract import FOLDS, MicaclError
from pipeline.dataset import INDEX_SCHEMA, open_dataset
from pipeline.holdout import describe, people, with_validation
from pipeline.loader import EvalLoader
from pipeline.plan import PlanConfig
from pipeline.rows import split_rows
from pipeline.stream import StreamConfig
from tests.test_verify import a_video, hash_near, place
from tests.tiny_dataset import make_dataset

Row = tuple[str, str, str | None]


def index_of(rows: list[Row]) -> pa.Table:
    """(split, label, subject) each."""
    empty = {name: [None] * len(rows) for name in INDEX_SCHEMA.names}
    split, label, subject = zip(*rows, strict=True)
    said = {"split": split, "label": label, "subject": subject, "video": [f"{i}.mp4" for i in range(len(rows))]}
    return pa.table({**empty, **said}, schema=INDEX_SCHEMA)


rows_of_a_split = st.lists(
    st.tuples(
        st.sampled_from(["train", "train", "train", "test"]),
        st.sampled_from(["happy", "sad", "fear", "unlabelled"]),
        st.sampled_from([None, *"abcdefgh"]),
    ),
    min_size=1,
    max_size=60,
)


@settings(max_examples=200, deadline=None)
@given(rows_of_a_split, st.floats(0.01, 0.9), st.integers(0, 5))
def test_nobody_is_on_both_sides_and_no_class_is_emptied(rows: list[Row], share: float, seed: int) -> None:
    before = index_of(rows)
    try:
        after = with_validation(before, share, seed)
    except MicaclError:
        return
    assert with_validation(before, share, seed).equals(after)
    turned = with_validation(before.take(list(range(len(rows)))[::-1]), share, seed)
    assert turned["split"].to_pylist()[::-1] == after["split"].to_pylist()
    was, now, who = before["split"].to_pylist(), after["split"].to_pylist(), people(after)
    labels = after["label"].to_pylist()
    assert all(a == b or (a, b) == ("train", "val") for a, b in zip(was, now, strict=True))
    assert all(label != "unlabelled" for label, split in zip(labels, now, strict=True) if split == "val")
    labelled = [(w, s) for w, s, label in zip(who, now, labels, strict=True) if label != "unlabelled"]
    assert not {w for w, s in labelled if s == "val"} & {w for w, s in labelled if s == "train"}
    for label in ("happy", "sad", "fear"):
        assert (label in of_split(before, "train")) == (label in of_split(after, "train"))


def of_split(index: pa.Table, split: str) -> list[str]:
    return [
        label for s, label in zip(index["split"].to_pylist(), index["label"].to_pylist(), strict=True) if s == split
    ]


def test_the_share_is_met_as_near_as_subjects_allow() -> None:
    rng = np.random.default_rng(0)
    rows = [("train", str(rng.choice(["happy", "sad"])), f"s{rng.integers(40)}") for _ in range(800)]
    for share in (0.1, 0.2, 0.5):
        val = of_split(with_validation(index_of(rows), share, 0), "val")
        assert len(val) / 800 == pytest.approx(share, abs=0.02)  # a subject has some 20 clips of 800
    seeds = {tuple(with_validation(index_of(rows), 0.2, seed)["split"].to_pylist()) for seed in range(4)}
    assert len(seeds) == 4


def test_a_subject_that_is_too_large_stays_and_smaller_ones_go() -> None:
    """Whoever comes first: one person has half of the clips, a tenth is wanted."""
    rows = [("train", "happy", "large")] * 50 + [("train", "happy", f"s{i}") for i in range(50)]
    for seed in range(8):
        after = with_validation(index_of(rows), 0.1, seed)
        held = [s for s, x in zip(after["subject"].to_pylist(), after["split"].to_pylist(), strict=True) if x == "val"]
        assert len(held) == 10
        assert "large" not in held


def test_a_class_of_one_subject_stays_in_train() -> None:
    rows = [("train", "happy", f"s{i}") for i in range(10)] + [("train", "fear", "s3")] * 4
    after = with_validation(index_of(rows), 0.5, 0)
    assert of_split(after, "val") == ["happy"] * 7
    sides = [after.filter(pa.array([x == side for x in after["split"].to_pylist()])) for side in ("train", "val")]
    assert "s3" not in sides[1]["subject"].to_pylist()
    assert describe(*sides) == "validation: 7 of 14 labelled clips of 7 subjects, not trained on; no clip of fear in it"


def test_without_anybody_to_spare_it_is_refused() -> None:
    with pytest.raises(MicaclError, match="No subject of `train` can be spared"):
        with_validation(index_of([("train", "happy", "a"), ("train", "sad", "b")]), 0.5, 0)


def test_a_validation_split_of_its_own_is_left_alone() -> None:
    index = index_of([("train", "happy", "a"), ("train", "happy", "b"), ("val", "happy", "c")])
    assert with_validation(index, 0.5, 0) is index


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> str:
    counts = {"train": {"happy": 12, "sad": 8, "fear": 4}, "test": {"happy": 3, "sad": 2, "fear": 1}}
    return make_dataset(tmp_path_factory.mktemp("ds"), counts, seed=0, max_bags=5)


def test_readers_see_disjoint_splits_that_are_the_whole_of_train(url: str) -> None:
    """By the loader of training, of evaluation, and in the decode processes, which open the dataset by themselves."""
    whole, held = open_dataset(url), open_dataset(url, val_share=0.25)
    assert whole.identity != held.identity != open_dataset(url, val_share=0.25, val_seed=1).identity
    of = {s: set(held.split(s)["key"].to_pylist()) for s in ("train", "val", "test")}
    assert of["train"] | of["val"] == set(whole.split("train")["key"].to_pylist())
    assert not of["train"] & of["val"]
    assert of["test"] == set(whole.split("test")["key"].to_pylist())
    for split, keys in of.items():
        for processes in (0, 1) if split == "val" else (0,):
            stream = StreamConfig(frames=2, processes=processes)
            read = EvalLoader(split_rows(held, split), stream, clips_per_batch=4)
            assert {k for b in read for k, there in zip(b.keys, b.mask_B, strict=True) if there} == keys
    plan = PlanConfig(global_batch=4, steps_per_epoch=12)
    with held.loader("train", plan, stream=StreamConfig(frames=2)) as loader:
        drawn = {key for batch in loader.batches(1) for key in batch.keys}
    with pickle.loads(pickle.dumps(held.loader("train", plan, stream=StreamConfig(frames=2)))) as loader:
        assert {key for batch in loader.batches(1) for key in batch.keys} == drawn <= of["train"]


def test_the_filter_of_training_does_not_move_the_choice(url: str) -> None:
    held = open_dataset(url, val_share=0.25)
    filtered = open_dataset(url, val_share=0.25, where="label != 'happy'")
    assert set(filtered.split("val")["key"].to_pylist()) <= set(held.split("val")["key"].to_pylist())
    assert not set(filtered.split("train")["key"].to_pylist()) & set(held.split("val")["key"].to_pylist())


def test_the_test_fold_is_never_held_out(tmp_path: Path) -> None:
    videos = [
        (a_video(f"{label}{i}.mp4", FOLDS, label, subject=f"s{i}", fold=1 + i % 3), hash_near(i))
        for i in range(9)
        for label in ("happy", "sad")
    ]
    store = place(tmp_path, videos)
    for fold in (1, 2, 3):
        held = open_dataset(store.root, fold=fold, val_share=0.3)
        assert set(held.split("val")["fold"].to_pylist()) <= {1, 2, 3} - {fold}
        assert set(held.split("test")["fold"].to_pylist()) == {fold}
        assert len(split_rows(held, "val")) == held.split("val").num_rows


def test_settings_that_mean_nothing_are_refused() -> None:
    for bad in ({"val_share": -0.1}, {"val_share": 0.95}, {"val_every": -1}, {"val_share": 0.1, "split": "test"}):
        with pytest.raises(MicaclError):
            TrainConfig(**bad)
