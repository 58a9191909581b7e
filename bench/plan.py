"""What a plan costs from 10^4 to 10^8 rows: python bench/plan.py [LARGEST]

Each size is an index of two columns (class, shard) in Parquet: seven classes with DFEW's tail, class-pure shards of
some 1000 rows in random order. A fresh process reads it in batches and opens plans; another opens them from the list
of shards alone, as a reader of a whole split does. Seconds are those of the CPU, memory is the peak of the process.
"""

from __future__ import annotations

import dataclasses
import datetime as dt
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from demo_steps import commit, machine

from pipeline.plan import EpochPlan, PlanConfig, PlanIndex
from pipeline.runs import Runs

DFEW = (1956, 1515, 2135, 1738, 1175, 116, 721)
CONFIG = PlanConfig(policy="sqrt", global_batch=16)
SIZES = tuple(10**power for power in range(4, 9))
GROUP_ROWS = 2**20
STEPS = 1000
RESUME_AT = 10**5

Ints = npt.NDArray[np.int64]


def shard_list(rows: int) -> tuple[Ints, Ints]:
    """Class and rows of each shard, shape (shards,); at least one shard of each class."""
    rng = np.random.default_rng(rows)
    of_class = np.maximum(np.array(DFEW) * rows // (sum(DFEW) * 1000), 1)
    labels = rng.permutation(np.repeat(np.arange(len(DFEW)), of_class))
    edges = np.linspace(0, rows, len(labels) + 1).astype(np.int64)
    edges[1:-1] += rng.integers(-200, 200, len(labels) - 1)
    return labels, np.diff(edges)


def write_index(path: Path, rows: int) -> None:
    """The same as one row a clip, in row groups of GROUP_ROWS or so."""
    labels, counts = shard_list(rows)
    schema = pa.schema([("label", pa.int16()), ("shard", pa.int32())])
    cuts = np.flatnonzero(np.diff(np.cumsum(counts) // GROUP_ROWS)) + 1
    with pq.ParquetWriter(path, schema) as writer:
        for part in np.split(np.arange(len(counts)), cuts):
            columns = [np.repeat(values[part], counts[part]) for values in (labels, np.arange(len(counts)))]
            writer.write_table(pa.table(columns, names=schema.names).cast(schema))


def read_index(path: Path) -> Iterator[tuple[Ints, Ints]]:
    for batch in pq.ParquetFile(path).iter_batches(batch_size=GROUP_ROWS):
        yield batch["label"].to_numpy(), batch["shard"].to_numpy()


def second_key(rows: int, subjects: int) -> tuple[float, float, float]:
    """(seconds to the first batch, to a batch of the next epoch's middle, us a step) balanced over subjects too."""
    labels, counts = shard_list(rows)
    groups = np.random.default_rng(0).integers(0, subjects, rows)
    index = PlanIndex(Runs(labels, np.arange(len(labels)), counts), len(DFEW), groups=groups)
    config = dataclasses.replace(CONFIG, second="subject")
    clock = [time.process_time()]
    plan = EpochPlan(index, config, 0)
    plan.batch(0)
    clock.append(time.process_time())
    EpochPlan(index, config, 1).batch(plan.steps // 2)
    clock.append(time.process_time())
    for step in range(1, STEPS):
        plan.batch(step)
    clock.append(time.process_time())
    first, middle, steps = np.diff(clock).tolist()
    return first, middle, steps / (STEPS - 1) * 1e6


def peak_mib() -> float:
    """Of this process; getrusage would count what the parent held when it started this one."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def measure(rows: int, path: str) -> dict[str, float]:
    """Seconds of each step in this process; `path` is empty for the list of shards alone."""
    said: dict[str, float] = {}
    clock = [time.process_time()]

    def lap(name: str) -> None:
        clock.append(time.process_time())
        said[name] = clock[-1] - clock[-2]

    if path:
        runs = Runs.of_parts(read_index(Path(path)))
    else:
        labels, counts = shard_list(rows)
        clock.append(time.process_time())
        runs = Runs(labels, np.arange(len(labels)), counts)
    index = PlanIndex(runs, len(DFEW))
    lap("index")
    plan = EpochPlan(index, CONFIG, 0)
    plan.batch(0)
    lap("first batch")
    EpochPlan(index, CONFIG, 37).batch(0)
    lap("first batch of epoch 37")
    plan.hash  # noqa: B018
    lap("hash")
    steps = min(STEPS, plan.steps)
    for step in range(1, steps):
        plan.batch(step)
    lap("steps")
    for position in range(len(plan) - 1, len(plan) - 1 - steps, -1):
        plan[position]
    at = min(RESUME_AT, plan.steps - 1)
    lap("backwards")
    EpochPlan(index, CONFIG, 1).batch(at)
    lap("resume")
    last = plan.steps - 1
    EpochPlan(index, CONFIG, 2).batch(last)
    lap("resume at the end")
    said["us a step"] = said.pop("steps") / (steps - 1) * 1e6
    said["MiB"] = peak_mib()
    said["runs"] = len(runs.labels_R)
    return said


def child(rows: int, path: str) -> dict[str, float]:
    done = subprocess.run([sys.executable, __file__, "--one", str(rows), path], check=True, capture_output=True)
    return dict(json.loads(done.stdout))


def main(largest: int) -> None:
    print(f"`python bench/plan.py`, commit {commit()}, {machine()}, {dt.date.today().isoformat()}\n")  # noqa: DTZ011
    names = ["index", "first batch", "first batch of epoch 37", "hash", "resume", "resume at the end"]
    print("| rows | shards | from | MiB, peak | us a step | " + ", s | ".join(names) + ", s |")
    print("| ---: | ---: | --- |" + " ---: |" * (2 + len(names)))
    for rows in [size for size in SIZES if size <= largest]:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "index.parquet"
            write_index(path, rows)
            for source, name in (("Parquet", str(path)), ("shards", "")):
                said = child(rows, name)
                seconds = " | ".join(f"{said[name]:.3f}" for name in names)
                shards = f"{rows:,} | {said['runs']:,.0f}"
                print(f"| {shards} | {source} | {said['MiB']:.0f} | {said['us a step']:.0f} | {seconds} |", flush=True)
    print("\n| rows | subjects | first batch, s | a batch of the middle, s | us a step |")
    print("| ---: | ---: | ---: | ---: | ---: |")
    for rows, subjects in [(10**6, 1000), (10**6, 30_000)] if largest >= 10**6 else []:
        first, middle, step = second_key(rows, subjects)
        print(f"| {rows:,} | {subjects:,} | {first:.2f} | {middle:.2f} | {step:.0f} |")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        print(json.dumps(measure(int(sys.argv[2]), sys.argv[3])))
    else:
        main(int(float(sys.argv[1])) if sys.argv[1:] else SIZES[-1])
