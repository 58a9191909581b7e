"""Ours: the uniform plan, every bag checked by its sha256, resumed by its state. `workers` are decode threads.

The one file here, with ours_ray.py, that knows the house's reader.
"""

from __future__ import annotations

from collections.abc import Iterator

from work import BATCH, CLASSES, EPOCH_CLIPS, Batch, Job, run

from pipeline import PlanConfig, StreamConfig, open_dataset
from pipeline.loader import ClipBatch


class Loader:
    """Batches from where the job's state says."""

    def __init__(self, job: Job) -> None:
        dataset = open_dataset(job.root)
        steps = EPOCH_CLIPS // BATCH if job.mode != "steady" else 10**5
        plan = PlanConfig(policy="uniform", global_batch=BATCH, steps_per_epoch=steps)
        self.loader = dataset.loader("train", plan, stream=self.stream(job))
        if job.state:
            self.loader.load_state_dict(job.state)
        self.number_C = [CLASSES.index(label) for label in dataset.labels]

    def __iter__(self) -> Iterator[Batch]:
        for batch in self.batches():
            self.last = batch.state
            yield Batch(batch.frames_BNTHWC, [self.number_C[n] for n in batch.labels_B], batch.keys)

    def stream(self, job: Job) -> StreamConfig:
        return StreamConfig(threads=job.workers)

    def batches(self) -> Iterator[ClipBatch]:
        return self.loader.batches(1)

    def state(self, step: int) -> dict:
        del step
        return self.last


if __name__ == "__main__":
    run(Loader)
