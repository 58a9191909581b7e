"""A plan -> clips: in order, the same for the same draw, checked by hash, with bounded memory."""

from __future__ import annotations

import dataclasses
import itertools
import random
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.bags import Bag, video_to_bags
from pipeline.codec import decode_jpeg
from pipeline.contract import CODECS, CropConfig, MicaclError
from pipeline.dataset import Dataset, open_dataset
from pipeline.plan import Draw
from pipeline.samplers import SAMPLERS, pick_frames
from pipeline.shards import read_bag, write_shard
from pipeline.storage import LocalStore, open_store
from pipeline.stream import BagStream, Clip, ShardCache, StreamConfig, decode_bag, label_numbers, shard_numbers
from tests.tiny_dataset import CROP, FRAMES, INSTANCES, SIZE, make_dataset

COUNTS = {"train": {"sad": 6, "happy": 9, "neutral": 1}, "test": {"unlabelled": 3}}
CONFIG = StreamConfig(frames=2, lookahead=4, threads=2)


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
    slow = Dataset(Slow(url), dataset.number, dataset.body, dataset.sha256, dataset.index)
    stream = stream_of(slow, StreamConfig(frames=2, threads=threads, lookahead=lookahead))
    draws = draws_of(ORDER)
    clips = list(stream.read(draws, train=True))
    assert [(c.row, c.rng_key) for c in clips] == [tuple(d) for d in draws]
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

    for done, _ in enumerate(stream_of(dataset, StreamConfig(lookahead=3, threads=2)).read(draws(), train=False)):
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


@pytest.mark.parametrize("where", ["first", "middle", "last"])
def test_a_flipped_bit_names_shard_and_key(own: Dataset, where: str) -> None:
    row = own.split("train").to_pylist()[6]
    data = bytearray(own.store.get(row["shard"]))
    data[
        {"first": row["offset"], "middle": row["offset"] + row["size"] // 2, "last": row["offset"] + row["size"] - 1}[
            where
        ]
    ] ^= 1
    own.store.put(row["shard"], bytes(data))
    stream = stream_of(own)
    with pytest.raises(MicaclError, match=f"{row['shard']} bag {row['key']}.*sha256.*verify"):
        stream.bag(6)
    for other, said in enumerate(own.split("train").to_pylist()):  # its neighbours are as they were
        if other != 6:
            assert stream.bag(other).meta.key == said["key"]


def test_damage_ends_the_stream_in_its_place(own: Dataset) -> None:
    row = own.split("train").to_pylist()[6]
    data = bytearray(own.store.get(row["shard"]))
    data[row["offset"] + 700] ^= 1
    own.store.put(row["shard"], bytes(data))
    clips = stream_of(own).read(draws_of([0, 1, 6, 2]), train=False)
    assert [next(clips).row, next(clips).row] == [0, 1]
    with pytest.raises(MicaclError, match=row["key"]):
        next(clips)


@pytest.mark.parametrize("how", ["cut", "gone"])
def test_a_shard_that_is_cut_or_gone(own: Dataset, how: str) -> None:
    row = own.split("train").to_pylist()[6]
    if how == "gone":
        own.store.delete(row["shard"])
    else:
        own.store.put(row["shard"], own.store.get(row["shard"])[: row["offset"] + 600])
    stream = stream_of(own)
    for _ in range(2):  # a failure is not remembered as a shard
        with pytest.raises(MicaclError, match=f"{row['shard']}.*(is missing|sha256)"):
            stream.bag(6)


def test_a_shard_that_came_back_is_read(own: Dataset) -> None:
    shard = own.split("train")["shard"][6].as_py()
    data = own.store.get(shard)
    own.store.delete(shard)
    stream = stream_of(own)
    with pytest.raises(MicaclError, match="is missing"):
        stream.bag(6)
    own.store.put(shard, data)
    assert stream.bag(6).meta.key == own.split("train")["key"][6].as_py()


# The cache.


