"""Ours: the uniform plan, every bag checked by its sha256, resumed by position. `workers` are reading threads.

The one file here that knows the house's reader.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from work import BATCH, CLASSES, EPOCH_CLIPS, Batch, Job, run

from pipeline.dataset import open_dataset
from pipeline.plan import EpochPlan, PlanConfig, PlanState
from pipeline.stream import BagStream, StreamConfig, label_numbers, shard_numbers


class Loader:
    """Batches of an epoch from the step that the job's state says."""

    def __init__(self, job: Job) -> None:
        dataset = open_dataset(job.root)
        rows = dataset.split("train")
        steps = EPOCH_CLIPS // BATCH if job.mode != "steady" else 10**5
        self.plan = EpochPlan(
            labels=label_numbers(rows, dataset.labels, job.root),
            shards=shard_numbers(rows),
            classes=len(dataset.labels),
            config=PlanConfig(policy="uniform", global_batch=BATCH, steps_per_epoch=steps),
            epoch=0,
            version=dataset.sha256,
        )
        self.step = PlanState.from_dict(job.state).step if job.state else 0
        self.number_C = [CLASSES.index(label) for label in dataset.labels]
        self.stream = BagStream(dataset, rows, StreamConfig(threads=job.workers))

    def __iter__(self) -> Iterator[Batch]:
        draws = (self.plan[i] for i in range(self.step * BATCH, len(self.plan)))
        waiting = []
        for clip in self.stream.read(draws, train=True):
            waiting.append(clip)
            if len(waiting) == BATCH:
                frames = np.stack([c.frames_NTHWC for c in waiting])
                yield Batch(frames, [self.number_C[c.label] for c in waiting], [c.key for c in waiting])
                waiting = []

    def state(self, step: int) -> dict:
        return self.plan.state(step).to_dict()


if __name__ == "__main__":
    run(Loader)
