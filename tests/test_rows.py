"""The rows of a split: the same from the version file alone as from the whole index."""

from __future__ import annotations

import os
import signal
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.contract import MicaclError
from pipeline.dataset import Dataset, commit, open_dataset, read_version
from pipeline.once import Once
from pipeline.rows import SplitRows, split_rows, table_rows
from pipeline.storage import LocalStore
from tests.tiny_dataset import make_dataset

COUNTS = {"train": {"sad": 6, "happy": 9, "neutral": 1}, "test": {"sad": 2, "unlabelled": 3}}


class Counting(LocalStore):
    def __init__(self, root: str) -> None:
        super().__init__(root)
        self.gets: Counter[str] = Counter()

    def get(self, key: str) -> bytes:
        self.gets[key] += 1
        return super().get(key)


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_dataset(tmp_path_factory.mktemp("rows"), COUNTS, 0, max_bags=4)


def lazy_and_whole(url: str, split: str) -> tuple[SplitRows, SplitRows]:
    dataset = open_dataset(url)
    return split_rows(dataset, split), table_rows(dataset, dataset.split(split))


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_row_is_the_same_with_and_without_the_index(url: str, split: str) -> None:
    lazy, whole = lazy_and_whole(url, split)
    table = open_dataset(url).split(split).to_pylist()
    assert len(lazy) == len(whole) == len(table)
    for row, said in enumerate(table):
        assert lazy.place(row) == whole.place(row)
        assert lazy.place(row) == tuple(said[name] for name in ("shard", "key", "offset", "size", "sha256"))
        assert lazy.label(row) == whole.label(row)
        assert (lazy.labels[lazy.label(row)] if lazy.label(row) >= 0 else "unlabelled") == said["label"]
    assert lazy.runs.hash == whole.runs.hash
    assert [lazy.shard_of(first) for first, _ in map(lazy.rows_of, range(len(lazy.shards)))] == [
        *range(len(lazy.shards))
    ]


def test_the_version_alone_opens_a_split(url: str) -> None:
    store = Counting(url)
    number, body, sha256 = read_version(store)
    dataset = Dataset(store, number, body, sha256)
    rows = split_rows(dataset, "train")
    assert len(rows) == 16
    assert not [key for key in store.gets if key.startswith("index/")]
    for _ in range(2):
        rows.place(0)
        rows.place(1)
    assert [n for key, n in store.gets.items() if key.startswith("index/")] == [1]


def test_bytes_used_are_those_of_the_chosen_bags(url: str) -> None:
    lazy, whole = lazy_and_whole(url, "train")
    assert np.array_equal(lazy.used_bytes, lazy.shard_bytes)
    assert np.all((whole.used_bytes > 0) & (whole.used_bytes <= whole.shard_bytes))
    dataset = open_dataset(url, where="subject in ('s0', 's3', 's5')")
    rows = split_rows(dataset, "train")
    assert 0 < len(rows) < 16
    assert rows.used_bytes.sum() == sum(dataset.split("train")["size"].to_pylist())


def test_a_split_that_is_not_there(url: str) -> None:
    with pytest.raises(MicaclError, match=r"no bag in split 'val'.*Choose one of test, train"):
        split_rows(open_dataset(url), "val")


def test_unlabelled_rows_are_refused_where_labels_are_needed(url: str) -> None:
    rows = split_rows(open_dataset(url), "test")
    assert Counter(rows.label(n) for n in range(len(rows))) == {-1: 3, 1: 2}
    with pytest.raises(MicaclError, match="unlabelled"):
        rows.require_labelled()
    split_rows(open_dataset(url), "train").require_labelled()


def test_subjects_as_numbers(url: str) -> None:
    dataset = open_dataset(url)
    said = dataset.split("train")["subject"].to_pylist()
    for rows in lazy_and_whole(url, "train"):
        groups = rows.groups("subject").tolist()
        assert len(set(zip(groups, said, strict=True))) == len(set(groups)) == len(set(said))
        with pytest.raises(MicaclError, match=r"No bag of the split has a scene.*plan.second"):
            rows.groups("scene")


