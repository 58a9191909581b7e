"""An HTTP proxy that breaks things on purpose: what a network does to an object store, in front of a real one.

    with FaultProxy(port) as proxy:
        proxy.plan(Fault("503", times=2), Fault("cut_down", after=40, method="GET"))

Each request meets at most one fault: the first of the plan whose number has come and which fits it. `injected` counts
them, `requests` lists what clients asked for.
"""

from __future__ import annotations

import contextlib
import http.client
import random
import select
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Self

KINDS = {
    "500": "an error of the server; it never saw the request",
    "503": "Slow Down; it never saw the request",
    "reset": "the connection is reset before the reply; it never saw the request",
    "lost": "done by the server, the answer dropped",
    "cut_down": "an answer's body ends early in an orderly way",
    "reset_down": "the same by a reset, which takes along what was under way",
    "stall": "an answer's body stops in the middle until the client hangs up",
    "slow_down": "an answer's body comes with small stalls",
    "cut_up": "the server sees a part of a request's body, then the end of the connection; so does the client",
    "slow_up": "a request's body is taken with small stalls",
    "409": "another conditional put is under way, says the server",
    "412": "the key exists, says the server",
    "404": "there is no such multipart upload, says the server",
    "flip": "one bit of an answer's body is another one",
}
_DOWN = ("cut_down", "reset_down", "stall", "slow_down", "flip")
_REFUSALS = {
    "500": (500, "Internal Server Error", "InternalError"),
    "503": (503, "Slow Down", "SlowDown"),
    "409": (409, "Conflict", "ConditionalRequestConflict"),
    "404": (404, "Not Found", "NoSuchUpload"),
    "412": (412, "Precondition Failed", "PreconditionFailed"),
}


@dataclass(frozen=True, slots=True)
class Request:
    """What a client asked for."""

    method: str
    path: str
    """With the query."""
    headers: dict[str, str]
    """Names in lower case."""
    size: int
    """Of the body, bytes."""


@dataclass(slots=True)
class Fault:
    """One thing to go wrong, `times` times."""

    kind: str
    after: int = 0
    """Requests since the plan was made that pass before."""
    at: float = 0.5
    """Share of the body that passes before it happens."""
    times: int = 1
    method: str = ""
    path: str = ""
    """A part of the path and query."""

    def fits(self, request: Request) -> bool:
        if self.method not in ("", request.method) or self.path not in request.path:
            return False
        if self.kind in _DOWN:
            return request.method == "GET"
        if self.kind in ("cut_up", "slow_up"):
            return request.size > 1
        if self.kind in ("409", "412"):
            return "if-none-match" in request.headers
        if self.kind == "404":
            return "uploadId" in request.path
        return self.kind != "lost" or request.method in ("PUT", "POST", "DELETE")


def random_faults(rng: random.Random, count: int, span: int, kinds: Sequence[str]) -> list[Fault]:
    """`count` faults at random requests of the first `span`."""
    return [Fault(rng.choice(kinds), after=rng.randrange(span), at=rng.random()) for _ in range(count)]


