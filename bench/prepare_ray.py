"""The whole job on many copies of the clips: with Ray by one and two workers, and its crop tasks without Ray.

Rates are of the crop phase: from when Ray is there to the last crop; the start of Ray's and our processes for the first
clips lies in it. `plain` is the same work (fetch, sandbox, one put) in one or two processes: what two cores of this
machine can give at most while they are shared.
"""

from __future__ import annotations

import csv
import json
import math
import shutil
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from processes import Sample, Watch

_RUN = str(Path(__file__).with_name("prepare_run.py"))
_LABELS = ("happy", "sad", "fear")
_LEAST_S = 4.0
_LEAST_VIDEOS = 16
"""Half of it still gives a task to each of two workers."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """One job, measured from outside."""

    name: str
    workers: int
    videos: int
    crop_s: float
    steady_per_s: float
    """Videos a second between progress lines, without the start and without the last tasks; NaN if that is short."""
    cpu_s: float
    """CPU seconds in the crop phase, of all processes of the job."""
    others: float
    """Cores that the rest of the machine kept busy in the crop phase."""
    driver_mb: float
    """Peak resident memory of the driver."""
    tree_pss_mb: float
    """Peak of the sum over all processes, shared pages counted once."""
    watch_cpu_s: float
    """CPU seconds that the sampling itself took."""

    @property
    def per_s(self) -> float:
        """Videos a second in the crop phase."""
        return self.videos / self.crop_s

    @property
    def cores(self) -> float:
        """That the job kept busy in the crop phase."""
        return self.cpu_s / self.crop_s

    @property
    def cpu_ms(self) -> float:
        """CPU milliseconds a video, with what starting the processes took."""
        return 1000 * self.cpu_s / self.videos


def measure(paths: list[Path], clip_s: float, run_s: float) -> list[Run]:
    """The runs, each of about `run_s` seconds or a fraction of it, if a clip takes `clip_s`.

    The run by two workers takes 4 N videos and another one N: peak memory must be the same, and the difference of their
    CPU time is that of 3 N videos, without the start of anything.
    """
    each = max(_LEAST_VIDEOS, 4 * math.ceil(run_s / clip_s / 4))
    with tempfile.TemporaryDirectory(prefix="micacl-bench-") as folder:
        home = Path(folder)
        half, whole, twice = (make_table(home, paths, n) for n in (each // 2, each, 2 * each))
        return [
            _plain(home, half, 1),
            _ray(home, "prepare", whole, 1),
            _plain(home, whole, 2),
            _ray(home, "prepare", twice, 2),
            _ray(home, "prepare, a quarter", half, 2),
            _ray(home, "prepare again, all is done", twice, 2),
            _ray(home, "the quarter again", half, 2),
        ]


def make_table(home: Path, paths: list[Path], count: int) -> Path:
    """`count` rows, a copy of a clip each; copies are shared by the tables."""
    clips = home / "clips"
    clips.mkdir(exist_ok=True)
    table = home / f"{count}.csv"
    with table.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["path", "label", "split"])
        for i in range(count):
            source = paths[i % len(paths)]
            copy = clips / f"{i:05d}_{source.name}"
            if not copy.exists():
                shutil.copyfile(source, copy)
            rows.writerow([f"clips/{copy.name}", _LABELS[i % len(_LABELS)], "train"])
    return table


def _ray(home: Path, name: str, table: Path, workers: int) -> Run:
    dataset = home / f"ray-{workers}-{table.stem}"
    done, watch = _watched([["ray", str(table), str(dataset), str(workers)]])
    (said,) = done
    videos, lines = said["videos"]["listed"], said["lines"]
    assert said["decoded"] in (0, videos), "all of the clips, or none of them, are new"
    first, late = lines[0], lines[-2] if len(lines) > 1 else lines[0]
    seconds = late[0] - first[0]
    steady = (late[1] - first[1]) / seconds if seconds > _LEAST_S else math.nan
    return _run(name, workers, videos, said["start_s"], lines[-1][0], watch, steady)


def _plain(home: Path, table: Path, processes: int) -> Run:
    dataset = home / f"plain-{processes}"
    jobs = [["plain", str(table), str(dataset), str(part), str(processes)] for part in range(processes)]
    done, watch = _watched(jobs)
    start, stop = min(said["start_s"] for said in done), max(said["stop_s"] for said in done)
    videos = sum(said["decoded"] for said in done)
    return _run("plain processes, no Ray", processes, videos, start, stop, watch, math.nan)


def _run(name: str, workers: int, videos: int, start: float, stop: float, watch: Watch, steady: float) -> Run:
    inside = watch.between(start, stop) or watch.samples[-2:]
    seconds, tree, machine = _spent(inside)
    return Run(
        name=name,
        workers=workers,
        videos=videos,
        crop_s=stop - start,
        steady_per_s=steady,
        cpu_s=tree / seconds * (stop - start),
        others=max(0.0, machine - tree) / seconds,
        driver_mb=max(s.driver_rss for s in watch.samples) / 1e6,
        tree_pss_mb=max(s.tree_pss or 0 for s in watch.samples) / 1e6,
        watch_cpu_s=watch.own_cpu_s,
    )


def _spent(samples: list[Sample]) -> tuple[float, float, float]:
    """(wall seconds, CPU seconds of the job, of the machine) from the first sample to the last."""
    first, last = samples[0], samples[-1]
    return (
        max(last.at_s - first.at_s, 1e-3),
        last.tree_cpu_s - first.tree_cpu_s,
        last.machine_cpu_s - first.machine_cpu_s,
    )


def _watched(jobs: list[list[str]]) -> tuple[list[dict[str, Any]], Watch]:
    """What processes of bench/prepare_run.py say at their end, and how they were while they ran."""
    with tempfile.TemporaryFile("w+") as errors:
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": errors, "text": True}
        running = [subprocess.Popen([sys.executable, _RUN, *job], **pipes) for job in jobs]
        with Watch([one.pid for one in running]) as watch:
            for one, job in zip(running, jobs, strict=True):
                if job[0] == "plain":
                    one.stdout.readline()
            ended = [one for one in running if one.stdin.write("\n") and not one.stdin.flush()]
            said = [one.stdout.read() for one in ended]
            codes = [one.wait() for one in running]
        if any(codes):
            errors.seek(0)
            raise RuntimeError(f"exit codes {codes} of {jobs}:\n{errors.read()[-4000:]}")
    return [json.loads(text.strip().splitlines()[-1]) for text in said], watch


def summary(runs: list[Run]) -> dict[str, float]:
    """Ratios between the runs of `measure`; milliseconds of Ray and the driver are beside those of plain processes."""
    plain, one, plain_two, two, quarter, again, quarter_again = runs
    long_run_ms = 1000 * (two.cpu_s - quarter.cpu_s) / (two.videos - quarter.videos)
    return {
        "efficiency": two.per_s / (2 * one.per_s),
        "efficiency_steady": two.steady_per_s / (2 * one.steady_per_s),
        "efficiency_plain": plain_two.per_s / (2 * plain.per_s),
        "ray_wall_ms": 1000 * (1 / one.per_s - 1 / plain.per_s),
        "ray_steady_wall_ms": 1000 * (1 / one.steady_per_s - 1 / plain.per_s),
        "ray_cpu_ms": one.cpu_ms - plain.cpu_ms,
        "ray_long_run_cpu_ms": long_run_ms - plain_two.cpu_ms,
        "look_ms": 1000 / again.per_s,
        "look_long_run_ms": 1000 * (again.crop_s - quarter_again.crop_s) / (again.videos - quarter_again.videos),
        "driver_growth": two.driver_mb / quarter.driver_mb - 1,
        "tree_growth": two.tree_pss_mb / quarter.tree_pss_mb - 1,
    }


def as_json(runs: list[Run]) -> list[dict[str, Any]]:
    return [without_nan(asdict(run)) for run in runs]


def without_nan(values: dict[str, Any]) -> dict[str, Any]:
    """NaN is no JSON: null."""
    return {k: None if isinstance(v, float) and math.isnan(v) else v for k, v in values.items()}
