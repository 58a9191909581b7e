"""The property that a dataset rests on: whatever the network does, and whenever a process dies, a run ends right or
with an error in words, and the next run ends right. The same bytes, one version, no part of an object.

A small real run (crops, shards, commit, read back) goes over a real S3 server behind the fault proxy.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import os
import random
import re
import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import get_context

import pytest

from pipeline import storage_s3
from pipeline.bags import Bag
from pipeline.contract import MicaclError, PackConfig, Video
from pipeline.crop import CropRecord, crop_key, read_record
from pipeline.dataset import bag_counts, commit, list_versions, open_dataset, version_body, version_key
from pipeline.object_store import ObjectStore
from pipeline.pack import pack_shard, plan_shards
from pipeline.storage import Store, open_store
from pipeline.storage_s3 import S3Config, S3Store
from pipeline.stream import BagStream, StreamConfig
from tests.fault_proxy import KINDS, Fault, FaultProxy, random_faults
from tests.tiny_dataset import CROP, put_crop, tiny_bag

LABELS = ("happy", "sad", "angry")
SEEDS, FAULTS = 20, 10
KILLS, KILLS_OF_A_RUN = 20, 5
MEETABLE = tuple(kind for kind in KINDS if kind not in ("flip", "404"))
IMPATIENT = S3Config(attempts=4, connect_s=5, read_s=1, pause_s=0.001, pause_max_s=0.01, piece_bytes=2000)
GAVE_UP = re.compile(r"the last of [24] attempts|says that it exists and that it does not")
"""The only two errors that a network may cause: no lost race where there is one writer, no damaged object."""


@functools.cache
def bags() -> list[tuple[Video, Bag]]:
    """Nine videos of three labels in two splits, and the bag of each."""
    videos = [
        Video(url=f"/nowhere/{i}", name=f"{i}.mp4", fingerprint="1", label=LABELS[i % 3], split=split, subject=f"s{i}")
        for i in range(9)
        for split in ("train" if i < 6 else "test",)
    ]
    return [(video, tiny_bag(video, LABELS, 0)) for video in videos]


def crop(store: Store, video: Video, bag: Bag) -> CropRecord:
    return read_record(store, crop_key(video, CROP)) or put_crop(store, video, [bag])


def run(url: str) -> None:
    """What `micacl prepare` and a reader do, less the decoding: crops, shards, commit, then every bag."""
    store = open_store(url)
    store.check()
    with ThreadPoolExecutor(2) as pool:
        records = list(pool.map(lambda one: crop(store, *one), bags()))
        plans = plan_shards(
            [(video, str(video.split), record) for (video, _), record in zip(bags(), records, strict=True)],
            PackConfig(max_bags=3),
        )
        shards = list(pool.map(lambda plan: pack_shard(plan, store)[0], plans))
        commit(store, version_body(labels=LABELS, shards=shards, rows=bag_counts(shards)))
        dataset = open_dataset(url)
        assert dataset.number == 1
        stream = BagStream(dataset, dataset.index, StreamConfig())
        read = {bag.meta.key: bag.encoded for bag in pool.map(stream.bag, range(dataset.index.num_rows))}
    assert read == {bag.meta.key: bag.encoded for _, bag in bags()}


def objects(url: str) -> dict[str, str]:
    """Size and ETag of every object: for objects that were put in one piece the ETag is the MD5 of the bytes."""
    return {entry.key: entry.fingerprint for entry in open_store(url).list()}


@pytest.fixture(scope="module")
def proxy(s3_server: ObjectStore) -> Iterator[FaultProxy]:
    with FaultProxy(s3_server.ports[0]) as proxy, pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        storage_s3._s3_client.cache_clear()
        yield proxy
    storage_s3._s3_client.cache_clear()


@pytest.fixture(scope="module")
def right(proxy: FaultProxy, s3: Callable[[str], str]) -> dict[str, str]:
    """Every object of a run without faults."""
    run(url := s3("right"))
    found = objects(url)
    version = open_store(url).get(version_key(1))
    assert found[version_key(1)] == f"{len(version)}-{hashlib.md5(version).hexdigest()}"
    assert Counter(key.split("/")[0] for key in found) == {"crops": 9, "shards": 6, "index": 6, "versions": 1}
    return found


def check_what_is_there(url: str, right: dict[str, str]) -> None:
    """Whole, right objects, and a version only when all that it lists is there."""
    found = objects(url)
    assert found.items() <= right.items()
    assert version_key(1) not in found or found == right


def faults_of(seed: int, requests: int) -> list[Fault]:
    """Spread over the run, or (every other seed) all from one request on, which more attempts than four would pass."""
    rng = random.Random(seed)
    faults = random_faults(rng, FAULTS, requests, MEETABLE)
    if seed % 2:
        start = rng.randrange(requests)
        faults = [dataclasses.replace(fault, after=start) for fault in faults]
    return [*faults, *(dataclasses.replace(fault, kind=rng.choice(("412", "409", "lost"))) for fault in faults[:2])]


def error_of(url: str) -> MicaclError | None:
    try:
        run(url)
    except MicaclError as error:
        return error
    return None


@pytest.mark.slow
def test_a_run_among_faults_ends_right_or_in_words(
    proxy: FaultProxy, s3: Callable[[str], str], right: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    injected: Counter[str] = Counter()
    ends: Counter[str] = Counter()
    proxy.calm()
    run(s3("count"))
    requests = len(proxy.requests)
    for seed in range(SEEDS):
        url = s3(f"seed-{seed}")
        monkeypatch.setattr(storage_s3, "CONFIG", IMPATIENT)
        proxy.plan(*faults_of(seed, requests))
        error = error_of(url)
        assert error is None or GAVE_UP.search(str(error)), f"seed {seed}: {error}"
        ends["in words" if error else "right"] += 1
        injected += proxy.injected
        monkeypatch.setattr(storage_s3, "CONFIG", S3Config())
        proxy.calm()
        check_what_is_there(url, right)
        if error:
            run(url)
        assert objects(url) == right, f"seed {seed}"
        assert list_versions(open_store(url)) == [1]
    print(f"{requests} requests a run; {injected.total()} faults: {dict(injected)}; runs ended {dict(ends)}")
    assert injected.total() >= 0.7 * SEEDS * FAULTS
    assert set(injected) == set(MEETABLE)
    assert min(ends["right"], ends["in words"]) >= 2


def run_in_child(url: str, environment: dict[str, str]) -> None:
    os.environ.update(environment)
    run(url)


@pytest.mark.slow
def test_a_run_that_is_killed_is_completed_by_the_next(
    proxy: FaultProxy, s3: Callable[[str], str], right: dict[str, str]
) -> None:
    """Killed before a request, after one whose answer it has not seen, or in the middle of an upload."""
    context, rng = get_context("forkserver"), random.Random(0)
    context.set_forkserver_preload(["tests.test_faults"])
    environment = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
    killed: Counter[str] = Counter()
    while killed.total() < KILLS:
        url = s3("killed")
        for _ in range(KILLS_OF_A_RUN):
            child = context.Process(target=run_in_child, args=(url, environment))
            proxy.calm()
            proxy.plan(*random_faults(rng, 1, 40, ["reset", "lost", "cut_up"]))
            proxy.on_fault = lambda _, child=child: os.kill(child.pid, signal.SIGKILL)
            child.start()
            child.join()
            killed += proxy.injected
            assert child.exitcode == (-signal.SIGKILL if proxy.injected else 0)
            proxy.calm()
            check_what_is_there(url, right)
        run(url)
        assert objects(url) == right
        assert list_versions(open_store(url)) == [1]
    print(f"killed {dict(killed)}")
    assert set(killed) == {"reset", "lost", "cut_up"}


class Gate(S3Store):
    """Writers that wait for each other before the commit's put."""

    def __init__(self, url: str, gate: threading.Barrier) -> None:
        super().__init__(url, dataclasses.replace(IMPATIENT, read_s=20))
        self.gate = gate

    def put_if_absent(self, key: str, data: bytes) -> bool:
        self.gate.wait(60)
        return super().put_if_absent(key, data)


