"""`s3://` through boto3: conditional puts that are judged by content, reads that resume, errors in words.

S3 credentials and endpoint come from the usual AWS places (environment, profile, instance role).
"""

from __future__ import annotations

import functools
import os
import random
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, TypeVar

import boto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError, HTTPClientError, IncompleteReadError
from urllib3.exceptions import HTTPError

from pipeline.contract import MicaclError
from pipeline.storage import Entry, Store

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

T = TypeVar("T")
ATTEMPTS = 6


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


def _backoff_s(attempt: int) -> float:
    """Exponential with full jitter, at most 5 s. The jitter keeps a thousand workers from knocking together."""
    return random.SystemRandom().uniform(0.05, min(5.0, 0.2 * 2**attempt))
