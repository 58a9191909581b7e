"""Bags <-> tar: exact, reproducible, read by others, and every damage is an error in words."""

from __future__ import annotations

import dataclasses
import io
import itertools
import json
import pickle
import subprocess
import tarfile
import tracemalloc
from pathlib import Path

import pytest
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.bags import Bag
from pipeline.codec import member_count
from pipeline.contract import CODECS, BagMeta, MicaclError, digest
from pipeline.ray_local import ray_session
from pipeline.shards import (
    MAX_MEMBER_BYTES,
    bag_members,
    frame_names,
    read_bag,
    read_bags,
    read_members,
    write_members,
    write_shard,
)

GOLDEN = {
    "jpeg": "3f2521adaf388f605544233ca7659a7c6cc8a65f1c07600df4b1571032a0c6cd",
    "h264": "aefac43f5761d3d9be3b213789a1b9b4d029286013303230e80ebe94ac586a1c",
}
WHERE = "s3://b/shards/train/happy/x.tar"


def bag_of(
    counts: tuple[int, ...],
    key: str = "5f0c9a1b2c3d4e5f_0",
    payload: bytes = b"",
    codec: str = "jpeg",
    video: str = "clips/a.mp4",
) -> Bag:
    """Fixed bytes instead of pictures: what the encoders give is not this file's matter."""
    meta = BagMeta(
        key=key,
        video=video,
        track=0,
        instance_frames=counts,
        seconds=1.5,
        fps=8.0,
        size=128,
        detector="yunet-2023mar",
        detector_score=0.875,
        crop="0123456789ab",
        boxes=((64.0, 64.5, 40.0),) * len(counts),
        codec=codec,
        label="happy",
        split="train",
        subject="s1",
    )
    members = [member_count(codec, n) for n in counts]
    return Bag(meta, tuple(tuple(b"\xff\xd8%d.%d" % (i, f) + payload for f in range(n)) for i, n in enumerate(members)))


def bags_of(codec: str) -> list[Bag]:
    return [bag_of((2, 3), f"{i:016x}_0", bytes([i]) * (400 * i), codec) for i in range(4)]


BAGS = bags_of("jpeg")
COUNTS = st.lists(st.integers(1, 14), min_size=1, max_size=9).map(tuple)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(
    bags=st.lists(
        st.tuples(COUNTS, st.binary(max_size=1200), st.sampled_from(CODECS), st.text(max_size=40)), max_size=5
    )
)
def test_bags_come_back_as_they_went(bags: list[tuple[tuple[int, ...], bytes, str, str]]) -> None:
    """Any number of bags, instances and frames, of both codecs, named in any script; spans tile the tar."""
    sent = [bag_of(counts, f"{i:016x}_{i}", *rest) for i, (counts, *rest) in enumerate(bags)]
    tar, spans = write_shard(sent)
    assert list(read_bags(tar, WHERE)) == sent
    assert [0, *(span.offset + span.size for span in spans)] == [*(span.offset for span in spans), len(tar) - 1024]
    assert tar[-1024:] == b"\0" * 1024
    for span, bag in zip(spans, sent, strict=True):
        assert span.size % 512 == 0
        block = tar[span.offset : span.offset + span.size]
        assert span.key == bag.meta.key
        assert digest(block) == span.sha256
        assert read_bag(block, WHERE) == bag


def test_the_order_of_bags_does_not_change_the_bytes() -> None:
    assert {digest(write_shard(order)[0]) for order in itertools.permutations(BAGS)} == {digest(write_shard(BAGS)[0])}


@pytest.mark.parametrize("codec", CODECS)
def test_the_bytes_of_a_shard_are_fixed(codec: str) -> None:
    """If this fails, every shard in the world gets another hash: raise SCHEMA_VERSION, or find what changed."""
    assert digest(write_shard(bags_of(codec))[0]) == GOLDEN[codec]


def test_spans_tile_the_shard() -> None:
    tar, spans = write_shard(BAGS)
    assert spans[0].offset == 0
    assert all(a.offset + a.size == b.offset for a, b in itertools.pairwise(spans))
    assert spans[-1].offset + spans[-1].size + 1024 == len(tar)


@pytest.mark.parametrize("codec", CODECS)
def test_names_of_members(codec: str) -> None:
    names = {
        "jpeg": ["k.00.000.jpg", "k.00.001.jpg", "k.01.000.jpg", "k.json"],
        "h264": ["k.00.h264", "k.01.h264", "k.json"],
    }
    assert [name for name, _ in bag_members(bag_of((2, 1), "k", codec=codec))] == names[codec]


