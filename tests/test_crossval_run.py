"""`micacl crossval` on real Ray: killed in the middle of its second run, then the same command again."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from micacl.bundle import export_bundle
from micacl.compare import compare_runs
from micacl.summary import temperature_of
from micacl.train.best import read_best
from micacl.train.checkpoint import complete_steps
from pipeline.contract import DFEW_LABELS, MicaclError
from pipeline.storage import open_store
from tests.cli import Done, micacl
from tests.tiny_dataset import make_dataset

pytestmark = pytest.mark.slow

FLAGS = [
    "--seeds", "2", "--train.val-share", "0.25", "--train.epochs", "3", "--train.checkpoint-every", "1",
    "--train.log-every", "1", "--plan.global-batch", "7", "--batch.side", "24", "--stream.frames", "2",
    "--scaling.engine", "plain", "--scaling.workers", "1",
]  # fmt: skip
STEPS = 4 * 3


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("crossval")


@pytest.fixture(scope="module")
def done(place: Path) -> dict[str, Any]:
    """What was there when it was killed, and what the second command said."""
    counts = {"train": dict.fromkeys(DFEW_LABELS, 4), "test": dict.fromkeys(DFEW_LABELS, 2)}
    url, out = make_dataset(place / "ds", counts, seed=0), place / "out"
    command = ["crossval", "tiny-cpu", url, str(out), *FLAGS]
    first, second = (out / f"runs/tiny-cpu/all/seed-{seed}" for seed in (0, 1))
    process = subprocess.Popen(
        [sys.executable, "-m", "cluster", *command], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        while not list(second.glob("checkpoints/*/COMPLETE.json")):
            assert process.poll() is None, "it ended before its second run began"
            time.sleep(0.02)
    finally:
        process.kill()
        process.wait()
    time.sleep(1)  # what was being written when it died
    there = {"scores": (first / "evaluation/test/scores.json").stat().st_mtime_ns}
    there["steps"] = complete_steps(open_store(str(second)))
    there["second"] = (second / "evaluation").exists()
    said: Done = micacl(*command, timeout_s=500, RAY_ADDRESS="")
    assert said.code == 0, said.stderr[-4000:]
    return {"there": there, "said": said, "first": first, "second": second, "url": url}


def test_what_was_done_is_not_done_again_and_the_rest_continues(done: dict[str, Any]) -> None:
    there, said = done["there"], done["said"]
    assert there["steps"]
    assert there["steps"][-1] < STEPS
    assert not there["second"]
    assert (said.result["runs"], said.result["runs_now"], said.result["failed"]) == (2, 1, {})
    assert (done["first"] / "evaluation/test/scores.json").stat().st_mtime_ns == there["scores"]
    began = re.search(r"\[tiny-cpu seed 1\] \d+ parameters, 1 workers, step (\d+) of 12", said.stderr)
    assert began is not None
    assert int(began[1]) >= there["steps"][-1]  # from its own checkpoint, perhaps one that it wrote while it was dying
    assert int(began[1]) > 0


def test_each_run_has_its_last_and_its_best_by_validation(done: dict[str, Any]) -> None:
    for run in (done["first"], done["second"]):
        store = open_store(str(run))
        best = read_best(store)
        assert best is not None
        assert {best.step, STEPS} <= set(complete_steps(store))
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        assert [line["step"] for line in lines if "val/uar" in line] == [4, 8, 12]
        assert max(line["val/uar"] for line in lines if "val/uar" in line) == best.uar
        scores = {
            name: json.loads((run / f"evaluation/{name}/scores.json").read_text())
            for name in os.listdir(run / "evaluation")
        }
        assert set(scores) == {"val", "val-best", "test", "test-best"}
        assert scores["test"]["checkpoint"]["step"] == STEPS
        assert scores["test-best"]["checkpoint"]["step"] == best.step
        assert "highest UAR on validation" in scores["test-best"]["checkpoint"]["chosen"]
        assert scores["val-best"]["uar"] == best.uar
        assert scores["test"]["clips"] == 14
        fitted = scores["val"]["calibration"]["temperature"]
        assert scores["test"]["calibration"]["temperature"] == fitted
        assert scores["val"]["dataset"]["split"] == "train"  # who is forgotten is looked for there
        keys = [
            set(pq.read_table(run / f"evaluation/{s}/predictions.parquet")["key"].to_pylist()) for s in ("val", "test")
        ]
        assert not keys[0] & keys[1]


def test_the_table_is_there(done: dict[str, Any], place: Path) -> None:
    results = json.loads((place / "out/results.json").read_text())
    assert [(row["recipe"], row["which"], row["runs"]) for row in results["rows"]] == [
        ("tiny-cpu", "last", 2),
        ("tiny-cpu", "best", 2),
    ]
    assert done["said"].result["uar"]["tiny-cpu, last"] == results["rows"][0]["numbers"]["uar"]["mean"]
    assert (place / "out/report.html").read_text().count("<svg") == 2 + 2 * 3


def test_its_runs_are_compared_and_exported(done: dict[str, Any], place: Path) -> None:
    first, second = str(done["first"]), str(done["second"])
    assert compare_runs(first, second, "test", "best")["clips"] == 14
    fitted = json.loads((done["first"] / "evaluation/val/scores.json").read_text())["calibration"]["temperature"][
        "value"
    ]
    if fitted is None:
        with pytest.raises(MicaclError, match="was right on all validation clips"):
            temperature_of(first, STEPS, "auto")
    else:
        assert temperature_of(first, STEPS, "auto") == fitted
    made = export_bundle(first, str(place / "bundle"), STEPS, temperature=temperature_of(first, STEPS, "2.5"))
    assert made.temperature == 2.5
