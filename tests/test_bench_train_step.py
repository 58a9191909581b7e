"""bench/train_step.py at its smallest size: every part is measured, and its counts are those of the model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "bench"))

import train_step_before
import train_step_runs as runs

from micacl.batch import Batch, BatchConfig, to_input
from micacl.train.precision import ComputeConfig

BENCH = Path(runs.__file__).parent


@pytest.mark.slow
def test_the_smallest_run_says_everything() -> None:
    command = [sys.executable, str(BENCH / "train_step.py"), "--small", "--cpu", "--seconds", "0.1"]
    command += ["--without", "torch.compile", "bf16"]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith("`python bench/train_step.py`, commit")
    rows = [line for line in lines if line.startswith("| ")]
    assert sum("not run: no GPU was at hand" in row for row in rows) == 1
    assert [row for row in rows if row.startswith("| + torch.compile")] == ["| + torch.compile | left out | | | |"]
    said = json.loads(lines[-1])
    assert len(said["ladder"]) == 5
    assert all(0 < one["mfu"] < 1.2 and 0.1 < one["gain"] < 10 for one in said["ladder"])
    assert said["ladder"][0]["mib"] > 0
    assert 0 < said["heads"]["shares"]["all behind the backbone, alone"] < 1
    assert len(said["input"]) == 5


def test_the_flop_are_three_forwards_but_for_the_first_convolution() -> None:
    work = runs.Work(device=torch.device("cpu"), clips=2)
    macs = 43.14e9
    """Of a clip of 4 x 4 x 112 x 112 px, counted layer by layer; the stem needs no gradient of the clip."""
    stem = 4 * 64 * 3 * 3 * 49 * 4 * 56 * 56
    assert runs.step_flops(work) / work.clips == pytest.approx(2 * (3 * macs - stem), rel=0.002)


def test_a_gpu_adds_up_its_settings_and_a_cpu_takes_them_alone() -> None:
    names = [rung.name for rung in runs.ladder(cumulative=True)]
    assert (len(names), len(set(names))) == (8, 8)
    last = runs.ladder(cumulative=True)[-1]
    everything = ComputeConfig(precision="bf16", channels_last=True, fused=True, compile="reduce-overhead")
    assert (last.compute, last.feed) == (everything, "augment")
    assert [r.compute for r in runs.ladder(cumulative=False)[-2:]] == [ComputeConfig()] * 2


def test_the_former_evaluation_is_the_same() -> None:
    work, config = runs.Work.small(torch.device("cpu")), BatchConfig(side=24)
    frames = work.frames_BNTHWC()
    batch = Batch(frames, work.labels_B, ("", ""), None, config)
    assert torch.equal(to_input(batch, work.device), train_step_before.collate_before(frames, None, config))
