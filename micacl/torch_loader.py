"""The balanced stream for any torch loop: tensors, worker processes, pinned memory, and a state to resume from.

    loader = TorchLoader(open_dataset(url).loader("train", PlanConfig(global_batch=32), rank=rank, ranks=ranks))
    for epoch in range(10):
        for batch in loader:                       # frames_BNTHWC uint8, labels_B int64
            ...
    torch.save({"data": loader.state_dict(), ...})

`state_dict` and `load_state_dict` are those of torchdata's StatefulDataLoader, with two differences that matter on a
cluster: the state is the same on every rank, and it may be loaded with another number of ranks or workers. It moves
with each batch that is handed out, whatever the workers have read ahead.

Threads decode without the GIL, so workers are needed only when the training process itself keeps the GIL busy
(docs/sampling.md). Worker w of W reads the steps w, w + W, ... of this rank; torch's DataLoader puts them in order.

Legend: B clips per rank and batch, N instances, T frames per instance, H W height and width.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from pipeline.loader import ClipBatch, Loader


@dataclass(frozen=True, slots=True)
class TorchBatch:
    """pipeline.loader.ClipBatch in tensors."""

    frames_BNTHWC: Tensor
    """uint8; normalise it where it is used, on the GPU if there is one."""
    labels_B: Tensor
    """int64; -1 for a bag without a label."""
    rows_B: Tensor
    positions_B: Tensor
    rng_keys_B2: Tensor
    """uint64."""
    mask_B: Tensor
    keys: tuple[str, ...]
    epoch: int
    step: int
    state: dict[str, Any]

    @classmethod
    def of(cls, batch: ClipBatch) -> TorchBatch:
        """Shares the arrays' memory."""
        return cls(
            frames_BNTHWC=torch.from_numpy(batch.frames_BNTHWC),
            labels_B=torch.from_numpy(batch.labels_B),
            rows_B=torch.from_numpy(batch.rows_B),
            positions_B=torch.from_numpy(batch.positions_B),
            rng_keys_B2=torch.from_numpy(batch.rng_keys_B2),
            mask_B=torch.from_numpy(batch.mask_B),
            keys=batch.keys,
            epoch=batch.epoch,
            step=batch.step,
            state=batch.state,
        )

    def pin_memory(self) -> TorchBatch:
        """A copy that is moved to a GPU without waiting; torch's DataLoader calls it."""
        return replace(self, frames_BNTHWC=self.frames_BNTHWC.pin_memory(), labels_B=self.labels_B.pin_memory())

    def to(self, device: torch.device | str) -> TorchBatch:
        """Frames and labels on a device."""
        frames, labels = (x.to(device, non_blocking=True) for x in (self.frames_BNTHWC, self.labels_B))
        return replace(self, frames_BNTHWC=frames, labels_B=labels)


class TorchLoader:
    """Batches of a Loader as tensors. Iterating takes what is left of the current epoch."""

    def __init__(self, loader: Loader, *, workers: int = 0, pin_memory: bool = False) -> None:
        """`workers`: processes beside this one that read and decode; 0 does it in threads of this one."""
        self.loader, self.workers, self.pin_memory = loader, workers, pin_memory

    def __len__(self) -> int:
        """Batches of an epoch on this rank."""
        return len(self.loader)

    def __iter__(self) -> Iterator[TorchBatch]:
        if not self.workers and not self.pin_memory:
            yield from map(TorchBatch.of, self.loader)
            return
        epoch = self.state_dict()["epoch"]
        while self.state_dict()["epoch"] == epoch:
            self.loader.close()  # its threads would not come along to the workers
            for batch in self._batches():
                if self.workers:
                    self.loader.load_state_dict(batch.state)
                here = self.state_dict()
                yield batch
                if self.state_dict() != here:  # a state was loaded, or another iterator took a batch: from there on
                    break

    def _batches(self) -> DataLoader[TorchBatch]:
        return DataLoader(_Part(self.loader), batch_size=None, num_workers=self.workers, pin_memory=self.pin_memory)

    def state_dict(self) -> dict[str, Any]:
        """Where the loader is: behind the last batch that was handed out."""
        return self.loader.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there. Raises MicaclError if it is of another dataset version or plan."""
        self.loader.load_state_dict(state)


class _Part(IterableDataset[TorchBatch]):
    """What one worker reads."""

    def __init__(self, loader: Loader) -> None:
        self.loader = loader

    def __iter__(self) -> Iterator[TorchBatch]:
        info = get_worker_info()
        if info is not None:
            self.loader.stripe = (info.id, info.num_workers)
        yield from map(TorchBatch.of, self.loader)
