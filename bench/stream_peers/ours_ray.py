"""Ours, decoded by Ray Data (pipeline/ray_stream.py). `workers` are its actors."""

from __future__ import annotations

from collections.abc import Iterator

from ours import Loader
from work import Job, run

from pipeline.loader import ClipBatch
from pipeline.ray_local import ray_session
from pipeline.ray_stream import ray_batches


class RayLoader(Loader):
    """The same batches, through the object store."""

    def __init__(self, job: Job) -> None:
        super().__init__(job)
        self.actors = job.workers

    def batches(self) -> Iterator[ClipBatch]:
        with ray_session(num_cpus=self.actors, object_store_mb=1000):
            yield from ray_batches(self.loader, 1, actors=self.actors)


if __name__ == "__main__":
    run(RayLoader)
