"""The work that every loader does for a clip, and how it is timed. Needs numpy, simplejpeg and psutil.

    bag: 4 x 12 JPEGs of 128 px ──pick 4 of each──> 16 JPEGs ──decode──> (4, 4, 128, 128, 3) ──stack 16──> batch

A runner is a program of its own, `python of_<name>.py JOB`, in the interpreter of its library. It gets a `Job` as JSON,
prints one JSON object as its last line, and runs in one of these modes:

    steady    endless, `seconds` long after the first SKIP batches
    epoch     exactly `batches` batches, from a cold cache
    keys      `batches` batches; which clips they held, and the loader's state after half of them
    resume    a new process: from `state`, the second half of that
    convert   the house's tar shards -> the library's own format
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import tarfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import psutil
import simplejpeg

INSTANCES, STORED, WANTED, SIDE = 4, 12, 4, 128
CLASSES = ("happy", "sad", "neutral", "angry", "surprise", "disgust", "fear")
BATCH = 16
SKIP = 2
"""Batches that are not timed: workers start, queues fill."""
EPOCH_CLIPS = 704


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """One run of one loader."""

    mode: str
    data: dict[str, list[str]]
    """Shards by class: paths or s3:// URLs of tars; for `mosaicml` and `litdata` one folder of the library's own."""
    workers: int = 0
    """Worker processes (torch DataLoader), reading threads (ours), processes (limit); Ray decides by itself."""
    seconds: float = 8.0
    batches: int = 44
    cache: str = ""
    """An empty folder for what the library keeps of remote data."""
    root: str = ""
    """Of the dataset, for ours."""
    state: Any = None


class Batch(NamedTuple):
    frames_BNTHWC: Any
    """(16, 4, 4, 128, 128, 3) uint8, numpy or torch."""
    labels_B: Sequence[int]
    keys_B: Sequence[str]


def pick(rng: np.random.Generator) -> list[int]:
    """16 of 48: a random frame of each quarter of each instance, as pipeline.samplers.pick_frames does."""
    edges = np.arange(WANTED + 1) * (STORED / WANTED)
    at_NT = rng.random((INSTANCES, WANTED))
    in_instance_NT = np.minimum(STORED - 1, (edges[:-1] + at_NT * np.diff(edges)).astype(int))
    return list((in_instance_NT + np.arange(INSTANCES)[:, None] * STORED).flat)


def decode(jpegs: Sequence[bytes], out_NTHWC: np.ndarray | None = None) -> np.ndarray:
    """16 JPEGs -> (4, 4, 128, 128, 3) uint8, each written straight to its place."""
    out = np.empty((INSTANCES, WANTED, SIDE, SIDE, 3), np.uint8) if out_NTHWC is None else out_NTHWC
    for place, jpeg in zip(out.reshape(-1, SIDE, SIDE, 3), jpegs, strict=True):
        simplejpeg.decode_jpeg(jpeg, colorspace="RGB", buffer=place)
    return out


def cut(blob: bytes, ends: Sequence[int], picked: Iterable[int]) -> list[bytes]:
    """The picked JPEGs of a bag that is stored as one piece."""
    view = memoryview(blob)
    return [view[(int(ends[i - 1]) if i else 0) : int(ends[i])] for i in picked]


_rngs: dict[int, np.random.Generator] = {}


def own_rng() -> np.random.Generator:
    """One a process: forked workers must not share what they draw."""
    return _rngs.setdefault(os.getpid(), np.random.default_rng())


def read_bags(tar: str) -> Iterator[tuple[str, str, list[bytes]]]:
    """(key, label, 48 JPEGs) of a shard of the house."""
    jpegs: list[bytes] = []
    with tarfile.open(tar) as file:
        for member in file:
            data = file.extractfile(member).read()
            if member.name.endswith(".jpg"):
                jpegs.append(data)
            else:
                meta = json.loads(data)
                yield meta["key"], meta["label"], jpegs
                jpegs = []


def s3_env() -> tuple[str, str, str]:
    """(endpoint, access key, secret key)."""
    return tuple(os.environ[k] for k in ("AWS_ENDPOINT_URL", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"))


def cpu_s() -> float:
    """CPU seconds so far of this process and all that descend from it and live."""
    me, total = psutil.Process(), 0.0
    for process in [me, *me.children(recursive=True)]:
        try:
            used = process.cpu_times()
        except psutil.NoSuchProcess:
            continue
        total += used.user + used.system
    return total


def run(open_loader: Callable[[Job], Iterable[Batch]], convert: Callable[[Job], None] | None = None) -> None:
    """Do the job of the command line and print what was found."""
    fields = json.loads(sys.argv[1])
    job = Job(**fields)
    if job.mode == "convert":
        convert(job)
        said: Mapping[str, Any] = {}
    elif job.mode in ("keys", "resume"):
        said = _keys(open_loader, job)
    else:
        said = _time(open_loader, job)
    print(json.dumps(said), flush=True)
    sys.stdout.flush()
    sys.stderr.flush()


def _time(open_loader: Callable[[Job], Iterable[Batch]], job: Job) -> dict[str, Any]:
    opened = time.perf_counter()
    counts_SC: list[np.ndarray] = []
    keys: set[str] = set()
    first_s = since_start_s = start = start_cpu = end = 0.0
    for batch in open_loader(job):
        end = time.perf_counter()
        if not counts_SC:
            first_s, since_start_s = end - opened, time.time() - psutil.Process().create_time()
        _check(batch)
        counts_SC.append(np.bincount(np.asarray(batch.labels_B), minlength=len(CLASSES)))
        keys.update(batch.keys_B)
        if len(counts_SC) == SKIP:
            start, start_cpu = time.perf_counter(), cpu_s()
        done = len(counts_SC) >= job.batches if job.mode == "epoch" else start and end - start >= job.seconds
        if done:
            used = cpu_s() - start_cpu  # before the loader is left, which ends its workers
            break
    else:
        raise RuntimeError(f"the loader ended after {len(counts_SC)} batches")
    clips = (len(counts_SC) - SKIP) * BATCH
    share_C = np.sum(counts_SC, axis=0) / (len(counts_SC) * BATCH)
    return {
        "clips_per_s": clips / (end - start),
        "cpu_ms": used / clips * 1000,
        "batches": len(counts_SC),
        "first_s": first_s,
        "since_start_s": since_start_s,
        "off_most": float(np.max(np.abs(np.array(counts_SC) - BATCH / len(CLASSES)))),
        "share_least": float(share_C.min()),
        "share_most": float(share_C.max()),
        "keys": sorted(keys) if job.mode == "epoch" else len(keys),
    }


def _check(batch: Batch) -> None:
    shape = tuple(batch.frames_BNTHWC.shape)
    assert shape == (BATCH, INSTANCES, WANTED, SIDE, SIDE, 3), shape
    assert str(batch.frames_BNTHWC.dtype).endswith("uint8"), batch.frames_BNTHWC.dtype
    assert len(batch.labels_B) == len(batch.keys_B) == BATCH
    assert batch.frames_BNTHWC[-1, -1, -1, :, :, :].max() > 0, "a frame of the last clip is black"


def _keys(open_loader: Callable[[Job], Iterable[Batch]], job: Job) -> dict[str, Any]:
    loader = open_loader(job)
    wanted = job.batches if job.mode == "keys" else job.batches - job.batches // 2
    keys, state = [], None
    for batch in loader:
        keys.append(list(batch.keys_B))
        if len(keys) == job.batches // 2:
            state = loader.state(job.batches // 2) if hasattr(loader, "state") else None
        if len(keys) == wanted:
            break
    return {"keys": keys, "state": state}
