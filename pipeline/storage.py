"""URL -> bytes: the only room that talks to buckets.

A `Store` is a folder in some storage: a local path, `s3://bucket/prefix`, or whatever fsspec opens. Keys are
relative to it and use `/`. Promises that the rest of the house builds on:

* `put` is all or nothing: a reader sees the old object, the new one, or none, never a part.
* `put_if_absent` has one winner. It is the commit of a dataset version.
* reads resume by range after a broken connection; time-outs and attempts are set here, not left to defaults
  that differ by a factor of 30 between clients.
* a call ends right, with FileNotFoundError, or with a MicaclError; a folder's other errors are the system's OSError.
* a key is text. A file name that is no UTF-8 has its stray bytes as %FF in its key, and is found by that key again.

S3 credentials and endpoint come from the usual AWS places (environment, profile, instance role), through boto3.
"""

from __future__ import annotations

import os
import re
import secrets
import stat
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pipeline.contract import MicaclError

_TEMPORARY = ".tmp-"
_STRAY = re.compile("[\udc80-\udcff]")
_ESCAPED = re.compile("%([89A-F][0-9A-F])")


@dataclass(frozen=True, slots=True)
class Entry:
    """One object of a listing."""

    key: str
    size: int
    fingerprint: str
    """Changes when the content may have changed: size with ETag (S3) or modification time (files)."""


class Store(ABC):
    """A folder in some storage. Small and picklable: clients are made in the process that uses them."""

    def __init__(self, url: str) -> None:
        self.root = url.rstrip("/") or "/"

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.root!r})"

    def url(self, key: str) -> str:
        return f"{self.root.rstrip('/')}/{key}" if key else self.root

    @abstractmethod
    def get(self, key: str) -> bytes:
        """The whole object. Raises FileNotFoundError."""

    @abstractmethod
    def read_range(self, key: str, offset: int, size: int) -> bytes:
        """At most `size` bytes from `offset`; fewer only at the end of the object. Raises FileNotFoundError."""

    @abstractmethod
    def put(self, key: str, data: bytes) -> None:
        """Write or replace, all or nothing."""

    @abstractmethod
    def put_if_absent(self, key: str, data: bytes) -> bool:
        """Write unless the key exists. True if the object is now ours (also when an equal one was there)."""

    @abstractmethod
    def list(self, prefix: str = "") -> Iterator[Entry]:
        """Every object whose key starts with `prefix`, in no promised order, page by page."""

    def children(self, prefix: str = "") -> Iterator[Entry]:
        """One level: the objects of a folder, and its folders as entries whose keys end with / (size 0).

        Args:
            prefix: the folder: "" or a key that ends with /.
        """
        folders = set()
        for entry in self.list(prefix):
            name, slash, _ = entry.key[len(prefix) :].partition("/")
            if not slash:
                yield entry
            elif name not in folders:
                folders.add(name)
                yield Entry(f"{prefix}{name}/", 0, "")

    @abstractmethod
    def stat(self, key: str) -> Entry | None:
        """What a listing would say of the object, or None if there is none."""

    @abstractmethod
    def delete(self, key: str) -> None:
        """Remove; a missing key is no error."""

    def exists(self, key: str) -> bool:
        return self.stat(key) is not None

    def size(self, key: str) -> int | None:
        """Bytes of the object, or None if there is none."""
        found = self.stat(key)
        return found.size if found else None

    def open_uploads(self) -> int | None:
        """Uploads in parts below this URL that were begun and not ended, counted to 1000; None if it knows none."""
        return None

    def check(self) -> None:  # noqa: B027  (nothing to check is a valid answer)
        """Raise MicaclError if the bucket is missing or refuses our credentials."""


def open_store(url: str) -> Store:
    """A Store for a local path, `file://`, `s3://bucket/prefix` or any fsspec URL. Raises MicaclError."""
    if not url:
        raise MicaclError("The URL is empty.", "There is nothing to open.", "Give a folder or s3://bucket/prefix.")
    if url.startswith("s3://"):
        from pipeline.storage_s3 import S3Store  # boto3 takes a while to load, and local work does not need it

        return S3Store(url)
    if url.startswith("file://") or "://" not in url:
        return LocalStore(escape_name(os.path.abspath(url.removeprefix("file://"))))
    from pipeline.storage_fsspec import FsspecStore  # it needs this room's Store

    return FsspecStore(url)


def split_url(url: str) -> tuple[str, str]:
    """`s3://b/p/x.mp4` -> (`s3://b/p`, `x.mp4`): the store and the key of one object."""
    root, _, key = url.rstrip("/").rpartition("/")
    return root or ("/" if url.startswith("/") else "."), key


