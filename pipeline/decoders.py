"""Decode processes: the parts of batches that a stream hands out are decoded by children, into memory that both see.

    stream ── ask(part), submit(part) ──> child 0, 1, ...: BagStream of its own, one thread of decoding
       batch: memfd, mapped here and there  <──── pixels
       <── keys and labels, or an error in words

Sixteen JPEGs a clip are sixteen times that a thread gives the GIL back and waits for it; with two decode threads that
costs a quarter of the rate, and it slows the training loop too. Children have a GIL of their own, and nothing is
copied: torch's DataLoader would move every batch through a fresh segment of shared memory (docs/benchmarks.md).

Nothing is left behind: memory is anonymous (memfd) and goes with its last holder; a child ends when its socket closes,
however its parent went. A child that dies is an error in words in its place in the order. Messages are JSON in packets;
no pickle. Children are started with `python -m`, so a script needs no `if __name__ == "__main__"`.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import mmap
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import asdict
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.contract import MicaclError
from pipeline.decode import StreamConfig
from pipeline.rows import SplitRows
from pipeline.storage import open_store

PACKET_BYTES = 2**18
_CHILD = (sys.executable, "-m", "pipeline.decoder_child")
Shared = tuple[int, int]
"""Descriptor of a memfd, bytes."""


def can_share(rows: SplitRows) -> bool:
    """Whether a child can open the same rows by their URL: not rows chosen by hand, nor a store of another kind."""
    dataset = rows.dataset
    return rows.split is not None and type(open_store(dataset.store.root)) is type(dataset.store)


class Decoders:
    """The children of one stream."""

    def __init__(self, rows: SplitRows, config: StreamConfig, whole_S: NDArray[np.bool_] | None) -> None:
        """`whole_S`: which shards are read whole, of storage far away."""
        dataset, self._far = rows.dataset, whole_S is not None
        of = {"url": dataset.store.root, "version": dataset.number, "fold": dataset.fold, "where": dataset.where}
        of |= {"val_share": dataset.val_share, "val_seed": dataset.val_seed}
        setup = {
            "dataset": of,
            "sha256": dataset.sha256,
            "split": rows.split,
            "stream": {**asdict(config), "processes": 0, "threads": 1},
            "whole": None if whole_S is None else np.packbits(whole_S).tobytes().hex(),
        }
        self._children = [_Child(setup) for _ in range(config.processes)]
        self._turn = itertools.cycle(range(config.processes))
        self._child_of: dict[int, _Child] = {}

    def ask(self, part: int, rows: Sequence[int]) -> None:
        """Say that a part of these rows will come; its child begins to fetch from storage far away."""
        child = self._child_of[part] = self._children[next(self._turn)]
        if self._far:
            child.send({"ask": list(rows)})

    def submit(self, part: int, shared: Shared, shape: Sequence[int], clips: Sequence[Any]) -> Future[Any]:
        """Decode clips of a part that was asked for into a shared batch of this shape.

        Args:
            clips: (place in the batch, row, rng key or None) each.

        The future gives [[key, label], ...], or raises MicaclError.
        """
        return self._child_of.pop(part).submit(part, shared, {"shape": list(shape), "clips": list(clips)})

    def close(self) -> None:
        """End the children."""
        for child in self._children:
            child.close()


class _Child:
    def __init__(self, setup: dict[str, Any]) -> None:
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            command = [*_CHILD, str(theirs.fileno())]
            self._process = subprocess.Popen(command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL)
        self._waiting: dict[int, Future[Any]] = {}
        self._known: set[int] = set()
        self._lock = threading.Lock()
        self._listener = threading.Thread(target=self._listen, name="stream-child", daemon=True)
        self._listener.start()
        self.send(setup)

    def send(self, message: dict[str, Any], fds: Sequence[int] = ()) -> None:
        try:
            socket.send_fds(self._socket, [json.dumps(message).encode()], fds)
        except ConnectionError:  # it died: what waits for it is told by _listen, and what comes later by submit
            return

    def submit(self, part: int, shared: Shared, work: dict[str, Any]) -> Future[Any]:
        future: Future[Any] = Future()
        with self._lock:
            if self._process.poll() is not None:
                future.set_exception(self._died())
                return future
            self._waiting[part] = future
        descriptor, size = shared
        new = descriptor not in self._known  # a descriptor that is mapped there is named by its number here
        self._known.add(descriptor)
        self.send({"part": part, "buffer": descriptor, "bytes": size, **work}, [descriptor] if new else [])
        return future

    def _listen(self) -> None:
        """Resolve futures until the child is gone."""
        while data := _receive(self._socket):
            answer = json.loads(data)
            with self._lock:
                future = self._waiting.pop(answer["part"])
            if "error" in answer:
                future.set_exception(MicaclError(*answer["error"]))
            else:
                future.set_result(answer["clips"])
        self._process.wait()
        with self._lock:
            waiting, self._waiting = self._waiting, {}
        for future in waiting.values():
            future.set_exception(self._died())

    def _died(self) -> MicaclError:
        return MicaclError(
            f"A decode process of the stream ended with {self._process.returncode}.",
            "Its part of the batch is lost, so the sequence of clips cannot be kept.",
            "Run the same command again: it goes on from the last checkpoint. -9 can mean that memory ran out.",
        )

    def close(self) -> None:
        with contextlib.suppress(OSError):  # it is gone already
            self._socket.shutdown(socket.SHUT_RDWR)
        self._process.wait()
        self._listener.join()
        self._socket.close()


def _receive(connection: socket.socket) -> bytes:
    try:
        return connection.recv(PACKET_BYTES)
    except OSError:
        return b""


class SharedArrays:
    """Arrays in memfds, made for Buffers."""

    def __init__(self) -> None:
        self._of: dict[int, Shared] = {}

    def new(self, size: int) -> NDArray[np.uint8]:
        """Bytes that other processes can map by `shared`."""
        descriptor = os.memfd_create("micacl-batch", os.MFD_CLOEXEC)
        os.ftruncate(descriptor, size)
        array = np.frombuffer(mmap.mmap(descriptor, size), np.uint8)
        self._of[array.__array_interface__["data"][0]] = (descriptor, size)
        return array

    def shared(self, array: NDArray[np.uint8]) -> Shared:
        """The memfd of an array of ours, of any shape."""
        return self._of[array.__array_interface__["data"][0]]

    def close(self) -> None:
        """Give back the descriptors; arrays stay as long as somebody holds them."""
        for descriptor, _ in self._of.values():
            os.close(descriptor)
        self._of.clear()