@pytest.mark.parametrize("kind", ["", "lost", "409", "412", "503", "reset", "cut_up"])
def test_of_two_who_commit_one_wins_and_the_other_is_told(
    proxy: FaultProxy, s3: Callable[[str], str], kind: str
) -> None:
    url, gate = s3("race"), threading.Barrier(2)
    bodies = [version_body(labels=(name,), shards=[], rows={}) for name in ("one", "other")]
    proxy.calm()
    proxy.plan(*([Fault(kind, method="PUT", times=3)] if kind else []))

    def writer(body: dict[str, object]) -> object:
        try:
            return commit(Gate(url, gate), body)
        except MicaclError as error:
            return error

    with ThreadPoolExecutor(2) as pool:
        told = list(pool.map(writer, bodies))
    assert proxy.injected.total() == (3 if kind else 0)
    won = [body for body, answer in zip(bodies, told, strict=True) if answer == (1, True)]
    assert len(won) == 1
    (refusal,) = (answer for answer in told if isinstance(answer, MicaclError))
    assert f"Somebody else committed version 1 of {url} first (no bags)." in str(refusal)
    store = open_store(url)
    assert list_versions(store) == [1]
    assert open_dataset(url).labels == tuple(won[0]["labels"])
    assert commit(store, won[0]) == (1, False)
    (late,) = (body for body in bodies if body is not won[0])
    assert commit(store, late) == (2, True)
