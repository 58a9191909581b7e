"""File locks that die with their process (flock), made safe for files that are renamed or deleted, and for fork.

The kernel releases a flock with the last descriptor of its open file, also after SIGKILL: no lock is ever stale. Two
things are in the way. A waiter may be given the lock of a file that was renamed or deleted meanwhile; `take` looks
again. And a forked child inherits the descriptors, so it would hold its parent's locks after the parent's death:

    parent   open ── flock ─────────────┐
    child         fork ── close at once └── SIGKILL: nobody else has it open, the lock is free

Each `take` opens the file anew, so locks also exclude the threads of one process from each other.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import threading
from collections.abc import Iterator
from pathlib import Path

guard = threading.RLock()
"""Fork waits for it, so a child finds nothing half done that is done under it. Only for steps that never wait."""
_open: set[int] = set()
"""Descriptors of all locks that this process holds or waits for."""


def _in_child() -> None:
    for fd in _open:
        os.close(fd)  # without LOCK_UN: the lock is the parent's
    _open.clear()
    guard.release()


os.register_at_fork(before=guard.acquire, after_in_parent=guard.release, after_in_child=_in_child)


def take(path: Path, kind: int) -> int | None:
    """Locks `path` (made with mode 0600 if missing) and returns its descriptor, for `drop`.

    `kind` is fcntl.LOCK_SH or LOCK_EX, with LOCK_NB for None at once where another has it. When it returns, `path`
    still names the locked file. Raises OSError where the file cannot be opened.
    """
    while True:
        with guard:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            _open.add(fd)
        try:
            fcntl.flock(fd, kind)
            if named(path, fd):
                return fd
        except BlockingIOError:
            drop(fd)
            return None
        except BaseException:
            drop(fd)
            raise
        drop(fd)


def named(path: Path, fd: int) -> bool:
    """Whether `path` is the name of this open file, and not of none or another."""
    try:
        return os.path.samestat(os.stat(path, follow_symlinks=False), os.fstat(fd))
    except FileNotFoundError:
        return False


def drop(fd: int) -> None:
    """Releases and closes. A descriptor that is not this process's own (it was forked since) is left alone."""
    with guard:
        if fd in _open:
            _open.discard(fd)
            with contextlib.suppress(OSError):
                fcntl.flock(fd, fcntl.LOCK_UN)  # said aloud, for a child that is just being forked by C code
            os.close(fd)


@contextlib.contextmanager
def held(path: Path, kind: int = fcntl.LOCK_EX) -> Iterator[int | None]:
    """`take` for the length of a with block."""
    fd = take(path, kind)
    try:
        yield fd
    finally:
        if fd is not None:
            drop(fd)
