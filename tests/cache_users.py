"""Other processes that use a NodeCache, driven over a pipe: tests/test_node_cache.py starts, stops and kills them."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import random
import signal
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from pipeline.node_cache import NodeCache

_SPAWN = multiprocessing.get_context("spawn")


def data_of(name: str) -> bytes:
    """1 to 5000 bytes that only this name has."""
    seed = hashlib.sha256(name.encode()).digest()
    return (seed * 157)[: 1 + int.from_bytes(seed[:4]) % 5000]


def fetches(log: Path) -> list[str]:
    """Names in the order in which any process fetched them."""
    return log.read_text().split() if log.exists() else []


class Fetch:
    """A fetch that says so in a log which all processes share; with `hang`, it never returns."""

    def __init__(self, name: str, log: Path, *, hang: bool = False, seconds: float = 0) -> None:
        self.name, self.log, self.hang, self.seconds = name, log, hang, seconds

    def __call__(self) -> bytes:
        with self.log.open("a") as file:
            file.write(f"{self.name}\n")
        time.sleep(3600 if self.hang else self.seconds)
        return data_of(self.name)


class User:
    """One process with one cache."""

    def __init__(self, cache: NodeCache | tuple[Path | None, int]) -> None:
        self.pipe, theirs = _SPAWN.Pipe()
        self.process = _SPAWN.Process(target=_serve, args=(theirs, cache))
        self.process.start()
        theirs.close()
        assert self.answer() == "open"

    def ask(self, *what: Any) -> User:
        self.pipe.send(what)
        return self

    def answer(self) -> Any:
        assert self.pipe.poll(60), "no answer"
        return self.pipe.recv()

    def get(self, name: str, log: Path) -> bytes:
        got: bytes = self.ask("get", Fetch(name, log)).answer()
        return got

    def kill(self) -> None:
        assert self.process.pid is not None
        os.kill(self.process.pid, signal.SIGKILL)
        self.process.join()

    def end(self) -> None:
        """A normal end, without a word to the cache."""
        self.ask("end")
        self.process.join(60)
        assert self.process.exitcode == 0


def _serve(pipe: Connection, how: NodeCache | tuple[Path | None, int]) -> None:
    cache = how if isinstance(how, NodeCache) else NodeCache(*how)
    pipe.send("open")
    while (message := pipe.recv())[0] != "end":
        match message:
            case ["get", fetch]:
                pipe.send(bytes(cache.get(fetch.name, fetch)))
            case ["get in a thread", fetch]:
                threading.Thread(target=cache.get, args=(fetch.name, fetch), daemon=True).start()
                pipe.send("started")
            case ["fork", fetch]:
                pipe.send(_fork(cache, fetch))
            case ["get in a forked worker", fetch]:
                pipe.send(_worker(cache.get, fetch.name, fetch))
            case ["close in a forked worker"]:
                pipe.send(_worker(cache.close))
            case ["get for ever", seed]:
                _get_for_ever(cache, random.Random(seed))
            case ["close"]:
                cache.close()
                pipe.send("closed")


def _worker(work: Callable[..., object], *args: object) -> int | None:
    worker = multiprocessing.get_context("fork").Process(target=work, args=args)
    worker.start()
    worker.join()
    return worker.exitcode


def _get_for_ever(cache: NodeCache, order: random.Random) -> None:
    while True:
        name = order.choice("abcdefghijklmnop")
        assert cache.get(name, Fetch(name, Path(os.devnull), seconds=order.random() * 0.002)) == data_of(name)


def _fork(cache: NodeCache, fetch: Fetch | None) -> int:
    """The pid of a child that gets one object, or leaves the cache alone, and then sleeps until it is killed."""
    done, said = os.pipe()
    if (pid := os.fork()) == 0:
        if fetch is not None:
            assert cache.get(fetch.name, fetch) == data_of(fetch.name)
        os.write(said, b".")
        time.sleep(3600)
        os._exit(1)
    os.read(done, 1)
    os.close(done)
    os.close(said)
    return pid
