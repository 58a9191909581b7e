"""Versions: who commits first, what a reader sees, and that nothing changed is used."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from pipeline.contract import MicaclError, canonical_json, digest
from pipeline.dataset import (
    INDEX_SCHEMA,
    commit,
    list_versions,
    open_dataset,
    read_index,
    read_version,
    version_body,
    version_key,
    write_index,
)
from pipeline.storage import LocalStore, Store, open_store
from tests.tiny_dataset import make_dataset

COUNTS = {"train": {"happy": 5, "sad": 2}, "test": {"happy": 1, "sad": 1}}


def body(**rest: Any) -> dict[str, Any]:
    return version_body(labels=("happy", "sad"), shards=[], rows={"train": {}}, **rest)


@pytest.fixture(params=["local", "memory", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    if request.param == "s3":
        return open_store(request.getfixturevalue("s3")("versions"))
    return open_store(str(tmp_path) if request.param == "local" else f"memory://{uuid4().hex}/p")


@pytest.fixture
def url(tmp_path: Path) -> str:
    return make_dataset(tmp_path, COUNTS, 0, max_bags=3)


# Commits.


def test_the_same_body_is_no_new_version(store: Store) -> None:
    assert commit(store, body(pack={"b": 1, "a": "x"})) == (1, True)
    assert commit(store, body(pack={"a": "x", "b": 1})) == (1, False)
    assert list_versions(store) == [1]


def test_another_body_is_the_next_version(store: Store) -> None:
    first, second = body(pack={"is": 1}), body(pack={"is": 2})
    assert [commit(store, b) for b in (first, second, first)] == [(1, True), (2, True), (3, True)]
    read = [read_version(store, n)[1] for n in (1, 2, 3)]
    assert [(b["version"], b["parent"]) for b in read] == [(1, None), (2, 1), (3, 2)]
    assert [b["pack"]["is"] for b in read] == [1, 2, 1]
    assert read_version(store)[0] == 3


@pytest.mark.parametrize("before", [0, 1])
def test_of_two_commits_at_once_one_is_refused(store: Store, before: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for i in range(before):
        commit(store, body(pack={"is": f"before {i}"}))
    gate, said = threading.Barrier(2), {}
    put_if_absent = type(store).put_if_absent

    def together(self: Store, key: str, data: bytes) -> bool:
        gate.wait(30)  # both have read the versions that were there
        return put_if_absent(self, key, data)

    monkeypatch.setattr(type(store), "put_if_absent", together)

    def work(name: str) -> None:
        try:
            said[name] = commit(store, body(pack={"is": name}))
        except MicaclError as error:
            said[name] = error

    threads = [threading.Thread(target=work, args=(name,)) for name in ("a", "b")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (winner,) = [name for name, result in said.items() if result == (before + 1, True)]
    (refusal,) = [result for result in said.values() if isinstance(result, MicaclError)]
    assert f"committed version {before + 1}" in str(refusal)
    assert list_versions(store) == list(range(1, before + 2))
    assert read_version(store)[1]["pack"]["is"] == winner


def test_a_commit_on_an_older_version_is_refused(store: Store) -> None:
    commit(store, body(pack={"is": 1}))
    commit(store, body(pack={"is": 2}))
    with pytest.raises(MicaclError, match="committed version 2"):
        commit(store, body(pack={"is": 3}), parent=1)
    assert list_versions(store) == [1, 2]
    assert commit(store, body(pack={"is": 3}), parent=2) == (3, True)


def test_a_version_is_the_same_bytes_for_the_same_inputs(tmp_path: Path) -> None:
    one, two = (LocalStore(make_dataset(tmp_path / name, COUNTS, 0)) for name in ("one", "two"))
    assert {e.key: digest(one.get(e.key)) for e in one.list()} == {e.key: digest(two.get(e.key)) for e in two.list()}
    assert str(tmp_path).encode() not in one.get(version_key(1))


def test_shards_are_listed_in_one_order(store: Store) -> None:
    shards = [{"path": f"shards/{i}"} for i in (2, 0, 1)]
    made = version_body(labels=("happy",), shards=shards, rows={})
    assert [s["path"] for s in made["shards"]] == ["shards/0", "shards/1", "shards/2"]


def test_more_than_nine_versions_are_in_order(tmp_path: Path) -> None:
    store = LocalStore(str(tmp_path))
    for i in range(12):
        commit(store, body(pack={"is": i}))
    for stranger in ("versions/abc.json", "versions/000099.json.bak", "versions/1.json"):
        store.put(stranger, b"{}")
    assert list_versions(store) == list(range(1, 13))
    assert read_version(store)[0] == 12


# Reading.


def test_no_version(store: Store) -> None:
    with pytest.raises(MicaclError, match=r"no version.*prepare"):
        read_version(store)
    commit(store, body())
    with pytest.raises(MicaclError, match=r"no version 7 \(it has \[1\]\)"):
        read_version(store, 7)


@pytest.mark.parametrize("data", [b'{"schema":3}', b"{}", b"[]", b"", b"\xff"])
def test_a_version_that_is_not_ours(tmp_path: Path, data: bytes) -> None:
    LocalStore(str(tmp_path)).put(version_key(1), data)
    with pytest.raises(MicaclError):
        open_dataset(str(tmp_path))


def test_another_schema_is_said_in_words(url: str) -> None:
    store = LocalStore(url)
    store.put(version_key(1), store.get(version_key(1)).replace(b'"schema":2', b'"schema":9'))
    with pytest.raises(MicaclError, match=r"000001\.json of schema 9; this release reads schema 2"):
        open_dataset(url)


def test_a_missing_bucket(s3: Callable[[str], str]) -> None:
    del s3
    with pytest.raises(MicaclError, match="NoSuchBucket"):
        open_dataset("s3://no-such-bucket/ds")


def test_an_opened_dataset_has_every_bag_in_place(url: str) -> None:
    dataset = open_dataset(url)
    assert dataset.labels == ("happy", "sad")
    assert dataset.index.schema == INDEX_SCHEMA
    rows = dataset.index.to_pylist()
    assert len({r["key"] for r in rows}) == len(rows) == 9
    assert [(r["shard"], r["offset"]) for r in rows] == sorted((r["shard"], r["offset"]) for r in rows)
    assert {s: dataset.split(s).num_rows for s in COUNTS} == {"train": 7, "test": 2}
    for row in rows:
        data = dataset.store.read_range(row["shard"], row["offset"], row["size"])
        assert digest(data) == row["sha256"]
    with pytest.raises(MicaclError, match=r"no bag in split 'val'.*test, train"):
        dataset.split("val")


def test_a_reader_sees_what_its_version_lists(url: str) -> None:
    store = LocalStore(url)
    _, old, _ = read_version(store)
    fewer = {k: v for k, v in old.items() if k not in ("version", "parent")}
    commit(store, {**fewer, "shards": fewer["shards"][:1]})
    assert open_dataset(url, 1).index.num_rows == 9
    assert open_dataset(url).index.num_rows == old["shards"][0]["bags"] < 9


@pytest.mark.parametrize("damage", ["flip", "truncate", "delete"])
def test_a_changed_index_is_not_used(url: str, damage: str) -> None:
    store = LocalStore(url)
    key = next(store.list("index/")).key
    data = bytearray(store.get(key))
    data[len(data) // 2] ^= 1
    if damage == "delete":
        store.delete(key)
    else:
        store.put(key, bytes(data) if damage == "flip" else store.get(key)[:-1])
    with pytest.raises(MicaclError, match=f"{key} (has sha256|is missing)"):
        _ = open_dataset(url).index


def test_an_empty_version_opens(tmp_path: Path) -> None:
    commit(LocalStore(str(tmp_path)), body())
    dataset = open_dataset(str(tmp_path))
    assert dataset.index.num_rows == 0
    assert dataset.index.schema == INDEX_SCHEMA


def test_the_hash_of_a_version_is_of_its_bytes(url: str) -> None:
    store = LocalStore(url)
    data = store.get(version_key(1))
    assert read_version(store)[2] == digest(data) == open_dataset(url).sha256
    assert canonical_json(json.loads(data)).encode() == data


def test_an_index_comes_back_as_it_went() -> None:
    values = {"string": "x", "double": 0.5, "int32": 7, "int64": 7}
    row = {field.name: values[str(field.type)] for field in INDEX_SCHEMA}
    rows = [{**row, "subject": subject, "fold": fold} for subject, fold in (("s1", 2), (None, None))]
    assert write_index(rows) == write_index(rows)
    assert read_index(write_index(rows)).to_pylist() == rows
    assert read_index(write_index(rows)).schema == INDEX_SCHEMA
