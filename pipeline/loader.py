"""A split and a plan -> batches of clips, with the state that resumes after each of them. Needs no torch and no Ray.

    dataset = open_dataset("s3://bucket/faces")
    loader = dataset.loader("train", PlanConfig(policy="uniform", global_batch=32), rank=rank, ranks=ranks)
    for epoch in range(10):
        for batch in loader:                  # one epoch, or what is left of it
            step(batch.frames_BNTHWC, batch.labels_B)
            saved = batch.state               # a dict of plain values: the same on every rank

`loader.load_state_dict(saved)` goes on behind that batch, at any number of ranks: nothing is left out, nothing comes
twice. A position moves when a batch is handed out, not when it is read ahead. `load_state_dict` and `state_dict` are
what torchdata's StatefulDataLoader and Lightning look for; docs/sampling.md has examples.

`EvalLoader` gives every row once, in natural order, the same number of batches on every rank, padded and masked.

Legend: B clips per rank and batch, N instances, T frames per instance, H W height and width.
"""

from __future__ import annotations

import os
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import tee
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from pipeline.bags import Bag
from pipeline.buffers import Buffers
from pipeline.contract import MicaclError
from pipeline.dataset import Dataset
from pipeline.decode import Pixels, StreamConfig, decode_bag
from pipeline.plan import Draw, EpochPlan, PlanConfig, PlanIndex, PlanState, SequentialPlan, require_same_plan
from pipeline.rows import SplitRows, split_rows
from pipeline.stream import BagStream, Decoded


@dataclass(frozen=True, slots=True)
class ClipBatch:
    """One rank's part of a global batch."""

    frames_BNTHWC: Pixels
    """(clips, instances, frames per instance, height, width, RGB) uint8."""
    labels_B: NDArray[np.int64]
    """Place in the label set; -1 for a bag without a label."""
    keys: tuple[str, ...]
    rows_B: NDArray[np.int64]
    """Of the split, in the order of the index."""
    positions_B: NDArray[np.int64]
    """In the epoch's plan: position % ranks == rank."""
    rng_keys_B2: NDArray[np.uint64]
    """For augmentation: np.random.Philox(key=...) of the place in the plan, not of the worker."""
    mask_B: NDArray[np.bool_]
    """False for clips that only fill up the last batch of an evaluation."""
    epoch: int
    step: int
    """Of the epoch, from 0."""
    state: dict[str, Any]
    """Resumes behind this batch. Empty in evaluation."""


