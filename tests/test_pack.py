"""Bags -> shards: a plan that is a function of what goes in, shards that are written once and whole."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.contract import MicaclError, PackConfig, Video, digest
from pipeline.crop import BagStub, CropRecord, bag_stub
from pipeline.dataset import commit, open_dataset, read_index, version_body
from pipeline.pack import UNLABELLED, ShardPlan, pack_shard, plan_shards
from pipeline.shards import read_bag, read_bags
from pipeline.storage import LocalStore
from tests.tiny_dataset import CROP, put_crop, tiny_bag

LABELS = ("happy", "sad")
Row = tuple[Video, str, CropRecord]


def row_of(number: int, label: str | None, split: str, sizes: Iterable[int], subject: str | None = None) -> Row:
    video = Video(url=f"/x/{number}.mp4", name=f"{number}.mp4", label=label, split=split, subject=subject)
    stubs = tuple(BagStub(key=f"{video.id}_{i}", sha256=f"{number}.{i}", size=size) for i, size in enumerate(sizes))
    return video, split, CropRecord(video=video.name, object=f"crops/{number}.tar", bags=stubs)


ROWS = st.lists(
    st.tuples(
        st.sampled_from(["happy", "sad", None]),
        st.sampled_from(["train", "test"]),
        st.lists(st.integers(1, 50), max_size=4),
    ),
    max_size=40,
).map(lambda rows: [row_of(i, *row) for i, row in enumerate(rows)])
CONFIGS = st.builds(PackConfig, max_bags=st.integers(1, 8), max_bytes=st.integers(1, 120))


@settings(max_examples=150, deadline=None, derandomize=True)
@given(rows=ROWS, config=CONFIGS, seed=st.integers(0, 2**20))
def test_the_plan(rows: list[Row], config: PackConfig, seed: int) -> None:
    plans = plan_shards(rows, config)
    shuffled = list(rows)
    random.Random(seed).shuffle(shuffled)
    assert plan_shards(iter(shuffled), config) == plans  # independent of order, and pure
    members = [m for plan in plans for m in plan.members]
    assert sorted(m.key for m in members) == sorted(b.key for _, _, r in rows for b in r.bags)
    wanted = {b.key: (split, v.label or UNLABELLED) for v, split, r in rows for b in r.bags}
    assert all(wanted[m.key] == (plan.split, plan.label) for plan in plans for m in plan.members)
    for plan in plans:
        assert 1 <= len(plan.members) <= config.max_bags
        assert len(plan.members) == 1 or sum(m.size for m in plan.members) <= config.max_bytes
        assert [m.key for m in plan.members] == sorted(m.key for m in plan.members)
    assert len({plan.path for plan in plans}) == len({plan.index_path for plan in plans}) == len(plans)


@pytest.mark.parametrize("count", [300, 1000, 5000])
def test_shards_are_half_full_or_more_in_the_mean(count: int) -> None:
    plans = plan_shards([row_of(i, "happy", "train", [10]) for i in range(count)], PackConfig(max_bags=64))
    assert count / len(plans) > 32


@settings(max_examples=50, deadline=None, derandomize=True)
@given(count=st.integers(1, 60), config=CONFIGS)
def test_one_bag_more_leaves_all_other_shards_alone(count: int, config: PackConfig) -> None:
    rows = [row_of(i, "happy", "train", [10]) for i in range(count + 1)]
    before, after = ({p.id: p for p in plan_shards(part, config)} for part in (rows[:-1], rows))
    assert len(before.keys() - after.keys()) <= 1, "one bag more changes at most the shard it falls into"


def test_the_bags_of_one_video_may_fill_several_shards() -> None:
    plans = plan_shards([row_of(0, "happy", "train", [10] * 7)], PackConfig(max_bags=3))
    assert [len(p.members) for p in plans] == [3, 3, 1]


@pytest.mark.parametrize(
    "change", [{"label": "sad"}, {"subject": "s9"}, {"name": "other.mp4"}, {"split": "test"}, {"sha256": "other"}]
)
def test_a_shard_has_another_name_when_something_in_it_changes(change: dict[str, str]) -> None:
    def plan(**said: str) -> ShardPlan:
        video = Video(
            url="/x", name=said.get("name", "a.mp4"), label=said.get("label", "happy"), subject=said.get("subject")
        )
        stub = BagStub(key=f"{video.id}_0", sha256=said.get("sha256", "1"), size=1)
        (made,) = plan_shards(
            [(video, said.get("split", "train"), CropRecord(video=video.name, object="crops/a", bags=(stub,)))],
            PackConfig(),
        )
        return made

    assert plan(**change).id != plan().id
    assert plan(**change).path != plan().path


@pytest.mark.parametrize("label", ["a/b", "..", ".", "a\nb", "a\0b"])
def test_a_label_that_cannot_name_a_folder(label: str) -> None:
    with pytest.raises(MicaclError, match="cannot name a folder"):
        plan_shards([row_of(0, label, "train", [1])], PackConfig())


# Shards of tiny bags on a folder.


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(str(tmp_path))


def rows_in(store: LocalStore, count: int = 5, **changes: object) -> list[Row]:
    crop = dataclasses.replace(CROP, **changes)  # type: ignore[arg-type]
    videos = [Video(url="/x", name=f"{i}.mp4", label="happy", subject=f"s{i}", fingerprint="1") for i in range(count)]
    return [(v, "train", put_crop(store, v, [tiny_bag(v, LABELS, 0, crop)], crop)) for v in videos]


def plan_of(store: LocalStore, count: int = 5, **changes: object) -> ShardPlan:
    (plan,) = plan_shards(rows_in(store, count, **changes), PackConfig())
    return plan


def test_a_shard_holds_the_bags_of_its_plan_with_what_the_table_says(store: LocalStore) -> None:
    rows = rows_in(store)
    (plan,) = plan_shards(rows, PackConfig())
    entry, wrote = pack_shard(plan, store)
    assert wrote
    bags = list(read_bags(store.get(plan.path), "x"))
    expected = {v.id: tiny_bag(v, LABELS, 0) for v, _, _ in rows}
    subjects = {v.id: v.subject for v, _, _ in rows}
    assert [b.meta.key for b in bags] == sorted(f"{i}_0" for i in expected)
    for bag in bags:
        video = bag.meta.key.partition("_")[0]
        assert bag.encoded == expected[video].encoded
        said = dataclasses.replace(expected[video].meta, label="happy", split="train", subject=subjects[video])
        assert bag.meta == said
    assert entry == {
        "path": plan.path,
        "split": "train",
        "label": "happy",
        "bags": 5,
        "bytes": store.size(plan.path),
        "index": {"path": plan.index_path, "sha256": digest(store.get(plan.index_path))},
    }


def test_a_bag_in_a_shard_is_known_by_the_stub_of_its_crop(store: LocalStore) -> None:
    ((_, _, record),) = rows = rows_in(store, 1)
    (plan,) = plan_shards(rows, PackConfig())
    pack_shard(plan, store)
    assert [bag_stub(bag) for bag in read_bags(store.get(plan.path), "x")] == list(record.bags)


def test_the_index_finds_every_bag(store: LocalStore) -> None:
    plan = plan_of(store)
    pack_shard(plan, store)
    tar, rows = store.get(plan.path), read_index(store.get(plan.index_path)).to_pylist()
    assert len(rows) == 5
    for row in rows:
        block = tar[row["offset"] : row["offset"] + row["size"]]
        assert digest(block) == row["sha256"]
        meta = read_bag(block, "x").meta
        assert {k: row[k] for k in ("key", "label", "split", "subject", "video", "frames", "seconds", "crop")} == {
            k: getattr(meta, k) for k in ("key", "label", "split", "subject", "video", "frames", "seconds", "crop")
        }
        assert (row["shard"], row["instances"]) == (plan.path, len(meta.instance_frames))


def test_unlabelled_bags_stay_without_a_label(store: LocalStore) -> None:
    video = Video(url="/x", name="a.mp4", fingerprint="1")
    (plan,) = plan_shards([(video, "test", put_crop(store, video, [tiny_bag(video, LABELS, 0)]))], PackConfig())
    pack_shard(plan, store)
    assert plan.path.startswith(f"shards/test/{UNLABELLED}/")
    assert [b.meta.label for b in read_bags(store.get(plan.path), "x")] == [None]


def test_packing_twice_writes_once(store: LocalStore, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_of(store)
    first, _ = pack_shard(plan, store)
    monkeypatch.setattr(LocalStore, "put", lambda *_: pytest.fail("written again"))
    assert pack_shard(plan, store) == (first, False)


@pytest.mark.parametrize("lost", ["path", "index_path"])
def test_what_is_missing_is_written_again_with_the_same_bytes(store: LocalStore, lost: str) -> None:
    plan = plan_of(store)
    entry, _ = pack_shard(plan, store)
    before = {key: store.get(key) for key in (plan.path, plan.index_path)}
    store.delete(getattr(plan, lost))
    assert pack_shard(plan, store) == (entry, True)
    assert {key: store.get(key) for key in before} == before


def test_the_index_is_the_last_to_be_written(store: LocalStore, monkeypatch: pytest.MonkeyPatch) -> None:
    plan, put = plan_of(store), LocalStore.put

    def stop_at_index(self: LocalStore, key: str, data: bytes) -> None:
        if key == plan.index_path:
            raise KeyboardInterrupt
        put(self, key, data)

    monkeypatch.setattr(LocalStore, "put", stop_at_index)
    with pytest.raises(KeyboardInterrupt):
        pack_shard(plan, store)
    assert store.exists(plan.path)
    assert not store.exists(plan.index_path)


def test_a_crop_without_its_bag_is_an_error_in_words(store: LocalStore) -> None:
    plan = plan_of(store, 1)
    wrong = dataclasses.replace(plan, members=(dataclasses.replace(plan.members[0], key="other_0"),))
    with pytest.raises(MicaclError, match=r"crops/.*does not hold the bag other_0.*Delete that crop"):
        pack_shard(wrong, store)
    assert list(store.list("shards/")) == []


def test_a_crop_that_was_damaged_is_not_packed(store: LocalStore) -> None:
    """Else the damage gets a valid sha256 in the index, and no later check can find it."""
    plan = plan_of(store, 1)
    data = bytearray(store.get(plan.members[0].crop))
    at = bytes(data).index(b"\xff\xd8") + 300
    data[at] ^= 1
    store.put(plan.members[0].crop, bytes(data))
    with pytest.raises(MicaclError):
        pack_shard(plan, store)
    assert list(store.list("shards/")) == []


def test_a_crop_that_is_gone_is_an_error_in_words(store: LocalStore) -> None:
    plan = plan_of(store, 1)
    store.delete(plan.members[0].crop)
    with pytest.raises(MicaclError, match="crops/"):
        pack_shard(plan, store)


def test_equal_names_are_equal_bytes(store: LocalStore) -> None:
    """Another cap changes no pixel here, but the json of each bag names the settings that made it."""
    plans = [plan_of(store), plan_of(store, max_seconds=60.0)]
    shards = []
    for plan in plans:
        pack_shard(plan, store)
        shards.append(store.get(plan.path))
        store.delete(plan.path)
        store.delete(plan.index_path)
    assert (plans[0].id == plans[1].id) == (shards[0] == shards[1])


def test_packing_under_other_settings_leaves_older_versions_whole(store: LocalStore) -> None:
    def prepare(**changes: object) -> None:
        plan = plan_of(store, **changes)
        entry, _ = pack_shard(plan, store)
        body = version_body(labels=LABELS, shards=[entry], rows={"train": {"happy": 5}}, source={"kind": str(changes)})
        commit(store, body)

    prepare()
    before = open_dataset(store.root, 1).index
    store.delete(next(store.list("shards/")).key)
    prepare(max_seconds=60.0)
    assert open_dataset(store.root, 1).index.equals(before)
