"""`verify` finds each kind of damage, says where, and does not stop at the first."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import verify
from pipeline.contract import FOLDS, BagMeta, MicaclError, PackConfig, Video, canonical_json, digest
from pipeline.dataset import bag_counts, body_sha256, commit, read_index, version_body, version_key, write_index
from pipeline.pack import pack_shard, plan_shards
from pipeline.phash import HEX_DIGITS
from pipeline.shards import read_bags, write_shard
from pipeline.storage import LocalStore
from pipeline.verify import MAX_PROBLEMS, verify_dataset
from tests.cli import micacl
from tests.tiny_dataset import CROP, make_dataset, put_crop, tiny_bag

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
    """Change the version file as a forger would: its own hash follows."""
    body = json.loads(store.get(version_key(1)))
    change(body)
    store.put(version_key(1), canonical_json({**body, "sha256": body_sha256(body)}).encode())


def said(store: LocalStore) -> str:
    """All problems as text; there is at least one."""
    result = verify_dataset(store.root)
    assert not result["ok"]
    assert all(set(p) == {"severity", "what", "where", "remedy"} and all(p.values()) for p in result["problems"])
    return "\n".join(f"{p['where']}: {p['what']}" for p in result["problems"])


def test_a_whole_dataset_is_ok(store: LocalStore) -> None:
    result = verify_dataset(store.root)
    assert result["problems"] == []
    assert result["ok"]
    assert (result["bags"], result["version"]) == (12, 1)
    assert result["found"] == {"damage": 0, "leak": 0, "suspect": 0}
    assert result["notes"] == []
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
    edit_version(store, lambda body: body["videos"].update(listed=10, written=10))  # three test videos became one
    problems = verify_dataset(store.root)["problems"]
    assert [p["what"] for p in problems] == [
        "Leakage: the subject 's0' is in test and train (4 bags).",
        "Leakage: the video 'train/happy/0000.mp4' is in test and train (3 bags).",
    ]
    assert {p["severity"] for p in problems} == {"leak"}


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
    assert "The version file is not what `prepare` writes" in said(store)


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


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> LocalStore:
    lost = {"lost/a.mp4": ("no_face", "no face is followed"), "lost/b.mp4": ("empty", "the file has zero bytes")}
    folder = tmp_path_factory.mktemp("whole")
    return LocalStore(make_dataset(folder, {"train": {"happy": 2, "sad": 1}, "test": {"sad": 1}}, 0, quarantined=lost))


def objects_of(store: LocalStore) -> list[str]:
    """Keys of everything that a reader of the version opens."""
    shards = shards_of(store)
    lists = [e.key for e in store.list("quarantine/")]
    return [version_key(1), *lists, *(s["index"]["path"] for s in shards), *(s["path"] for s in shards)]


@pytest.mark.slow
@settings(max_examples=150, deadline=None)
@given(st.data())
def test_any_changed_byte_is_found_and_named(whole: LocalStore, data: st.DataObject) -> None:
    """One byte of one object, any object, any place, any other value."""
    keys = objects_of(whole)
    key = data.draw(st.one_of(st.just(keys[0]), st.sampled_from(keys)), "object")
    before = whole.get(key)
    at = data.draw(st.integers(0, len(before) - 1), "byte")
    changed = bytearray(before)
    changed[at] ^= data.draw(st.integers(1, 255), "flip")
    whole.put(key, bytes(changed))
    try:
        result = verify_dataset(whole.root)
    finally:
        whole.put(key, before)
    assert not result["ok"]
    named = [p for p in result["problems"] if p["where"].split(" bag ")[0] == whole.url(key)]
    assert named
    assert {p["severity"] for p in result["problems"]} == {"damage"}
    assert verify_dataset(whole.root)["problems"] == []


@pytest.mark.parametrize("key_of", [0, 1, 2, -1])
def test_a_cut_or_a_longer_object_is_found(whole: LocalStore, key_of: int) -> None:
    key = objects_of(whole)[key_of]
    before = whole.get(key)
    for changed in (before[:-1], before[: len(before) // 2], b"", before + b"\n", before + b"\0" * 512):
        whole.put(key, changed)
        try:
            problems = verify_dataset(whole.root)["problems"]
        finally:
            whole.put(key, before)
        assert [p for p in problems if p["where"].split(" bag ")[0] == whole.url(key)]


def test_counts_of_videos_and_the_quarantine_list_are_checked(tmp_path: Path) -> None:
    lost = {"lost/a.mp4": ("no_face", "no face is followed")}
    store = LocalStore(make_dataset(tmp_path, {"train": {"happy": 2}}, 0, quarantined=lost))
    edit_version(store, lambda body: body["videos"].update(listed=4))
    assert "It lists 4 videos, but 2 written, 1 quarantined and 0 forgotten." in said(store)
    edit_version(store, lambda body: body["videos"].update(listed=4, written=3))
    assert "It says 3 videos gave bags, the index files have 2." in said(store)
    edit_version(
        store, lambda body: body.update(quarantined={"empty": 1}, videos={"listed": 3, "written": 2, "quarantined": 1})
    )
    assert "The list has 1 videos ({'no_face': 1}), the version says 1 ({'empty': 1})." in said(store)
    edit_version(store, lambda body: body["crop"].update(margin=2.0))
    assert "Its crop settings have the hash" in said(store)


def place(folder: Path, videos: Sequence[tuple[Video, str]]) -> LocalStore:
    """A committed dataset of videos with the perceptual hashes that are given."""
    store = LocalStore(str(folder))
    records = []
    for video, phash in videos:
        bag = tiny_bag(video, ("happy", "sad"), 0)
        bag = dataclasses.replace(bag, meta=dataclasses.replace(bag.meta, phash=phash))
        records.append((video, str(video.split), put_crop(store, video, [bag])))
    shards = [pack_shard(plan, store)[0] for plan in plan_shards(records, PackConfig())]
    body = version_body(
        labels=("happy", "sad"),
        shards=shards,
        rows=bag_counts(shards),
        crop={**dataclasses.asdict(CROP), "hash": CROP.hash},
        videos={"listed": len(videos), "written": len(videos), "quarantined": 0},
    )
    commit(store, body)
    return store


def a_video(name: str, split: str = "train", label: str | None = "happy", **more: Any) -> Video:
    return Video(url=f"/nowhere/{name}", name=name, fingerprint="1", label=label, split=split, **more)


def hash_near(seed: int, flips: int = 0) -> str:
    """A hash of the seed with some bits of motion flipped."""
    rng = np.random.default_rng(seed)
    bits = rng.integers(0, 2, 4 * HEX_DIGITS, dtype=np.uint8)
    bits[64 + rng.choice(256, flips, replace=False)] ^= 1
    return np.packbits(bits).tobytes().hex()


def test_a_subject_in_two_folds_is_a_leak(tmp_path: Path) -> None:
    folds = [("a", 1, "s0"), ("b", 1, "s1"), ("c", 2, "s0"), ("d", 3, None), ("e", 2, None)]
    store = place(tmp_path, [(a_video(n, FOLDS, subject=s, fold=k), "") for n, k, s in folds])
    result = verify_dataset(store.root)
    assert [p["what"] for p in result["problems"]] == ["Leakage: the subject 's0' is in fold-1 and fold-2 (2 bags)."]
    assert result["found"] == {"damage": 0, "leak": 1, "suspect": 0}
    assert not result["ok"]


def test_a_video_in_two_folds_is_a_leak(tmp_path: Path) -> None:
    """Tracks of one video: pack keeps them together, so the fold of one is changed by hand."""
    store = place(tmp_path, [(a_video(n, FOLDS, fold=k), "") for n, k in (("a", 1), ("b", 2))])
    second = next(s for s in shards_of(store) if s["fold"] == 2)
    rewrite_bags(store, second, lambda meta: {"video": "a"})
    edit_version(store, lambda body: body["videos"].update(listed=1, written=1))
    assert said(store).endswith("Leakage: the video 'a' is in fold-1 and fold-2 (2 bags).")


def test_copies_on_two_sides_are_suspected_by_name(tmp_path: Path) -> None:
    one, other = hash_near(1), hash_near(1, 17)
    videos = [
        (a_video("a", "train"), one),
        (a_video("again", "train"), one),  # twice on one side is no leak
        (a_video("b", "test"), other),
        (a_video("c", "test"), hash_near(2)),
        (a_video("d", "test", None), one),  # without a label it is not scored
        (a_video("e", "val", "sad"), ""),
    ]
    result = verify_dataset(place(tmp_path, videos).root)
    assert result["ok"]
    assert result["found"] == {"damage": 0, "leak": 0, "suspect": 1}
    [problem] = result["problems"]
    assert problem["severity"] == "suspect"
    assert re.search(
        r"videos '(a|again)' \(train\) and 'b' \(test\) look and move alike \(distance 17 of", problem["what"]
    )


def test_copies_in_two_folds_are_suspected(tmp_path: Path) -> None:
    videos = [(a_video("a", FOLDS, fold=1), hash_near(1)), (a_video("b", FOLDS, fold=4), hash_near(1))]
    result = verify_dataset(place(tmp_path, videos).root)
    assert "'a' (fold-1) and 'b' (fold-4)" in result["problems"][0]["what"]


@pytest.mark.slow
def test_exit_codes_tell_damage_from_leaks(tmp_path: Path) -> None:
    copies = [(a_video("a"), hash_near(1)), (a_video("b", "test"), hash_near(1))]
    store = place(tmp_path / "copies", copies)
    done = micacl("verify", store.root, module="pipeline")
    assert (done.code, done.result["found"]["suspect"]) == (0, 1)
    assert "suspect: " in done.stderr
    assert micacl("verify", store.root, "--strict", "True", module="pipeline").code == 4
    leaky = place(tmp_path / "leak", [(a_video("a", subject="s"), ""), (a_video("b", "test", subject="s"), "")])
    assert micacl("verify", leaky.root, module="pipeline").code == 4
    leaky.delete(shards_of(leaky)[0]["path"])
    done = micacl("verify", leaky.root, module="pipeline")
    assert done.code == 2
    assert [p["severity"] for p in done.result["problems"]] == ["damage", "leak"]  # the worst first


def test_layout_and_published_counts_are_notes(store: LocalStore) -> None:
    layout = "DFEW with single labels, 5 folds."
    edit_version(store, lambda body: body.update(source={"kind": "dfew", "layout": layout}))
    result = verify_dataset(store.root)
    assert result["ok"]
    assert result["notes"][0] == layout
    assert result["notes"][1].startswith("fold-1: 0 clips, 2341 are published; happy 0 (489), sad 0 (379)")
    assert result["notes"][-1] == "train: 8 clips, the published lists have no such part."
    edit_version(store, lambda body: body.update(source={"kind": "mafw"}))
    assert verify_dataset(store.root)["notes"][0] == "fold-1: 0 clips, 1839 are published."
    edit_version(store, lambda body: body.update(source={"kind": "folder"}))
    assert verify_dataset(store.root)["notes"] == []


def test_lists_that_a_version_names_are_checked(store: LocalStore) -> None:
    store.put("records/x.parquet", b"what was written")
    listed = {"path": "records/x.parquet", "sha256": digest(b"what was written")}
    edit_version(store, lambda body: body.update(records=[listed]))
    assert verify_dataset(store.root)["ok"]
    store.put("records/x.parquet", b"what was writteN")
    [problem] = verify_dataset(store.root)["problems"]
    assert problem["where"] == store.url("records/x.parquet")
    edit_version(store, lambda body: body.update(records=[], quarantine={"path": "records/x.parquet"}))
    [problem] = verify_dataset(store.root)["problems"]
    assert "quarantine.sha256 is missing" in problem["what"]
    edit_version(store, lambda body: (body.pop("quarantine"), body["videos"].update(listed=9, quarantined=1)))
    assert "names no list of them" in said(store)


def test_a_long_run_says_how_far_it_is(store: LocalStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify, "_SAY_EVERY_S", 0.0)
    lines: list[str] = []
    verify_dataset(store.root, say=lines.append)
    assert len(lines) == len(shards_of(store))
    assert lines[-1].startswith(f"checked {len(lines)}/{len(lines)} shards")


@pytest.mark.slow
def test_a_real_copy_in_another_codec_is_named(media: Path, tmp_path: Path) -> None:
    """From raw videos: the H.264 original is in train, its AV1 copy in test; another take of somebody else is not."""
    table = tmp_path / "table.csv"
    rows = [("asl/book.mkv", "train"), ("edge/av1.mp4", "test"), ("asl/no.mkv", "train"), ("asl/yes.mkv", "test")]
    table.write_text("path,label,split\n" + "".join(f"{media / name},happy,{split}\n" for name, split in rows))
    dataset = str(tmp_path / "dataset")
    micacl("prepare", str(table), dataset, "--labels", "happy", module="pipeline")
    done = micacl("verify", dataset, module="pipeline")
    assert (done.code, done.result["found"]) == (0, {"damage": 0, "leak": 0, "suspect": 1})
    assert "book.mkv" in done.result["problems"][0]["what"]
    assert "av1.mp4" in done.result["problems"][0]["what"]