@pytest.mark.parametrize("codec", CODECS)
def test_tarfile_reads_a_shard(codec: str) -> None:
    bags = bags_of(codec)
    with tarfile.open(fileobj=io.BytesIO(write_shard(bags)[0])) as tar:
        members = tar.getmembers()
        read = [(m.name, tar.extractfile(m).read()) for m in members]  # type: ignore[union-attr]
    assert read == [member for bag in bags for member in bag_members(bag)]
    assert read == sorted(read)
    assert {(m.mode, m.uid, m.gid, m.uname, m.gname, m.mtime, m.type) for m in members} == {
        (0o644, 0, 0, "", "", 0, tarfile.REGTYPE)
    }


@pytest.mark.parametrize("codec", CODECS)
def test_tar_unpacks_a_shard(codec: str, tmp_path: Path) -> None:
    shard = tmp_path / "000000.tar"
    shard.write_bytes(write_shard(bags_of(codec))[0])
    members = [member for bag in bags_of(codec) for member in bag_members(bag)]
    listed = subprocess.run(["tar", "-tf", shard], check=True, capture_output=True, text=True)
    assert (listed.stdout.split(), listed.stderr) == ([name for name, _ in members], "")
    subprocess.run(["tar", "-xf", shard, "-C", tmp_path, "--no-same-owner"], check=True)
    assert [(name, (tmp_path / name).read_bytes()) for name, _ in members] == members


def samples_of(bags: list[Bag]) -> dict[str, dict[str, bytes]]:
    """As WebDataset sees them: by key, then by the rest of the name."""
    return {bag.meta.key: {name.partition(".")[2]: data for name, data in bag_members(bag)} for bag in bags}


@pytest.mark.parametrize("codec", CODECS)
def test_webdataset_reads_a_shard(codec: str, tmp_path: Path) -> None:
    path = tmp_path / "000000.tar"
    path.write_bytes(write_shard(bags_of(codec))[0])
    samples = list(webdataset.WebDataset(str(path), shardshuffle=False))
    read = {s["__key__"]: {k: v for k, v in s.items() if not k.startswith("__")} for s in samples}
    assert list(read.items()) == list(samples_of(bags_of(codec)).items())


@pytest.mark.slow
def test_ray_reads_shards_of_both_codecs(tmp_path: Path) -> None:
    import ray.data

    for codec in CODECS:
        (tmp_path / codec).mkdir()
        (tmp_path / codec / "000000.tar").write_bytes(write_shard(bags_of(codec))[0])
    with ray_session(num_cpus=1, object_store_mb=100):
        for codec in CODECS:
            rows = ray.data.read_webdataset(str(tmp_path / codec), decoder=None).take_all()
            read = {r["__key__"]: {k: v for k, v in r.items() if not k.startswith("__")} for r in rows}
            assert read == samples_of(bags_of(codec))


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


@pytest.mark.parametrize(
    "foreign",
    ["x.pkl", "5f_0.pickle", "../../etc/passwd", "/etc/x", "a.txt", "a.jpg.npy", "a", "a.mp4", ".jpg.", ""],
)
def test_a_foreign_member(foreign: str) -> None:
    data = write_members([(foreign, pickle.dumps({"a": 1}))])
    for tar in (data + ONE, ONE + data, ONE[:1024] + data + ONE[1024:]):
        refused(tar, "unexpected member|something lies behind the end")


@pytest.mark.parametrize("folder", ["..", "/etc", ".", "a"])
@pytest.mark.parametrize("codec", CODECS)
def test_a_member_in_a_folder(codec: str, folder: str) -> None:
    """Right but for the folder: of a frame, of the json, of all, and in the key."""
    members = bag_members(bags_of(codec)[1])
    moved = [(f"{folder}/{name}", data) for name, data in members]
    refused(write_members([moved[0], *members[1:]]), "the frames of")
    refused(write_members([*members[:-1], moved[-1]]), "the json of .* is named")
    refused(write_members(moved), "the frames of")
    key = f"{folder}/5f_0"
    refused(write_members(bag_members(bag_of((2, 3), key, codec=codec))), f"has the key '{key}'")


@pytest.mark.parametrize("key", ["a.b", "k" * 81, "\u00e9" * 41, ""])
def test_a_key_that_cannot_name_members(key: str) -> None:
    meta = dataclasses.replace(BAGS[1].meta, key=key)
    refused(write_members(bag_members(Bag(meta, BAGS[1].encoded))), "has the key|unexpected member")


@pytest.mark.parametrize("codec", CODECS)
def test_members_of_the_other_codec(codec: str) -> None:
    other = {"jpeg": "h264", "h264": "jpeg"}[codec]
    frames, json_member = bag_members(bags_of(codec)[1])[:-1], bag_members(bags_of(other)[1])[-1]
    refused(write_members([*frames, json_member]), "the frames of")
    mixed = [*frames, bag_members(bags_of(other)[1])[0]]
    refused(write_members([*mixed, bag_members(bags_of(codec)[1])[-1]]), "the frames of")


