"""Bytes of objects on local disk: fetched once a node, shared by its processes, bounded, safe against SIGKILL.

    get(name, fetch)                                  <folder>/
      mapped in this process? ── yes ──> view           <sha256 of name>        finished: bytes and their length
      file there, its length right? ──> map it          <sha256 of name>.part   being fetched, under its own flock
      flock the .part (others wait here),               evict.lock              flock of who makes room
      fetch, write, make room, rename ──> map it

The pages lie once in the kernel's page cache, however many ranks map them. A waiter whose fetcher died or failed is
given the lock and fetches itself. Least recently used files (by mtime) are deleted first; a deleted file lives on
until the last view of it is gone. Where the disk refuses, the fetched bytes themselves are handed out.

Without a folder the files lie in one that is gone with its last user (pipeline/private_folder.py). A given folder is
kept from run to run. Only the length of a file is checked here (pipeline/cached_files.py): the reader checks hashes.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import time
from collections import OrderedDict
from collections.abc import Callable
from multiprocessing.util import Finalize
from pathlib import Path
from types import TracebackType
from typing import Self

from pipeline import cached_files, flocks, private_folder
from pipeline.cached_files import Mapped
from pipeline.private_folder import PrivateFolder

_LOG = logging.getLogger(__name__)
MAPS = 64
"""Files that a process keeps mapped, a descriptor each, beside those whose views are in use."""
TOUCH_S = 1.0
"""A mapped file is marked as used, and looked for, at most this often by each process."""


class NodeCache:
    """One a process, or many: all that name the same folder share its files, and threads may share one.

    After a fork, or unpickled, it opens the folder anew.
    """

    def __init__(self, folder: Path | None, limit_bytes: int) -> None:
        """Never fails for want of a folder: without one it hands out what it fetches."""
        self.folder, self.limit_bytes = folder and folder.absolute(), limit_bytes
        self._maps: OrderedDict[str, Mapped] = OrderedDict()
        self._said = self._closed = False
        self._pid = -1
        self._path: Path | None = None
        self._here()

    def get(self, name: str, fetch: Callable[[], bytes]) -> memoryview:
        """The bytes of the object of this name, read-only; from `fetch` if no process of the node has them.

        What `fetch` raises goes through and is not remembered. Raises ValueError after `close`. A view stays valid
        after eviction and close.
        """
        if self._closed:
            raise ValueError("the cache is closed")
        view = self._mapped(name)
        if view is not None:
            return view
        folder = self._here()
        if folder is None:
            return memoryview(fetch())
        path = cached_files.place(folder, name)
        view = self._load(name, path)
        return self._fetch(name, path, fetch) if view is None else view

    def forget(self, name: str) -> None:
        """For a reader that found other bytes than it expects: the next `get` fetches anew."""
        with flocks.guard:
            self._maps.pop(name, None)
        if (folder := self._here()) is not None:
            with contextlib.suppress(OSError):
                cached_files.place(folder, name).unlink()

    def close(self) -> None:
        """Views stay valid. The last user of the default folder deletes it."""
        self._closed = True
        with flocks.guard:
            self._maps.clear()
        self._finalizer()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def __reduce__(self) -> tuple[type[NodeCache], tuple[Path | None, int]]:
        return NodeCache, (self.folder, self.limit_bytes)

    def _here(self) -> Path | None:
        """The folder, opened by the first to ask in this process; None if there can be none."""
        if self._pid == os.getpid():
            return self._path
        path, private = self._enter()
        with flocks.guard:
            if self._pid != os.getpid():
                self._path = path
                # Also at the end of a process, and of a forked worker, after those that it waits for: last.
                self._finalizer = Finalize(self, _leave, (private,), exitpriority=-1)
                self._pid = os.getpid()
                return path
        _leave(private)  # another thread was first
        return self._path

    def _enter(self) -> tuple[Path | None, PrivateFolder | None]:
        private = None
        try:
            if self.folder is None:
                private = private_folder.enter("micacl-cache")
                path = private.path
            else:
                path = self.folder
                path.mkdir(mode=0o700, parents=True, exist_ok=True)
            cached_files.sweep(path)
        except OSError as error:
            self._say(error)
            return None, private
        return path, private

    def _mapped(self, name: str) -> memoryview | None:
        with flocks.guard:
            found = self._maps.get(name)
            if found is None:
                return None
            self._maps.move_to_end(name)
            now = time.monotonic()
            due = now - found.touched >= TOUCH_S
            if due:
                found.touched = now
        if due and not found.touch():
            with flocks.guard:
                self._maps.pop(name, None)
            return None
        return found.view[:]

    def _load(self, name: str, path: Path) -> memoryview | None:
        """Maps a finished file, and forgets the oldest maps and those of deleted files: a map holds disk space."""
        mapped = cached_files.load(path)
        if mapped is None:
            return None
        with flocks.guard:
            self._maps[name] = mapped
            self._maps.move_to_end(name)
            while len(self._maps) > MAPS:
                self._maps.popitem(last=False)
            entries = list(self._maps.items())
        gone = [old for old, entry in entries if not entry.there()]
        with flocks.guard:
            for old in gone:
                self._maps.pop(old, None)
        return mapped.view[:]

    def _fetch(self, name: str, path: Path, fetch: Callable[[], bytes]) -> memoryview:
        part = cached_files.part(path)
        fd = self._lock(part)
        if fd is None:
            return memoryview(fetch())
        try:
            view = self._load(name, path)  # another fetched it while this one waited
            return self._store(name, path, fd, fetch()) if view is None else view
        finally:
            with contextlib.suppress(OSError):
                if flocks.named(part, fd):
                    part.unlink()
            flocks.drop(fd)

    def _lock(self, part: Path) -> int | None:
        try:
            return flocks.take(part, fcntl.LOCK_EX)
        except OSError as error:
            self._say(error)
            return None

    def _store(self, name: str, path: Path, fd: int, data: bytes) -> memoryview:
        try:
            cached_files.store(path, fd, data, self.limit_bytes)
        except OSError as error:
            self._say(error)
            return memoryview(data)
        view = self._load(name, path)
        return memoryview(data) if view is None else view

    def _say(self, error: OSError) -> None:
        if not self._said and not self._closed:
            self._said = True
            _LOG.warning(
                "The cache of fetched objects cannot be written (%s): they are fetched again each time.", error
            )


def _leave(folder: PrivateFolder | None) -> None:
    if folder is not None:
        private_folder.leave(folder)
