"""`forget` removes what was named and nothing else, and with --delete leaves no byte of it."""

from __future__ import annotations

import dataclasses
import io
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import pipeline.dataset as dataset_module
import pipeline.forget as forget_module
import pipeline.rewrite as rewrite_module
from pipeline.bags import Bag
from pipeline.cli import VERBS, run
from pipeline.contract import MicaclError, Video, digest
from pipeline.crop import crop_key, crop_video, read_thumb
from pipeline.dataset import commit, open_dataset
from pipeline.demo import encode_mp4, hum, moving_gradient
from pipeline.erase import INTENTS, erase, pending_erasures, read_who
from pipeline.forget import forget, lift
from pipeline.shards import read_bags, write_shard
from pipeline.storage import LocalStore, Store, open_store
from pipeline.tombstones import forgotten_of, is_forgotten, newest_forgotten, tombstone
from pipeline.verify import verify_dataset
from tests.tiny_dataset import CROP, label_set, make_dataset, put_crop, tiny_bag

COUNTS = {"train": {"happy": 6, "sad": 3}, "test": {"happy": 2, "sad": 2}}


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(make_dataset(tmp_path / "ds", COUNTS, 0, max_bags=4))


def videos_in(store: LocalStore, version: int | None = None) -> set[str]:
    return set(open_dataset(store.root, version).index["video"].to_pylist())


def holders(store: LocalStore, video: str) -> list[str]:
    """Every object in which the bytes of a video's name or frames can be found."""
    frame = tiny_bag(Video(url="", name=video, label="happy"), label_set(COUNTS), 0).encoded[0][0]
    return [e.key for e in store.list() if frame in (data := store.get(e.key)) or video.encode() in data]


def test_a_subject_is_gone_and_the_rest_is_as_before(store: LocalStore) -> None:
    before = open_dataset(store.root)
    result = forget(store.root, subjects=["s1"])
    after = open_dataset(store.root)
    assert result["videos"] == ["train/happy/0002.mp4", "train/happy/0003.mp4"]
    assert (result["version"], result["committed"], result["bags"]) == (2, True, 2)
    assert "prepare" in result["text"]
    assert set(before.index["video"].to_pylist()) - videos_in(store) == set(result["videos"])
    assert after.body["counts"]["train"] == {"happy": 4, "sad": 3}
    assert (after.body["videos"]["written"], after.body["videos"]["forgotten"]) == (11, 2)
    assert verify_dataset(store.root)["problems"] == []
    old = {s["path"] for s in before.body["shards"]}
    assert len({s["path"] for s in after.body["shards"]} - old) == result["shards_rewritten"] <= 2


def test_without_delete_the_older_version_stays_readable(store: LocalStore) -> None:
    forget(store.root, subjects=["s1"])
    assert verify_dataset(store.root, 1)["ok"]
    assert "train/happy/0002.mp4" in videos_in(store, 1)


def test_a_rewritten_shard_is_the_one_that_prepare_makes(tmp_path: Path) -> None:
    """Forgetting the last subject gives the shards of a dataset that never had it, name and bytes."""
    forgotten = LocalStore(make_dataset(tmp_path / "a", {"train": {"happy": 6}}, 0))
    forget(forgotten.root, subjects=["s2"])
    never = LocalStore(make_dataset(tmp_path / "b", {"train": {"happy": 4}}, 0))
    one, other = (open_dataset(s.root, v).body["shards"] for s, v in ((forgotten, 2), (never, 1)))
    assert one == other
    assert forgotten.get(one[0]["path"]) == never.get(one[0]["path"])


def test_delete_leaves_no_byte_of_it(store: LocalStore) -> None:
    video = "train/happy/0001.mp4"
    assert len(holders(store, video)) >= 3  # crop, shard, index: the helper can find it
    result = forget(store.root, videos=[video], delete=True)
    assert holders(store, video) == []
    assert any(key.startswith("crops/") for key in result["deleted"])
    assert verify_dataset(store.root)["ok"]
    old = verify_dataset(store.root, 1)
    assert any("The shard is missing" in p["what"] and "forget --delete" in p["remedy"] for p in old["problems"])


