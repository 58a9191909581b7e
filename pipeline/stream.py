"""A plan -> decoded bags: shard cache, look-ahead, hash check, decode of the frames that are used.

    draws (row, rng key) ──look-ahead threads──> span of the shard ──sha256──> frames picked ──decode──> Clip

Training, evaluation and prediction over shards all read through here. Whole shards are fetched once and kept in a
cache bounded in bytes: the plan keeps the working set of a class to a few shards. Threads do the work where the GIL
is released (network, hashing, decoding); clips come out in plan order whatever thread was first. Nothing is shared
between processes, so nothing is left over when one dies.
"""

from __future__ import annotations

import threading
from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.bags import Bag
from pipeline.codec import decode_instance
from pipeline.contract import MicaclError, digest, require_label
from pipeline.dataset import Dataset
from pipeline.plan import Draw
from pipeline.samplers import SAMPLERS
from pipeline.shards import read_bag
from pipeline.storage import Store
from pipeline.video import RGB


@dataclass(frozen=True, kw_only=True, slots=True)
class StreamConfig:
    """How clips are read."""

    frames: int = 4
    """Frames per instance that a step uses."""
    sampler: str = "segments"
    """Which of the stored frames: `segments` (evenly in each instance) or `m3dfel` (pipeline/samplers.py)."""
    lookahead: int = 32
    """Clips in flight ahead of the one that is used, per rank."""
    threads: int = 2
    """Per rank."""
    cache_mb: int = 512
    """Shards kept in memory, per rank."""

    def __post_init__(self) -> None:
        if min(self.frames, self.lookahead, self.threads, self.cache_mb) < 1:
            raise MicaclError(
                "A field of --stream is below 1.", "No clip could be read.", "Give 1 or more for each of them."
            )
        if self.sampler not in SAMPLERS:
            raise MicaclError(
                f"--stream.sampler is {self.sampler!r}.", "No clip could be read.", f"Use {' or '.join(SAMPLERS)}."
            )


@dataclass(frozen=True, slots=True)
class Clip:
    """One decoded bag as a step uses it."""

    frames_NTHWC: NDArray[np.uint8]
    """(instances, frames per instance, height, width, RGB)."""
    label: int
    """Place in the label set; -1 if the bag has none."""
    key: str
    row: int
    rng_key: tuple[int, int]
    """For augmentation: a function of the place in the plan, not of the worker."""


class ShardCache:
    """Whole shards in memory, least recently used first out, each fetched once even when many threads ask."""

    def __init__(self, store: Store, limit_bytes: int) -> None:
        self.store, self.limit_bytes = store, limit_bytes
        self._lock = threading.Lock()
        self._shards: OrderedDict[str, Future[bytes]] = OrderedDict()
        self._bytes = 0

    def get(self, path: str) -> bytes:
        """The shard's bytes. Raises MicaclError if it is gone."""
        with self._lock:
            future = self._shards.get(path)
            mine = future is None
            if future is None:
                future = self._shards[path] = Future()
            self._shards.move_to_end(path)
        if mine:
            self._fetch(path, future)
        return future.result()

    def _fetch(self, path: str, future: Future[bytes]) -> None:
        try:
            data = self.store.get(path)
        except FileNotFoundError as error:
            self._fail(
                path,
                future,
                MicaclError(
                    f"{self.store.url(path)} is missing.",
                    "The version lists it, so the sequence of clips cannot be kept.",
                    "Run the same `micacl prepare` again: it makes missing shards anew from the crops.",
                ),
                error,
            )
            return
        except BaseException as error:
            self._fail(path, future, error, None)
            raise
        future.set_result(data)
        with self._lock:
            self._bytes += len(data)
            for old in [p for p, f in self._shards.items() if f.done() and p != path]:
                if self._bytes <= self.limit_bytes:
                    break
                self._bytes -= len(self._shards.pop(old).result())

    def _fail(self, path: str, future: Future[bytes], error: BaseException, cause: BaseException | None) -> None:
        error.__cause__ = cause
        with self._lock:
            self._shards.pop(path, None)
        future.set_exception(error)


