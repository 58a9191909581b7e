"""Row -> the bytes of its bag: from a local folder as they lie there, from storage far away through the node's cache.

    ask(row)   begin to fetch: the shard, or the bag alone (pipeline/reads.py says which)     I/O threads
    view(row)  the bytes, waiting for them if need be; valid until the same thread asks for the next

The first clips of a reader are fetched alone, before their shards, so that the first batch need not wait for sixteen
shards; not if whole shards were asked for by name.

Bytes are those that the index says: a bag's sha256 is checked when a process reads it for the first time, and again
when the process had to fetch it again. A mismatch names the shard and the key.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from pipeline.contract import MicaclError, digest
from pipeline.decode import StreamConfig
from pipeline.node_cache import NodeCache
from pipeline.once import Once
from pipeline.rows import Place, SplitRows
from pipeline.storage import LocalStore, Store

_OPEN_FILES = 128


class Spans(Protocol):
    """Where the bytes of bags come from."""

    def ask(self, row: int) -> None:
        """Begin to fetch what `view(row)` will need."""

    def view(self, row: int, place: Place) -> memoryview:
        """The span of a bag, unchecked. Valid until this thread asks for another. Raises MicaclError."""

    def checked(self, row: int, place: Place, view: memoryview, where: str) -> memoryview:
        """`view`, if it has the sha256 of the index. Raises MicaclError naming shard and key."""

    def close(self) -> None:
        """Give back threads, files and the cache."""


class LocalSpans:
    """Reads from the files themselves. The kernel keeps what is used often."""

    def __init__(self, store: LocalStore) -> None:
        self.store = store
        self._files: Once[str, _File] = Once(_OPEN_FILES)
        self._thread = threading.local()

    def ask(self, row: int) -> None:
        """Nothing to do."""

    def view(self, row: int, place: Place) -> memoryview:
        del row
        file = self._files.get(place.shard, lambda: _File(self._open(place.shard)))
        buffer: bytearray = getattr(self._thread, "buffer", bytearray())
        if len(buffer) < place.size:
            self._thread.buffer = buffer = bytearray(place.size)
        view = memoryview(buffer)[: place.size]
        got = os.preadv(file.descriptor, [view], place.offset)
        return view[:got]

    def checked(self, row: int, place: Place, view: memoryview, where: str) -> memoryview:
        del row
        require_sha256(view, place, where)
        return view

    def _open(self, path: str) -> int:
        try:
            return self.store.open_file(path)
        except FileNotFoundError as error:
            raise missing(self.store, path) from error

    def close(self) -> None:
        self._files = Once(_OPEN_FILES)


class _File:
    """A descriptor that is closed when nobody uses it any more."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor

    def __del__(self) -> None:
        os.close(self.descriptor)