class Loader:
    """One rank's batches of a class-balanced plan, epoch after epoch. Iterating goes on where the last one stopped."""

    def __init__(
        self,
        dataset: Dataset,
        split: str = "train",
        plan: PlanConfig | None = None,
        stream: StreamConfig | None = None,
        *,
        rank: int = 0,
        ranks: int = 1,
        nodes: int = 1,
        train: bool = True,
        rows: SplitRows | None = None,
    ) -> None:
        """`nodes`: machines over which the ranks are spread. `train`: draws random frames; else always the same.

        Raises MicaclError for a split without clips, a class without clips, a label outside the label set, and a
        global batch that the ranks cannot share.
        """
        self.dataset, self.split, self.rank, self.ranks, self.nodes = dataset, split, rank, ranks, nodes
        self.config, self.stream, self.train = plan or PlanConfig(), stream or StreamConfig(), train
        self.rows = rows or split_rows(dataset, split)
        self.rows.require_labelled()
        groups = self.rows.groups(self.config.second) if self.config.second else None
        name = f"{split!r} of {dataset.store.root} "
        self.index = PlanIndex(
            self.rows.runs, len(dataset.labels), groups=groups, version=f"{dataset.identity}, {split}", name=name
        )
        self._plans: dict[int, EpochPlan] = {}
        self.plan(0).rank_positions(0, rank, ranks)
        self.stripe = (0, 1)
        """(w, W): of the steps from here on only w, w + W, ... of each epoch; for worker processes."""
        self._at = (0, 0)
        self._end: int | None = None
        self._batches: tuple[int, BagStream, Generator[ClipBatch, None, None]] | None = None
        self._single: tuple[int, BagStream] | None = None

    def plan(self, epoch: int) -> EpochPlan:
        """The plan of an epoch; the last few are kept."""
        if epoch not in self._plans:
            self._plans = dict(list(self._plans.items())[-2:])
            self._plans[epoch] = EpochPlan(self.index, self.config, epoch)
        return self._plans[epoch]

    @property
    def steps_per_epoch(self) -> int:
        return self.plan(self._at[0]).steps

    def __len__(self) -> int:
        """Batches of an epoch on this rank."""
        return self.steps_per_epoch

    def __iter__(self) -> Iterator[ClipBatch]:
        """The batches that are left of the current epoch. Raises MicaclError, naming shard and key where it can.

        Iterators share one position: each ends when the loader leaves the epoch in which the iterator began.
        """
        epoch, step = self._at
        steps, (_, workers) = self._steps(epoch, step), self.stripe
        while steps and self._at[0] == epoch:
            batch = self._take()
            yield batch
            if workers > 1 and batch.step == steps[-1]:  # the epoch's last is another worker's
                return

    def batches(self, epochs: int) -> Iterator[ClipBatch]:
        """The batches from here to the end of epoch `epochs` - 1, read ahead across epochs and not beyond the last."""
        self._end = epochs
        while self._at[0] < epochs:
            yield self._take()
        self.close()

    def batch(self, epoch: int, step: int) -> ClipBatch:
        """One batch by its place. Does not move the loader, and reads nothing ahead."""
        if self._single is None or self._single[0] != os.getpid():
            self._single = (os.getpid(), self._reader(epoch))
        draws = self.plan(epoch).draws(step, self.rank, self.ranks)
        (decoded,) = self._single[1].read_batches([draws], train=self.train)
        return _batch(decoded, epoch, step, self.state_after(epoch, step))

    def state_dict(self) -> dict[str, Any]:
        """Where the loader is, as plain values. The same on every rank that has taken as many batches."""
        epoch, step = self._at
        return self.plan(epoch).state(step).to_dict()

    def load_state_dict(self, state: Mapping[str, Any], *, restart_epoch: bool = False) -> None:
        """Go on from `state`, which may be of another number of ranks. Raises MicaclError if it is of another plan.

        Args:
            restart_epoch: take a state of another dataset version, global batch or policy, and begin its epoch anew.
        """
        saved = PlanState.from_dict(state)
        if restart_epoch and not _same(saved, self.plan(saved.epoch)):
            saved = self.plan(saved.epoch).state(0)
        require_same_plan(saved, self.plan(saved.epoch))
        self.seek(saved.epoch, saved.step)

    def seek(self, epoch: int, step: int) -> None:
        """Go on with a step of an epoch; the step behind its last is the next epoch's first."""
        if not 0 <= step <= self.plan(epoch).steps:
            raise IndexError(f"Step {step} is outside epoch {epoch} of {self.plan(epoch).steps} steps.")
        self.close()
        self._at = (epoch, step) if step < self.plan(epoch).steps else (epoch + 1, 0)

    def close(self) -> None:
        """Give back threads and files. Iterating opens them again."""
        batches, single = self._batches, self._single
        self._batches = self._single = None
        if batches is not None and batches[0] == os.getpid():  # what a fork left us is its parent's to close
            batches[2].close()
            batches[1].close()
        if single is not None and single[0] == os.getpid():
            single[1].close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __getstate__(self) -> dict[str, Any]:
        return {
            "of": (self.dataset, self.split, self.config, self.stream),
            "as": {"rank": self.rank, "ranks": self.ranks, "nodes": self.nodes, "train": self.train},
            "at": (self._at, self.stripe),
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(*state["of"], **state["as"])  # type: ignore[misc]
        self._at, self.stripe = state["at"]

    def _take(self) -> ClipBatch:
        batch = self._next()
        if batch is None:  # what was opened reads to the end of a former `batches`, and somebody goes on behind it
            self._end = None
            batch = self._next()
        assert batch is not None, "without an end there is a next one"
        self._at = (batch.epoch, batch.step + 1)
        if batch.step + 1 == self.plan(batch.epoch).steps:
            self._at = (batch.epoch + 1, 0)
        return batch

    def _next(self) -> ClipBatch | None:
        """None where the reader was told to end."""
        if self._batches is None or self._batches[0] != os.getpid():  # threads do not come along through a fork
            reader = self._reader(self._at[0])
            self._batches = (os.getpid(), reader, self._read(reader))
        try:
            batch = next(self._batches[2], None)
        except BaseException:
            self.close()
            raise
        if batch is None:
            self.close()
        return batch

    def _reader(self, epoch: int) -> BagStream:
        return BagStream(self.dataset, self.rows, self.stream, plan=self.plan(epoch), nodes=self.nodes)

    def _read(self, reader: BagStream) -> Generator[ClipBatch, None, None]:
        """Reads ahead across epochs."""
        here, ahead = tee(self._places(*self._at))
        draws = (self.plan(epoch).draws(step, self.rank, self.ranks) for epoch, step in ahead)
        for (epoch, step), decoded in zip(here, reader.read_batches(draws, train=self.train), strict=False):
            yield _batch(decoded, epoch, step, self.state_after(epoch, step))

    def _places(self, epoch: int, step: int) -> Iterator[tuple[int, int]]:
        """(epoch, step) from here on."""
        while self._end is None or epoch < self._end:
            yield from ((epoch, at) for at in self._steps(epoch, step))
            epoch, step = epoch + 1, 0

    def _steps(self, epoch: int, step: int) -> range:
        worker, workers = self.stripe
        return range(step + worker, self.plan(epoch).steps, workers)

    def state_after(self, epoch: int, step: int) -> dict[str, Any]:
        """The state that resumes behind a batch."""
        plan = self.plan(epoch)
        after = plan.state(step + 1) if step + 1 < plan.steps else self.plan(epoch + 1).state(0)
        return after.to_dict()


class EvalLoader:
    """Every row of a split once, in natural order: rank r has rows r, r + ranks, ... in batches, padded and masked."""

    def __init__(
        self,
        rows: SplitRows,
        stream: StreamConfig | None = None,
        *,
        clips_per_batch: int = 16,
        rank: int = 0,
        ranks: int = 1,
    ) -> None:
        self.rows, self.stream, self.clips_per_batch = rows, stream or StreamConfig(), clips_per_batch
        self.rank_rows = SequentialPlan(len(rows)).rank_positions(rank, ranks)
        """This rank's rows, then -1."""

    def __len__(self) -> int:
        """Batches, the same on every rank."""
        return len(range(0, len(self.rank_rows), self.clips_per_batch))

    def __iter__(self) -> Iterator[ClipBatch]:
        """All batches, from the first on."""
        size = len(self) * self.clips_per_batch
        rows_B = np.concatenate([self.rank_rows, np.full(size - len(self.rank_rows), -1)]).reshape(len(self), -1)
        draws = ([Draw(max(int(row), 0), (0, 0), int(row)) for row in batch] for batch in rows_B)
        with BagStream(self.rows.dataset, self.rows, self.stream) as reader:
            for step, decoded in enumerate(reader.read_batches(draws, train=False)):
                yield _batch(decoded, 0, step, {}, mask_B=rows_B[step] >= 0)


def _same(state: PlanState, plan: EpochPlan) -> bool:
    try:
        require_same_plan(state, plan)
    except MicaclError:
        return False
    return True


def _batch(
    decoded: Decoded, epoch: int, step: int, state: dict[str, Any], mask_B: NDArray[np.bool_] | None = None
) -> ClipBatch:
    draws = decoded.draws
    return ClipBatch(
        frames_BNTHWC=decoded.frames_BNTHWC,
        labels_B=np.array(decoded.labels, np.int64),
        keys=tuple(decoded.keys),
        rows_B=np.array([draw.row for draw in draws], np.int64),
        positions_B=np.array([draw.position for draw in draws], np.int64),
        rng_keys_B2=np.array([draw.rng_key for draw in draws], np.uint64),
        mask_B=np.ones(len(draws), bool) if mask_B is None else mask_B,
        epoch=epoch,
        step=step,
        state=state,
    )


def batch_of_bags(bags: Sequence[Bag], stream: StreamConfig) -> ClipBatch:
    """Bags in memory, decoded as an evaluation decodes them. Raises MicaclError."""
    draws, keys = [Draw(n, (0, 0), n) for n in range(len(bags))], [bag.meta.key for bag in bags]
    decoded = Decoded(draws, keys, [-1] * len(bags), Buffers(0).take)
    for n, bag in enumerate(bags):
        frames_NTHWC = decode_bag(bag, stream, None)
        decoded.place(n, frames_NTHWC.shape, bag.meta.key)[:] = frames_NTHWC
    return _batch(decoded, 0, 0, {})
