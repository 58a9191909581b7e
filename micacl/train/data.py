"""A dataset version and a config -> this rank's training batches from any step on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice

import numpy as np
import pyarrow as pa

from micacl.batch import Batch, collate
from micacl.config import RunConfig
from pipeline.contract import MicaclError
from pipeline.dataset import Dataset
from pipeline.plan import Draw, EpochPlan, PlanState, require_same_plan
from pipeline.stream import BagStream, label_numbers, shard_numbers


@dataclass(frozen=True, slots=True)
class TrainData:
    """The training split, ready to be planned and read."""

    dataset: Dataset
    rows: pa.Table
    config: RunConfig
    plan_of: Callable[[int], EpochPlan]
    """Epoch -> plan."""
    class_counts: tuple[int, ...]
    """Clips of each class of the label set."""

    @property
    def steps_per_epoch(self) -> int:
        return self.plan_of(0).steps

    @property
    def steps(self) -> int:
        return self.steps_per_epoch * self.config.train.epochs

    def state_at(self, step: int) -> PlanState:
        epoch, done = divmod(step, self.steps_per_epoch)
        return PlanState(version=self.dataset.sha256, plan=self.plan_of(epoch).hash, epoch=epoch, step=done)

    def require_same(self, state: PlanState) -> None:
        """Refuse to continue on another dataset version, or with another plan. Raises MicaclError."""
        require_same_plan(state, self.plan_of(state.epoch))

    def batches(self, start_step: int, rank: int, ranks: int) -> Iterator[Batch]:
        """This rank's batches of steps start_step, start_step + 1, ... to the end, read ahead across epochs."""
        stream = BagStream(self.dataset, self.rows, self.config.stream)
        clips = stream.read(self._draws(start_step, rank, ranks), train=True)
        clips_per_rank = self.config.plan.global_batch // ranks
        while batch := list(islice(clips, clips_per_rank)):
            yield collate(batch, self.config.batch, train=True)

    def _draws(self, start_step: int, rank: int, ranks: int) -> Iterator[Draw]:
        for epoch in range(start_step // self.steps_per_epoch, self.config.train.epochs):
            plan = self.plan_of(epoch)
            for step in range(max(0, start_step - epoch * self.steps_per_epoch), plan.steps):
                for position in plan.rank_positions(step, rank, ranks):
                    yield plan[int(position)]


def train_data(dataset: Dataset, config: RunConfig) -> TrainData:
    """Raises MicaclError if the split is missing, its labels are not the model's, or a class has no clip."""
    require_labels(dataset, config)
    rows = dataset.split(config.train.split)
    labels = label_numbers(rows, dataset.labels, dataset.store.root)
    shards = shard_numbers(rows)
    classes = len(dataset.labels)

    def plan_of(epoch: int) -> EpochPlan:
        return EpochPlan(
            labels=labels, shards=shards, classes=classes, config=config.plan, epoch=epoch, version=dataset.sha256
        )

    counts = tuple(int(n) for n in np.bincount(labels, minlength=classes))
    return TrainData(dataset, rows, config, plan_of, counts)


def require_labels(dataset: Dataset, config: RunConfig) -> None:
    """The model's classes are the dataset's, in order. Raises MicaclError."""
    if dataset.labels != config.model.classes:
        raise MicaclError(
            f"{dataset.store.root} has the labels {', '.join(dataset.labels)}; "
            f"the model has {', '.join(config.model.classes)}.",
            "Its outputs would be called by wrong names.",
            "Train with --model.classes set to the dataset's labels, in that order.",
        )