def test_a_shard_is_fetched_once_for_many_threads(url: str) -> None:
    store = Slow(url)
    cache, keys = ShardCache(store, 2**30), [e.key for e in store.list("shards/")]
    threads = [threading.Thread(target=lambda: [cache.get(k) for k in keys]) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert store.gets == dict.fromkeys(keys, 1)


def held(cache: ShardCache) -> dict[str, int]:
    return {path: len(future.result()) for path, future in cache._shards.items()}


def test_a_cache_smaller_than_one_shard_works(url: str) -> None:
    store = Slow(url)
    cache, keys = ShardCache(store, 1), [e.key for e in store.list("shards/")]
    for key in keys * 2:
        assert cache.get(key) == LocalStore(url).get(key)
        assert list(held(cache)) == [key]
        assert cache._bytes == held(cache)[key]
    assert store.gets == dict.fromkeys(keys, 2)


def test_the_least_recently_used_shard_goes_first(url: str) -> None:
    store = Slow(url)
    a, b, c = sorted((e.key for e in store.list("shards/train")), key=lambda k: store.size(k) or 0)[-3:]
    cache = ShardCache(store, sum(store.size(k) or 0 for k in (a, b, c)) - 1)
    for key in (a, b, a, c):
        cache.get(key)
    assert list(held(cache)) == [a, c]


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    limit=st.integers(1, 120_000), order=st.lists(st.integers(0, 5), min_size=1, max_size=40), threads=st.integers(1, 4)
)
def test_what_is_held_is_bounded(url: str, limit: int, order: list[int], threads: int) -> None:
    store = LocalStore(url)
    sizes = {e.key: e.size for e in store.list("shards/")}
    keys = sorted(sizes)
    cache = ShardCache(store, limit)

    def work(part: int) -> None:
        for i in order[part::threads]:
            assert len(cache.get(keys[i % len(keys)])) == sizes[keys[i % len(keys)]]

    workers = [threading.Thread(target=work, args=(part,)) for part in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert cache._bytes == sum(held(cache).values()) <= limit + max(sizes.values())


# Which frames.


@settings(max_examples=300, deadline=None, derandomize=True)
@given(stored=st.integers(1, 200), wanted=st.integers(1, 64), seed=st.none() | st.integers(0, 2**32))
def test_frames_never_go_backwards(stored: int, wanted: int, seed: int | None) -> None:
    picked = pick_frames(stored, wanted, None if seed is None else np.random.default_rng(seed))
    assert len(picked) == wanted
    assert picked == sorted(picked)
    assert 0 <= picked[0] <= picked[-1] < stored
    edges = [stored * i / wanted for i in range(wanted + 1)]
    assert all(int(a) <= frame <= b for frame, a, b in zip(picked, edges, edges[1:], strict=False))
    if wanted <= stored:
        assert len(set(picked)) >= wanted // 2
    if wanted % stored == 0:
        assert set(Counter(picked).values()) == {wanted // stored}


def test_the_frames_of_the_docstring() -> None:
    assert pick_frames(12, 4, None) == [1, 4, 7, 10]
    assert pick_frames(2, 4, None) == [0, 0, 1, 1]
    assert pick_frames(1, 3, np.random.default_rng(0)) == [0, 0, 0]


INSTANCE_FRAMES = st.lists(st.integers(1, 40), min_size=1, max_size=8)
SEEDS = st.none() | st.integers(0, 2**32)


def rng_of(seed: int | None) -> np.random.Generator | None:
    return None if seed is None else np.random.default_rng(seed)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(stored=INSTANCE_FRAMES, wanted=st.integers(1, 16), seed=SEEDS)
def test_segments_stay_in_their_instance(stored: list[int], wanted: int, seed: int | None) -> None:
    picked = SAMPLERS["segments"](stored, wanted, rng_of(seed))
    rng, start = rng_of(seed), 0
    for row, count in zip(picked, stored, strict=True):
        assert row == [start + i for i in pick_frames(count, wanted, rng)]
        start += count


@settings(max_examples=300, deadline=None, derandomize=True)
@given(stored=INSTANCE_FRAMES, wanted=st.integers(1, 16), seed=SEEDS)
def test_m3dfel_starts_at_its_sixteenths(stored: list[int], wanted: int, seed: int | None) -> None:
    """Frame i of F is floor(N i / F), plus 0 to F - 1 in training, never past the last frame."""
    picked = SAMPLERS["m3dfel"](stored, wanted, rng_of(seed))
    assert [len(row) for row in picked] == [wanted] * len(stored)
    total, count = sum(stored), len(stored) * wanted
    for i, frame in enumerate(frame for row in picked for frame in row):
        start = total * i // count
        if seed is None:
            assert frame == start
        else:
            assert start <= frame <= min(start + count - 1, total - 1)


@pytest.mark.parametrize(("stored", "backwards"), [(30, 0.31), (77, 0.21), (200, 0.02), (800, 0.0)])
def test_m3dfel_goes_backwards_as_often_as_the_released_code(stored: int, backwards: float) -> None:
    """Share of neighbours among 16 frames that run back in time; the numbers are those of a simulation of that code."""
    rng = np.random.default_rng(0)
    pairs = [
        later < earlier
        for _ in range(2000)
        for row in [np.ravel(SAMPLERS["m3dfel"]([stored // 4] * 3 + [stored - 3 * (stored // 4)], 4, rng)).tolist()]
        for earlier, later in itertools.pairwise(row)
    ]
    assert np.mean(pairs) == pytest.approx(backwards, abs=0.01)


def test_m3dfel_repeats_the_frames_of_a_short_bag() -> None:
    assert SAMPLERS["m3dfel"]([3, 2], 5, None) == [[0, 0, 1, 1, 2], [2, 3, 3, 4, 4]]
    assert SAMPLERS["m3dfel"]([1], 3, np.random.default_rng(0)) == [[0, 0, 0]]
    last = Counter(np.ravel(SAMPLERS["m3dfel"]([2] * 4, 4, np.random.default_rng(0))).tolist())
    assert last.most_common(1)[0][0] == 7


def test_m3dfel_uses_every_jitter_equally() -> None:
    rng = np.random.default_rng(0)
    jitter = Counter(SAMPLERS["m3dfel"]([250] * 4, 4, rng)[0][0] for _ in range(4000))
    assert sorted(jitter) == list(range(16))
    assert max(jitter.values()) < 1.4 * min(jitter.values())


def test_an_unknown_sampler_is_refused() -> None:
    with pytest.raises(MicaclError, match=r"--stream.sampler is 'random'.*Use segments or m3dfel"):
        StreamConfig(sampler="random")


def test_every_stored_frame_is_used_in_training() -> None:
    rng = np.random.default_rng(0)
    seen = Counter(i for _ in range(600) for i in pick_frames(12, 4, rng))
    assert sorted(seen) == list(range(12))
    assert max(seen.values()) < 1.5 * min(seen.values())


def test_only_the_frames_that_are_used_are_decoded(dataset: Dataset) -> None:
    bag = stream_of(dataset).bag(0)
    used = pick_frames(FRAMES, 1, None)[0]
    broken = Bag(bag.meta, tuple(tuple(j if i == used else b"" for i, j in enumerate(run)) for run in bag.encoded))
    assert decode_bag(broken, StreamConfig(frames=1), None).shape == (INSTANCES, 1, SIZE, SIZE, 3)
    with pytest.raises(MicaclError, match=bag.meta.key):
        decode_bag(broken, StreamConfig(frames=FRAMES), None)


# Numbers for the plan.


def test_labels_and_shards_as_numbers(dataset: Dataset) -> None:
    rows = dataset.split("train")
    numbers = label_numbers(rows, dataset.labels, "x")
    assert [dataset.labels[n] for n in numbers] == rows["label"].to_pylist()
    shards = shard_numbers(rows)
    pairs = set(zip(shards.tolist(), rows["shard"].to_pylist(), strict=True))
    assert len(pairs) == len(set(shards.tolist())) == len(set(rows["shard"].to_pylist()))


def test_a_label_outside_the_set_is_refused(dataset: Dataset) -> None:
    with pytest.raises(MicaclError, match=r"'neutral' in s3://x"):
        label_numbers(dataset.split("train"), ("happy", "sad"), "s3://x")
    with pytest.raises(MicaclError, match="unlabelled"):
        label_numbers(dataset.split("test"), dataset.labels, "x")


@pytest.mark.parametrize("field", ["frames", "lookahead", "threads", "cache_mb"])
def test_a_config_below_one_is_refused(field: str) -> None:
    with pytest.raises(MicaclError, match="below 1"):
        StreamConfig(**{field: 0})
