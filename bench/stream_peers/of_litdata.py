"""litdata: its chunks, one StreamingDataset a class, combined with equal weights.

The combined dataset ends with its first class that ends, so each class is repeated (`subsample` above 1) to be as long
as an epoch: that is how a balanced epoch over a long tail is said in it. Classes are drawn at random.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import litdata
import numpy as np
from litdata.streaming import downloader
from torch import from_numpy, stack
from work import BATCH, CLASSES, EPOCH_CLIPS, Batch, Job, cut, decode, own_rng, pick, read_bags, run, s3_env

# Its second S3 client refuses an endpoint without TLS, and no option of the library reaches it.
downloader._OBSTORE_CLIENT_OPTIONS["allow_http"] = True  # noqa: SLF001


class Bags(litdata.StreamingDataset):
    def __getitem__(self, index: Any) -> tuple[Any, int, str]:
        sample = super().__getitem__(index)
        frames = decode(cut(sample["jpegs"], sample["ends"], pick(own_rng())))
        return from_numpy(frames), sample["label"], sample["key"]


def collate(samples: list[tuple[Any, int, str]]) -> tuple[Any, list[int], list[str]]:
    frames, labels, keys = zip(*samples, strict=True)
    return stack(frames), list(labels), list(keys)


class Loader:
    def __init__(self, job: Job) -> None:
        clips = EPOCH_CLIPS if job.mode != "steady" else 50 * EPOCH_CLIPS
        classes = [_dataset(job, label, folder, clips) for label, (folder,) in job.data.items()]
        combined = litdata.CombinedStreamingDataset(
            classes, weights=[1 / len(CLASSES)] * len(CLASSES), iterate_over_all=False
        )
        self.loader = litdata.StreamingDataLoader(
            combined, batch_size=BATCH, num_workers=job.workers, collate_fn=collate, drop_last=True
        )
        if job.state:
            self.loader.load_state_dict(job.state)

    def __iter__(self) -> Iterator[Batch]:
        return (Batch(*batch) for batch in self.loader)

    def state(self, step: int) -> dict[str, Any]:
        del step
        return self.loader.state_dict()


def _dataset(job: Job, label: str, folder: str, clips: int) -> Bags:
    more: dict[str, Any] = {}
    if folder.startswith("s3://"):
        endpoint, key, secret = s3_env()
        said = {"endpoint_url": endpoint, "aws_access_key_id": key, "aws_secret_access_key": secret}
        more = {"cache_dir": str(Path(job.cache, label)), "storage_options": {**said, "region_name": "us-east-1"}}
    one = Bags(folder, shuffle=True, **more)
    # Twice a worker's share of the class's clips: the class is drawn at random, and the epoch must not end early.
    repeats = max(1.0, float(-(-2 * clips // (len(CLASSES) * len(one)))))
    return Bags(folder, shuffle=True, subsample=repeats, **more)


def _samples(tar: str) -> Iterator[dict[str, Any]]:
    for key, word, jpegs in read_bags(tar):
        ends = np.cumsum([len(jpeg) for jpeg in jpegs]).astype(np.uint32)
        yield {"key": key, "label": CLASSES.index(word), "ends": ends, "jpegs": b"".join(jpegs)}


def convert(job: Job) -> None:
    for label, tars in job.data.items():
        litdata.optimize(
            fn=_samples, inputs=tars, output_dir=f"{job.cache}/{label}", chunk_bytes="8MB", num_workers=1, verbose=False
        )


if __name__ == "__main__":
    run(Loader, convert)
