"""docs/shard-format.md is enough to write a reader from: its own one is run, and its formulas are worked out again."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import re
import tarfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import av
import cv2
import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipeline.bags import Bag
from pipeline.codec import decode_instance
from pipeline.contract import CODECS, BagMeta, CropConfig, PackConfig
from pipeline.dataset import INDEX_SCHEMA, Dataset, open_dataset
from pipeline.pack import Member, cut_members
from pipeline.shards import MAX_FRAMES, MAX_KEY_BYTES, MAX_MEMBER_BYTES, bag_members, read_bags, write_members
from pipeline.storage import LocalStore
from tests.cli import micacl
from tests.tiny_dataset import CROP, make_dataset

PAGE = (Path(__file__).parents[1] / "docs" / "shard-format.md").read_text()
COUNTS = {"train": {"sad": 5, "happy": 4}, "test": {"happy": 2, "unlabelled": 1}}
Reader = Callable[..., Iterator[tuple[dict[str, Any], dict[str, Any], dict[str, bytes]]]]


@pytest.fixture(scope="module", params=CODECS)
def url(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    crop = dataclasses.replace(CROP, codec=request.param, size=CROP.size + 1)
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


def test_the_pictures_are_what_the_page_says(url: str, reader: Reader) -> None:
    """Decoded without ours: JPEGs by Pillow, streams by FFmpeg's plain H.264 decoder and the rule for odd sizes."""
    dataset = open_dataset(url)
    shards = [read_bags(dataset.store.get(s["path"]), "x") for s in dataset.body["shards"]]
    for (row, meta, members), bag in zip(reader(url), (bag for bags in shards for bag in bags), strict=True):
        for i, n in enumerate(meta["instance_frames"]):
            of = [data for name, data in members.items() if name.startswith(f"{row['key']}.{i:02d}.")]
            theirs = h264(*of, meta["size"]) if row["codec"] == "h264" else [jpeg(data) for data in of]
            ours = decode_instance(bag.encoded[i], bag.meta, i, range(n))
            assert [frame.shape for frame in theirs] == [(meta["size"], meta["size"], 3)] * n
            apart = max(int(np.abs(a.astype(int) - b).max()) for a, b in zip(theirs, ours, strict=True))
            assert apart <= (0 if row["codec"] == "h264" else 2)  # decoders of JPEG may round differently


def jpeg(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)))


def h264(stream: bytes, size: int) -> list[np.ndarray]:
    with av.open(io.BytesIO(stream), format="h264") as container:
        pictures = [picture.to_ndarray(format="yuv420p") for picture in container.decode(video=0)]
    return [cv2.cvtColor(picture, cv2.COLOR_YUV2RGB_I420)[:size, :size] for picture in pictures]


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
    check_fields(open_dataset(url).body)


def check_fields(body: Mapping[str, Any]) -> None:
    told, of_shard, of_line = fields("## Version file")
    assert set(body) <= set(told)
    assert {name for name, needed in told.items() if needed.startswith("yes")} <= set(body)
    for shard in body["shards"]:
        assert set(shard) <= set(of_shard)
        assert set(of_shard) - set(shard) <= {"fold"}
    assert list(of_line) == ["video", "reason", "detail", "object", "subject"]


def fields(title: str) -> list[dict[str, str]]:
    """Of each table of a section: the rest of the row by the name in its first column."""
    section = PAGE.split(f"{title}\n", 1)[1].split("\n## ", 1)[0]
    tables = re.findall(r"^\|---.*\n((?:\|.*\n)+)", section, re.MULTILINE)
    found = []
    for text in tables:
        rows = [row[2:].split(" | ", 1) for row in text.splitlines()]
        found.append({name: rest for names, rest in rows for name in re.findall(r"`(\w+)`", names)})
    return found


def test_the_caps_of_the_page() -> None:
    assert f"{MAX_FRAMES} frames a bag, {MAX_MEMBER_BYTES >> 20} MiB a member, 4 MiB a JPEG, 1024 px a side" in PAGE
    assert f"1 to {MAX_KEY_BYTES} bytes" in PAGE


def canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def sha256(text: str | bytes) -> str:
    return hashlib.sha256(text.encode() if isinstance(text, str) else text).hexdigest()


def test_names_follow_from_the_page(url: str) -> None:
    """Crop hash, video id and shard id, worked out from the words alone."""
    check_names(open_dataset(url))


def check_names(dataset: Dataset) -> None:
    crop = {**dataset.body["crop"], "schema": 2}
    assert sha256(canonical({k: v for k, v in crop.items() if k != "hash"}))[:12] == crop["hash"]
    for shard in dataset.body["shards"]:
        said = []
        for bag in read_bags(dataset.store.get(shard["path"]), "x"):
            assert bag.meta.key == f"{sha256(bag.meta.video)[:16]}_{bag.meta.track}"
            plain = write_members(bag_members(Bag(bag.meta.said(), bag.encoded)))
            said.append([bag.meta.key, sha256(plain), bag.meta.subject, bag.meta.scene])
        name = sha256(canonical([2, shard["split"], shard.get("fold"), shard["label"], said]))[:32]
        part = f"fold-{shard['fold']}" if shard["split"] == "folds" else shard["split"]
        assert shard["path"] == f"shards/{part}/{shard['label']}/{name}.tar"
        assert shard["index"]["path"] == f"index/{name}.parquet"


