"""bench/prepare.py runs; what it measures is for a quiet machine to say."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

BENCH = Path(__file__).resolve().parents[1] / "bench" / "prepare.py"


def test_one_clip_is_measured_against_its_steps_and_a_naive_loop(
    face_video: Callable[..., bytes], tmp_path: Path
) -> None:
    for person in range(2):
        (tmp_path / f"{person}.mp4").write_bytes(face_video("happy", 24, 160, person))
    command = [sys.executable, str(BENCH), str(tmp_path), "--quick", "--parts", "clip", "stages"]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout.splitlines()[-1])
    assert (said["clips"], said["without_face"]) == (2, [])
    cpu_ms = said["clip"]["cpu_ms"]
    assert cpu_ms["limit"] == pytest.approx(cpu_ms["decode"] + cpu_ms["detect"] + cpu_ms["pose"] + cpu_ms["encode"])
    assert all(ms > 0 for ms in cpu_ms.values())
    for ratio in said["clip"]["ratios"].values():
        assert ratio["ratio"] > 0
        assert ratio["goal"] is None or ratio["met"] == (ratio["ratio"] >= ratio["goal"])
    assert len(said["stages"]["largest"]) == 3
    assert "| crop_in_sandbox / limit |" in done.stdout
