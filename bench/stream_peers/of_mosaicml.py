"""mosaicml-streaming: MDS, one stream a class in equal proportions, stratified batches.

A sample is a bag: its JPEGs in one piece with where each ends. The library imports torchvision, whose registry build
does not load beside a CPU build of torch; nothing of it is used here, and stubs/ stands in for it.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).with_name("stubs")))

import numpy as np
from streaming import MDSWriter, Stream, StreamingDataLoader, StreamingDataset
from streaming.base.util import clean_stale_shared_memory
from torch import from_numpy, stack
from work import BATCH, CLASSES, EPOCH_CLIPS, Batch, Job, cut, decode, own_rng, pick, read_bags, run

COLUMNS = {"key": "str", "label": "int", "ends": "ndarray:uint32", "jpegs": "bytes"}
SHARD_BYTES = 8 * 2**20
"""About what the house's shards of this benchmark have."""


class Bags(StreamingDataset):
    def __getitem__(self, at: int) -> tuple[Any, int, str]:
        sample = super().__getitem__(at)
        frames = decode(cut(sample["jpegs"], sample["ends"], pick(own_rng())))
        return from_numpy(frames), sample["label"], sample["key"]


def collate(samples: list[tuple[Any, int, str]]) -> tuple[Any, list[int], list[str]]:
    frames, labels, keys = zip(*samples, strict=True)
    return stack(frames), list(labels), list(keys)


class Loader:
    def __init__(self, job: Job) -> None:
        clean_stale_shared_memory()
        tempfile.tempdir = job.cache  # its lock files stay where they are made
        streams = [_stream(job, label, folder) for label, (folder,) in job.data.items()]
        # Two classes have 3 clips of every batch and an epoch ends with them, so it takes more than EPOCH_CLIPS.
        clips = 2 * EPOCH_CLIPS if job.mode != "steady" else 50 * EPOCH_CLIPS
        dataset = Bags(
            streams=streams,
            batch_size=BATCH,
            batching_method="stratified",
            shuffle=True,
            epoch_size=clips,
            num_canonical_nodes=1,
        )
        more = {"prefetch_factor": 2} if job.workers else {}
        self.loader = StreamingDataLoader(
            dataset, batch_size=BATCH, num_workers=job.workers, collate_fn=collate, drop_last=True, **more
        )
        if job.state:
            self.loader.load_state_dict(job.state)

    def __iter__(self) -> Iterator[Batch]:
        return (Batch(*batch) for batch in self.loader)

    def state(self, step: int) -> dict[str, Any]:
        del step
        return self.loader.state_dict()


def _stream(job: Job, label: str, folder: str) -> Stream:
    share = 1 / len(CLASSES)
    if not folder.startswith("s3://"):
        return Stream(local=folder, proportion=share)
    return Stream(remote=folder, local=str(Path(job.cache, label)), proportion=share)


def convert(job: Job) -> None:
    for label, tars in job.data.items():
        with MDSWriter(out=f"{job.cache}/{label}", columns=COLUMNS, size_limit=SHARD_BYTES) as out:
            for tar in tars:
                for key, word, jpegs in read_bags(tar):
                    ends = np.cumsum([len(jpeg) for jpeg in jpegs]).astype(np.uint32)
                    out.write({"key": key, "label": CLASSES.index(word), "ends": ends, "jpegs": b"".join(jpegs)})


if __name__ == "__main__":
    run(Loader, convert)
