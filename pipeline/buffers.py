"""Arrays for batches, used again when nobody holds them any more: a new one of 12 MB costs 3,000 page faults.

An array is free when only the ring refers to it: a view, a tensor or a batch that somebody kept holds it by a
reference, and then it is left alone, however long.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

_OURS = 2
"""References to a free array: the ring's, and the argument of getrefcount."""


class Buffers:
    """Byte arrays of one size at a time."""

    def __init__(self, most: int, new: Callable[[int], NDArray[np.uint8]] | None = None) -> None:
        """`most`: arrays that are kept for use again. `new`: makes one of so many bytes."""
        self.most, self._new = most, new or _plain
        self._lock = threading.Lock()
        self._held: list[NDArray[np.uint8]] = []

    def take(self, shape: tuple[int, ...]) -> NDArray[np.uint8]:
        """An array of this shape with any content."""
        size = int(np.prod(shape))
        with self._lock:
            for i in range(len(self._held)):
                if self._held[i].size == size and sys.getrefcount(self._held[i]) == _OURS:
                    return self._held[i].reshape(shape)
            new = self._new(size)
            self._held = [*self._held, new][-self.most :] if self.most else []
            return new.reshape(shape)


def _plain(size: int) -> NDArray[np.uint8]:
    return np.empty(size, np.uint8)
