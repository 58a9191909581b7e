"""webdataset 1.0.2: our tars unchanged; of each class an endless resampled dataset, mixed with equal probabilities.

S3 is read by a boto3 opener in the process (the library's own s3:// starts `aws s3 cp`, a process a shard). It has no
state, so an epoch cannot be resumed; classes are drawn at random, so a batch has as many of a class as chance gives.
"""

from __future__ import annotations

import functools
import io
import json
from collections.abc import Iterator
from typing import Any

import boto3
import webdataset
from botocore.config import Config
from torch import from_numpy, stack
from webdataset.gopen import gopen_schemes
from webdataset.mix import RandomMix
from work import BATCH, CLASSES, INSTANCES, STORED, Batch, Job, decode, own_rng, pick, run, s3_env

NAMES = [f"{i:02d}.{f:03d}.jpg" for i in range(INSTANCES) for f in range(STORED)]
MIXED = 32
"""Bags in the shuffle buffer of a class; mixed from the first on, so that the first batch does not wait for it."""


@functools.cache
def client() -> Any:
    endpoint, key, secret = s3_env()
    quick = Config(retries={"max_attempts": 5}, proxies={})
    return boto3.client("s3", endpoint_url=endpoint, aws_access_key_id=key, aws_secret_access_key=secret, config=quick)


def open_s3(url: str, mode: str = "rb", bufsize: int = 8192, **_: object) -> io.BytesIO:
    del mode, bufsize
    bucket, _, key = url.removeprefix("s3://").partition("/")
    return io.BytesIO(client().get_object(Bucket=bucket, Key=key)["Body"].read())


def decode_sample(sample: dict[str, Any]) -> tuple[Any, int, str]:
    frames = decode([sample[NAMES[i]] for i in pick(own_rng())])
    return from_numpy(frames), CLASSES.index(json.loads(sample["json"])["label"]), sample["__key__"]


def collate(samples: list[tuple[Any, int, str]]) -> tuple[Any, list[int], list[str]]:
    frames, labels, keys = zip(*samples, strict=True)
    return stack(frames), list(labels), list(keys)


class Loader:
    def __init__(self, job: Job) -> None:
        gopen_schemes["s3"] = open_s3
        classes = [
            webdataset.WebDataset(urls, resampled=True, shardshuffle=False).shuffle(MIXED, initial=1)
            for urls in job.data.values()
        ]
        mixed = RandomMix(classes, [1 / len(classes)] * len(classes))
        batches = webdataset.DataPipeline(
            mixed, webdataset.map(decode_sample), webdataset.batched(BATCH, collation_fn=collate)
        )
        self.loader = webdataset.WebLoader(batches, batch_size=None, num_workers=job.workers)

    def __iter__(self) -> Iterator[Batch]:
        return (Batch(*batch) for batch in self.loader)


if __name__ == "__main__":
    run(Loader)
