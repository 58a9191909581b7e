"""One file of the node's cache: written whole, checked, mapped, marked as used, deleted.

    <sha256 of the object's name>    the object's bytes │ their length, magic (16 bytes)

The trailer is written last: a file that was cut short, or whose end was never written before the machine went down,
has none. It also makes every file longer than nothing, and only such a file can be mapped.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import mmap
import os
import re
import struct
import time
from dataclasses import dataclass
from pathlib import Path

from pipeline import flocks

_TRAILER = struct.Struct("<Q8s")
_MAGIC = b"micacl\x00\x01"
_FINISHED = re.compile(r"[0-9a-f]{64}")
_PART = re.compile(r"[0-9a-f]{64}\.part")
"""No other name is ever deleted: a folder that a user gives may hold files of theirs."""


@dataclass(slots=True)
class Mapped:
    """A file as this process has it mapped. Holds one descriptor (of mmap's own) and the file's space on disk."""

    path: Path
    inode: int
    view: memoryview
    touched: float
    """time.monotonic() when it was last marked as used."""

    def there(self) -> bool:
        """False if it was evicted: the view is valid still."""
        try:
            return os.stat(self.path).st_ino == self.inode
        except OSError:
            return False

    def touch(self) -> bool:
        """Marks the file as used just now; False if it was evicted."""
        if not self.there():
            return False
        with contextlib.suppress(OSError):  # who may only read the folder never evicts either
            os.utime(self.path)
        return True


def place(folder: Path, name: str) -> Path:
    """Where the object of this name lies, or would lie."""
    return folder / hashlib.sha256(name.encode(errors="surrogatepass")).hexdigest()


def part(path: Path) -> Path:
    """What the file is called while it is written."""
    return path.with_name(f"{path.name}.part")


def load(path: Path) -> Mapped | None:
    """None if there is no such file, it was cut short, or it cannot be opened or mapped."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        return None
    try:
        found = os.fstat(fd)
        size = found.st_size - _TRAILER.size
        if size < 0 or os.pread(fd, _TRAILER.size, size) != _TRAILER.pack(size, _MAGIC):
            return None
        # Closed by nobody: it goes with its last view.
        view = memoryview(mmap.mmap(fd, 0, access=mmap.ACCESS_READ))[:size]
    except OSError:
        return None
    finally:
        os.close(fd)
    mapped = Mapped(path, found.st_ino, view, time.monotonic())
    mapped.touch()
    return mapped


def store(path: Path, fd: int, data: bytes, limit_bytes: int) -> None:
    """Writes the part `fd`, makes room for it and gives it its name. Raises OSError. Its lock is held by the caller.

    Nobody adds a file while room is made, so the files together never have more than `limit_bytes`, or are this one.
    """
    os.ftruncate(fd, 0)  # what a dead fetcher wrote
    for piece in (data, _TRAILER.pack(len(data), _MAGIC)):
        rest = memoryview(piece)
        while rest:
            rest = rest[os.write(fd, rest) :]
    with flocks.held(path.with_name("evict.lock")):
        if not flocks.named(part(path), fd):  # the folder was cleared meanwhile, and the name is another fetcher's
            raise FileNotFoundError(f"{part(path)} was deleted while it was written")
        _make_room(path.parent, limit_bytes - len(data) - _TRAILER.size)
        part(path).rename(path)


def _make_room(folder: Path, limit_bytes: int) -> None:
    """Deletes least recently used files until all together have at most `limit_bytes`, or none is left."""
    files = []
    for entry in os.scandir(folder):
        if _FINISHED.fullmatch(entry.name):
            with contextlib.suppress(FileNotFoundError):
                files.append((entry.stat().st_mtime_ns, entry.stat().st_size, entry.path))
    total = sum(size for _, size, _ in files)
    for _, size, path in sorted(files):
        if total <= limit_bytes:
            return
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
        total -= size


def sweep(folder: Path) -> None:
    """Deletes the parts of dead fetchers: nobody holds their locks. Raises OSError if there is no such folder."""
    for path in folder.iterdir():
        if _PART.fullmatch(path.name):
            with contextlib.suppress(OSError), flocks.held(path, fcntl.LOCK_EX | fcntl.LOCK_NB) as lock:
                if lock is not None:
                    path.unlink()
