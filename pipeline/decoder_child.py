"""A decode process of pipeline.decoders: `python -m pipeline.decoder_child SOCKET`. Ends when its parent hangs up."""

from __future__ import annotations

import json
import mmap
import queue
import signal
import socket
import sys
import threading
from typing import Any

import numpy as np

from pipeline.contract import MicaclError
from pipeline.dataset import open_dataset
from pipeline.decode import Pixels, StreamConfig
from pipeline.decoders import PACKET_BYTES
from pipeline.plan import Draw
from pipeline.rows import split_rows
from pipeline.stream import BagStream, Decoded


def main() -> None:
    """Decode what comes, in order; rows that are asked for are fetched meanwhile."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    connection = socket.socket(fileno=int(sys.argv[1]))
    setup = json.loads(connection.recv(PACKET_BYTES))
    child = _Decoder(connection, setup)
    threading.Thread(target=child.listen, daemon=True).start()
    child.work()


class _Decoder:
    def __init__(self, connection: socket.socket, setup: dict[str, Any]) -> None:
        self.connection, self.setup = connection, setup
        self.todo: queue.Queue[dict[str, Any] | None] = queue.Queue()
        self.buffers: dict[int, Pixels] = {}
        self.stream: BagStream | None = None
        self.asked: list[int] = []

    def listen(self) -> None:
        while True:
            try:
                data, fds, *_ = socket.recv_fds(self.connection, PACKET_BYTES, 1)
            except OSError:
                data, fds = b"", []
            if not data:
                self.todo.put(None)
                return
            message = json.loads(data)
            for descriptor in fds:
                shared = mmap.mmap(descriptor, message["bytes"])
                self.buffers[message["buffer"]] = np.frombuffer(shared, np.uint8)
            self.todo.put(message) if "part" in message else self._ask(message["ask"])

    def _ask(self, rows: list[int]) -> None:
        if self.stream is None:
            self.asked += rows
        for row in rows if self.stream is not None else ():
            self.stream.ask(row)  # type: ignore[union-attr]

    def work(self) -> None:
        while (message := self.todo.get()) is not None:
            answer: dict[str, Any] = {"part": message["part"]}
            try:
                answer["clips"] = self._decode(message)
            except MicaclError as error:
                answer["error"] = error.args
            except OSError as error:
                answer["error"] = [str(error), "The stream ended.", "Check the path, its rights and the disk."]
            try:
                self.connection.send(json.dumps(answer).encode())
            except OSError:
                break
        if self.stream is not None:
            self.stream.close()

    def _decode(self, message: dict[str, Any]) -> list[tuple[str, int]]:
        if self.stream is None:
            self.stream = _open(self.setup)
            self._ask(self.asked)
        shape = tuple(message["shape"])
        batch = self.buffers[message["buffer"]].reshape(shape)
        draws = [Draw(0, (0, 0))] * shape[0]
        for i, row, key in message["clips"]:
            draws[i] = Draw(row, tuple(key) if key else (0, 0))
        decoded = Decoded(draws, [""] * shape[0], [-1] * shape[0], lambda _: batch, batch)
        for i, _, key in message["clips"]:
            self.stream.decode(decoded, i, train=key is not None)
        return [(decoded.keys[i], decoded.labels[i]) for i, *_ in message["clips"]]


def _open(setup: dict[str, Any]) -> BagStream:
    dataset = open_dataset(**setup["dataset"])
    if dataset.sha256 != setup["sha256"]:
        raise MicaclError(
            f"{dataset.store.root} version {dataset.number} is another one than a moment ago.",
            "Clips of two versions would be mixed.",
            "Start again; versions are never changed by the house.",
        )
    rows, whole = split_rows(dataset, setup["split"]), setup["whole"]
    whole_S = None
    if whole is not None:
        whole_S = np.unpackbits(np.frombuffer(bytes.fromhex(whole), np.uint8), count=len(rows.shards)).astype(bool)
    return BagStream(dataset, rows, StreamConfig(**setup["stream"]), whole_S=whole_S)


if __name__ == "__main__":
    main()
