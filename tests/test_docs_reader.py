"""docs/shard-format.md is enough to write a reader from: its own one is run, and its formulas are worked out again."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline.bags import Bag
from pipeline.contract import CODECS, BagMeta, CropConfig
from pipeline.dataset import INDEX_SCHEMA, open_dataset
from pipeline.shards import MAX_FRAMES, MAX_KEY_BYTES, MAX_MEMBER_BYTES, bag_members, read_bags, write_members
from tests.tiny_dataset import CROP, make_dataset

PAGE = (Path(__file__).parents[1] / "docs" / "shard-format.md").read_text()
COUNTS = {"train": {"sad": 5, "happy": 4}, "test": {"happy": 2, "unlabelled": 1}}
Reader = Callable[[str], Iterator[tuple[dict[str, Any], dict[str, Any], dict[str, bytes]]]]


@pytest.fixture(scope="module", params=CODECS)
def url(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    crop = dataclasses.replace(CROP, codec=request.param)
    return make_dataset(tmp_path_factory.mktemp(request.param), COUNTS, 0, max_bags=3, crop=crop)


@pytest.fixture(scope="module")
def reader() -> Reader:
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    imported = re.findall(r"^(?:import|from) (.+)$", code, re.MULTILINE)
    assert imported == ["hashlib, io, json, pathlib, tarfile", "pyarrow.parquet"]
    names: dict[str, Any] = {}
    exec(compile(code, "docs/shard-format.md", "exec"), names)
    read_dataset: Reader = names["read_dataset"]
    return read_dataset


def test_the_reader_of_the_page_reads_what_ours_reads(url: str, reader: Reader) -> None:
    dataset = open_dataset(url)
    read = list(reader(url))
    assert [row for row, _, _ in read] == dataset.index.to_pylist()
    assert len(read) == 12
    shards = {s["path"]: list(read_bags(dataset.store.get(s["path"]), "x")) for s in dataset.body["shards"]}
    ours = {bag.meta.key: bag for bags in shards.values() for bag in bags}
    for row, meta, members in read:
        bag = ours[row["key"]]
        assert meta == json.loads(bag.meta.to_json())
        assert list(members.items()) == bag_members(bag)[:-1]


@pytest.mark.parametrize("what", ["index", "path"])
def test_the_reader_of_the_page_notices_damage(tmp_path: Path, reader: Reader, what: str) -> None:
    dataset = open_dataset(make_dataset(tmp_path, COUNTS, 0))
    shard = dataset.body["shards"][0]
    key = shard["path"] if what == "path" else shard["index"]["path"]
    data = bytearray(dataset.store.get(key))
    data[700] ^= 1
    dataset.store.put(key, bytes(data))
    with pytest.raises(AssertionError, match="changed after it was written"):
        list(reader(dataset.store.root))


def table(title: str) -> list[list[str]]:
    """Names in the first column of the first table of a section, row by row."""
    section = PAGE.split(f"{title}\n", 1)[1].split("\n#", 1)[0]
    rows = re.findall(r"^\| (.*?) \|", section, re.MULTILINE)[1:]
    return [re.findall(r"`([^`]+)`", row) for row in rows if "`" in row]


def test_every_column_and_field_is_on_the_page() -> None:
    columns = [name for row in table("## Index file") for name in row]
    assert columns == INDEX_SCHEMA.names
    meta = [name for row in table("### Meta") for name in row]
    assert sorted(meta) == sorted(f.name for f in dataclasses.fields(BagMeta))


def test_types_of_columns_are_on_the_page() -> None:
    section = PAGE.split("## Index file\n", 1)[1]
    for name in INDEX_SCHEMA.names:
        (row,) = re.findall(rf"^\| [^|]*`{name}`[^|]* \| (.+?) \|", section.split("\n#", 1)[0], re.MULTILINE)
        assert str(INDEX_SCHEMA.field(name).type).replace("double", "float64") in row, name


def test_every_field_of_a_version_is_on_the_page(url: str) -> None:
    body = open_dataset(url).body
    told = {name for row in table("## Version file") for name in row}
    assert {*body} <= told
    for shard in body["shards"]:
        assert {*shard} <= told


def test_the_caps_of_the_page() -> None:
    assert f"{MAX_FRAMES} frames a bag, {MAX_MEMBER_BYTES >> 20} MiB a member, 4 MiB a JPEG, 1024 px a side" in PAGE
    assert f"1 to {MAX_KEY_BYTES} bytes" in PAGE


def canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def sha256(text: str | bytes) -> str:
    return hashlib.sha256(text.encode() if isinstance(text, str) else text).hexdigest()


def test_names_follow_from_the_page(url: str) -> None:
    """Version number, crop hash, video id and shard id, worked out from the words alone."""
    dataset = open_dataset(url)
    crop = {**dataset.body["crop"], "schema": 2}
    assert sha256(canonical({k: v for k, v in crop.items() if k != "hash"}))[:12] == crop["hash"]
    for shard in dataset.body["shards"]:
        said = []
        for bag in read_bags(dataset.store.get(shard["path"]), "x"):
            assert bag.meta.key == f"{sha256(bag.meta.video)[:16]}_{bag.meta.track}"
            plain = write_members(bag_members(Bag(bag.meta.said(), bag.encoded)))
            said.append([bag.meta.key, sha256(plain), bag.meta.subject, bag.meta.scene])
        name = sha256(canonical([2, shard["split"], shard.get("fold"), shard["label"], said]))[:32]
        assert shard["path"] == f"shards/{shard['split']}/{shard['label']}/{name}.tar"
        assert shard["index"]["path"] == f"index/{name}.parquet"


def test_the_page_tells_the_defaults_of_a_step() -> None:
    crop = CropConfig()
    assert f"A bag stores up to {crop.instances} x {crop.frames_per_instance} frames" in PAGE
