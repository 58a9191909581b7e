"""Bags <-> tar: exact, reproducible, read by others, and every damage is an error in words."""

from __future__ import annotations

import dataclasses
import io
import itertools
import json
import pickle
import tarfile
import tracemalloc
from pathlib import Path

import pytest
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.bags import Bag
from pipeline.contract import BagMeta, MicaclError, digest
from pipeline.shards import MAX_MEMBER_BYTES, bag_members, read_bag, read_bags, read_members, write_members, write_shard

GOLDEN = "5c2f9e5881952fe3738a687602b8899c7b457542b0ec37749824c8ff71ce2b7d"
WHERE = "s3://b/shards/train/happy/x.tar"


def bag_of(counts: tuple[int, ...], key: str = "5f0c9a1b2c3d4e5f_0", payload: bytes = b"") -> Bag:
    meta = BagMeta(
        key=key,
        video="clips/a.mp4",
        track=0,
        instance_frames=counts,
        seconds=1.5,
        fps=8.0,
        size=128,
        detector="yunet-2023mar",
        detector_score=0.875,
        crop="0123456789ab",
        boxes=((64.0, 64.5, 40.0),) * len(counts),
        label="happy",
        split="train",
        subject="s1",
    )
    return Bag(meta, tuple(tuple(b"\xff\xd8%d.%d" % (i, f) + payload for f in range(n)) for i, n in enumerate(counts)))


BAGS = [bag_of((2, 3), f"{i:016x}_0", bytes([i]) * (400 * i)) for i in range(4)]
COUNTS = st.lists(st.integers(1, 14), min_size=1, max_size=9).map(tuple)


@settings(max_examples=80, deadline=None, derandomize=True)
@given(bags=st.lists(st.tuples(COUNTS, st.binary(max_size=1200)), min_size=1, max_size=5))
def test_bags_come_back_as_they_went(bags: list[tuple[tuple[int, ...], bytes]]) -> None:
    sent = [bag_of(counts, f"{i:016x}_{i}", payload) for i, (counts, payload) in enumerate(bags)]
    tar, spans = write_shard(sent)
    assert list(read_bags(tar, WHERE)) == sent
    for span, bag in zip(spans, sent, strict=True):
        block = tar[span.offset : span.offset + span.size]
        assert span.key == bag.meta.key
        assert digest(block) == span.sha256
        assert read_bag(block, WHERE) == bag


def test_the_order_of_bags_does_not_change_the_bytes() -> None:
    assert {digest(write_shard(order)[0]) for order in itertools.permutations(BAGS)} == {digest(write_shard(BAGS)[0])}


def test_the_bytes_of_a_shard_are_fixed() -> None:
    """If this fails, every shard in the world gets another hash: raise SCHEMA_VERSION, or find what changed."""
    assert digest(write_shard(BAGS)[0]) == GOLDEN


def test_spans_tile_the_shard() -> None:
    tar, spans = write_shard(BAGS)
    assert spans[0].offset == 0
    assert all(a.offset + a.size == b.offset for a, b in itertools.pairwise(spans))
    assert spans[-1].offset + spans[-1].size + 1024 == len(tar)


def test_tarfile_reads_a_shard() -> None:
    with tarfile.open(fileobj=io.BytesIO(write_shard(BAGS)[0])) as tar:
        members = tar.getmembers()
        read = [(m.name, tar.extractfile(m).read()) for m in members]  # type: ignore[union-attr]
    assert read == [member for bag in BAGS for member in bag_members(bag)]
    assert read == sorted(read)
    assert {(m.mode, m.uid, m.gid, m.uname, m.gname, m.mtime, m.type) for m in members} == {
        (0o644, 0, 0, "", "", 0, tarfile.REGTYPE)
    }


def test_webdataset_reads_a_shard(tmp_path: Path) -> None:
    path = tmp_path / "000000.tar"
    path.write_bytes(write_shard(BAGS)[0])
    samples = list(webdataset.WebDataset(str(path), shardshuffle=False))
    assert [s["__key__"] for s in samples] == [bag.meta.key for bag in BAGS]
    for sample, bag in zip(samples, BAGS, strict=True):
        assert {k: v for k, v in sample.items() if not k.startswith("__")} == {
            name.partition(".")[2]: data for name, data in bag_members(bag)
        }


# Damage.


def member(name: str, size: int = 4, kind: bytes = tarfile.REGTYPE, link: str = "") -> bytes:
    info = tarfile.TarInfo(name)
    info.size, info.type, info.linkname = size, kind, link
    return info.tobuf(tarfile.USTAR_FORMAT) + b"data".ljust(512, b"\0")


def refused(data: bytes, match: str) -> None:
    with pytest.raises(MicaclError, match=match) as caught:
        list(read_bags(data, WHERE))
    assert WHERE in str(caught.value)
    with pytest.raises(MicaclError):
        read_bag(data, WHERE)