@pytest.mark.parametrize("named", [{"subjects": ["s1"]}, {"videos": ["lost.mp4"]}], ids=str)
def test_delete_takes_the_pictures_of_quarantined_videos(tmp_path: Path, named: dict[str, list[str]]) -> None:
    """Without a bag there is no index row; but the crop object has a thumbnail, and it may show them."""
    url = make_dataset(
        tmp_path / "ds",
        COUNTS,
        0,
        quarantined={"lost.mp4": ("no_face", ""), "other.mp4": ("no_face", "")},
        quarantined_subjects={"lost.mp4": "s1", "other.mp4": "s0"},
    )
    raw, store = LocalStore(str(tmp_path / "raw")), LocalStore(url)
    objects = {}
    for name in ("lost.mp4", "other.mp4"):
        raw.put(name, encode_mp4(moving_gradient(12, 64), hum(12, np.random.default_rng(0))))
        video = Video(url=raw.url(name), name=name, fingerprint="1")
        store.delete(crop_key(video, CROP))
        record, _ = crop_video(video, CROP, store)
        changed, _ = crop_video(dataclasses.replace(video, fingerprint="2"), CROP, store)  # of an earlier file
        objects[name] = {record.object, changed.object}
        assert record.reason == "no_face"
        assert all(read_thumb(store, key) for key in objects[name])
    result = forget(url, **named, delete=True)
    assert result["quarantined"] == 1
    assert objects["lost.mp4"] <= set(result["deleted"])
    assert not any(store.exists(key) for key in objects["lost.mp4"])
    assert all(store.exists(key) for key in objects["other.mp4"])
    body = open_dataset(url).body
    assert store.get(body["quarantine"]["path"]).count(b"\n") == 1
    assert verify_dataset(url)["ok"]


def test_delete_reaches_older_versions_and_stopped_packs(store: LocalStore) -> None:
    """After a plain forget the newest version knows nothing of it, but old shards do, and so may a killed pack."""
    video = Video(url="", name="train/happy/0001.mp4", label="happy", fingerprint="2")
    forget(store.root, videos=[video.name])
    bag = tiny_bag(video, label_set(COUNTS), 0)
    store.put("shards/train/happy/" + "0" * 32 + ".tar", write_shard([bag])[0])
    put_crop(store, video, [bag])  # another fingerprint: the source had changed
    result = forget(store.root, videos=[video.name], delete=True)
    assert (result["version"], result["committed"], result["bags"]) == (2, False, 0)
    assert len([k for k in result["deleted"] if k.startswith("crops/")]) == 2
    assert holders(store, video.name) == []
    assert verify_dataset(store.root)["ok"]


def test_a_class_can_be_emptied(store: LocalStore) -> None:
    forget(store.root, videos=["test/sad/0000.mp4", "test/sad/0001.mp4"])
    assert open_dataset(store.root).body["counts"]["test"] == {"happy": 2}
    assert verify_dataset(store.root)["ok"]


@pytest.mark.parametrize(
    ("subjects", "videos", "says"),
    [
        (["s99"], [], "no subject 's99'.*Did you mean"),
        (["s1"], ["train/happy/0002.mp"], "Did you mean train/happy/000"),
        ([], [], "No subject and no video"),
        (["s1", "s9"], [], "--ahead True"),
    ],
)
def test_a_wrong_name_changes_nothing(
    store: LocalStore, subjects: Sequence[str], videos: Sequence[str], says: str
) -> None:
    before = {e.key for e in store.list()}
    with pytest.raises(MicaclError, match=says):
        forget(store.root, subjects, videos, delete=True)
    assert {e.key for e in store.list()} == before


def test_a_damaged_bag_is_not_copied(store: LocalStore) -> None:
    shard = next(s for s in open_dataset(store.root).body["shards"] if s["label"] == "sad" and s["split"] == "test")
    data = store.get(shard["path"])
    store.put(shard["path"], data.replace(b"\xff\xd9", b"\xff\xd8"))
    with pytest.raises(MicaclError, match="another sha256"):
        forget(store.root, videos=["test/sad/0000.mp4"])
    assert open_dataset(store.root).number == 1