class RemoteSpans:
    """Reads whole shards through the cache that the processes of a node share, and single bags into memory."""

    def __init__(
        self, rows: SplitRows, whole_S: NDArray[np.bool_], cache: NodeCache, config: StreamConfig, checked: Checked
    ) -> None:
        """`checked`: forgets the rows of what was fetched."""
        self.rows, self.store, self.cache = rows, rows.dataset.store, cache
        self._whole_S, self._checked_rows = whole_S, checked
        self._bags: Once[int, memoryview] = Once(config.range_mb * 2**20, len)
        self._pool = ThreadPoolExecutor(config.io_threads, thread_name_prefix="stream-io")
        self._lock = threading.Lock()
        self._asked: set[tuple[str, int]] = set()
        self._queue: deque[tuple[tuple[str, int], int]] = deque()
        self._alone: set[int] = set()
        self._alone_left = config.lookahead if config.reads == "auto" else 0
        self._free = config.io_threads

    def ask(self, row: int) -> None:
        with self._lock:
            if self._alone_left:
                self._alone_left -= 1
                self._alone.add(row)
        unit = self._unit(row)
        with self._lock:
            if unit in self._asked:
                return
            self._asked.add(unit)
            self._queue.append((unit, row))
        self._begin(0)

    def _unit(self, row: int) -> tuple[str, int]:
        """What is fetched for a row: its shard, or the bag alone."""
        shard = self.rows.shard_of(row)
        return ("shard", shard) if self._whole_S[shard] and row not in self._alone else ("row", row)

    def _begin(self, ended: int) -> None:
        """Start what the free threads can do. The pool's own queue stays empty: it is worked off at exit."""
        with self._lock:
            self._free += ended
            while self._free and self._queue:
                try:
                    self._pool.submit(self._fetch, *self._queue.popleft())
                except RuntimeError:  # closed, or the process ends
                    self._queue.clear()
                    return
                self._free -= 1

    def view(self, row: int, place: Place) -> memoryview:
        found = self._read(row, place)
        with self._lock:
            self._alone.discard(row)  # the next time its shard is there
        return found

    def _read(self, row: int, place: Place) -> memoryview:
        kind, shard = self._unit(row)
        if kind == "row":
            return self._bags.get(row, lambda: memoryview(self._get(row, row + 1, place)))
        whole = self.cache.get(
            self.store.url(place.shard), lambda: self._get(*self.rows.rows_of(shard), place, whole=True)
        )
        return whole[place.offset : place.offset + place.size]

    def checked(self, row: int, place: Place, view: memoryview, where: str) -> memoryview:
        if not matches(view, place):  # perhaps the fault of a disk that kept the cache between runs: fetch it once more
            if self._unit(row)[0] == "shard":
                self.cache.forget(self.store.url(place.shard))
            self._bags.forget(row)
            view = self.view(row, place)
        require_sha256(view, place, where)
        return view

    def _get(self, first: int, last: int, place: Place, *, whole: bool = False) -> bytes:
        """The shard, or the bag at `place`; rows first..last lie in it."""
        self._checked_rows.discard(first, last)
        try:
            if whole:
                return self.store.get(place.shard)
            return self.store.read_range(place.shard, place.offset, place.size)
        except FileNotFoundError as error:
            raise missing(self.store, place.shard) from error

    def _fetch(self, unit: tuple[str, int], row: int) -> None:
        """Warm the caches. A failure is not told here: `view` meets it again, in its place in the order."""
        try:
            self._read(row, self.rows.place(row))
        except (MicaclError, OSError):
            pass
        finally:
            with self._lock:
                self._asked.discard(unit)
            self._begin(1)

    def close(self) -> None:
        with self._lock:
            self._queue.clear()
        self._pool.shutdown(wait=False, cancel_futures=True)
        self.cache.close()


class Checked:
    """Which rows had the right sha256: one bit each."""

    def __init__(self, rows: int) -> None:
        self._bits = bytearray(-(-rows // 8))
        self._lock = threading.Lock()

    def __contains__(self, row: int) -> bool:
        return bool(self._bits[row >> 3] >> (row & 7) & 1)

    def add(self, row: int) -> None:
        with self._lock:
            self._bits[row >> 3] |= 1 << (row & 7)

    def discard(self, first: int, last: int) -> None:
        """Forget the rows first..last."""
        with self._lock:
            for row in range(first, last):
                self._bits[row >> 3] &= ~(1 << (row & 7))


def matches(view: memoryview, place: Place) -> bool:
    """Whether the bytes are those that the index says."""
    return len(view) == place.size and digest(view) == place.sha256


def require_sha256(view: memoryview, place: Place, where: str) -> None:
    """Raises MicaclError naming shard and key."""
    if not matches(view, place):
        raise MicaclError(
            f"{where} does not have the sha256 that the index lists.",
            "Its bytes were changed after it was written, so it is not used.",
            "Delete the shard and run the same `micacl prepare` again; `micacl verify URL` lists all damage.",
        )


def missing(store: Store, path: str) -> MicaclError:
    return MicaclError(
        f"{store.url(path)} is missing.",
        "The version lists it, so the sequence of clips cannot be kept.",
        "Run the same `micacl prepare` again: it makes missing shards anew from the crops.",
    )