class BagStream:
    """Reads the bags of one table of index rows in any order that a plan says."""

    def __init__(self, dataset: Dataset, rows: pa.Table, config: StreamConfig) -> None:
        self.config, self.rows = config, rows
        self.labels = dataset.labels
        self._cache = ShardCache(dataset.store, config.cache_mb * 2**20)
        self._shards, self._keys, self._sha256 = (rows[c].combine_chunks() for c in ("shard", "key", "sha256"))
        self._offsets, self._sizes = (rows[c].to_numpy() for c in ("offset", "size"))

    def bag(self, row: int) -> Bag:
        """One stored bag, hash-checked. Raises MicaclError naming shard and key."""
        shard, key = self._shards[row].as_py(), self._keys[row].as_py()
        start, size = int(self._offsets[row]), int(self._sizes[row])
        data = self._cache.get(shard)[start : start + size]
        where = f"{self._cache.store.url(shard)} bag {key}"
        if digest(data) != self._sha256[row].as_py():
            raise MicaclError(
                f"{where} does not have the sha256 that the index lists.",
                "Its bytes were changed after it was written, so it is not used.",
                "Delete the shard and run the same `micacl prepare` again; `micacl verify URL` lists all damage.",
            )
        return read_bag(data, where)

    def clip(self, draw: Draw, *, train: bool) -> Clip:
        """Decode the frames that this draw uses: random by its key in training, always the same else."""
        bag = self.bag(draw.row)
        rng = np.random.Generator(np.random.Philox(key=np.array(draw.rng_key, np.uint64))) if train else None
        label = self.labels.index(bag.meta.label) if bag.meta.label in self.labels else -1
        return Clip(decode_bag(bag, self.config, rng), label, bag.meta.key, draw.row, draw.rng_key)

    def read(self, draws: Iterable[Draw], *, train: bool) -> Iterator[Clip]:
        """Clips in the order of the draws, `lookahead` of them in flight."""
        waiting: deque[Future[Clip]] = deque()
        pool = ThreadPoolExecutor(self.config.threads, thread_name_prefix="stream")
        try:
            for draw in draws:
                waiting.append(pool.submit(self.clip, draw, train=train))
                if len(waiting) > self.config.lookahead:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def decode_bag(bag: Bag, config: StreamConfig, rng: np.random.Generator | None) -> NDArray[np.uint8]:
    """(instances, frames, H, W, 3) uint8: the frames of each instance that the sampler picks. Raises MicaclError.

    Each stored frame is decoded at most once, and of JPEG only what is picked.
    """
    counts = bag.meta.instance_frames
    picked_NT = np.array(SAMPLERS[config.sampler](counts, config.frames, rng))
    decoded: dict[int, RGB] = {}
    start = 0
    for i, (members, stored) in enumerate(zip(bag.encoded, counts, strict=True)):
        wanted = sorted({int(n) - start for n in picked_NT.flat if start <= n < start + stored})
        if wanted:
            frames = decode_instance(members, bag.meta, i, wanted)
            decoded |= dict(zip((start + n for n in wanted), frames, strict=True))
        start += stored
    return np.stack([np.stack([decoded[int(n)] for n in row]) for row in picked_NT])


def label_numbers(rows: pa.Table, labels: Sequence[str], where: str) -> NDArray[np.int64]:
    """The label of each row as its place in the label set. Raises MicaclError on a word outside it."""
    words = rows["label"].combine_chunks().dictionary_encode()
    for word in words.dictionary.to_pylist():
        require_label(word, labels, where)
    place = np.array([labels.index(w) for w in words.dictionary.to_pylist()] or [0], np.int64)
    return np.asarray(place[words.indices.to_numpy()], np.int64)


def shard_numbers(rows: pa.Table) -> NDArray[np.int64]:
    """The shard of each row as a number, for the plan's shard blocks."""
    codes: Any = rows["shard"].combine_chunks().dictionary_encode().indices.to_numpy()
    return np.asarray(codes, np.int64)