def test_a_commit_meanwhile_is_not_undone(store: LocalStore, monkeypatch: pytest.MonkeyPatch) -> None:
    real = rewrite_module._rewrite

    def slow(store: LocalStore, *rest: object) -> dict[str, object]:
        body = {k: v for k, v in open_dataset(store.root).body.items() if k not in ("version", "parent")}
        commit(store, {**body, "note": "somebody else"})
        return real(store, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(rewrite_module, "_rewrite", slow)
    with pytest.raises(MicaclError, match="Somebody else committed"):
        forget(store.root, videos=["train/happy/0001.mp4"])
    assert open_dataset(store.root).body["note"] == "somebody else"


def test_bags_are_copied_byte_for_byte(store: LocalStore) -> None:
    def bags() -> dict[str, Bag]:
        shards = open_dataset(store.root).body["shards"]
        return {b.meta.key: b for s in shards for b in read_bags(store.get(s["path"]), "test")}

    before = bags()
    forget(store.root, subjects=["s0"])
    after = bags()
    assert len(after) == len(before) - 2
    assert all(before[key] == bag for key, bag in after.items())


QUARANTINED = {
    "train/happy/0002.mp4.part": ("too_short", "3 frames"),
    "lost/0.mp4": ("no_face", "none"),
    "lost/1.mp4": ("no_face", "none"),
    "lost/2.mp4": ("empty", "zero bytes"),
}
SEEN = {"lost/0.mp4": "s1", "lost/2.mp4": "s7"}


def put_list(store: Store, rows: list[dict[str, Any]], folder: str = "records") -> dict[str, str]:
    """A Parquet list as a version names it."""
    out = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), out, compression="zstd")
    path = f"{folder}/{digest(out.getvalue())[:32]}.parquet"
    store.put(path, out.getvalue())
    return {"path": path, "sha256": digest(out.getvalue())}


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Version 1; version 2 has lists of all videos besides; a shard without an index, a crop and a list of nobody's."""
    folder = tmp_path_factory.mktemp("template") / "ds"
    url = make_dataset(folder, COUNTS, 0, max_bags=4, quarantined=QUARANTINED, quarantined_subjects=SEEN)
    store = open_store(url)
    dataset = open_dataset(url)
    rows = [
        {"video": v, "subject": s, "frames": 12}
        for v, s in zip(*map(dataset.index.to_pydict().get, ("video", "subject")), strict=True)
    ]
    rows += [{"video": v, "subject": SEEN.get(v), "frames": 0} for v in QUARANTINED]
    listing = [{"name": row["video"], "subject": row["subject"]} for row in rows]
    body = {k: v for k, v in dataset.body.items() if k not in ("version", "parent")}
    commit(store, {**body, "records": [put_list(store, rows[:6]), put_list(store, rows[6:])]})
    put_list(store, listing, "listing")
    bag = tiny_bag(Video(url="", name="train/happy/0002.mp4", label="happy"), label_set(COUNTS), 0)
    store.put("shards/train/happy/" + "0" * 32 + ".tar", write_shard([bag])[0])
    put_crop(store, Video(url="", name="train/happy/0003.mp4", fingerprint="2"), [])
    return folder


@pytest.fixture
def rich(template: Path, tmp_path: Path) -> LocalStore:
    return LocalStore(str(shutil.copytree(template, tmp_path / "rich")))


def rows_naming(store: Store, names: Sequence[str]) -> list[str]:
    """Objects in which one of these videos is named, Parquet and JSON read, tars searched."""
    found = []
    for entry in store.list():
        data = store.get(entry.key)
        if entry.key.endswith(".parquet"):
            data = json.dumps(pq.read_table(io.BytesIO(data)).to_pylist()).encode()
        if any(f'"{name}"'.encode() in data for name in names):
            found.append(entry.key)
    return sorted(found)


