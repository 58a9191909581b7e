"""A dataset version and a config -> this rank's training batches from any step on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property

from micacl.batch import Batch, collate
from micacl.config import RunConfig
from pipeline.contract import MicaclError
from pipeline.dataset import Dataset, open_dataset
from pipeline.loader import ClipBatch, Loader
from pipeline.plan import EpochPlan, PlanState, class_weights, require_same_plan
from pipeline.rows import SplitRows, split_rows

Read = Callable[[Loader, int], Iterator[ClipBatch]]


@dataclass(frozen=True)
class TrainData:
    """The training split, ready to be planned and read."""

    dataset: Dataset
    rows: SplitRows
    config: RunConfig
    val: SplitRows | None = None
    """Validation: held out of `train`, or the dataset's own `val`. All of it, whatever --train.where says."""

    @property
    def val_steps(self) -> int:
        """Steps between validations."""
        return self.steps_per_epoch * self.config.train.val_every

    @property
    def class_counts(self) -> tuple[int, ...]:
        """Clips of each class of the label set."""
        return self._loader.index.counts

    def seen_counts(self, epoch: int) -> list[float]:
        """Clips of each class as training sees them: its share in the draws of an epoch, of all the clips there are."""
        share_C = class_weights(self.class_counts, self.config.plan, epoch)
        return [float(n) for n in share_C * sum(self.class_counts)]

    def plan_of(self, epoch: int) -> EpochPlan:
        return self._loader.plan(epoch)

    @property
    def steps_per_epoch(self) -> int:
        return self.plan_of(0).steps

    @property
    def steps(self) -> int:
        return self.steps_per_epoch * self.config.train.epochs

    def state_at(self, step: int) -> PlanState:
        epoch, done = divmod(step, self.steps_per_epoch)
        return self.plan_of(epoch).state(done)

    def require_same(self, state: PlanState) -> None:
        """Refuse to continue on another dataset version, or with another plan. Raises MicaclError."""
        require_same_plan(state, self.plan_of(state.epoch))

    def batches(
        self, start_step: int, rank: int, ranks: int, nodes: int = 1, read: Read = Loader.batches
    ) -> Iterator[Batch]:
        """This rank's batches of steps start_step, start_step + 1, ... to the end, read ahead across epochs.

        Args:
            nodes: machines over which the ranks are spread.
            read: (loader, epochs) -> batches, for another way of reading them.
        """
        with self._loader_of(rank, ranks, nodes) as loader:
            loader.seek(*divmod(start_step, self.steps_per_epoch))
            clips = read(loader, self.config.train.epochs)
            for batch in clips:
                yield collate(batch, self.config.batch, train=True)

    @cached_property
    def _loader(self) -> Loader:
        return self._loader_of(0, 1, 1)

    def _loader_of(self, rank: int, ranks: int, nodes: int) -> Loader:
        config = self.config
        return Loader(
            self.dataset,
            config.train.split,
            config.plan,
            config.stream,
            rank=rank,
            ranks=ranks,
            nodes=nodes,
            rows=self.rows,
        )


def train_data(dataset: Dataset, config: RunConfig) -> TrainData:
    """Raises MicaclError if the split is missing, its labels are not the model's, or a class has no clip."""
    require_labels(dataset, config)
    data = TrainData(dataset, split_rows(dataset, config.train.split), config, _validation(dataset, config))
    _ = data.class_counts
    return data


def open_training(url: str, version: int | None, config: RunConfig) -> TrainData:
    """The dataset as a config sees it: its test fold, its filter, its validation clips. Raises MicaclError."""
    train = config.train
    return train_data(open_dataset(url, version, train.fold, train.where, train.val_share, train.val_seed), config)


def _validation(dataset: Dataset, config: RunConfig) -> SplitRows | None:
    """The rows of `val`, if training is to look at them. Raises MicaclError if one has no label."""
    train, own = config.train, has_split(dataset, "val")
    if not train.val_every or train.split == "val" or not (own or train.val_share):
        return None
    rows = split_rows(with_where(dataset, ""), "val")
    try:
        rows.require_labelled()
    except MicaclError as error:
        raise MicaclError(
            f"{error.cause}, in split val.",
            "It cannot be validated on.",
            "Leave validation out with --train.val-every 0.",
        ) from error
    return rows


def with_where(dataset: Dataset, where: str) -> Dataset:
    """The same version, fold and validation clips under another filter."""
    return dataset if dataset.where == where else replace(dataset, where=where)


def has_split(dataset: Dataset, split: str) -> bool:
    """Whether the version itself has bags of it: read from the version file alone."""
    return any(shard["split"] == split for shard in dataset.body["shards"])


def require_labels(dataset: Dataset, config: RunConfig) -> None:
    """The model's classes are the dataset's, in order. Raises MicaclError."""
    if dataset.labels != config.model.classes:
        raise MicaclError(
            f"{dataset.store.root} has the labels {', '.join(dataset.labels)}; "
            f"the model has {', '.join(config.model.classes)}.",
            "Its outputs would be called by wrong names.",
            "Train with --model.classes set to the dataset's labels, in that order.",
        )
