"""A value by key, made once even when many threads ask for it at the same time; the least recently used go first.

A forked child begins with nothing: threads of its parent that were about to make a value did not come along.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, Generic, TypeVar

K = TypeVar("K")
V = TypeVar("V")


class Once(Generic[K, V]):
    """Holds values up to `limit` in all. A failure is passed to all who wait for it, and not remembered."""

    def __init__(self, limit: int, size: Callable[[V], int] = lambda _: 1) -> None:
        """`size` of a value; by default `limit` counts values."""
        self.limit, self.size, self.total = limit, size, 0
        self._lock = threading.Lock()
        self._values: OrderedDict[K, Future[V]] = OrderedDict()
        _all.add(self)

    def after_fork(self) -> None:
        """In the child, before anything else runs there."""
        self._lock = threading.Lock()  # a thread of the parent may have held it, or that of any Future
        self._values, self.total = OrderedDict(), 0

    def get(self, key: K, make: Callable[[], V]) -> V:
        """The value of `key`; `make()` if it is not held."""
        with self._lock:
            future = self._values.get(key)
            mine = future is None
            if future is None:
                future = self._values[key] = Future()
            else:
                self._values.move_to_end(key)
        if mine:
            self._make(key, future, make)
        return future.result()

    def forget(self, key: K) -> None:
        """The next `get` makes it anew."""
        with self._lock:
            future = self._values.get(key)
            if future is not None and future.done():
                self.total -= self.size(self._values.pop(key).result())

    def _make(self, key: K, future: Future[V], make: Callable[[], V]) -> None:
        try:
            value = make()
        except BaseException as error:
            with self._lock:
                self._values.pop(key, None)
            future.set_exception(error)
            raise
        with self._lock:
            self.total += self.size(value)
            if self.total > self.limit:
                self._make_room(key)
        future.set_result(value)

    def _make_room(self, key: K) -> None:
        for old in [k for k, f in self._values.items() if f.done() and k != key]:
            self.total -= self.size(self._values.pop(old).result())
            if self.total <= self.limit:
                break


_all: weakref.WeakSet[Once[Any, Any]] = weakref.WeakSet()


def _in_child() -> None:
    for once in _all:
        once.after_fork()


os.register_at_fork(after_in_child=_in_child)