def test_shards_are_cut_as_the_page_says() -> None:
    """The rule of the page, written again: the parts that ours makes of one class."""
    names = [f"{n}.mp4" for n in range(300)]
    keys = [f"{sha256(name)[:16]}_{track}" for name in names for track in (range(9) if name == "7.mp4" else (0,))]
    sizes = {key: 1000 + int(sha256(key)[:4], 16) for key in keys}
    sizes[keys[0]] = 10**6
    config = PackConfig(max_bags=7, max_bytes=250_000)

    def fits(bags: list[str]) -> bool:
        small = sum(sizes[key] for key in bags) <= config.max_bytes
        return len(bags) <= config.max_bags and (small or len(bags) == 1)

    def cut(low: int, high: int) -> Iterator[list[str]]:
        bags = sorted(key for key in keys if low <= int(key[:16], 16) < high)
        if bags and fits(bags):
            yield bags
        elif bags and high - low == 1:
            while bags:
                most = max(n for n in range(1, len(bags) + 1) if fits(bags[:n]))
                yield bags[:most]
                bags = bags[most:]
        elif bags:
            yield from cut(low, (low + high) // 2)
            yield from cut((low + high) // 2, high)

    members = [Member(key=key, sha256="", size=sizes[key], crop="") for key in keys]
    made = [[m.key for m in part] for part in cut_members(members, config)]
    assert made == list(cut(0, 2**64))
    assert len(made) > 40


def test_the_page_tells_the_defaults_of_a_step() -> None:
    crop = CropConfig()
    assert f"A bag stores up to {crop.instances} x {crop.frames_per_instance} frames" in PAGE


# A dataset as `prepare` makes it: folds, a filter, records, quarantine, the work list.

TABLE = """path,label,fold,subject
happy/0.mp4,happy,1,s0
happy/1.mp4,happy,2,s1
happy/2.mp4,happy,1,s0
happy/3.mp4,happy,2,s1
happy/4.mp4,happy,1,s2
fear/0.mp4,fear,2,s3
broken.mp4,happy,1,s4
gone.mp4,happy,2,
"""


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory, face_video: Callable[..., bytes]) -> Dataset:
    raw = LocalStore(str(tmp_path_factory.mktemp("raw")))
    for i in range(5):
        raw.put(f"happy/{i}.mp4", face_video("happy", 12, 120, i % 2))
    raw.put("fear/0.mp4", face_video("fear", 12, 120))
    raw.put("broken.mp4", b"no video")
    raw.put("t.csv", TABLE.encode())
    url = str(tmp_path_factory.mktemp("prepared"))
    flags = ("--crop.size", "64", "--crop.codec", "h264", "--pack.max-bags", "2", "--pack.where", "label != 'fear'")
    done = micacl("prepare", raw.url("t.csv"), url, *flags, "--max-quarantined", "0.5", module="pipeline")
    assert done.code == 0, done.stderr
    return open_dataset(url)


@pytest.mark.slow
def test_all_that_prepare_writes_is_on_the_page(prepared: Dataset, reader: Reader) -> None:
    store, body = prepared.store, prepared.body
    check_fields(body)
    check_names(prepared)
    assert set(body) == {*fields("## Version file")[0]} - {"forgotten"}
    folders = set(re.findall(r"^  ([\w-]+)[/.]", PAGE.split("```")[1], re.MULTILINE))
    assert {re.split(r"[/.]", entry.key)[0] for entry in store.list()} == folders - {"forgetting"}
    assert [row for row, _, _ in reader(store.root)] == prepared.index.to_pylist()
    with_nulls = {name for name in prepared.index.column_names if prepared.index[name].null_count}
    assert with_nulls <= {"subject", "fold", "scene", "yaw"}
    for fold in (1, 2):
        seen = [row for row, _, _ in reader(store.root, fold)]
        assert seen == open_dataset(store.root, fold=fold).index.to_pylist()
        assert {(row["fold"] == fold, row["split"]) for row in seen} == {(True, "test"), (False, "train")}


@pytest.mark.slow
def test_lists_and_crops_are_what_the_page_says(prepared: Dataset) -> None:
    store, body = prepared.store, prepared.body
    lines = checked(prepared, body["quarantine"]).decode().splitlines(keepends=True)
    rows = [json.loads(line) for line in lines]
    assert lines == [canonical(row) + "\n" for row in rows]
    assert [(row["video"], row["reason"], row.get("subject")) for row in rows] == [
        ("broken.mp4", "unreadable", "s4"),
        ("fear/0.mp4", "filtered", "s3"),
        ("gone.mp4", "missing", None),
    ]
    assert set(rows[0]) == {*fields("## Version file")[2]}
    (file,) = body["records"]
    records = pq.read_table(io.BytesIO(checked(prepared, file)))
    assert records.schema.names == ["video", "subject", "object", "record"]
    assert [sha256(name)[:16] for name in records["video"].to_pylist()] == sorted(
        sha256(line.split(",")[0])[:16] for line in TABLE.splitlines()[1:]
    )
    for row in records.to_pylist():
        record = json.loads(row["record"])
        assert set(record) == {*fields("## Crop object")[0]}
        with tarfile.open(fileobj=io.BytesIO(store.get(row["object"]))) as tar:
            members = tar.getmembers()
            assert members[0].name == "record.json"
            assert tar.extractfile(members[0]).read().decode() == row["record"] == canonical(record)
            assert [m.name.removesuffix(".json") for m in members[1:] if m.name.endswith("json")] == [
                bag["key"] for bag in record["bags"]
            ]
        prefix = f"crops/{body['crop']['hash']}/{sha256(row['video'])[:2]}/{sha256(row['video'])[:16]}."
        assert row["object"].startswith(prefix)
        assert len(row["object"]) == len(prefix) + len("01234567.tar")
        if row["video"] == "gone.mp4":
            assert row["object"] == f"{prefix}{sha256('missing')[:8]}.tar"
    assert next(r for r in records.to_pylist() if r["video"] == "fear/0.mp4")["record"].count('"reason":null') == 1


@pytest.mark.slow
def test_the_work_list_is_what_the_page_says(prepared: Dataset) -> None:
    said = json.loads(prepared.store.get("latest-run.json"))
    assert (said["videos"], said["listed"], said["crop"]) == (8, 8, prepared.body["crop"]["hash"])
    ((path, digest),) = said["parts"]
    listed = pq.read_table(io.BytesIO(checked(prepared, {"path": path, "sha256": digest})))
    assert listed.schema.names == ["video", "subject", "row"]
    assert {json.loads(row)["name"] for row in listed["row"].to_pylist()} == set(listed["video"].to_pylist())


def checked(dataset: Dataset, file: Mapping[str, Any]) -> bytes:
    data = dataset.store.get(file["path"])
    assert sha256(data) == file["sha256"]
    assert file["path"].rpartition("/")[2].partition(".")[0] == file["sha256"][:32]
    return data
