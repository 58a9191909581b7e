"""A private Ray is gone when its block ends, however it ends."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SLOW_TO_CLEAN_UP = """
import os, signal, time
from pipeline.cli import stop_on_sigterm
from pipeline.ray_local import ray_session
stop_on_sigterm()
try:
    with ray_session(num_cpus=1, object_store_mb=100):
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(60)
        finally:
            time.sleep(4)
except KeyboardInterrupt:
    print("ended in order")
"""


@pytest.mark.slow
def test_a_terminated_command_has_time_to_clean_up(tmp_path: Path) -> None:
    """Ray's own handler of SIGTERM aborts the process after three seconds."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path))}
    done = subprocess.run(
        [sys.executable, "-c", SLOW_TO_CLEAN_UP],
        capture_output=True,
        text=True,
        env=environment,
        cwd=tmp_path,
        timeout=120,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "ended in order\n"), done.stderr
    assert "SIGTERM received" not in done.stderr
