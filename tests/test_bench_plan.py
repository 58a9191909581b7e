"""The benches of the plan run, and the shuffle is as good as its windows allow. Their times are not looked at."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

BENCH = Path(__file__).resolve().parents[1] / "bench"


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCH))
    return importlib.import_module("shuffle_quality")


def test_a_wider_window_is_nearer_to_a_full_shuffle(bench: Any) -> None:
    split = bench.Split.of((3600, 1800, 900), shard_rows=60)
    windows = {window: bench.measure(split, window, epochs=2) for window in (1, 4, 10**6)}
    for window, (order, _, same_shard, video) in windows.items():
        in_window = min(window, 60) * 60
        assert order < (0.4 if window == 1 else 0.3)
        assert same_shard == pytest.approx(60 / in_window, rel=0.15) or window == 10**6
        assert video <= 3 / (min(in_window, 900) - 1) * 1.5
    one, four, full = (windows[window] for window in (1, 4, 10**6))
    assert one[1] < four[1] < full[1] == pytest.approx(1 / 3, rel=0.1)
    assert one[2] > four[2] > full[2]
    assert one[3] > four[3] > full[3]


def test_rank_correlation_sees_order_and_its_absence(bench: Any) -> None:
    in_order = np.repeat(np.arange(40), 5)
    assert bench.rank_correlation(in_order) == pytest.approx(1, abs=0.01)
    assert bench.rank_correlation(in_order[::-1]) == pytest.approx(-1, abs=0.01)
    assert abs(bench.rank_correlation(np.random.default_rng(0).permutation(in_order))) < 0.2


def test_the_cost_of_a_small_plan_is_measured_both_ways() -> None:
    command = [sys.executable, str(BENCH / "plan.py"), "1e4"]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith("`python bench/plan.py`, commit")
    assert [line.split(" | ")[2] for line in lines[4:6]] == ["Parquet", "shards"]
    assert len({line.count("|") for line in lines[2:6]}) == 1
