"""bench/stream.py: its loaders do the house's work, frame for frame, and its rules of choice."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "bench"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "bench/stream_peers"))

import stream_data
import work
from stream_runs import LOADERS, Bench

from pipeline.contract import PackConfig, Video
from pipeline.pack import pack_shard, plan_shards
from pipeline.samplers import pick_segments
from pipeline.shards import read_bags
from pipeline.storage import LocalStore
from pipeline.stream import StreamConfig, decode_bag


@pytest.mark.parametrize("seed", range(20))
def test_a_peer_picks_the_frames_that_the_house_picks(seed: int) -> None:
    ours = pick_segments((work.STORED,) * work.INSTANCES, work.WANTED, np.random.default_rng(seed))
    assert work.pick(np.random.default_rng(seed)) == [n for part in ours for n in part]


def test_a_peer_reads_and_decodes_what_the_house_does(tmp_path: Path) -> None:
    store = LocalStore(str(tmp_path))
    video = Video(url="/nowhere/a.mp4", name="a.mp4", fingerprint="1", label="happy", split="train", subject="a")
    record = stream_data._put_crop(store, video, stream_data.render_bag(0))
    (plan,) = plan_shards([(video, "train", record)], PackConfig())
    pack_shard(plan, store)
    ((key, label, jpegs),) = work.read_bags(str(tmp_path / plan.path))
    (bag,) = read_bags(store.get(plan.path), "a test")
    assert (key, label) == (bag.meta.key, "happy")
    assert jpegs == [data for members in bag.encoded for data in members]
    theirs = decode_bag(bag, StreamConfig(frames=work.WANTED), np.random.default_rng(3))
    picked = work.pick(np.random.default_rng(3))
    assert np.array_equal(work.decode([jpegs[i] for i in picked]), theirs)
    ends = np.cumsum([len(jpeg) for jpeg in jpegs])
    assert [bytes(piece) for piece in work.cut(b"".join(jpegs), ends, picked)] == [jpegs[i] for i in picked]


def test_settings_far_from_the_best_are_dropped_and_the_median_decides(tmp_path: Path) -> None:
    bench = Bench(folder=tmp_path, peers_python="", seconds=1)
    ours = dataclasses.replace(LOADERS[0], workers=(1, 2, 3))
    assert bench.best("local", ours) is None
    assert bench.going_on("local", ours) == [1, 2, 3]
    for workers, rates in {1: [1.0, 100.0, 50.0], 2: [60.0, 61.0, 0.0], 3: [58.0, 5.0, 58.0]}.items():
        bench.found["local", "ours", workers] = [{"clips_per_s": rate} for rate in rates]
    assert bench.best("local", ours) == 2
    assert bench.going_on("local", ours) == [2, 3]
    bench.found["local", "ours", 1] = [{"clips_per_s": 1000.0}]
    assert bench.best("local", ours) == 2, "one lucky run does not beat three"
