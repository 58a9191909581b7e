"""Many runs on few cores: each in a process of its own, seed by seed."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from experiment import Experiment, run


def run_all(
    experiments: Sequence[Experiment], dataset_url: str, seeds: Iterable[int], out: Path, processes: int
) -> list[dict[str, Any]]:
    """Results in the order of `experiments`, seeds within. A run that fails stops the table with its error."""
    os.environ["OMP_NUM_THREADS"] = "1"
    jobs = [(seed, number) for seed in seeds for number in range(len(experiments))]
    found: dict[tuple[int, int], dict[str, Any]] = {}
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn"), max_tasks_per_child=1) as pool:
        futures = {pool.submit(run, experiments[n], dataset_url, seed, out): (seed, n) for seed, n in jobs}
        for future in as_completed(futures):
            result = found[futures[future]] = future.result()
            done, name = f"{len(found)}/{len(jobs)}", f"{result['name']} {result['control']} seed {result['seed']}"
            print(
                f"{done} {name}: UAR {result['uar']:.3f} WAR {result['war']:.3f} {result['seconds']} s", file=sys.stderr
            )
    return [found[seed, n] for n in range(len(experiments)) for seed in sorted({s for s, _ in jobs})]
