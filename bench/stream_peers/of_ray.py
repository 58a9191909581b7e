"""Ray Data: `read_webdataset` over our tars with a decoder of our own; no class balance, no state of an iterator.

The decoder picks and decodes, so nothing is unpickled and only 16 JPEGs of 48 are decoded. Files are shuffled, clips
inside them are not. Steady runs read the list of shards many times over, so that the start of a job is not timed.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ["RAY_DEDUP_LOGS"] = "0"
os.environ["RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"] = "0"
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"

import pyarrow.fs
import ray
import ray.data
from work import BATCH, CLASSES, INSTANCES, STORED, Batch, Job, decode, own_rng, pick, run, s3_env

NAMES = [f"{i:02d}.{f:03d}.jpg" for i in range(INSTANCES) for f in range(STORED)]
STORE_BYTES = 2 * 2**30


def decode_sample(sample: dict[str, Any]) -> dict[str, Any]:
    frames = decode([sample[NAMES[i]] for i in pick(own_rng())])
    label = CLASSES.index(json.loads(sample["json"])["label"])
    return {"frames": frames, "label": label, "key": sample["__key__"]}


class Loader:
    def __init__(self, job: Job) -> None:
        logging.disable(logging.WARNING)
        here = str(Path(__file__).parent)
        ray.init(
            include_dashboard=False,
            num_cpus=job.workers,
            object_store_memory=STORE_BYTES,
            logging_level=logging.ERROR,
            log_to_driver=False,
            runtime_env={"env_vars": {"PYTHONPATH": here}},
        )
        ray.data.DataContext.get_current().enable_progress_bars = False
        urls = [url for of_class in job.data.values() for url in of_class]
        files = None
        if urls[0].startswith("s3://"):
            endpoint, key, secret = s3_env()
            host = endpoint.removeprefix("http://")
            files = pyarrow.fs.S3FileSystem(
                access_key=key, secret_key=secret, endpoint_override=host, scheme="http", region="us-east-1"
            )
            urls = [url.removeprefix("s3://") for url in urls]
        urls = urls * (20 if job.mode == "steady" else 1)
        self.data = ray.data.read_webdataset(
            urls, filesystem=files, decoder=decode_sample, shuffle="files", override_num_blocks=len(urls)
        )

    def __iter__(self) -> Iterator[Batch]:
        for batch in self.data.iter_batches(batch_size=BATCH, batch_format="numpy", drop_last=True):
            yield Batch(batch["frames"], batch["label"], list(batch["key"]))


if __name__ == "__main__":
    run(Loader)
    ray.shutdown()
