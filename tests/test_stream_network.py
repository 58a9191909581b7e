"""The stream from a real S3 server behind a bad network, by several processes of a node, some of them killed."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from pipeline import PlanConfig, StreamConfig, open_dataset
from pipeline.contract import MicaclError
from pipeline.dataset import Dataset
from pipeline.loader import ClipBatch
from pipeline.object_store import ObjectStore
from pipeline.storage import open_store
from pipeline.storage_s3 import S3Store, _s3_client
from tests.fault_proxy import Fault, FaultProxy, random_faults
from tests.test_storage_network import FAST
from tests.tiny_dataset import make_dataset

pytestmark = pytest.mark.slow

COUNTS = {"train": {"sad": 40, "happy": 70, "neutral": 2}}
PLAN = PlanConfig(global_batch=12, steps_per_epoch=16, seed=1)
PATIENT = dataclasses.replace(FAST, attempts=13)
"""More attempts than a test has faults: threads meet them in any order."""
KINDS = ("500", "503", "reset", "cut_down", "reset_down", "slow_down", "flip")


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return open_dataset(make_dataset(tmp_path_factory.mktemp("net"), COUNTS, 0, max_bags=8))


@pytest.fixture(scope="module")
def proxy(s3_server: ObjectStore) -> Iterator[FaultProxy]:
    with FaultProxy(s3_server.ports[0]) as proxy, pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        _s3_client.cache_clear()
        yield proxy
    _s3_client.cache_clear()


@pytest.fixture
def there(here: Dataset, proxy: FaultProxy, s3: Callable[[str], str]) -> Dataset:
    """A copy in a bucket, seen through the proxy."""
    proxy.calm()
    remote = open_store(s3("stream"))
    for entry in here.store.list():
        remote.put(entry.key, here.store.get(entry.key))
    return Dataset(S3Store(remote.root, PATIENT), here.number, here.body, here.sha256)


def batches_of(dataset: Dataset, **stream: object) -> list[ClipBatch]:
    config = StreamConfig(**{"frames": 2, "lookahead": 8, "prefetch": 32, "io_threads": 4, **stream})
    with dataset.loader("train", PLAN, stream=config) as loader:
        return list(loader.batches(1))


def shard_reads(proxy: FaultProxy) -> Counter[str]:
    """Requests by shard."""
    return Counter(request.path.split("?")[0] for request in proxy.asked("GET") if "/shards/" in request.path)


@pytest.mark.parametrize("reads", ["whole", "range"])
@pytest.mark.parametrize("seed", range(4))
def test_faults_that_pass_change_nothing(
    here: Dataset, there: Dataset, proxy: FaultProxy, reads: str, seed: int
) -> None:
    proxy.plan(*random_faults(random.Random(seed), 12, 40, KINDS))
    proxy.pause_s = 0.001
    found = batches_of(there, reads=reads)
    assert sum(proxy.injected.values()) >= 6
    for one, other in zip(found, batches_of(here), strict=True):
        assert one.keys == other.keys
        assert one.state == other.state
        assert np.array_equal(one.frames_BNTHWC, other.frames_BNTHWC)


@pytest.mark.parametrize("reads", ["whole", "range"])
def test_storage_that_stays_broken_ends_the_stream_in_words(there: Dataset, proxy: FaultProxy, reads: str) -> None:
    proxy.plan(Fault("503", times=10**6, path="/shards/"))
    with pytest.raises(MicaclError, match=r"/shards/.*answered SlowDown.*Check the network"):
        batches_of(there, reads=reads)


@pytest.mark.parametrize("reads", ["whole", "range"])
def test_a_shard_that_is_gone_ends_the_stream_with_the_remedy(there: Dataset, reads: str) -> None:
    there.store.delete(shard := there.body["shards"][0]["path"])
    with pytest.raises(MicaclError, match=rf"{shard} is missing.*cannot be kept.*micacl prepare"):
        batches_of(there, reads=reads)


def test_reads_are_few(there: Dataset, proxy: FaultProxy) -> None:
    """Whole shards once each; ranges once a bag, and never more bytes than the bags have."""
    shards = {entry["path"] for entry in there.body["shards"]}
    proxy.plan()
    batches_of(there, reads="whole", prefetch=200)
    reads = shard_reads(proxy)
    assert set(reads.values()) == {1}
    assert {path.split("/", 3)[-1] for path in reads} <= shards
    proxy.plan()
    drawn = {key for batch in batches_of(there, reads="range") for key in batch.keys}
    assert shard_reads(proxy).total() == len(drawn)
    proxy.plan()
    batches_of(there)
    assert set(shard_reads(proxy).values()) == {1}, "auto reads whole shards: one node, and all fit"


READER = """
import json, sys
from pipeline import PlanConfig, StreamConfig, open_dataset
from pipeline.loader import Loader
url, cache, rank = sys.argv[1], sys.argv[2], int(sys.argv[3])
config = StreamConfig(frames=2, lookahead=4, prefetch=16, reads="whole", cache_dir=cache)
plan = PlanConfig(global_batch=12, steps_per_epoch=16, seed=1)
keys = []
with open_dataset(url).loader("train", plan, stream=config, rank=rank, ranks=2) as loader:
    for batch in loader:
        keys += zip(batch.positions_B.tolist(), batch.keys)
        print(len(keys), flush=True)
print(json.dumps(keys), flush=True)
"""


def reader(url: str, cache: Path, rank: int) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", READER, url, str(cache), str(rank)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=dict(os.environ))


def test_ranks_of_a_node_fetch_a_shard_once_and_outlive_each_other(
    here: Dataset, there: Dataset, proxy: FaultProxy, tmp_path: Path
) -> None:
    expected = {n: key for step, b in enumerate(batches_of(here)) for n, key in enumerate(b.keys, 12 * step)}
    proxy.plan()
    ranks = [reader(there.store.root, tmp_path / "cache", rank) for rank in (0, 1)]
    lines = [process.communicate(timeout=120)[0].splitlines() for process in ranks]
    assert dict(map(tuple, [*json.loads(lines[0][-1]), *json.loads(lines[1][-1])])) == expected
    assert set(shard_reads(proxy).values()) == {1}

    proxy.calm()
    proxy.plan(*(Fault("slow_down", times=10**6, path="/shards/"),))
    proxy.pause_s = 0.02
    dying, living = (reader(there.store.root, tmp_path / "other", rank) for rank in (0, 1))
    assert dying.stdout
    dying.stdout.readline()
    time.sleep(0.05)
    dying.send_signal(signal.SIGKILL)
    said = living.communicate(timeout=120)[0].splitlines()
    assert dict(map(tuple, json.loads(said[-1]))) == {n: key for n, key in expected.items() if n % 2}
    dying.wait()
    left = [path.name for path in (tmp_path / "other").iterdir()]
    assert not [name for name in left if name.endswith(".part")] or len(left) < 64
    again = reader(there.store.root, tmp_path / "other", 0)
    assert dict(map(tuple, json.loads(again.communicate(timeout=120)[0].splitlines()[-1]))) == {
        n: key for n, key in expected.items() if not n % 2
    }
