"""URL -> bytes: the only room that talks to buckets.

A `Store` is a folder in some storage: a local path, `s3://bucket/prefix`, or whatever fsspec opens. Keys are
relative to it and use `/`. Promises that the rest of the house builds on:

* `put` is all or nothing: a reader sees the old object, the new one, or none, never a part.
* `put_if_absent` has one winner. It is the commit of a dataset version.
* reads resume by range after a broken connection; time-outs and attempts are set here, not left to defaults
  that differ by a factor of 30 between clients.

S3 credentials and endpoint come from the usual AWS places (environment, profile, instance role), through boto3.
"""

from __future__ import annotations

import contextlib
import functools
import os
import random
import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import boto3
import fsspec
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError, HTTPClientError, IncompleteReadError
from urllib3.exceptions import HTTPError

from pipeline.contract import MicaclError, digest

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

T = TypeVar("T")
ATTEMPTS = 6
_TEMPORARY = ".tmp-"


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

    def check(self) -> None:  # noqa: B027  (nothing to check is a valid answer)
        """Raise MicaclError if the bucket is missing or refuses our credentials."""


def open_store(url: str) -> Store:
    """A Store for a local path, `file://`, `s3://bucket/prefix` or any fsspec URL. Raises MicaclError."""
    if not url:
        raise MicaclError("The URL is empty.", "There is nothing to open.", "Give a folder or s3://bucket/prefix.")
    if url.startswith("s3://"):
        return S3Store(url)
    if url.startswith("file://") or "://" not in url:
        return LocalStore(os.path.abspath(url.removeprefix("file://")))
    return FsspecStore(url)


def split_url(url: str) -> tuple[str, str]:
    """`s3://b/p/x.mp4` -> (`s3://b/p`, `x.mp4`): the store and the key of one object."""
    root, _, key = url.rstrip("/").rpartition("/")
    return root or ("/" if url.startswith("/") else "."), key


class LocalStore(Store):
    """A folder on a file system."""

    def _path(self, key: str) -> Path:
        if ".." in key.split("/") or key.startswith("/"):
            raise ValueError(f"key {key!r} leaves the store")
        return Path(self.root, key)

    def get(self, key: str) -> bytes:
        return self._path(key).read_bytes()

    def read_range(self, key: str, offset: int, size: int) -> bytes:
        with self._path(key).open("rb") as file:
            file.seek(offset)
            return file.read(size)

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
        folder = self._path(prefix) if prefix.endswith("/") or not prefix else self._path(prefix).parent
        for parent, _, names in os.walk(folder):
            for name in names:
                path = Path(parent, name)
                key = path.relative_to(self.root).as_posix()
                if name.startswith(_TEMPORARY) or not key.startswith(prefix):
                    continue
                with contextlib.suppress(FileNotFoundError):  # deleted since the folder was read
                    yield _local_entry(key, path)

    def stat(self, key: str) -> Entry | None:
        path = self._path(key)
        return _local_entry(key, path) if path.is_file() else None

    def delete(self, key: str) -> None:
        self._path(key).unlink(missing_ok=True)


def _local_entry(key: str, path: Path) -> Entry:
    stat = path.stat()
    return Entry(key, stat.st_size, f"{stat.st_size}-{stat.st_mtime_ns}")


@functools.lru_cache(maxsize=4)
def _s3_client(pid: int, attempts: int = ATTEMPTS) -> S3Client:
    del pid  # a forked process must not share its parent's sockets
    return boto3.session.Session().client(  # a session of its own: the default one keeps the first credentials it saw
        "s3",
        config=Config(
            connect_timeout=5,
            read_timeout=20,
            retries={"mode": "standard", "total_max_attempts": attempts},
            max_pool_connections=32,
        ),
    )