class FaultProxy:
    """Passes requests between clients of `endpoint` and 127.0.0.1:`upstream`, less the faults of the plan."""

    def __init__(self, upstream: int) -> None:
        self.upstream = upstream
        self._lock = threading.Lock()
        self.calm()
        self._server = _Server(("127.0.0.1", 0), _Handler)
        self._server.proxy = self
        self.endpoint = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def calm(self) -> None:
        """As it is at first: no faults."""
        self.on_fault: Callable[[Fault], None] = lambda _: None
        self.alter: Callable[[Request, bytes], bytes] = lambda _, body: body
        """What becomes of an answer's body."""
        self.pause_s = 0.01
        """Of each small stall."""
        self.delay_s = 0.0
        """Before each request is passed on: a store that is far away."""
        self.plan()

    def plan(self, *faults: Fault) -> None:
        """Forget the old plan and what was counted, and count requests from here."""
        with self._lock:
            self._faults = sorted(faults, key=lambda fault: fault.after)
            self.injected: Counter[str] = Counter()
            self.requests: list[Request] = []

    def asked(self, method: str) -> list[Request]:
        """Requests of this method."""
        return [request for request in self.requests if request.method == method]

    def draw(self, request: Request) -> Fault | None:
        """Note the request; the fault that it meets."""
        with self._lock:
            number = len(self.requests)
            self.requests.append(request)
            due = (f for f in self._faults if f.after <= number and f.times > 0 and f.fits(request))
            fault = next(due, None)
            if fault:
                fault.times -= 1
                self.injected[fault.kind] += 1
        return fault


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64
    proxy: FaultProxy

    def server_bind(self) -> None:
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2**16)  # what is not read here waits at the client
        super().server_bind()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Server

    def log_message(self, *args: object) -> None:
        pass

    def handle(self) -> None:
        with contextlib.suppress(OSError, http.client.HTTPException):  # one of the two sides has hung up
            super().handle()

    def do_any(self) -> None:
        proxy, size = self.server.proxy, int(self.headers.get("Content-Length") or 0)
        request = Request(self.command, self.path, {k.lower(): v for k, v in self.headers.items()}, size)
        fault = proxy.draw(request) or Fault("")
        time.sleep(proxy.delay_s)
        part = self._read(int(size * fault.at) if fault.kind == "cut_up" else size, slow=fault.kind == "slow_up")
        if fault.kind in ("lost", "cut_up"):
            self._ask(part, whole=fault.kind == "lost")
        if fault.kind:
            proxy.on_fault(fault)
        if fault.kind in ("reset", "lost", "cut_up"):
            self._reset()
        elif fault.kind in _REFUSALS:
            status, reason, code = _REFUSALS[fault.kind]
            body = f"<Error><Code>{code}</Code><Message>by the proxy</Message></Error>".encode()
            self._answer(status, reason, [("Content-Type", "application/xml")], body, fault)
        else:
            status, reason, headers, body = self._ask(part)
            self._answer(status, reason, headers, proxy.alter(request, body), fault)

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = do_any

    def _read(self, size: int, *, slow: bool) -> bytes:
        if not slow:
            return self.rfile.read(size)
        out = b""
        while len(out) < size and (piece := self.rfile.read(min(2**21, size - len(out)))):
            time.sleep(self.server.proxy.pause_s)
            out += piece
        return out

    def _ask(self, body: bytes, *, whole: bool = True) -> tuple[int, str, list[tuple[str, str]], bytes]:
        link = http.client.HTTPConnection("127.0.0.1", self.server.proxy.upstream, timeout=60)
        with contextlib.closing(link):
            link.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():
                if name.lower() not in ("expect", "connection"):
                    link.putheader(name, value)
            link.endheaders(body or None)
            if not whole:
                return 0, "", [], b""
            answer = link.getresponse()
            return answer.status, answer.reason, answer.getheaders(), answer.read()

    def _answer(self, status: int, reason: str, headers: list[tuple[str, str]], body: bytes, fault: Fault) -> None:
        length = str(len(body))
        self.send_response_only(status, reason)
        for name, value in headers:
            if name.lower() == "content-length" and self.command == "HEAD":
                length = value
            elif name.lower() not in ("transfer-encoding", "connection", "content-length"):
                self.send_header(name, value)
        if status != 204:
            self.send_header("Content-Length", length)
        self.end_headers()
        if self.command != "HEAD":
            self._send(body, fault)

    def _send(self, body: bytes, fault: Fault) -> None:
        at = int(len(body) * fault.at)
        if fault.kind == "flip" and body:
            body = body[:at] + bytes([body[at] ^ 1]) + body[at + 1 :]
        if fault.kind == "slow_down":
            for i in range(4):
                self.wfile.write(body[len(body) * i // 4 : len(body) * (i + 1) // 4])
                time.sleep(self.server.proxy.pause_s)
            return
        if fault.kind not in ("cut_down", "reset_down", "stall"):
            self.wfile.write(body)
            return
        self.wfile.write(body[:at])
        self.close_connection = True
        if fault.kind == "stall":
            select.select([self.connection], [], [], 60)  # readable when the client hangs up
        if fault.kind == "reset_down":
            self._reset()

    def _reset(self) -> None:
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()
        self.close_connection = True