class LocalStore(Store):
    """A folder on a file system."""

    def _path(self, key: str) -> Path:
        if ".." in key.split("/") or key.startswith("/"):
            raise leaves(key, self.root)
        return find_path(Path(self.root, key))

    def get(self, key: str) -> bytes:
        path = self._path(key)
        mode = path.stat().st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):  # a pipe would wait for ever, /dev/zero has no end
            raise MicaclError(f"{path} is no file.", "It was not read.", "Give a regular file.")
        return path.read_bytes()

    def read_range(self, key: str, offset: int, size: int) -> bytes:
        with self._path(key).open("rb") as file:
            file.seek(offset)
            return file.read(size)

    def open_file(self, key: str) -> int:
        """A descriptor to read from, which the caller closes. Raises FileNotFoundError."""
        return os.open(self._path(key), os.O_RDONLY | os.O_CLOEXEC)

    def _temporary(self, path: Path, data: bytes) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f"{_TEMPORARY}{secrets.token_hex(8)}")
        try:
            temporary.write_bytes(data)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise
        return temporary

    def put(self, key: str, data: bytes) -> None:
        path = self._path(key)
        temporary = self._temporary(path, data)
        try:
            temporary.replace(path)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise

    def put_if_absent(self, key: str, data: bytes) -> bool:
        path = self._path(key)
        temporary = self._temporary(path, data)
        try:
            os.link(temporary, path)  # fails if the name exists, atomically
        except FileExistsError:
            return path.read_bytes() == data
        finally:
            temporary.unlink()
        return True

    def list(self, prefix: str = "") -> Iterator[Entry]:
        """As Store says. Links are followed, folders that cannot be read are an OSError.

        The names of one folder at a time are in memory: crops lie in 256 folders for that.
        """
        root = self._path("")
        folder = self._path(prefix) if prefix.endswith("/") or not prefix else self._path(prefix).parent
        for parent, folders, names in os.walk(folder, onerror=_unless_gone, followlinks=True):
            folders[:] = [name for name in folders if not _leads_back(Path(parent, name))]
            for name in names:
                path = Path(parent, name)
                key = self._key(path.relative_to(root).as_posix())
                if name.startswith(_TEMPORARY) or not key.startswith(prefix):
                    continue
                if entry := _listed_entry(key, path):
                    yield entry

    def children(self, prefix: str = "") -> Iterator[Entry]:
        """As Store says, in the order of the names; links to folders are followed."""
        folder = self._path(prefix)
        for name in sorted(os.listdir(folder)) if folder.is_dir() else ():
            path = Path(folder, name)
            key = self._key(f"{prefix}{name}")
            if path.is_dir():
                yield Entry(f"{key}/", 0, "")
            elif not name.startswith(_TEMPORARY) and (entry := _listed_entry(key, path)):
                yield entry

    def _key(self, name: str) -> str:
        key = escape_name(name)
        if key != name and os.path.lexists(Path(self.root, key)):
            raise MicaclError(
                f"{self.root} has two files with the key {key!r}: one of that name, one with bytes that are no UTF-8.",
                "One of the two could not be told from the other, so nothing was listed.",
                "Rename one of them.",
            )
        return key

    def stat(self, key: str) -> Entry | None:
        path = self._path(key)
        try:
            return _local_entry(key, path) if path.is_file() else None
        except OSError:  # a name that no file can have
            return None

    def delete(self, key: str) -> None:
        self._path(key).unlink(missing_ok=True)


def escape_name(name: str) -> str:
    """A path from the operating system as a key: bytes that are no UTF-8 (lone surrogates in Python) become %FF."""
    return _STRAY.sub(lambda stray: f"%{ord(stray[0]) - 0xDC00:02X}", name)


def find_path(path: Path) -> Path:
    """The file that `escape_name` named so, if there is one and no file of that very name; else `path`."""
    if not _ESCAPED.search(str(path)):
        return path
    found = Path(path.anchor)
    for part in path.relative_to(path.anchor).parts:
        raw = os.fsdecode(os.fsencode(_ESCAPED.sub(lambda byte: chr(0xDC00 + int(byte[1], 16)), part)))
        stray = escape_name(raw) == part and not os.path.lexists(found / part) and os.path.lexists(found / raw)
        found /= raw if stray else part
    return found


def _unless_gone(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError | NotADirectoryError):
        raise error


def _leads_back(folder: Path) -> bool:
    """Whether it is a link to a folder that it lies in."""
    return folder.is_symlink() and folder.parent.resolve().is_relative_to(folder.resolve())


def leaves(key: str, root: str) -> MicaclError:
    return MicaclError(
        f"The key {key!r} leaves {root}.", "It was not opened.", "Whatever lists it was changed by hand."
    )


def _local_entry(key: str, path: Path) -> Entry:
    stat = path.stat()
    return Entry(key, stat.st_size, f"{stat.st_size}-{stat.st_mtime_ns}")


def _listed_entry(key: str, path: Path) -> Entry | None:
    """Of a name in a folder; None if it was deleted since. A link that leads nowhere is there, and cannot be read."""
    try:
        return _local_entry(key, path)
    except OSError as error:
        if not path.is_symlink() and isinstance(error, FileNotFoundError):
            return None
        if not path.is_symlink():
            raise
        return Entry(key, 0, "")
