"""Items made in a thread of their own, a few ahead of the one that is used: what makes them need not be waited for."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from typing import Generic, TypeVar

T = TypeVar("T")
_LOOK_S = 0.2


def ahead(items: Iterator[T], count: int = 1) -> Iterator[T]:
    """The same items in the same order, at most `count` made and waiting. An exception comes in its place."""
    maker = _Maker(items, count)
    maker.start()
    try:
        while (box := maker.boxes.get()) is not None:
            yield box.open()
    finally:
        maker.stop.set()
        maker.join()


class _Box(Generic[T]):
    def __init__(self, item: T | None, error: BaseException | None = None) -> None:
        self.item, self.error = item, error

    def open(self) -> T:
        if self.error is not None:
            raise self.error
        return self.item  # type: ignore[return-value]


class _Maker(threading.Thread, Generic[T]):
    def __init__(self, items: Iterator[T], count: int) -> None:
        super().__init__(name="ahead", daemon=True)
        self.items, self.stop = items, threading.Event()
        self.boxes: queue.Queue[_Box[T] | None] = queue.Queue(count)

    def run(self) -> None:
        try:
            for item in self.items:
                self._put(_Box(item))
                if self.stop.is_set():
                    return
            self._put(None)
        except BaseException as error:  # noqa: BLE001  (raised again where the item would have been used)
            self._put(_Box(None, error))

    def _put(self, box: _Box[T] | None) -> None:
        while not self.stop.is_set():
            try:
                self.boxes.put(box, timeout=_LOOK_S)
            except queue.Full:
                continue
            return