def test_members_twice() -> None:
    members = bag_members(BAGS[1])
    refused(write_members([members[0], *members]), "the frames of")
    refused(write_members([*members, members[-1]]), "unexpected member")
    with pytest.raises(MicaclError, match="holds 2 bags instead of one"):
        read_bag(write_members([*members, *members]), WHERE)


def other_kinds(kind: str) -> bytes:
    """The bag as another tar writer would put it: the same members, said in headers of other kinds."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.GNU_FORMAT if kind == "gnu" else tarfile.PAX_FORMAT) as tar:
        for name, data in bag_members(BAGS[1]):
            info = tarfile.TarInfo(name if kind != "gnu" else f"{'long' * 30}.{name}")
            info.size = len(data)
            info.pax_headers = {"comment": "x", "path": "../../evil.jpg"} if kind == "pax" else {}
            tar.addfile(info, io.BytesIO(data))
    return out.getvalue()


@pytest.mark.parametrize("kind", ["pax", "gnu"])
def test_extended_headers(kind: str) -> None:
    """They could rename members or resize them behind the reader's back."""
    refused(other_kinds(kind), "no plain file")


def test_something_behind_the_end() -> None:
    for hidden in (ONE, b"x", b"\0" * 512 + b"x"):
        refused(ONE + b"\0" * 1024 + hidden, "something lies behind the end of the tar")
    assert list(read_bags(ONE + b"\0" * 10240, WHERE)) == [BAGS[1]]  # the padding of other tar writers


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


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    codec=st.sampled_from(CODECS),
    flips=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(1, 255)), min_size=1, max_size=6),
)
def test_flipped_bits_are_an_error_in_words_or_in_the_frames(codec: str, flips: list[tuple[float, int]]) -> None:
    """Names and counts hold whatever is flipped; what is inside a frame is for its decoder and for the hash."""
    bag = bags_of(codec)[1]
    data = bytearray(write_members(bag_members(bag)))
    for place, bits in flips:
        data[int(place * len(data))] ^= bits
    try:
        read = read_bag(bytes(data), WHERE)
    except MicaclError:
        return
    assert [len(members) for members in read.encoded] == [len(members) for members in bag.encoded]
    assert frame_names(read.meta) == [name for name, _ in bag_members(read)[:-1]]


NO_FILES = [
    *(tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE),
    *(tarfile.CONTTYPE, tarfile.GNUTYPE_SPARSE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK),
    *(tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.AREGTYPE, b"Z"),
]


@pytest.mark.parametrize("kind", NO_FILES)
def test_a_member_that_is_no_plain_file(kind: bytes) -> None:
    refused(member("a.00.000.jpg", 0, kind, "/etc/passwd") + ONE, "no plain file")
    refused(ONE + member("a.00.000.jpg", 4, kind) + ONE, "no plain file")


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
        "[" * 100_000,
        JSON.replace('"track"', '"trick"'),
        JSON.replace("[2,3]", "7"),
        JSON.replace("[2,3]", '["a"]'),
        JSON.replace("[2,3]", "[2,3,-1]"),
    ],
)
def test_a_json_that_is_not_ours(text: str) -> None:
    with pytest.raises(MicaclError):
        read_bag(with_json(text), WHERE)


@pytest.mark.parametrize(
    ("field", "value", "match"),
    [
        ("codec", "av1", "codec 'av1', known are jpeg, h264"),
        ("codec", None, "codec None"),
        ("codec", ["jpeg"], "codec"),
        ("size", 0, "0 px, the cap is 1024"),
        ("size", 1025, "1025 px, the cap is 1024"),
        ("size", "128", "'128' px"),
        ("size", True, "True px"),
        ("key", 7, "the key 7"),
        ("key", None, "the key None"),
        ("instance_frames", [2, 0], "are not 1 to 4096"),
        ("instance_frames", [2, -3], "are not 1 to 4096"),
        ("instance_frames", [], "are not 1 to 4096"),
        ("instance_frames", [4096, 1], "are not 1 to 4096"),
        ("instance_frames", [2.0, 3.0], "are not 1 to 4096"),
        ("instance_frames", [True, 3], "are not 1 to 4096"),
    ],
)
def test_a_json_that_claims_what_cannot_be(field: str, value: object, match: str) -> None:
    for codec in CODECS:
        members = bag_members(bags_of(codec)[1])
        text = json.dumps({**json.loads(members[-1][1]), field: value})
        refused(write_members([*members[:-1], (members[-1][0], text.encode())]), match)


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
