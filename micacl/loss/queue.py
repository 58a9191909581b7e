"""The newest clips of each class as keys for MCCL: a tail class has something to be compared with in every batch.

First in, first out, for each class by itself, so that the head does not drive the tail out (one queue for all would be
as long-tailed as the data). A key is an embedding of an earlier step, detached: a memory across batches (Wang et al.,
CVPR 2020). With a momentum encoder the keys are those of an average of the model's past weights (MoCo, He et al., CVPR
2020); without one they are the model's own, a few steps old.

Clips enter in the plan's order, whatever the number of ranks: rank r of W holds the clips at positions r, r + W, ... of
a global batch, so row i of rank r of what was gathered is clip i * W + r. Every rank holds the same queue. It is part
of the checkpoint, so that a run that continues sees the keys that it would have seen.

Shape suffixes: B clips, K classes, S places a class, E embeddings a clip (1, instances or frames), P projection.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from micacl.loss.mccl import IGNORED, More


class ClassQueue(nn.Module):
    """Keys of one scale. Its buffers come into being with the first clips, or are those of a checkpoint."""

    keys_KSEP: Tensor
    present_KSE: Tensor
    """False where an instance is missing or no clip was put yet."""
    put_K: Tensor
    """Clips of each class ever put; the next one takes the place put % S."""

    def __init__(self, classes: int, clips_per_class: int) -> None:
        super().__init__()
        self.classes, self.clips_per_class = classes, clips_per_class

    @property
    def begun(self) -> bool:
        return "keys_KSEP" in self._buffers

    def keys(self) -> More | None:
        """All places with their classes, IGNORED where nothing is. None before the first clip."""
        if not self.begun:
            return None
        classes_K = torch.arange(self.classes, device=self.keys_KSEP.device)
        labels_KSE = torch.where(self.present_KSE, classes_K[:, None, None], IGNORED)
        return More(self.keys_KSEP.flatten(0, 2), labels_KSE.flatten())

    @torch.no_grad()
    def put(self, keys_BEP: Tensor, present_BE: Tensor, labels_B: Tensor) -> None:
        """Append a global batch in the plan's order; of more clips of a class than there are places, the last ones."""
        if not self.begun:
            shape = (self.classes, self.clips_per_class, *keys_BEP.shape[1:])
            self._begin(keys_BEP.new_zeros(shape), present_BE.new_zeros(shape[:-1]), labels_B.new_zeros(self.classes))
        same_BB = labels_B[:, None] == labels_B[None, :]
        nth_B = same_BB.tril(-1).sum(1)
        taken_B = (labels_B >= 0) & (nth_B >= same_BB.sum(1) - self.clips_per_class)
        class_B, nth_B = labels_B[taken_B], nth_B[taken_B]
        place_B = (self.put_K[class_B] + nth_B) % self.clips_per_class
        self.keys_KSEP[class_B, place_B] = keys_BEP[taken_B].to(self.keys_KSEP)
        self.present_KSE[class_B, place_B] = present_BE[taken_B]
        self.put_K += torch.bincount(labels_B[labels_B >= 0], minlength=self.classes)

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Continue from the tensors of `state_dict()`; none is an empty queue."""
        if state:
            self._begin(*(state[name].clone() for name in ("keys_KSEP", "present_KSE", "put_K")))

    def _begin(self, keys_KSEP: Tensor, present_KSE: Tensor, put_K: Tensor) -> None:
        self.register_buffer("keys_KSEP", keys_KSEP)
        self.register_buffer("present_KSE", present_KSE)
        self.register_buffer("put_K", put_K)


def in_plan_order(gathered: Tensor, ranks: int) -> Tensor:
    """Rows of all ranks in rank order -> in the order of the plan, which deals clips out to the ranks in turn."""
    return gathered.reshape(ranks, -1, *gathered.shape[1:]).transpose(0, 1).flatten(0, 1)
