"""A plan -> clips: in order, the same for the same draw, checked by hash, with bounded memory."""

from __future__ import annotations

import dataclasses
import random
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from pipeline.bags import Bag, video_to_bags
from pipeline.codec import decode_instance, decode_jpeg
from pipeline.contract import CODECS, CropConfig, MicaclError
from pipeline.dataset import Dataset, open_dataset
from pipeline.plan import Draw, EpochPlan, PlanConfig, PlanIndex
from pipeline.reads import open_bytes_of_plan, whole_shards
from pipeline.rows import split_rows
from pipeline.samplers import SAMPLERS, pick_frames
from pipeline.shards import read_bag, write_shard
from pipeline.storage import LocalStore, open_store
from pipeline.stream import BagStream, Clip, StreamConfig, decode_bag
from tests.tiny_dataset import CROP, FRAMES, INSTANCES, SIZE, make_dataset

COUNTS = {"train": {"sad": 6, "happy": 9, "neutral": 1}, "test": {"unlabelled": 3}}
CONFIG = StreamConfig(frames=2, lookahead=4, prefetch=8, threads=2)


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_dataset(tmp_path_factory.mktemp("stream"), COUNTS, 0, max_bags=4)


@pytest.fixture(scope="module")
def h264(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """The same frames in the other codec."""
    crop = dataclasses.replace(CROP, codec="h264")
    return open_dataset(make_dataset(tmp_path_factory.mktemp("h264"), COUNTS, 0, max_bags=4, crop=crop))


@pytest.fixture(scope="module")
def dataset(url: str) -> Dataset:
    return open_dataset(url)


@pytest.fixture
def own(tmp_path: Path) -> Dataset:
    """To be damaged."""
    return open_dataset(make_dataset(tmp_path, COUNTS, 0, max_bags=4))


def stream_of(dataset: Dataset, config: StreamConfig = CONFIG, split: str = "train") -> BagStream:
    return BagStream(dataset, dataset.split(split), config)


def draws_of(rows: list[int], seed: int = 0) -> list[Draw]:
    return [Draw(row, (seed, i)) for i, row in enumerate(rows)]


ORDER = [3, 15, 0, 7, 7, 12, 1, 15, 4, 9, 2, 11, 5, 14, 8, 6, 13, 10]


class Slow(LocalStore):
    """Answers after a random moment, so that threads finish out of order; counts what is fetched."""

    def __init__(self, root: str) -> None:
        super().__init__(root)
        self.gets: Counter[str] = Counter()

    def get(self, key: str) -> bytes:
        self.gets[key] += 1
        time.sleep(random.Random(hash(key)).uniform(0, 0.02))
        return super().get(key)


# Order and repeatability.


@pytest.mark.parametrize(("threads", "lookahead"), [(1, 1), (2, 4), (8, 32), (4, 1)])
def test_clips_come_in_the_order_of_the_draws(url: str, dataset: Dataset, threads: int, lookahead: int) -> None:
    slow = Dataset(Slow(url), dataset.number, dataset.body, dataset.sha256)
    stream = stream_of(slow, StreamConfig(frames=2, threads=threads, lookahead=lookahead, prefetch=2 * lookahead))
    draws = draws_of(ORDER)
    clips = list(stream.read(draws, train=True))
    assert [(c.row, c.rng_key) for c in clips] == [(d.row, d.rng_key) for d in draws]
    keys = dataset.split("train")["key"].to_pylist()
    assert [c.key for c in clips] == [keys[row] for row in ORDER]
    reference = [stream_of(dataset).clip(draw, train=True) for draw in draws]
    assert all(np.array_equal(a.frames_NTHWC, b.frames_NTHWC) for a, b in zip(clips, reference, strict=True))


def test_a_clip_is_what_its_bag_holds(dataset: Dataset) -> None:
    stream = stream_of(dataset, StreamConfig(frames=FRAMES))
    clip = stream.clip(Draw(5, (0, 0)), train=False)
    assert clip.frames_NTHWC.shape == (INSTANCES, FRAMES, SIZE, SIZE, 3)
    assert clip.frames_NTHWC.dtype == np.uint8
    bag = stream.bag(5)
    assert bag.meta.key == clip.key == dataset.split("train")["key"][5].as_py()
    for i, instance in enumerate(bag.encoded):
        for f, jpeg in enumerate(instance):
            assert np.array_equal(clip.frames_NTHWC[i, f], decode_jpeg(jpeg))


def test_a_draw_decides_the_pixels(dataset: Dataset) -> None:
    def pixels(key: int, train: bool) -> bytes:
        return stream_of(dataset).clip(Draw(0, (key, 1)), train=train).frames_NTHWC.tobytes()

    assert pixels(0, True) == pixels(0, True)
    assert len({pixels(key, True) for key in range(8)}) > 1
    assert len({pixels(key, False) for key in range(8)}) == 1


@pytest.mark.parametrize("split", ["train", "test"])
def test_labels_are_places_in_the_label_set(dataset: Dataset, split: str) -> None:
    assert dataset.labels == ("happy", "sad", "neutral")
    stream, rows = stream_of(dataset, split=split), dataset.split(split)
    words = rows["label"].to_pylist()
    for draw in draws_of(list(range(rows.num_rows))):
        label = stream.clip(draw, train=False).label
        assert (dataset.labels[label] if label >= 0 else "unlabelled") == words[draw.row]


def test_a_reader_that_stops_early_leaves_no_thread(dataset: Dataset) -> None:
    clips = stream_of(dataset).read(draws_of(ORDER * 20), train=True)
    next(clips)
    clips.close()
    for thread in threading.enumerate():
        if thread.name.startswith("stream"):
            thread.join(30)
            assert not thread.is_alive()


def test_no_more_clips_are_in_flight_than_asked_for(dataset: Dataset) -> None:
    taken = 0

    def draws() -> object:
        nonlocal taken
        for draw in draws_of(ORDER):
            taken += 1
            yield draw

    for done, _ in enumerate(
        stream_of(dataset, StreamConfig(lookahead=3, prefetch=1, threads=2)).read(draws(), train=False)
    ):
        assert taken <= done + 1 + 3


def test_nothing_to_read(dataset: Dataset) -> None:
    assert list(stream_of(dataset).read([], train=True)) == []


def test_a_stream_from_s3_is_the_stream_of_a_folder(dataset: Dataset, s3: Callable[[str], str]) -> None:
    remote = open_store(s3("ds"))
    for entry in dataset.store.list():
        remote.put(entry.key, dataset.store.get(entry.key))
    draws = draws_of(list(range(16)))
    there, here = (list(stream_of(d).read(draws, train=False)) for d in (open_dataset(remote.root), dataset))
    assert [c.key for c in there] == [c.key for c in here] == dataset.split("train")["key"].to_pylist()
    assert all(np.array_equal(a.frames_NTHWC, b.frames_NTHWC) for a, b in zip(there, here, strict=True))


# Codecs.


def clips_of(dataset: Dataset, keys: list[str], config: StreamConfig, *, train: bool) -> list[Clip]:
    rows = dataset.split("train")["key"].to_pylist()
    return list(stream_of(dataset, config).read(draws_of([rows.index(key) for key in keys]), train=train))


def test_both_codecs_give_the_same_clips(dataset: Dataset, h264: Dataset) -> None:
    """By key (shards are named by content, so their order differs); for every sampler, in training and evaluation."""
    assert set(h264.index["codec"].to_pylist()) == {"h264"}
    assert {len(members) for members in stream_of(h264).bag(0).encoded} == {1}
    keys = dataset.split("train")["key"].to_pylist()[:4]
    for sampler in SAMPLERS:
        config = StreamConfig(frames=2, sampler=sampler)
        for train in (False, True):
            a, b = (clips_of(d, keys, config, train=train) for d in (dataset, h264))
            for one, other in zip(a, b, strict=True):
                assert (one.key, one.label) == (other.key, other.label)
                assert one.frames_NTHWC.shape == other.frames_NTHWC.shape == (INSTANCES, 2, SIZE, SIZE, 3)
                assert np.abs(one.frames_NTHWC.astype(int) - other.frames_NTHWC).mean() < 6


def test_a_bag_of_h264_is_the_same_however_it_is_picked(h264: Dataset) -> None:
    stream = stream_of(h264, StreamConfig(frames=FRAMES))
    whole_NTHWC = stream.clip(Draw(3, (0, 0)), train=False).frames_NTHWC
    middle_NTHWC = stream_of(h264, StreamConfig(frames=1)).clip(Draw(3, (0, 0)), train=False).frames_NTHWC
    assert np.array_equal(middle_NTHWC[:, 0], whole_NTHWC[:, pick_frames(FRAMES, 1, None)[0]])


def test_a_video_is_the_same_clip_in_both_codecs(face_video: Callable[..., bytes]) -> None:
    """From raw video through the shard to pixels; twice the same bytes."""
    clips = {}
    for codec in CODECS:
        crop = CropConfig(size=64, instances=3, frames_per_instance=4, codec=codec)
        (bag,), _ = video_to_bags(face_video(), name="a.mp4", video_id="0" * 16, config=crop)
        (again,), _ = video_to_bags(face_video(), name="a.mp4", video_id="0" * 16, config=crop)
        assert bag == again
        assert bag.meta.codec == codec
        tar, (span,) = write_shard([bag])
        assert read_bag(tar[: span.size], "x") == bag
        clips[codec] = decode_bag(bag, StreamConfig(frames=4), None)
    a_NTHWC, b_NTHWC = (clips[codec].astype(int) for codec in ("jpeg", "h264"))
    assert a_NTHWC.shape == b_NTHWC.shape == (3, 4, 64, 64, 3)
    assert np.abs(a_NTHWC - b_NTHWC).mean() < 4


@pytest.mark.parametrize("codec", CODECS)
def test_a_bag_whose_frames_are_no_pictures(dataset: Dataset, h264: Dataset, codec: str) -> None:
    bag = stream_of({"jpeg": dataset, "h264": h264}[codec]).bag(0)
    broken = Bag(bag.meta, tuple(tuple(b"junk" for _ in members) for members in bag.encoded))
    with pytest.raises(MicaclError, match=rf"{bag.meta.key} instance 00.* is not .*verify"):
        decode_bag(broken, CONFIG, None)


# Damage.


class Remote(LocalStore):
    """Read as storage far away is: through the node's cache."""


WAYS = ("local", "whole", "range")


def way_of(dataset: Dataset, way: str) -> BagStream:
    """A stream over the train split that reads so."""
    if way == "local":
        return stream_of(dataset)
    far = Dataset(Remote(dataset.store.root), dataset.number, dataset.body, dataset.sha256)
    return stream_of(far, dataclasses.replace(CONFIG, reads=way))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("where", ["first", "middle", "last"])
def test_a_flipped_bit_names_shard_and_key(own: Dataset, where: str, way: str) -> None:
    row = own.split("train").to_pylist()[6]
    data = bytearray(own.store.get(row["shard"]))
    data[
        {"first": row["offset"], "middle": row["offset"] + row["size"] // 2, "last": row["offset"] + row["size"] - 1}[
            where
        ]
    ] ^= 1
    own.store.put(row["shard"], bytes(data))
    stream = way_of(own, way)
    with pytest.raises(MicaclError, match=f"{row['shard']} bag {row['key']}.*sha256.*verify"):
        stream.bag(6)
    for other, said in enumerate(own.split("train").to_pylist()):  # its neighbours are as they were
        if other != 6:
            assert stream.bag(other).meta.key == said["key"]


@pytest.mark.parametrize("way", WAYS)
def test_damage_ends_the_stream_in_its_place(own: Dataset, way: str) -> None:
    row = own.split("train").to_pylist()[6]
    data = bytearray(own.store.get(row["shard"]))
    data[row["offset"] + 700] ^= 1
    own.store.put(row["shard"], bytes(data))
    clips = way_of(own, way).read(draws_of([0, 1, 6, 2]), train=False)
    assert [next(clips).row, next(clips).row] == [0, 1]
    with pytest.raises(MicaclError, match=row["key"]):
        next(clips)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("how", ["cut", "gone"])
def test_a_shard_that_is_cut_or_gone(own: Dataset, how: str, way: str) -> None:
    row = own.split("train").to_pylist()[6]
    if how == "gone":
        own.store.delete(row["shard"])
    else:
        own.store.put(row["shard"], own.store.get(row["shard"])[: row["offset"] + 600])
    stream = way_of(own, way)
    for _ in range(2):  # a failure is not remembered as a shard
        with pytest.raises(MicaclError, match=f"{row['shard']}.*(is missing|sha256)"):
            stream.bag(6)


@pytest.mark.parametrize("way", WAYS)
def test_a_shard_that_came_back_is_read(own: Dataset, way: str) -> None:
    shard = own.split("train")["shard"][6].as_py()
    data = own.store.get(shard)
    own.store.delete(shard)
    stream = way_of(own, way)
    with pytest.raises(MicaclError, match="is missing"):
        stream.bag(6)
    own.store.put(shard, data)
    assert stream.bag(6).meta.key == own.split("train")["key"][6].as_py()


@pytest.mark.parametrize("way", ["whole", "range"])
def test_damage_that_the_cache_kept_is_fetched_again(own: Dataset, way: str, tmp_path: Path) -> None:
    """A folder that is kept between runs can hold what a disk has spoilt."""
    folder = tmp_path / "cache"
    config = dataclasses.replace(CONFIG, reads=way, cache_dir=str(folder))
    far = Dataset(Remote(own.store.root), own.number, own.body, own.sha256)
    with stream_of(far, config) as stream:
        whole = stream.bag(6)
    for file in folder.iterdir():
        if file.is_file() and len(data := bytearray(file.read_bytes())) > 2000:
            data[1000] ^= 1
            file.write_bytes(bytes(data))
    with stream_of(far, config) as stream:
        assert next(stream.read(draws_of([6]), train=False)).key == whole.meta.key


@pytest.mark.parametrize("way", WAYS)
def test_every_way_of_reading_gives_the_same_clips(dataset: Dataset, way: str) -> None:
    draws = draws_of(ORDER)
    with way_of(dataset, way) as stream:
        clips = list(stream.read(draws, train=True))
    reference = list(stream_of(dataset).read(draws, train=True))
    assert [c.key for c in clips] == [c.key for c in reference]
    assert all(np.array_equal(a.frames_NTHWC, b.frames_NTHWC) for a, b in zip(clips, reference, strict=True))


def test_each_shard_is_fetched_once_and_no_more_than_the_prefetch_says(url: str, dataset: Dataset) -> None:
    slow = Slow(url)
    far = Dataset(slow, dataset.number, dataset.body, dataset.sha256)
    config = StreamConfig(frames=2, lookahead=1, prefetch=2, io_threads=1, reads="whole")
    with stream_of(far, config) as stream:
        clips = stream.read(draws_of([0, 1, 6, 12, 15, 0, 6]), train=False)
        next(clips)
        shards = dataset.split("train")["shard"].to_pylist()
        assert set(slow.gets) <= {shards[row] for row in (0, 1, 6, 12)} | {
            s["index"]["path"] for s in dataset.body["shards"]
        }
        list(clips)
    assert {key: n for key, n in slow.gets.items() if n > 1 and key.startswith("shards")} == {}


def test_a_cache_smaller_than_one_shard_reads_ranges(url: str, dataset: Dataset) -> None:
    """So that no shard is fetched whole for each of its bags."""
    rows = split_rows(dataset, "train")
    plan = EpochPlan(PlanIndex(rows.runs, 3), PlanConfig(global_batch=4), 0)
    is_open = open_bytes_of_plan(rows, plan)
    assert is_open == rows.shard_bytes.sum()
    assert whole_shards(rows, is_open, mode="auto", cache_bytes=is_open, nodes=1).all()
    assert not whole_shards(rows, is_open, mode="auto", cache_bytes=is_open - 1, nodes=1).any()
    assert not whole_shards(rows, is_open, mode="auto", cache_bytes=2**40, nodes=3).any()
    few = split_rows(open_dataset(url, where="subject in ('s0', 's3', 's5')"), "train")
    assert len(few) < len(rows)
    assert np.array_equal(
        whole_shards(few, 0, mode="auto", cache_bytes=1, nodes=1), few.used_bytes >= 0.5 * few.shard_bytes
    )


# Which frames.


def rng_of(seed: int | None) -> np.random.Generator | None:
    return None if seed is None else np.random.default_rng(seed)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("seed", [None, 0, 1])
def test_the_frames_that_a_sampler_picks_are_decoded_in_its_order(
    dataset: Dataset, h264: Dataset, sampler: str, seed: int | None
) -> None:
    for bag in (stream_of(dataset).bag(0), stream_of(h264).bag(0)):
        counts = bag.meta.instance_frames
        stored = [
            frame
            for i, members in enumerate(bag.encoded)
            for frame in decode_instance(members, bag.meta, i, range(FRAMES))
        ]
        picked = SAMPLERS[sampler](counts, 2, rng_of(seed))
        clip_NTHWC = decode_bag(bag, StreamConfig(frames=2, sampler=sampler), rng_of(seed))
        for row, frames_THWC in zip(picked, clip_NTHWC, strict=True):
            assert all(np.array_equal(stored[n], frame) for n, frame in zip(row, frames_THWC, strict=True))


def test_only_the_frames_that_are_used_are_decoded(dataset: Dataset) -> None:
    bag = stream_of(dataset).bag(0)
    used = pick_frames(FRAMES, 1, None)[0]
    broken = Bag(bag.meta, tuple(tuple(j if i == used else b"" for i, j in enumerate(run)) for run in bag.encoded))
    assert decode_bag(broken, StreamConfig(frames=1), None).shape == (INSTANCES, 1, SIZE, SIZE, 3)
    with pytest.raises(MicaclError, match=bag.meta.key):
        decode_bag(broken, StreamConfig(frames=FRAMES), None)


@pytest.mark.parametrize("field", ["frames", "lookahead", "prefetch", "threads", "io_threads", "range_mb", "cache_mb"])
def test_a_config_below_one_is_refused(field: str) -> None:
    with pytest.raises(MicaclError, match="below 1"):
        StreamConfig(**{field: 0})
