"""Row -> the bytes of its bag: from a local folder as they lie there, from storage far away through the node's cache.

    ask(row)   begin to fetch: the shard, or the bag alone (pipeline/reads.py says which)     I/O threads
    view(row)  the bytes, waiting for them if need be; valid until the same thread asks for the next

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
_FETCHES_AGAIN = 3
"""Of bytes from far away that do not have their sha256, before that is taken for damage."""


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
        self._asked: set[object] = set()
        self._queue: deque[tuple[object, int]] = deque()
        self._free = config.io_threads

    def ask(self, row: int) -> None:
        shard = self.rows.shard_of(row)
        unit: object = shard if self._whole_S[shard] else ("row", row)
        with self._lock:
            if unit in self._asked:
                return
            self._asked.add(unit)
            self._queue.append((unit, row))
        self._begin(0)

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
        if not self._whole_S[shard := self.rows.shard_of(row)]:
            return self._bags.get(row, lambda: memoryview(self._get(row, row + 1, place)))
        whole = self.cache.get(
            self.store.url(place.shard), lambda: self._get(*self.rows.rows_of(shard), place, whole=True)
        )
        return whole[place.offset : place.offset + place.size]

    def checked(self, row: int, place: Place, view: memoryview, where: str) -> memoryview:
        for _ in range(_FETCHES_AGAIN):
            if matches(view, place):
                return view
            # A disk may have spoilt what the cache kept between runs, or a network a range, which S3 sends no sum of.
            if self._whole_S[self.rows.shard_of(row)]:
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

    def _fetch(self, unit: object, row: int) -> None:
        """Warm the caches. A failure is not told here: `view` meets it again, in its place in the order."""
        try:
            self.view(row, self.rows.place(row))
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