def _refusal(error: ClientError | BotoCoreError, url: str) -> Exception:
    """What the server said, in our words."""
    code = error.response.get("Error", {}).get("Code", "") if isinstance(error, ClientError) else type(error).__name__
    if code in ("404", "NoSuchKey"):
        return FileNotFoundError(url)
    remedies = {
        "NoSuchBucket": "Create the bucket, or correct the URL.",
        "InvalidAccessKeyId": "Check AWS_ACCESS_KEY_ID and AWS_ENDPOINT_URL.",
        "SignatureDoesNotMatch": "Check AWS_SECRET_ACCESS_KEY.",
        "AccessDenied": "Check the credentials and the bucket's policy.",
        "403": "Check the credentials and the bucket's policy.",
        "NoCredentialsError": "Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, a profile, or an instance role.",
        "EndpointConnectionError": "Check AWS_ENDPOINT_URL and that the server runs.",
        "ConnectTimeoutError": "Check AWS_ENDPOINT_URL and that the server runs.",
    }
    remedy = remedies.get(code, "Try again; if it stays, `micacl doctor URL` shows what the bucket can do.")
    return MicaclError(f"{url}: the object store answered {code or error}.", "The operation was not done.", remedy)


class S3Store(Store):
    """`s3://bucket/prefix` through boto3."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.bucket, _, prefix = self.root.removeprefix("s3://").partition("/")
        self.prefix = f"{prefix}/" if prefix else ""

    @property
    def _client(self) -> S3Client:
        return self._client_of(ATTEMPTS)

    def _client_of(self, attempts: int) -> S3Client:
        try:
            return _s3_client(os.getpid(), attempts)
        except ValueError as error:
            raise MicaclError(
                f"The object store's client cannot be made: {error}.",
                "No bucket can be opened.",
                "Check AWS_ENDPOINT_URL: it needs http:// or https://.",
            ) from error

    def _call(self, key: str, call: Callable[[], T]) -> T:
        try:
            return call()
        except (ClientError, BotoCoreError) as error:
            raise _refusal(error, self.url(key)) from error

    def check(self) -> None:
        client = self._client_of(2)  # a wrong endpoint should not take six attempts to be told
        self._call("", lambda: client.list_objects_v2(Bucket=self.bucket, MaxKeys=1))

    def get(self, key: str) -> bytes:
        return self._read(key, 0, None)

    def read_range(self, key: str, offset: int, size: int) -> bytes:
        return self._read(key, offset, offset + size) if size else b""

    def _read(self, key: str, start: int, end: int | None) -> bytes:  # noqa: C901  (one loop, five ends)
        """Bytes [start, end), resumed by range where the connection broke; never mixes two versions of the object."""
        out, etag = bytearray(), ""
        for attempt in range(ATTEMPTS):
            at = start + len(out)
            extra: dict[str, Any] = {"IfMatch": etag} if etag else {}
            if at or end is not None:
                extra["Range"] = f"bytes={at}-{'' if end is None else end - 1}"
            try:
                answer = self._client.get_object(Bucket=self.bucket, Key=self.prefix + key, **extra)
                etag, total = answer["ETag"], int(answer["ContentLength"])
                got = len(out)
                for chunk in answer["Body"].iter_chunks(2**20):
                    out += chunk
                if len(out) - got == total:
                    return bytes(out)
            except (
                HTTPClientError,
                IncompleteReadError,
                HTTPError,
                OSError,
            ) as error:  # the body broke off: boto3 does not retry that
                if attempt == ATTEMPTS - 1:
                    raise self._broken(key, len(out)) from error
            except ClientError as error:
                if error.response.get("Error", {}).get("Code") in ("InvalidRange", "416"):
                    return bytes(out)
                if error.response.get("Error", {}).get("Code") in ("PreconditionFailed", "412"):
                    out, etag = bytearray(), ""  # replaced meanwhile: start over
                    continue
                raise _refusal(error, self.url(key)) from error
            except BotoCoreError as error:
                raise _refusal(error, self.url(key)) from error
            time.sleep(_backoff_s(attempt))
        raise self._broken(key, len(out))

    def _broken(self, key: str, got: int) -> MicaclError:
        return MicaclError(
            f"{self.url(key)}: the connection broke {ATTEMPTS} times, {got} bytes were read.",
            "The object was not used.",
            "Check the network and the object store, then run the same command again.",
        )

    def put(self, key: str, data: bytes) -> None:
        self._call(key, lambda: self._client.put_object(Bucket=self.bucket, Key=self.prefix + key, Body=data))

    def put_if_absent(self, key: str, data: bytes) -> bool:
        for attempt in range(ATTEMPTS):
            try:
                self._client.put_object(Bucket=self.bucket, Key=self.prefix + key, Body=data, IfNoneMatch="*")
            except ClientError as error:
                status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode")
                if status == 412:
                    # Our own first attempt may have won while its answer was lost: the content decides.
                    return self.get(key) == data
                if status != 409:
                    raise _refusal(error, self.url(key)) from error
                time.sleep(_backoff_s(attempt))
            except BotoCoreError as error:
                raise _refusal(error, self.url(key)) from error
            else:
                return True
        return False

    def list(self, prefix: str = "") -> Iterator[Entry]:
        pages = self._client.get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=self.prefix + prefix)
        try:
            for page in pages:
                for item in page.get("Contents", []):
                    key, size = item["Key"].removeprefix(self.prefix), item["Size"]
                    if not key.endswith("/"):
                        yield _s3_entry(key, size, item["ETag"])
        except (ClientError, BotoCoreError) as error:
            raise _refusal(error, self.url(prefix)) from error

    def stat(self, key: str) -> Entry | None:
        try:
            head = self._call(key, lambda: self._client.head_object(Bucket=self.bucket, Key=self.prefix + key))
        except FileNotFoundError:
            return None
        return _s3_entry(key, int(head["ContentLength"]), head["ETag"])

    def delete(self, key: str) -> None:
        self._call(key, lambda: self._client.delete_object(Bucket=self.bucket, Key=self.prefix + key))


def _s3_entry(key: str, size: int, etag: str) -> Entry:
    return Entry(key, size, f"{size}-{etag.strip(chr(34))}")


class FsspecStore(Store):
    """Anything else that fsspec opens (gs://, az://, memory://, ...). Its client library must be installed."""

    def _open(self, key: str) -> tuple[Any, str]:
        if ".." in key.split("/"):
            raise ValueError(f"key {key!r} leaves the store")
        try:
            fs, path = fsspec.core.url_to_fs(self.url(key))
        except (ImportError, ValueError) as error:
            raise MicaclError(
                f"{self.root}: {error}.", "The URL cannot be opened.", "Use a path or s3://, or install its client."
            ) from error
        return fs, path

    def get(self, key: str) -> bytes:
        fs, path = self._open(key)
        return bytes(fs.cat_file(path))

    def read_range(self, key: str, offset: int, size: int) -> bytes:
        fs, path = self._open(key)
        return bytes(fs.cat_file(path, start=offset, end=offset + size))

    def put(self, key: str, data: bytes) -> None:
        fs, path = self._open(key)
        fs.pipe_file(path, data)

    def put_if_absent(self, key: str, data: bytes) -> bool:
        fs, path = self._open(key)
        try:
            fs.pipe_file(path, data, mode="create")
        except FileExistsError:
            return bytes(fs.cat_file(path)) == data
        return True

    def list(self, prefix: str = "") -> Iterator[Entry]:
        fs, root = self._open("")
        folder = prefix.rpartition("/")[0]
        for path, info in fs.find(f"{root}/{folder}" if folder else root, detail=True).items():
            key = path.removeprefix(root).lstrip("/")
            if key.startswith(prefix):
                yield _fsspec_entry(key, info)

    def stat(self, key: str) -> Entry | None:
        fs, path = self._open(key)
        try:
            info = fs.info(path)
        except FileNotFoundError:
            return None
        return _fsspec_entry(key, info) if info.get("type") == "file" else None

    def delete(self, key: str) -> None:
        fs, path = self._open(key)
        if fs.exists(path):
            fs.rm_file(path)


def _fsspec_entry(key: str, info: Mapping[str, Any]) -> Entry:
    stamp = info.get("etag") or info.get("mtime") or info.get("created") or ""
    return Entry(key, int(info["size"]), f"{info['size']}-{digest(str(stamp).encode())[:16]}")


def _backoff_s(attempt: int) -> float:
    """Exponential with full jitter, at most 5 s. The jitter keeps a thousand workers from knocking together."""
    return random.SystemRandom().uniform(0.05, min(5.0, 0.2 * 2**attempt))
