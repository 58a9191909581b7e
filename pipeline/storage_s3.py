"""`s3://` through boto3: one rule for retries, conditional puts judged by content, reads that resume, errors in words.

Every call ends right, with FileNotFoundError, or with a MicaclError after `S3Config.attempts`. boto3 is told to try
once: its own loop has other time-outs for other faults, and knows nothing of broken bodies and lost answers.

S3 credentials and endpoint come from the usual AWS places (environment, profile, instance role).
"""

from __future__ import annotations

import contextlib
import functools
import io
import os
import random
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import boto3
from boto3.s3.transfer import TransferConfig
from botocore import exceptions as boto
from botocore.config import Config
from botocore.parsers import ResponseParserError
from urllib3.exceptions import HTTPError

from pipeline.contract import MicaclError
from pipeline.storage import Entry, Store

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

T = TypeVar("T")

_UNREAD = "Nothing of it was used."
_UNKNOWN = "It may or may not have been done; nothing half-written is visible."
_TRANSFER_THREADS = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class S3Config:
    """How patient a store is: small calls end within attempts * (connect_s + read_s), and the pauses between."""

    attempts: int = 6
    connect_s: float = 5.0
    read_s: float = 20.0
    """Without a byte."""
    pause_s: float = 0.2
    """The first pause between attempts; each next one is up to twice as long, with jitter."""
    pause_max_s: float = 5.0
    page_keys: int = 1000
    """Keys in one page of a listing; S3 gives at most 1000."""
    piece_bytes: int = 2**20
    """A read that breaks off keeps the whole pieces of this size."""
    multipart_bytes: int = 64 * 2**20
    """Larger objects are put in parts."""
    part_bytes: int = 16 * 2**20


CONFIG = S3Config()


@functools.lru_cache(maxsize=8)
def _s3_client(pid: int, config: S3Config = CONFIG, attempts: int = 1) -> S3Client:
    del pid  # a forked process must not share its parent's sockets
    return boto3.session.Session().client(  # a session of its own: the default one keeps the first credentials it saw
        "s3",
        config=Config(
            connect_timeout=config.connect_s,
            read_timeout=config.read_s,
            retries={"mode": "standard", "total_max_attempts": attempts},
            max_pool_connections=32,
        ),
    )


class _ReplacedWhileRead(OSError):
    pass


_FAULTS = (boto.ClientError, boto.BotoCoreError, ResponseParserError, HTTPError, OSError)
_MAY_PASS = (
    boto.HTTPClientError,
    boto.ConnectionError,
    boto.IncompleteReadError,
    boto.FlexibleChecksumError,
    ResponseParserError,
    HTTPError,
    OSError,
)
_CODES_THAT_MAY_PASS = ("RequestTimeout", "BadDigest", "IncompleteBody", "NoSuchUpload")
_REMEDIES = {
    "NoSuchBucket": "Create the bucket, or correct the URL.",
    "InvalidAccessKeyId": "Check AWS_ACCESS_KEY_ID and AWS_ENDPOINT_URL.",
    "SignatureDoesNotMatch": "Check AWS_SECRET_ACCESS_KEY.",
    "AccessDenied": "Check the credentials and the bucket's policy.",
    "403": "Check the credentials and the bucket's policy.",
    "EntityTooLarge": "An object that is put if absent, or one part, may have at most 5 GB.",
    "NoCredentialsError": "Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, a profile, or an instance role.",
    "EndpointConnectionError": "Check AWS_ENDPOINT_URL and that the server runs.",
    "ConnectTimeoutError": "Check AWS_ENDPOINT_URL and that the server runs.",
}


def _answer(error: BaseException) -> tuple[int, str]:
    """HTTP status (0 without an answer) and S3's code, or what went wrong in one word."""
    if not isinstance(error, boto.ClientError):
        return 0, type(error).__name__.lstrip("_")
    status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    return status, error.response.get("Error", {}).get("Code") or str(status)


def _may_pass(error: BaseException) -> bool:
    status, code = _answer(error)
    busy = status in (408, 409, 429) or status >= 500 or code in _CODES_THAT_MAY_PASS
    return busy if isinstance(error, boto.ClientError) else isinstance(error, _MAY_PASS)


