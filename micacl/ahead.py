"""Items made in a thread of their own, a few ahead of the one that is used: what makes them need not be waited for."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from typing import TypeVar

T = TypeVar("T")


def ahead(items: Iterator[T], count: int = 1) -> Iterator[T]:
    """The same items in the same order, at most `count` made and waiting. An exception comes in its place."""
    box: queue.Queue[tuple[bool, T | BaseException | None]] = queue.Queue(count)
    stop = threading.Event()

    def put(done: bool, what: T | BaseException | None) -> None:
        while not stop.is_set():
            try:
                box.put((done, what), timeout=0.2)
                return
            except queue.Full:
                continue

    def work() -> None:
        try:
            for item in items:
                put(False, item)
                if stop.is_set():
                    return
            put(True, None)
        except BaseException as error:  # noqa: BLE001  (raised again where the item would have been used)
            put(True, error)

    thread = threading.Thread(target=work, name="ahead", daemon=True)
    thread.start()
    try:
        while True:
            done, what = box.get()
            if isinstance(what, BaseException):
                raise what
            if done:
                return
            yield what  # type: ignore[misc]
    finally:
        stop.set()
        thread.join()