S1 = ("train/happy/0002.mp4", "train/happy/0003.mp4", "lost/0.mp4")


def test_a_forgotten_subject_leaves_lists_quarantine_and_crops(rich: LocalStore) -> None:
    before = open_dataset(rich.root).body
    folders = {key.split("/")[0] for key in rows_naming(rich, S1)}
    assert folders == {"crops", "index", "shards", "quarantine", "records", "listing"}
    result = forget(rich.root, subjects=["s1"], delete=True)
    assert (result["videos"], result["bags"], result["quarantined"]) == (sorted(S1), 2, 1)
    assert rows_naming(rich, S1) == []
    assert not any(entry.key.startswith(INTENTS) for entry in rich.list())
    body = open_dataset(rich.root).body
    assert body["quarantined"] == {"empty": 1, "no_face": 1, "too_short": 1}
    assert body["videos"] == {"listed": 17, "written": 11, "quarantined": 3, "forgotten": 3}
    assert before["records"][1] != body["records"][1]
    assert verify_dataset(rich.root)["ok"]
    rows = [r for e in body["records"] for r in pq.read_table(io.BytesIO(rich.get(e["path"]))).to_pylist()]
    assert len(rows) == 14
    kept = [json.loads(line)["video"] for line in rich.get(body["quarantine"]["path"]).splitlines()]
    assert kept == sorted(set(QUARANTINED) - {"lost/0.mp4"})  # the name that only begins alike stays


def test_a_quarantined_video_is_forgotten_by_its_name(rich: LocalStore) -> None:
    result = forget(rich.root, videos=["lost/1.mp4"], delete=True)
    assert (result["bags"], result["quarantined"], result["shards_rewritten"]) == (0, 1, 0)
    assert rows_naming(rich, ["lost/1.mp4"]) == []
    assert open_dataset(rich.root).body["quarantined"] == {"empty": 1, "no_face": 1, "too_short": 1}


def test_without_delete_old_lists_stay_for_old_versions(rich: LocalStore) -> None:
    forget(rich.root, subjects=["s1"])
    old, new = open_dataset(rich.root, 2).body, open_dataset(rich.root, 3).body
    assert rich.exists(old["quarantine"]["path"])
    assert not set(rows_naming(rich, S1)) & {new["quarantine"]["path"], *(e["path"] for e in new["records"])}


class Killed(BaseException):
    pass


class Dying(LocalStore):
    """Lives for `left` operations; of those in `counted` the next is not done, nor is anything after it."""

    def __init__(self, url: str, left: int, counted: Sequence[str]) -> None:
        super().__init__(url)
        self.left, self.counted, self.dead = left, counted, False

    def _live(self, operation: str) -> None:
        if operation in self.counted:
            self.left -= 1
        if self.dead or self.left < 0:
            self.dead = True
            raise Killed(operation)

    def get(self, key: str) -> bytes:
        self._live("get")
        return super().get(key)

    def list(self, prefix: str = "") -> Any:
        self._live("list")
        return super().list(prefix)

    def put(self, key: str, data: bytes) -> None:
        self._live("put")
        super().put(key, data)

    def put_if_absent(self, key: str, data: bytes) -> bool:
        self._live("put")
        return super().put_if_absent(key, data)

    def delete(self, key: str) -> None:
        self._live("delete")
        super().delete(key)


def contents(store: Store) -> dict[str, str]:
    return {entry.key: digest(store.get(entry.key)) for entry in store.list()}


def kill_everywhere(
    template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, counted: Sequence[str], act: Callable[[str], Any]
) -> int:
    """Kill `act` at every counted operation; each time readers see a whole version, and the same command ends alike."""
    done = LocalStore(str(shutil.copytree(template, tmp_path / "done")))
    act(done.root)
    wanted = contents(done)
    for n in range(1000):
        store = LocalStore(str(shutil.copytree(template, tmp_path / str(n))))
        dying = Dying(store.root, n, counted)
        with monkeypatch.context() as patch:
            patch.setattr(dataset_module, "open_store", lambda url, dying=dying: dying)
            try:
                act(store.root)
            except Killed:
                pass
        assert {shard["path"] for shard in open_dataset(store.root).body["shards"]} <= {e.key for e in store.list()}
        assert n % 5 or verify_dataset(store.root)["ok"]
        if not dying.dead:
            assert contents(store) == wanted
            return n
        act(store.root)
        assert contents(store) == wanted, f"killed at operation {n}"
        shutil.rmtree(store.root)
    raise AssertionError("it never ended")