def _refusal(error: BaseException, url: str, tries: int, consequence: str) -> Exception:
    """What the server said, in our words."""
    status, code = _answer(error)
    if status == 404 and code in ("404", "NoSuchKey"):
        return FileNotFoundError(url)
    if status == 412:
        return FileExistsError(url)
    what = "the object store answered" if status else "the request failed with"
    passing = "Check the network and the object store, then run the same command again."
    lasting = "Try again; if it stays, `micacl doctor URL` shows what the bucket can do."
    return MicaclError(
        f"{url}: {what} {code}{f', the last of {tries} attempts' if tries > 1 else ''}.",
        consequence if _may_pass(error) else "The operation was not done.",
        _REMEDIES.get(code, passing if _may_pass(error) else lasting),
    )


class S3Store(Store):
    """`s3://bucket/prefix` through boto3."""

    def __init__(self, url: str, config: S3Config | None = None) -> None:
        super().__init__(url)
        self.bucket, _, prefix = self.root.removeprefix("s3://").partition("/")
        self.prefix = f"{prefix}/" if prefix else ""
        self.config = config or CONFIG

    @property
    def _client(self) -> S3Client:
        return self._client_of(1)

    def _client_of(self, attempts: int) -> S3Client:
        try:
            return _s3_client(os.getpid(), self.config, attempts)
        except ValueError as error:
            raise MicaclError(
                f"The object store's client cannot be made: {error}.",
                "No bucket can be opened.",
                "Check AWS_ENDPOINT_URL: it needs http:// or https://.",
            ) from error

    def _call(self, key: str, call: Callable[[], T], consequence: str = _UNREAD, attempts: int = 0) -> T:
        """`call()`, made again while its fault may pass. Raises FileNotFoundError, FileExistsError or MicaclError."""
        attempts = attempts or self.config.attempts
        for attempt in range(attempts):
            try:
                return call()
            except _FAULTS as error:
                if attempt == attempts - 1 or not _may_pass(error):
                    raise _refusal(error, self.url(key), attempt + 1, consequence) from error
            self._pause(attempt)
        raise AssertionError("the last attempt returns or raises")

    def _pause(self, attempt: int) -> None:
        """Exponential with full jitter. The jitter keeps a thousand workers from knocking together."""
        longest = min(self.config.pause_max_s, self.config.pause_s * 2**attempt)
        time.sleep(random.SystemRandom().uniform(self.config.pause_s / 4, longest))

    def check(self) -> None:
        # A wrong endpoint should not take six attempts to be told.
        list_one = functools.partial(self._client.list_objects_v2, Bucket=self.bucket, MaxKeys=1)
        self._call("", list_one, attempts=min(2, self.config.attempts))

    def get(self, key: str) -> bytes:
        return self._read(key, 0, None)

    def read_range(self, key: str, offset: int, size: int) -> bytes:
        return self._read(key, offset, offset + size) if size else b""

    def _read(self, key: str, start: int, end: int | None) -> bytes:
        """Bytes [start, end), resumed by range where the connection broke; never mixes two versions of the object."""
        out, etag = bytearray(), ""

        def read_on() -> bytes:
            nonlocal etag
            at, got = start + len(out), len(out)
            extra: dict[str, Any] = {"IfMatch": etag} if etag else {}
            if at or end is not None:
                extra["Range"] = f"bytes={at}-{'' if end is None else end - 1}"
            try:
                answer = self._client.get_object(Bucket=self.bucket, Key=self.prefix + key, **extra)
                etag = answer["ETag"]
                with contextlib.closing(answer["Body"]) as body:
                    for chunk in body.iter_chunks(self.config.piece_bytes):
                        out.extend(chunk)
            except boto.ClientError as error:
                if _answer(error)[0] == 416:  # nothing lies at `at`
                    return bytes(out)
                if _answer(error)[0] != 412:
                    raise
                raise start_over(_ReplacedWhileRead(key)) from error
            except boto.FlexibleChecksumError as error:
                raise start_over(error) from None
            if len(out) - got != answer["ContentLength"]:
                raise boto.IncompleteReadError(actual_bytes=len(out) - got, expected_bytes=answer["ContentLength"])
            return bytes(out)

        def start_over(error: Exception) -> Exception:
            nonlocal etag
            out.clear()
            etag = ""
            return error

        return self._call(key, read_on)

    def put(self, key: str, data: bytes) -> None:
        if len(data) > self.config.multipart_bytes:
            self._put_parts(key, data)
        else:
            put = self._client.put_object
            self._call(key, lambda: put(Bucket=self.bucket, Key=self.prefix + key, Body=data), _UNKNOWN)

    def _put_parts(self, key: str, data: bytes) -> None:
        """Through boto3's transfer manager: it tries each part again, and aborts the upload if one fails for good."""
        how = TransferConfig(
            multipart_threshold=self.config.multipart_bytes,
            multipart_chunksize=self.config.part_bytes,
            max_concurrency=_TRANSFER_THREADS,
            preferred_transfer_client="classic",
        )
        upload = self._client_of(self.config.attempts).upload_fileobj
        # Twice: if the answer to the last request is lost, boto3 asks again and may hear that there is no such upload.
        self._call(
            key, lambda: upload(io.BytesIO(data), self.bucket, self.prefix + key, Config=how), _UNKNOWN, attempts=2
        )

    def put_if_absent(self, key: str, data: bytes) -> bool:
        put = self._client.put_object
        for attempt in range(self.config.attempts):
            try:
                self._call(
                    key,
                    lambda: put(Bucket=self.bucket, Key=self.prefix + key, Body=data, IfNoneMatch="*"),
                    _UNKNOWN,
                )
                return True
            except FileExistsError:  # perhaps our own first attempt, whose answer was lost: the content decides
                with contextlib.suppress(FileNotFoundError):  # gone again, or a wrong answer
                    return self.get(key) == data
            self._pause(attempt)
        raise MicaclError(
            f"{self.url(key)}: the object store says that it exists and that it does not.",
            _UNKNOWN,
            "Run `micacl doctor URL`: it shows whether conditional writes work there.",
        )

    def list(self, prefix: str = "") -> Iterator[Entry]:
        for page in self._pages(prefix):
            yield from self._entries(page)

    def children(self, prefix: str = "") -> Iterator[Entry]:
        for page in self._pages(prefix, Delimiter="/"):
            yield from (
                Entry(folder["Prefix"].removeprefix(self.prefix), 0, "") for folder in page.get("CommonPrefixes", [])
            )
            yield from self._entries(page)

    def _entries(self, page: Mapping[str, Any]) -> Iterator[Entry]:
        for item in page.get("Contents", []):
            key = item["Key"].removeprefix(self.prefix)
            if not key.endswith("/"):
                yield _s3_entry(key, item["Size"], item["ETag"])

    def _pages(self, prefix: str, **more: Any) -> Iterator[Mapping[str, Any]]:
        fetch = functools.partial(
            self._client.list_objects_v2,
            Bucket=self.bucket,
            Prefix=self.prefix + prefix,
            MaxKeys=self.config.page_keys,
            **more,
        )
        page, token = self._call(prefix, fetch), ""
        while True:
            yield page
            if not page.get("IsTruncated"):
                return
            last, token = token, page.get("NextContinuationToken", "")
            if token in ("", last):
                raise MicaclError(
                    f"{self.url(prefix)}: a page of the listing says that there are more keys, but not where.",
                    "The listing is not whole, so it was not used.",
                    "The object store is at fault: try again, or use another.",
                )
            page = self._call(prefix, functools.partial(fetch, ContinuationToken=token))

    def open_uploads(self) -> int:
        """As Store says; one request, which needs the right s3:ListBucketMultipartUploads. Raises MicaclError."""
        look = functools.partial(self._client.list_multipart_uploads, Bucket=self.bucket, Prefix=self.prefix)
        return len(self._call("", look, attempts=min(2, self.config.attempts)).get("Uploads", []))

    def stat(self, key: str) -> Entry | None:
        head = functools.partial(self._client.head_object, Bucket=self.bucket, Key=self.prefix + key)
        try:
            found = self._call(key, head)
        except FileNotFoundError:
            return None
        return _s3_entry(key, found["ContentLength"], found["ETag"])

    def delete(self, key: str) -> None:
        delete = functools.partial(self._client.delete_object, Bucket=self.bucket, Key=self.prefix + key)
        with contextlib.suppress(FileNotFoundError):
            self._call(key, delete, _UNKNOWN)


def _s3_entry(key: str, size: int, etag: str) -> Entry:
    return Entry(key, size, f"{size}-{etag.strip(chr(34))}")