def without(bag: Bag, name: str) -> bytes:
    return write_members([m for m in bag_members(bag) if not m[0].endswith(name)])


ONE = write_members(bag_members(BAGS[1]))


@pytest.mark.parametrize("at", range(1, len(ONE) - 512, 97))
def test_a_bag_that_is_cut_off(at: int) -> None:
    with pytest.raises(MicaclError):
        read_bag(ONE[:at], WHERE)


def test_a_bag_whose_end_is_cut_off_in_its_json() -> None:
    last = len(ONE) - 512 * (1 + len(bag_members(BAGS[1])[-1][1]) // 512)
    refused(ONE[: last + 10], "cut off")


def test_a_shard_that_is_cut_off_in_a_header() -> None:
    refused(ONE + ONE[:300], "cut off|header")


@pytest.mark.parametrize("foreign", ["x.pkl", "5f_0.pickle", "../../etc/passwd", "a.txt", "a.jpg.npy", "a"])
def test_a_foreign_member(foreign: str) -> None:
    data = write_members([(foreign, pickle.dumps({"a": 1}))])
    for tar in (data + ONE, ONE + data, ONE[:1024] + data + ONE[1024:]):
        refused(tar, "unexpected member")


@pytest.mark.parametrize("name", [".00.000.jpg", ".00.001.jpg", ".01.001.jpg", ".01.002.jpg"])
def test_a_missing_frame(name: str) -> None:
    refused(without(BAGS[1], name), "the frames of")


def test_frames_out_of_order_or_of_another_bag() -> None:
    first, second, *rest = bag_members(BAGS[1])
    refused(write_members([second, first, *rest]), "the frames of")
    refused(write_members([first, first, *rest]), "the frames of")
    refused(write_members([*bag_members(BAGS[1])[:-1], bag_members(BAGS[2])[-1]]), "the frames of")


def test_a_missing_json() -> None:
    refused(without(BAGS[1], ".json"), "json .* is missing")
    refused(without(BAGS[1], ".json") + ONE, "the frames of")


def test_a_json_alone() -> None:
    refused(write_members(bag_members(BAGS[1])[-1:]), "unexpected member")


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE])
def test_a_member_that_is_no_plain_file(kind: bytes) -> None:
    refused(member("a.00.000.jpg", 0, kind, "/etc/passwd") + ONE, "no plain file")


@pytest.mark.parametrize("size", [MAX_MEMBER_BYTES + 1, 2**40])
def test_a_member_over_the_cap(size: int) -> None:
    info = tarfile.TarInfo("a.00.000.jpg")
    info.size = size
    refused(info.tobuf(tarfile.GNU_FORMAT) + ONE, "at most 16777216 bytes")


def test_a_member_of_negative_size() -> None:
    info = tarfile.TarInfo("a.00.000.jpg")
    info.size = -512
    with pytest.raises(MicaclError):
        list(itertools.islice(read_members(info.tobuf(tarfile.GNU_FORMAT), WHERE), 100))


@pytest.mark.parametrize("at", [0, 100, 148, 257])
def test_a_damaged_header(at: int) -> None:
    data = bytearray(ONE)
    data[at] ^= 0x55
    refused(bytes(data), "no tar header")


@pytest.mark.parametrize("data", [b"", b"\0" * 1024, ONE + ONE])
def test_a_span_is_exactly_one_bag(data: bytes) -> None:
    with pytest.raises(MicaclError, match="instead of one"):
        read_bag(data, WHERE)


def with_json(text: str) -> bytes:
    return write_members([*bag_members(BAGS[1])[:-1], (f"{BAGS[1].meta.key}.json", text.encode())])


def test_a_bag_of_another_schema() -> None:
    with pytest.raises(MicaclError, match="schema 99"):
        read_bag(with_json(json.dumps({**dataclasses.asdict(BAGS[1].meta), "schema": 99})), WHERE)


JSON = BAGS[1].meta.to_json()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        '{"schema":1}',
        JSON.replace('"track"', '"trick"'),
        JSON.replace("[2,3]", "7"),
        JSON.replace("[2,3]", '["a"]'),
        JSON.replace("[2,3]", "[2,3,-1]"),
    ],
)
def test_a_json_that_is_not_ours(text: str) -> None:
    with pytest.raises(MicaclError):
        read_bag(with_json(text), WHERE)


def test_a_json_that_is_not_ours_is_said_to_be_in_its_shard() -> None:
    refused(with_json("{"), "json")


def test_a_json_that_claims_many_frames_costs_no_memory() -> None:
    data = with_json(BAGS[1].meta.to_json().replace("[2,3]", "[2,100000]"))
    tracemalloc.start()
    try:
        refused(data, "the frames of")
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()