def forget_s1(url: str) -> None:
    forget(url, subjects=["s1"], delete=True)


@pytest.mark.slow
def test_killed_at_any_write_the_same_command_ends_alike(
    template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert kill_everywhere(template, tmp_path, monkeypatch, ("put", "delete"), forget_s1) > 15


@pytest.mark.slow
def test_killed_at_any_operation_the_same_command_ends_alike(
    template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert kill_everywhere(template, tmp_path, monkeypatch, ("get", "list", "put", "delete"), forget_s1) > 40


def test_what_a_stopped_delete_left_is_deleted_by_the_next_forget_of_anybody(
    rich: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even if the file that told whose they were is gone already."""
    dying = Dying(rich.root, 3, ("delete",))
    with monkeypatch.context() as patch:
        patch.setattr(dataset_module, "open_store", lambda url: dying)
        with pytest.raises(Killed):
            forget_s1(rich.root)
    for key in [key for key, rows in read_who(rich).items() if "s1" in rows["subject"].to_pylist()]:
        rich.delete(key)
    told = forget(rich.root, subjects=["s0"], dry_run=True)["deleted"]
    assert set(rows_naming(rich, S1)) <= set(told)
    assert any(key.startswith("shards/") for key in rows_naming(rich, S1))
    forget(rich.root, subjects=["s0"])
    assert rows_naming(rich, S1) == []


def test_an_intent_deletes_neither_what_is_listed_nor_what_is_not_ours(rich: LocalStore) -> None:
    shard = open_dataset(rich.root).body["shards"][0]["path"]
    rich.put(f"{INTENTS}a.json", json.dumps({"delete": [shard]}).encode())
    forget(rich.root, subjects=["s1"])
    assert verify_dataset(rich.root, 2)["ok"]
    for keys in (["versions/000001.json"], ["shards/../versions/000001.json"], "shards/", [3]):
        rich.put(f"{INTENTS}b.json", json.dumps({"delete": keys}).encode())
        with pytest.raises(MicaclError):
            forget(rich.root, subjects=["s0"])
    assert rich.exists("versions/000001.json")


def test_erase_leaves_nothing_and_names_nobody(rich: LocalStore) -> None:
    keys = [entry.key for entry in rich.list("crops/")][:2]
    dying = Dying(rich.root, 1, ("delete",))
    with pytest.raises(Killed):
        erase(dying, keys)
    (intent,) = pending_erasures(rich, ())
    assert not any(name in rich.get(intent).decode() for name in ("s1", "happy"))
    erase(rich, keys)
    assert not any(rich.exists(key) for key in [*keys, intent])


# --- tombstones ---------------------------------------------------------------------------------------------------


def test_tombstones_keep_the_subject_and_its_videos_out(rich: LocalStore) -> None:
    assert newest_forgotten(rich) == (2, frozenset())
    forget(rich.root, subjects=["s1"])
    body = open_dataset(rich.root).body
    number, forgotten = newest_forgotten(rich)
    assert (number, forgotten) == (3, forgotten_of(body))
    assert body["forgotten"] == sorted([tombstone("subject", "s1"), *(tombstone("video", v) for v in S1)])
    assert "s1" not in json.dumps(body["forgotten"])
    for video, out in (
        (Video(url="", name="new.mp4", subject="s1"), True),
        (Video(url="", name="new.mp4", subject="s2"), False),
        (Video(url="", name="new.mp4"), False),
        (Video(url="", name=S1[0]), True),  # the same video from a source that says no subject
        (Video(url="", name="s1"), False),  # a video that is called like the subject
    ):
        assert is_forgotten(video, forgotten) is out


def test_a_tombstone_is_a_digest_that_anybody_can_compute() -> None:
    assert tombstone("subject", "s1") == digest(b"subject:s1")[:32]


def test_forgotten_twice_is_forgotten_once(rich: LocalStore) -> None:
    forget(rich.root, subjects=["s1"], delete=True)
    before = contents(rich)
    again = forget(rich.root, subjects=["s1"], delete=True)
    assert (again["version"], again["committed"], again["deleted"]) == (3, False, [])
    assert contents(rich) == before


def test_who_is_not_prepared_yet_is_forgotten_ahead(rich: LocalStore) -> None:
    result = forget(rich.root, subjects=["s1", "person 99"], videos=["later.mp4"], ahead=True)
    assert (result["ahead"], result["bags"]) == (["person 99", "later.mp4"], 2)
    _, forgotten = newest_forgotten(rich)
    assert is_forgotten(Video(url="", name="x.mp4", subject="person 99"), forgotten)
    assert is_forgotten(Video(url="", name="later.mp4"), forgotten)
    assert verify_dataset(rich.root)["ok"]
    assert not forget(rich.root, subjects=["person 99"])["committed"]  # known from now on


def test_lift_lets_them_in_again(rich: LocalStore) -> None:
    forget(rich.root, subjects=["s1", "s0"], videos=["lost/1.mp4"])
    result = lift(rich.root, subjects=["s1"])
    _, forgotten = newest_forgotten(rich)
    assert (result["version"], len(result["lifted"])) == (4, 4)
    assert not any(is_forgotten(Video(url="", name=name, subject="s1"), forgotten) for name in S1)
    assert is_forgotten(Video(url="", name="x.mp4", subject="s0"), forgotten)
    assert is_forgotten(Video(url="", name="lost/1.mp4"), forgotten)
    with pytest.raises(MicaclError, match="'s1' is not forgotten"):
        lift(rich.root, subjects=["s1"])
    with pytest.raises(MicaclError, match="No subject"):
        lift(rich.root)


def test_after_delete_videos_are_lifted_by_name(rich: LocalStore) -> None:
    """Nothing tells any more which videos were the subject's."""
    forget(rich.root, subjects=["s1"], delete=True)
    lift(rich.root, subjects=["s1"])
    assert is_forgotten(Video(url="", name=S1[0], subject="s1"), newest_forgotten(rich)[1])
    assert lift(rich.root, videos=S1)["forgotten"] == []


# --- dry run, checklist, storage ------------------------------------------------------------------------------------


def test_a_dry_run_writes_nothing_and_says_what_would_be_done(
    rich: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = contents(rich)
    with monkeypatch.context() as patch:
        patch.setattr(dataset_module, "open_store", lambda url: Dying(url, 0, ("put", "delete")))
        told = forget(rich.root, subjects=["s1"], delete=True, dry_run=True)
    assert contents(rich) == before
    assert (told["version"], told["committed"], told["bags"], told["quarantined"]) == (2, False, 2, 1)
    done = forget(rich.root, subjects=["s1"], delete=True)
    assert {k: told[k] for k in ("videos", "bags", "quarantined", "shards_rewritten", "deleted")} == {
        k: done[k] for k in ("videos", "bags", "quarantined", "shards_rewritten", "deleted")
    }


def what_remains(result: dict[str, Any]) -> dict[str, str]:
    return {item["what"]: item["where"] for item in result["remains"]}


def test_the_checklist_says_what_is_left(rich: LocalStore) -> None:
    put_crop(rich, Video(url="", name="never packed.mp4", fingerprint="1"), [])
    Path(rich.root, "crops/.tmp-1").write_bytes(b"half")
    plain = what_remains(forget(rich.root, subjects=["s1"]))
    assert plain["versions"].endswith("versions 1, 2")
    assert "train/happy/0002.mp4" in plain["the raw videos"]
    assert "1 crops of videos that no version names" in plain
    assert "1 files .tmp-*" in plain
    assert any("that say no subject" in what for what in plain)
    assert plain["runs and bundles that were trained on them"] == "those that name versions 1, 2 of this dataset"
    result = forget(rich.root, subjects=["s1"], delete=True)
    after = what_remains(result)
    assert "versions" not in after
    assert after["versions without their objects"].endswith("versions 1, 2")
    for item in result["remains"]:
        assert f"[ ] {item['what']}: {item['where']}" in result["text"]
        assert item["do"] in result["text"]
    assert "objects that hold them still" not in after


def test_what_somebody_wrote_meanwhile_is_named(rich: LocalStore, monkeypatch: pytest.MonkeyPatch) -> None:
    def slow(store: Store, keys: Sequence[str]) -> None:
        erase(store, keys)
        put_crop(store, Video(url="", name=S1[0], fingerprint="3"), [])

    monkeypatch.setattr(forget_module, "erase", slow)
    left = what_remains(forget(rich.root, subjects=["s1"], delete=True))
    assert left["objects that hold them still"].startswith("crops/")


@pytest.mark.parametrize(
    "key", ["index/x.parquet", "records/x.parquet", "quarantine/x.jsonl", "shards/train/sad/x.tar"]
)
def test_what_cannot_be_read_stops_it_before_anything_is_done(rich: LocalStore, key: str) -> None:
    rich.put(key, b"{broken" * 200)
    before = contents(rich)
    with pytest.raises(MicaclError, match=f"{key} cannot be read.*nothing was forgotten.*[Dd]elete it"):
        forget(rich.root, subjects=["s1"], delete=True)
    assert contents(rich) == before


def test_index_files_of_an_older_release_are_read(rich: LocalStore) -> None:
    old = {"key": "k", "video": S1[0], "subject": "s1", "shard": "shards/train/happy/old.tar", "split": "train"}
    out = io.BytesIO()
    pq.write_table(pa.Table.from_pylist([old]), out)
    rich.put("index/old.parquet", out.getvalue())
    rich.put(old["shard"], b"of another schema")
    assert {"index/old.parquet", old["shard"]} <= set(forget(rich.root, subjects=["s1"], delete=True)["deleted"])
    assert not rich.exists(old["shard"])


def test_on_a_real_object_store(s3: Callable[[str], str]) -> None:
    url = make_dataset(s3("forget"), {"train": {"happy": 4}}, 0, quarantined=QUARANTINED, quarantined_subjects=SEEN)
    store = open_store(url)
    result = forget(url, subjects=["s1"], delete=True)
    assert (result["version"], result["bags"], result["quarantined"]) == (2, 2, 1)
    assert rows_naming(store, S1) == []
    assert verify_dataset(url)["ok"]
    assert not list(store.list(INTENTS))
    assert any("lifecycle" in item["do"] for item in result["remains"])


def test_the_command_takes_names_in_both_ways_and_speaks_to_a_person(
    rich: LocalStore, capsys: pytest.CaptureFixture[str]
) -> None:
    def command(*flags: str) -> tuple[int, dict[str, Any], str]:
        code = run(VERBS, "micacl", ["forget", rich.root, *flags])
        out = capsys.readouterr()
        return code, json.loads(out.out.splitlines()[-1]), out.err

    names = ("--subject", "s0", "--subject", "s1", "s2")
    code, told, words = command(*names, "--dry-run", "True")
    assert (code, told["bags"], told["committed"]) == (0, 6, False)
    assert "Nothing was written" in words
    code, done, words = command(*names, "--delete", "True")
    assert (code, done["bags"], done["version"]) == (0, 6, 3)
    assert "[ ] the raw videos" in words
    assert done["remains"]
    assert "text" not in done
    code, back, _ = command("--subject", "s0", "--lift", "True")
    assert (code, back["version"], len(back["lifted"])) == (0, 4, 1)
    code, both, _ = command("--subject", "s1", "--lift", "True", "--delete", "True")
    assert code == 2
    assert "--lift True stands with" in both["error"]["cause"]
