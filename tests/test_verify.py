"""`verify` finds each kind of damage, says where, and does not stop at the first."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.contract import BagMeta, MicaclError, canonical_json, digest
from pipeline.dataset import read_index, version_key, write_index
from pipeline.shards import read_bags, write_shard
from pipeline.storage import LocalStore
from pipeline.verify import MAX_PROBLEMS, verify_dataset
from tests.tiny_dataset import make_dataset

COUNTS = {"train": {"happy": 5, "sad": 3}, "test": {"happy": 2, "sad": 2}}
Row = dict[str, Any]


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(make_dataset(tmp_path, COUNTS, 0, max_bags=3))


def shards_of(store: LocalStore) -> list[dict[str, Any]]:
    shards: list[dict[str, Any]] = json.loads(store.get(version_key(1)))["shards"]
    return shards


def forge(store: LocalStore, shard: dict[str, Any], change: Callable[[list[Row]], None]) -> None:
    """Change the rows of an index file and make the version file agree with its new hash."""
    rows = read_index(store.get(shard["index"]["path"])).to_pylist()
    change(rows)
    data = write_index(rows)
    store.put(shard["index"]["path"], data)
    edit_version(store, lambda body: [s["index"].update(sha256=digest(data)) for s in body["shards"] if s == shard])


def edit_version(store: LocalStore, change: Callable[[dict[str, Any]], Any]) -> None:
    body = json.loads(store.get(version_key(1)))
    change(body)
    store.put(version_key(1), canonical_json(body).encode())


def said(store: LocalStore) -> str:
    """All problems as text; there is at least one."""
    result = verify_dataset(store.root)
    assert not result["ok"]
    assert all(set(p) == {"what", "where", "remedy"} and all(p.values()) for p in result["problems"])
    return "\n".join(f"{p['where']}: {p['what']}" for p in result["problems"])


def test_a_whole_dataset_is_ok(store: LocalStore) -> None:
    result = verify_dataset(store.root)
    assert result["problems"] == []
    assert result["ok"]
    assert (result["bags"], result["version"]) == (12, 1)
    assert result["bytes"] == sum(s["bytes"] for s in shards_of(store))


def test_no_version_is_refused_in_words(tmp_path: Path) -> None:
    with pytest.raises(MicaclError, match="no version"):
        verify_dataset(str(tmp_path))


@pytest.mark.parametrize("place", [0.3, 0.6, 0.9])
def test_one_flipped_byte_is_found_in_its_bag(store: LocalStore, place: float) -> None:
    shard = shards_of(store)[0]
    data = bytearray(store.get(shard["path"]))
    at = int(place * (len(data) - 1024))
    data[at] ^= 1
    store.put(shard["path"], bytes(data))
    rows = read_index(store.get(shard["index"]["path"])).to_pylist()
    key = next(r["key"] for r in rows if r["offset"] <= at < r["offset"] + r["size"])
    assert f"{shard['path']} bag {key}: The bag has sha256" in said(store)
    assert {p["where"].partition(" bag ")[2] for p in verify_dataset(store.root)["problems"]} == {key}


def test_missing_objects_and_all_other_damage_are_named_together(store: LocalStore) -> None:
    first, second, third, *_ = shards_of(store)
    store.delete(first["index"]["path"])
    store.delete(second["path"])
    store.put(third["index"]["path"], b"no parquet")
    text = said(store)
    assert f"{first['index']['path']}: The index file is missing." in text
    assert f"{second['path']}: The shard is missing." in text
    assert f"{third['index']['path']}: The index file has sha256" in text
    assert f"{third['index']['path']}: The index file cannot be read" in text
    assert "It counts" in text  # the bags of two index files are not there


def test_a_swapped_label_in_the_index_is_found(store: LocalStore) -> None:
    shard = next(s for s in shards_of(store) if s["label"] == "sad" and s["split"] == "train")
    forge(store, shard, lambda rows: rows[0].update(label="happy"))
    text = said(store)
    assert "The index says label 'happy', the version 'sad'." in text
    assert "The bag's json says label 'sad', the index 'happy'." in text
    assert "It counts 5 bags of train/happy, the index files have 6." in text


def test_a_swapped_label_in_the_bag_is_found(store: LocalStore) -> None:
    shard = next(s for s in shards_of(store) if s["label"] == "sad")
    data = store.get(shard["path"])
    store.put(shard["path"], data.replace(b'"label":"sad"', b'"label":"joy"', 1))
    assert "The bag's json says label 'joy', the index 'sad'." in said(store)


def test_leakage_between_splits_is_found(store: LocalStore) -> None:
    """A forger who rewrites bag, shard, index and version alike is still found: the splits are compared."""
    test = next(s for s in shards_of(store) if s["split"] == "test")
    rewrite_bags(store, test, lambda meta: {"subject": "s0", "video": "train/happy/0000.mp4"})
    problems = [p["what"] for p in verify_dataset(store.root)["problems"]]
    assert problems == [
        "Leakage: the subject 's0' is in test and train.",
        "Leakage: the video 'train/happy/0000.mp4' is in test and train.",
    ]


def test_unknown_subjects_are_not_compared(store: LocalStore) -> None:
    for shard in shards_of(store):
        rewrite_bags(store, shard, lambda meta: {"subject": None})
    assert verify_dataset(store.root)["problems"] == []


def rewrite_bags(store: LocalStore, shard: dict[str, Any], fields: Callable[[BagMeta], dict[str, Any]]) -> None:
    """Change what every bag of a shard says of itself; hashes, index and version follow."""
    old = list(read_bags(store.get(shard["path"]), "test"))
    bags = [dataclasses.replace(b, meta=dataclasses.replace(b.meta, **fields(b.meta))) for b in old]
    tar, spans = write_shard(bags)
    store.put(shard["path"], tar)

    def follow(rows: list[Row]) -> None:
        for row, span, bag in zip(rows, spans, bags, strict=True):
            row.update((name, value) for name, value in fields(bag.meta).items() if name in row)
            row.update(offset=span.offset, size=span.size, sha256=span.sha256)  # this size is of bytes

    forge(store, shard, follow)
    edit_version(store, lambda body: [s.update(bytes=len(tar)) for s in body["shards"] if s["path"] == shard["path"]])


def test_a_key_that_is_there_twice_is_found(store: LocalStore) -> None:
    edit_version(store, lambda body: body["shards"].append(body["shards"][0]))
    text = said(store)
    assert "more than once" in text
    key = read_index(store.get(shards_of(store)[0]["index"]["path"]))["key"][0].as_py()
    assert f"The bag {key} is there twice" in text


def test_a_label_outside_the_set_and_other_crop_settings_are_found(store: LocalStore) -> None:
    edit_version(store, lambda body: (body.update(labels=["happy"]), body["crop"].update(hash="0" * 12)))
    text = said(store)
    assert "labelled 'sad', which is not in the label set (happy)" in text
    assert f'crops are of settings "{"0" * 12}"' in text


def test_a_frame_that_is_no_jpeg_is_found(store: LocalStore) -> None:
    """Right hashes over wrong content: what a faulty writer would leave behind."""
    shard = shards_of(store)[0]
    data = store.get(shard["path"]).replace(b"\xff\xd8\xff", b"\x00\x00\x00", 1)
    store.put(shard["path"], data)

    def follow(rows: list[Row]) -> None:
        for row in rows:
            row["sha256"] = digest(data[row["offset"] : row["offset"] + row["size"]])

    forge(store, shard, follow)
    assert "Frame 00.000 is no JPEG" in said(store)


def test_trailing_bytes_and_a_broken_version_file_are_found(store: LocalStore) -> None:
    shard = shards_of(store)[0]
    store.put(shard["path"], store.get(shard["path"])[:-1024] + b"x" * 2048)
    assert "something else than the end of a tar" in said(store)
    edit_version(store, lambda body: body.pop("shards"))
    assert "A version file is not what `prepare` writes" in said(store)


def test_problems_are_capped_and_counted(tmp_path: Path) -> None:
    store = LocalStore(make_dataset(tmp_path, {"train": {"happy": MAX_PROBLEMS + 5}}, 0))
    shard = shards_of(store)[0]

    def slower(rows: list[Row]) -> None:
        for row in rows:
            row.update(seconds=9.0)

    forge(store, shard, slower)
    result = verify_dataset(store.root)
    assert (len(result["problems"]), result["problems_found"]) == (MAX_PROBLEMS, MAX_PROBLEMS + 5)


def test_a_bag_that_no_index_names_is_found(store: LocalStore) -> None:
    shard = next(s for s in shards_of(store) if s["bags"] == 3)

    def hide(rows: list[Row]) -> None:
        del rows[1]

    forge(store, shard, hide)
    text = said(store)
    assert "but the one before it ends at" in text
    assert "The index has 2 bags, the version lists 3." in text


def test_a_frame_of_another_size_is_found(store: LocalStore) -> None:
    rewrite_bags(store, shards_of(store)[0], lambda _: {"size": 64})
    assert "Frame 00.000 is 32x32 px" in said(store)
