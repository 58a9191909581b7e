"""`ray job submit --working-dir . -- micacl train ...` against a head of its own, as on a cluster."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from micacl.train.checkpoint import complete_steps
from pipeline.contract import DFEW_LABELS
from pipeline.storage import open_store
from tests.tiny_dataset import make_dataset

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent


@contextlib.contextmanager
def head() -> Iterator[tuple[str, dict[str, str]]]:
    """A Ray head on loopback with token authentication; (dashboard URL, environment that reaches it)."""
    folder = Path(tempfile.mkdtemp(prefix="rayhead-", dir="/tmp"))  # short: Unix sockets allow 107 bytes
    (folder / "token").write_text(secrets.token_hex(32))
    port, dashboard = free_port(), free_port()
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("RAY_")},
        "PATH": f"{BIN}:{os.environ['PATH']}",
        "RAY_TMPDIR": str(folder),
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(folder / "token"),
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    command = [str(BIN / "ray"), "start", "--head", "--block", "--num-cpus=2", "--disable-usage-stats"]
    command += [f"--port={port}", f"--dashboard-port={dashboard}", "--object-store-memory=200000000"]
    command += [f"--dashboard-agent-listen-port={free_port()}"]  # the default belongs to whichever Ray came first
    log = (folder / "head.log").open("w")
    process = subprocess.Popen(
        [*command, f"--temp-dir={folder}"], env=environment, stdout=log, stderr=log, start_new_session=True
    )
    try:
        wait_for(dashboard, process, folder / "head.log")
        yield f"http://127.0.0.1:{dashboard}", environment
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=20)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        shutil.rmtree(folder, ignore_errors=True)


_NO_AGENT = "No available agent"


def free_port() -> int:
    """Above Ray's worker range, free now."""
    while True:
        port = 20000 + secrets.randbelow(10000)
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) != 0:
                return port


def wait_for(port: int, process: subprocess.Popen[bytes], log: Path) -> None:
    for _ in range(240):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        assert process.poll() is None, log.read_text()
        time.sleep(0.25)
    raise AssertionError(log.read_text())


def test_a_submitted_job_trains(tmp_path: Path) -> None:
    url = make_dataset(tmp_path / "dataset", {"train": dict.fromkeys(DFEW_LABELS, 2)}, seed=0)
    run = tmp_path / "run"
    flags = ["--plan.global-batch", "4", "--train.epochs", "1", "--batch.side", "24", "--stream.frames", "2"]
    with head() as (dashboard, environment):
        done = submit(dashboard, environment, "train", "tiny-cpu", url, str(run), *flags)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "succeeded" in done.stdout
    assert complete_steps(open_store(str(run))) == [4]


def submit(dashboard: str, environment: dict[str, str], *words: str) -> subprocess.CompletedProcess[str]:
    command = [str(BIN / "ray"), "job", "submit", "--address", dashboard, "--working-dir", ".", "--", "micacl", *words]
    until = time.monotonic() + 90
    while True:
        done = subprocess.run(
            command, check=False, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
        )
        if _NO_AGENT not in done.stderr or time.monotonic() > until:  # a busy head opens its port before it takes jobs
            return done
        time.sleep(3)
