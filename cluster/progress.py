"""Lines from a worker to the person at the driver, without Ray's prefixes and in order."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import ray


class _Lines:
    """A tiny actor that holds lines until the driver fetches them."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.failure: tuple[str, ...] | None = None

    def fail(self, failure: tuple[str, ...]) -> None:
        """Bad input that no further attempt can heal."""
        self.failure = self.failure or failure

    def failed(self) -> tuple[str, ...] | None:
        return self.failure

    def say(self, text: str) -> None:
        self.lines.append(text)

    def drain(self) -> list[str]:
        lines, self.lines = self.lines, []
        return lines


@contextlib.contextmanager
def relay(say: Callable[[str], None], every_s: float = 1.0) -> Iterator[Any]:
    """Yield an actor handle; what workers `.say.remote(text)` to it is said here, at the latest when the block ends."""
    actor = ray.remote(num_cpus=0)(_Lines).remote()
    stop = threading.Event()

    def pump() -> None:
        while not stop.wait(every_s):
            _drain(actor, say)

    thread = threading.Thread(target=pump, daemon=True, name="progress")
    thread.start()
    try:
        yield actor
    finally:
        stop.set()
        thread.join(timeout=10)
        _drain(actor, say)
        ray.kill(actor)


def _drain(actor: Any, say: Callable[[str], None]) -> None:
    try:
        for line in ray.get(actor.drain.remote(), timeout=10):
            say(line)
    except ray.exceptions.RayError as error:  # progress is a courtesy: a run does not stop for it
        say(f"(progress is not available: {type(error).__name__})")
