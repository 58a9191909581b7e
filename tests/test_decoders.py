"""Decode processes: the same batches, nothing left behind however they end."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from pipeline import PlanConfig, StreamConfig, open_dataset
from pipeline.contract import MicaclError
from pipeline.dataset import Dataset
from pipeline.loader import Loader
from pipeline.storage import LocalStore, open_store
from tests.tiny_dataset import make_dataset

pytestmark = pytest.mark.slow

COUNTS = {"train": {"sad": 11, "happy": 18, "neutral": 1}, "test": {"sad": 2, "happy": 5, "unlabelled": 3}}
PLAN = PlanConfig(global_batch=12, steps_per_epoch=6, seed=3)


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_dataset(tmp_path_factory.mktemp("decoders"), COUNTS, 0, max_bags=4)


def loader_of(dataset: Dataset, processes: int = 2, **stream: Any) -> Loader:
    config = StreamConfig(**{"frames": 2, "lookahead": 24, "prefetch": 48, "processes": processes, **stream})
    return dataset.loader("train", PLAN, stream=config)


def children() -> list[psutil.Process]:
    return [p for p in psutil.Process().children() if "pipeline.decoder_child" in " ".join(p.cmdline())]


def require_equal(one: list[Any], other: list[Any]) -> None:
    assert len(one) == len(other)
    for a, b in zip(one, other, strict=True):
        assert (a.keys, a.state, a.labels_B.tolist()) == (b.keys, b.state, b.labels_B.tolist())
        assert np.array_equal(a.frames_BNTHWC, b.frames_BNTHWC)


@pytest.mark.parametrize("processes", [1, 3])
def test_processes_decode_what_threads_decode(url: str, processes: int) -> None:
    dataset = open_dataset(url)
    with loader_of(dataset, processes) as there, loader_of(dataset, 0) as here:
        require_equal(list(there.batches(2)), list(here.batches(2)))
        assert not children()
    test = [list(dataset.eval_loader("test", stream=StreamConfig(frames=2, processes=n))) for n in (1, 0)]
    require_equal(*test)


def test_far_storage_and_filters(url: str, s3: Callable[[str], str]) -> None:
    remote, here = open_store(s3("ds")), open_dataset(url)
    for entry in here.store.list():
        remote.put(entry.key, here.store.get(entry.key))
    for reads in ("whole", "range"):
        with loader_of(open_dataset(remote.root), 2, reads=reads) as there, loader_of(here, 0) as local:
            require_equal(list(there.batches(1)), list(local.batches(1)))
    where = "subject not in ('s1', 's3')"
    chosen = [loader_of(open_dataset(root, where=where), n) for root, n in ((remote.root, 2), (url, 0))]
    require_equal(*[list(loader.batches(1)) for loader in chosen])


def test_a_store_that_a_url_does_not_open_is_read_by_threads(url: str) -> None:
    class Other(LocalStore):
        pass

    dataset = open_dataset(url)
    other = Dataset(Other(url), dataset.number, dataset.body, dataset.sha256)
    with loader_of(other) as loader:
        next(iter(loader))
        assert not children()


def test_damage_comes_in_its_place_and_in_words(url: str, tmp_path: Path) -> None:
    own = open_dataset(make_dataset(tmp_path, COUNTS, 0, max_bags=4))
    rows = own.split("train").to_pylist()
    row = next(r for r in rows if r["label"] == "neutral")
    data = bytearray(own.store.get(row["shard"]))
    data[row["offset"] + 700] ^= 1
    own.store.put(row["shard"], bytes(data))
    with loader_of(own) as loader, pytest.raises(MicaclError, match=f"{row['shard']} bag {row['key']}.*sha256"):
        list(loader)
    assert not children()


@pytest.mark.parametrize("number", [0, 1])
def test_a_child_that_dies_is_an_error_and_the_loader_goes_on(url: str, number: int) -> None:
    with loader_of(open_dataset(url), lookahead=1) as loader:
        first = next(iter(loader))
        children()[number].send_signal(signal.SIGKILL)
        with pytest.raises(MicaclError, match=r"decode process.*-9.*cannot be kept"):
            list(loader.batches(3))
        assert not children()
        at = loader.state_dict()
        rest = list(loader.batches(1))  # opened anew
    with loader_of(open_dataset(url), 0) as reference:
        wanted = list(reference.batches(1))
    assert first.keys == wanted[0].keys
    require_equal(rest, wanted[at["step"] :] if at["epoch"] == 0 else [])


def test_breaking_off_leaves_no_process_and_no_descriptor(url: str) -> None:
    dataset = open_dataset(url)
    list(loader_of(dataset).batches(1))
    gc.collect()
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        loader = loader_of(dataset)
        kept = next(iter(loader)).frames_BNTHWC
        loader.close()
        assert kept.sum() > 0
        del kept, loader
    gc.collect()
    assert not children()
    assert len(os.listdir("/proc/self/fd")) <= before


def test_batches_that_are_kept_keep_their_bytes(url: str) -> None:
    dataset = open_dataset(url)
    with loader_of(dataset) as there, loader_of(dataset, 0) as here:
        require_equal(list(there.batches(5)), list(here.batches(5)))


SCRIPT = """
import sys, time
from pipeline import PlanConfig, StreamConfig, open_dataset
stream = StreamConfig(frames=2, processes=2)
loader = open_dataset(sys.argv[1]).loader("train", PlanConfig(global_batch=4), stream=stream)
for batch in loader:
    print(batch.step, flush=True)
    time.sleep(60)
"""


def test_children_end_with_a_parent_that_is_killed(url: str) -> None:
    """And a script needs no guard for its main module."""
    process = subprocess.Popen([sys.executable, "-c", SCRIPT, url], stdout=subprocess.PIPE, text=True)
    assert process.stdout
    assert process.stdout.readline() == "0\n"
    there = psutil.Process(process.pid).children()
    assert len(there) == 2
    process.kill()
    process.wait()
    gone, alive = psutil.wait_procs(there, timeout=20)
    assert (len(gone), alive) == (2, [])