def test_an_index_that_is_not_what_the_version_says(tmp_path: Path) -> None:
    url = make_dataset(tmp_path, {"train": {"sad": 3, "happy": 4}}, 0)
    store = LocalStore(url)
    body = {k: v for k, v in open_dataset(url).body.items() if k not in ("version", "parent", "sha256")}
    shards = [{**shard, "bags": shard["bags"] + 1} for shard in body["shards"]]
    commit(store, {**body, "shards": shards})
    rows = split_rows(open_dataset(url), "train")
    assert len(rows) == 9
    with pytest.raises(MicaclError, match=r"index file.*rows, the version says"):
        rows.place(0)


def test_once_makes_a_value_once_and_forgets_failures() -> None:
    once: Once[int, int] = Once(2)
    made: Counter[int] = Counter()
    barrier = threading.Barrier(8)

    def make(key: int) -> int:
        made[key] += 1
        return key * 10

    def ask() -> None:
        barrier.wait()
        assert [once.get(key, lambda key=key: make(key)) for key in (1, 2)] == [10, 20]

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert made == {1: 1, 2: 1}
    once.get(1, lambda: make(1))
    once.get(3, lambda: make(3))  # 2 was used longest ago
    once.get(1, lambda: make(1))
    once.get(2, lambda: make(2))
    assert made == {1: 1, 2: 2, 3: 1}

    def fail() -> int:
        raise OSError("gone")

    with pytest.raises(OSError, match="gone"):
        once.get(9, fail)
    assert once.get(9, lambda: make(9)) == 90


def test_a_forked_child_makes_what_its_parent_was_making() -> None:
    """Its parent's threads do not come along: a value that one of them was making would be waited for for ever."""
    once: Once[int, int] = Once(9)
    once.get(1, lambda: 10)
    begun, go_on = threading.Event(), threading.Event()

    def slow() -> int:
        begun.set()
        go_on.wait()
        return 20

    thread = threading.Thread(target=once.get, args=(2, slow))
    thread.start()
    begun.wait()
    if (pid := os.fork()) == 0:
        try:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(20)
            os._exit([once.get(2, lambda: 21), once.get(1, lambda: 11), once.total] != [21, 11, 2])
        finally:
            os._exit(2)
    status = os.waitpid(pid, 0)[1]
    go_on.set()
    thread.join()
    assert status == 0
    assert once.get(2, lambda: 22) == 20


@pytest.mark.parametrize(
    "change",
    [{"bags": 0}, {"bags": -3}, {"bags": 10**20}, {"bytes": 0}, {"bytes": 10**30}, {"path": "shards/other.tar"}],
    ids=str,
)
@pytest.mark.parametrize("way", ["version", "where", "subjects"])
def test_a_version_that_was_edited_is_refused(tmp_path: Path, change: dict[str, Any], way: str) -> None:
    """Each of these moved the rows of other shards, or ended in a traceback."""
    store = LocalStore(make_dataset(tmp_path, {"train": {"sad": 6, "happy": 4}}, 0, max_bags=4))
    body = {k: v for k, v in open_dataset(store.root).body.items() if k not in ("version", "parent", "sha256")}
    first, *others = body["shards"]
    commit(store, {**body, "shards": [{**first, **change}, *others]})
    with pytest.raises(MicaclError, match=r"not what this release writes|is missing"):
        read_all(open_dataset(store.root, where="frames > 0" if way == "where" else ""), way)


def read_all(dataset: Dataset, way: str) -> None:
    rows = split_rows(dataset, "train")
    if way == "subjects":
        assert len(rows.groups("subject")) == len(rows)
    for place in map(rows.place, range(len(rows))):
        if dataset.store.size(place.shard) is None:
            raise MicaclError(f"{place.shard} is missing.", "", "")


def test_a_shard_that_is_listed_twice_is_refused(tmp_path: Path) -> None:
    store = LocalStore(make_dataset(tmp_path, {"train": {"sad": 6, "happy": 4}}, 0, max_bags=4))
    body = {k: v for k, v in open_dataset(store.root).body.items() if k not in ("version", "parent", "sha256")}
    commit(store, {**body, "shards": [*body["shards"], body["shards"][0]]})
    with pytest.raises(MicaclError, match=r"lists shards/.* twice"):
        split_rows(open_dataset(store.root), "train")
