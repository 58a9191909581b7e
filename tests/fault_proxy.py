"""A TCP proxy that breaks connections on purpose: what a network does to an object store, in front of a real one.

with FaultProxy(port) as proxy:
    proxy.cut_after = 100_000     # the next answer that is longer ends there, once
    proxy.refusals = 2            # the next two connections get 503 Slow Down
"""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
from collections.abc import Callable
from typing import Self

_REFUSAL = b"HTTP/1.1 503 Slow Down\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"


class FaultProxy:
    """Passes bytes between clients of `endpoint` and 127.0.0.1:`upstream`, less the faults that are armed."""

    def __init__(self, upstream: int) -> None:
        self.upstream = upstream
        self.cut_after: int | None = None
        self.reset = False
        """Cut by a reset (what was under way is lost too) instead of an orderly end."""
        self.on_cut: Callable[[], None] = lambda: None
        self.refusals = 0
        self.cuts = self.refused = 0
        self.sent = b""
        """All that clients sent, headers included."""
        self._lock = threading.Lock()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.endpoint = f"http://127.0.0.1:{self._listener.getsockname()[1]}"

    def __enter__(self) -> Self:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with self._lock:
            refuse = self.refusals > 0
            self.refusals -= refuse
            self.refused += refuse
        if refuse:
            with client, contextlib.suppress(OSError):
                client.recv(65536)
                client.sendall(_REFUSAL)
            return
        with client, socket.create_connection(("127.0.0.1", self.upstream)) as server:
            threading.Thread(target=self._requests, args=(client, server), daemon=True).start()
            self._answers(server, client)

    def _requests(self, client: socket.socket, server: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := client.recv(65536):
                with self._lock:
                    self.sent += data
                server.sendall(data)
            server.shutdown(socket.SHUT_WR)

    def _answers(self, server: socket.socket, client: socket.socket) -> None:
        passed = 0
        with contextlib.suppress(OSError):
            while data := server.recv(16384):
                if self.cut_after is not None and passed + len(data) > self.cut_after:
                    client.sendall(data[: self.cut_after - passed])
                    self.cut_after, self.cuts = None, self.cuts + 1
                    self.on_cut()
                    if self.reset:
                        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                        client.shutdown(socket.SHUT_RD)
                        return
                    break
                client.sendall(data)
                passed += len(data)
            client.shutdown(socket.SHUT_RDWR)
