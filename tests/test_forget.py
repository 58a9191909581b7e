"""`forget` removes what was named and nothing else, and with --delete leaves no byte of it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

import pipeline.forget as forget_module
from pipeline.bags import Bag
from pipeline.contract import MicaclError, Video
from pipeline.dataset import commit, open_dataset
from pipeline.forget import forget
from pipeline.shards import read_bags, write_shard
from pipeline.storage import LocalStore
from pipeline.verify import verify_dataset
from tests.tiny_dataset import label_set, make_dataset, put_crop, tiny_bag

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
    assert "prepare" in result["remedy"]
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


def test_a_delete_that_was_stopped_is_finished_by_the_same_command(
    store: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    video, whole = "train/happy/0001.mp4", LocalStore.delete
    left = [1]

    def dying(self: LocalStore, key: str) -> None:
        if not left:
            raise KeyboardInterrupt
        left.pop()
        whole(self, key)

    monkeypatch.setattr(LocalStore, "delete", dying)
    with pytest.raises(KeyboardInterrupt):
        forget(store.root, videos=[video], delete=True)
    monkeypatch.setattr(LocalStore, "delete", whole)
    assert holders(store, video)
    forget(store.root, videos=[video], delete=True)
    assert holders(store, video) == []


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
    real = forget_module._rewrite

    def slow(store: LocalStore, *rest: object) -> dict[str, object]:
        body = {k: v for k, v in open_dataset(store.root).body.items() if k not in ("version", "parent")}
        commit(store, {**body, "note": "somebody else"})
        return real(store, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(forget_module, "_rewrite", slow)
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
