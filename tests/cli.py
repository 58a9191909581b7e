"""Run a command of the house as a user does, in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Done:
    """How a command ended."""

    code: int
    result: dict[str, Any]
    """The JSON of the last line of stdout."""
    stderr: str


def micacl(*arguments: str, module: str = "cluster", timeout_s: float = 300, **environment: str) -> Done:
    """`micacl ARGUMENTS...`; fails the test if the last line of stdout is no JSON or a traceback is shown."""
    process = subprocess.run(
        [sys.executable, "-m", module, *arguments],
        check=False,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        env={**os.environ, **environment},
    )
    lines = process.stdout.strip().splitlines()
    assert lines, f"nothing on stdout; stderr:\n{process.stderr[-4000:]}"
    assert "Traceback" not in process.stderr, process.stderr[-4000:]
    return Done(process.returncode, json.loads(lines[-1]), process.stderr)
