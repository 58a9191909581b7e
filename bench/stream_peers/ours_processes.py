"""Ours with decode processes (pipeline/decoders.py) instead of threads. `workers` are processes."""

from __future__ import annotations

from ours import Loader
from work import Job, run

from pipeline import StreamConfig


class ProcessLoader(Loader):
    """The same batches, decoded by children into shared memory."""

    def stream(self, job: Job) -> StreamConfig:
        return StreamConfig(processes=job.workers)


if __name__ == "__main__":
    run(ProcessLoader)
