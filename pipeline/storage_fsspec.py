"""Buckets of any other kind that fsspec opens (gs://, az://, memory://, ...)."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Mapping
from typing import Any

from pipeline.contract import MicaclError, digest
from pipeline.storage import Entry, Store, leaves


class FsspecStore(Store):
    """Anything else that fsspec opens (gs://, az://, memory://, ...). Its client library must be installed.

    Retries and time-outs are the client's own.
    """

    @contextlib.contextmanager
    def _open(self, key: str) -> Iterator[tuple[Any, str]]:
        """The file system and the path of a key; what its client raises in the block, in words."""
        if ".." in key.split("/"):
            raise leaves(key, self.root)
        import fsspec

        try:
            fs, path = fsspec.core.url_to_fs(self.url(key))
            fs.invalidate_cache()  # clients keep listings, and would not see what others write
            yield fs, path
        except (MicaclError, FileNotFoundError):
            raise
        except Exception as error:
            kind, remedy = "is not known to be done", "Check the network and the credentials, then try again."
            if isinstance(error, NotImplementedError):
                kind, remedy = "cannot be done there", "Use s3:// or a folder."
            elif isinstance(error, ImportError | ValueError):
                kind, remedy = "was not done", "Use a path or s3://, or correct the URL and install its client."
            raise MicaclError(
                f"{self.url(key)}: {type(error).__name__}: {error}.", f"The operation {kind}.", remedy
            ) from error

    def get(self, key: str) -> bytes:
        with self._open(key) as (fs, path):
            return bytes(fs.cat_file(path))

    def read_range(self, key: str, offset: int, size: int) -> bytes:
        with self._open(key) as (fs, path):
            return bytes(fs.cat_file(path, start=offset, end=offset + size))

    def put(self, key: str, data: bytes) -> None:
        with self._open(key) as (fs, path):
            fs.pipe_file(path, data)

    def put_if_absent(self, key: str, data: bytes) -> bool:
        with self._open(key) as (fs, path):
            if not _can_create(fs):
                raise NotImplementedError("its client has no atomic write of a file that must not exist")
            try:
                fs.pipe_file(path, data, mode="create")
            except FileExistsError:
                return bytes(fs.cat_file(path)) == data
        return True

    def list(self, prefix: str = "") -> Iterator[Entry]:
        """As Store says, folder by folder: fsspec's own `find` passes over folders that it could not read."""
        with self._open("") as (fs, root), self._open(prefix.rpartition("/")[0]) as (_, top):
            folders = [top]
            while folders:
                at = folders.pop()
                with contextlib.suppress(FileNotFoundError):  # deleted since its parent was read
                    for info in fs.ls(at, detail=True):
                        key = info["name"].removeprefix(root).strip("/")
                        if info["type"] == "directory" and info["name"].rstrip("/") != at.rstrip("/"):
                            folders.append(info["name"])
                        elif info["type"] == "file" and key.startswith(prefix):
                            yield _entry(key, info)

    def stat(self, key: str) -> Entry | None:
        try:
            with self._open(key) as (fs, path):
                info = fs.info(path)
        except FileNotFoundError:
            return None
        return _entry(key, info) if info.get("type") == "file" else None

    def delete(self, key: str) -> None:
        with self._open(key) as (fs, path), contextlib.suppress(FileNotFoundError):
            fs.rm_file(path)


def _can_create(fs: Any) -> bool:
    """Whether the client has its own write with mode="create": fsspec's looks first and writes then, so two can win."""
    from fsspec.asyn import AsyncFileSystem
    from fsspec.spec import AbstractFileSystem

    own = [getattr(type(fs), name, None) for name in ("pipe_file", "_pipe_file")]
    inherited = (None, AbstractFileSystem.pipe_file, AsyncFileSystem._pipe_file)  # noqa: SLF001
    return any(f not in inherited and "mode" in inspect.signature(f).parameters for f in own)


def _entry(key: str, info: Mapping[str, Any]) -> Entry:
    stamp = info.get("etag") or info.get("mtime") or info.get("created") or ""
    return Entry(key, int(info["size"]), f"{info['size']}-{digest(str(stamp).encode())[:16]}")
