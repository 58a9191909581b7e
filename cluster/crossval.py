"""`micacl crossval`: the runs of micacl.crossval on Ray, some at once, and the table of what they say.

A run is a Ray task without a CPU of its own: it starts the workers of `--scaling` as `micacl train` does, then scores
validation and test by the last checkpoint and by the best. What is done is known by its scores, so the same command
goes on from where it was; a run that was in the middle continues from its own checkpoint.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Annotated, Any

import ray
import tyro

from cluster.evaluate import score, write_evaluation
from cluster.progress import relay
from cluster.scaling import ScalingConfig
from cluster.train import check_config, check_run, train
from micacl.bundle import load_model
from micacl.config import RunConfig, from_dict, to_dict
from micacl.crossval import (
    WHICH,
    Job,
    Outcome,
    Wanted,
    claim,
    claimed,
    is_done,
    jobs_of,
    numbers_of,
    outcome_of,
    seeds_of,
)
from micacl.crossval_page import to_html
from micacl.crossval_table import rows_of
from micacl.crossval_text import Report, text_files, to_markdown
from micacl.evaluate import open_for
from micacl.model.weights import check_encoder_weights
from micacl.predictions import BEST, folder_of
from micacl.train.best import read_best
from micacl.train.data import train_data
from pipeline.cli import DatasetUrl
from pipeline.contract import MicaclError, require_at_least
from pipeline.dataset import Dataset, open_dataset
from pipeline.storage import open_store

EXIT_FAILED_RUNS = 5


@dataclass(frozen=True, kw_only=True)
class CrossvalArgs:
    """Run recipes over folds and seeds. Run again with the same OUT, it does what is left."""

    dataset: DatasetUrl
    """Folder or s3://bucket/prefix."""
    out: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")]
    """Where the runs and the table go: folder or s3://bucket/prefix."""
    folds: str = ""
    """Test folds, such as 1..5 or 1,3; without it the dataset's own train and test are used."""
    seeds: str = "3"
    """How many, counted from 0; or which, such as 0,4 or 2..4."""
    parallel: int = 1
    """Runs at once, each with --scaling."""
    version: int | None = None
    """Dataset version; default the one that OUT was begun with, else the newest."""
    address: str | None = None
    """Of a running Ray cluster to join; default RAY_ADDRESS, else a private one."""
    scaling: ScalingConfig = field(default_factory=ScalingConfig)
    config: Annotated[RunConfig, tyro.conf.arg(name="")]


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """What is to be run, checked."""

    jobs: Sequence[Job]
    folds: tuple[int | None, ...]
    seeds: tuple[int, ...]
    dataset: Dataset
    """Without a fold."""


def plan(args: CrossvalArgs, recipes: dict[str, RunConfig]) -> Plan:
    """Settle what OUT is of, before anything is started. Raises MicaclError."""
    require_at_least(1, ("--parallel", args.parallel))
    if args.config.train.fold is not None:
        raise MicaclError(
            f"--train.fold is {args.config.train.fold}.",
            "crossval sets it for each run; no run was started.",
            f"Say --folds {args.config.train.fold}.",
        )
    folds: list[int | None] = [*numbers_of("--folds", args.folds)] if args.folds else [None]
    seeds = seeds_of(args.seeds)
    before = claimed(open_store(args.out))
    dataset = open_dataset(args.dataset, args.version or (before["dataset"]["version"] if before else None))
    for fold in folds:
        open_dataset(args.dataset, dataset.number, fold)
    if folds == [None] and all(shard.get("fold") is not None for shard in dataset.body["shards"]):
        known = sorted({shard["fold"] for shard in dataset.body["shards"]})
        raise MicaclError(
            f"{args.dataset} is in folds {', '.join(map(str, known))}.",
            "It has no test split of its own; no run was started.",
            f"Say which are to be tested on: --folds {known[0]}..{known[-1]}.",
        )
    jobs = jobs_of(recipes, folds, seeds, args.out)
    for job in jobs[: len(folds) * len(recipes)]:  # of the first seed: the others differ in nothing that is looked at
        _check(job, args, dataset, begun=before is not None and job.recipe in before["recipes"])
    claim(args.out, {"url": args.dataset, "version": dataset.number, "sha256": dataset.sha256}, recipes)
    return Plan(jobs=jobs, folds=tuple(folds), seeds=tuple(seeds), dataset=dataset)


def _check(job: Job, args: CrossvalArgs, dataset: Dataset, *, begun: bool) -> None:
    """What no run of the recipe could work with. Raises MicaclError."""
    check_config(args.dataset, job.config, args.scaling, dataset.number)
    if not begun:
        check_encoder_weights(job.config.model.backbone)


def crossval(todo: Plan, args: CrossvalArgs, say: Callable[[str], None]) -> dict[str, Any]:
    """Run what is left on the Ray that is up, write the table. Returns the JSON line and the exit code."""
    left = [job for job in todo.jobs if not _is_done(job, todo.dataset)]
    say(f"{len(todo.jobs)} runs, {len(todo.jobs) - len(left)} of them done")
    errors = _run_all(left, args, todo, say)
    say("writing the table")
    outcomes = [_outcome(job, errors.get(job.name, "")) for job in todo.jobs]
    return {**report(todo, args.out, outcomes, say), "runs_now": len(left)}


def report(todo: Plan, out_url: str, outcomes: Sequence[Outcome], say: Callable[[str], None]) -> dict[str, Any]:
    """Write table.md, table.csv, runs.csv, results.json and report.html."""
    data = {"url": todo.dataset.store.root, "version": todo.dataset.number, "sha256": todo.dataset.sha256}
    made = Report(
        dataset=data,
        labels=todo.dataset.labels,
        folds=todo.folds,
        seeds=todo.seeds,
        outcomes=outcomes,
        rows=rows_of(outcomes),
    )
    store = open_store(out_url)
    for name, content in {**text_files(made), "report.html": to_html(made).encode()}.items():
        store.put(name, content)
    say(to_markdown(made))
    failed = {outcome.job.name: outcome.error for outcome in made.failed}
    return {
        "out": store.root,
        "runs": len(outcomes),
        "failed": failed,
        "uar": {f"{row.recipe}, {row.which}": row.numbers["uar"].mean for row in made.rows},
        "exit": EXIT_FAILED_RUNS if failed else 0,
    }


def _is_done(job: Job, dataset: Dataset) -> bool:
    try:
        return is_done(job, _wanted(job, dataset))
    except MicaclError:  # the run itself will say so
        return False


def _outcome(job: Job, error: str) -> Outcome:
    try:
        return outcome_of(job, error)
    except MicaclError as damaged:
        return outcome_of(job, str(damaged))


def _wanted(job: Job, dataset: Dataset) -> Wanted:
    train = job.config.train
    opened = _opened(dataset.store.root, dataset.number, job.fold, train.where, train.val_share, train.val_seed)
    data = train_data(opened, job.config)
    return Wanted(
        sha256=dataset.sha256,
        steps=data.steps,
        labels=dataset.labels,
        keys=frozenset(opened.split("test")["key"].to_pylist()),
        validated=data.val is not None,
    )


@cache
def _opened(url: str, version: int, fold: int | None, where: str, val_share: float, val_seed: int) -> Dataset:
    return open_dataset(url, version, fold, where, val_share, val_seed)


def _run_all(jobs: Sequence[Job], args: CrossvalArgs, todo: Plan, say: Callable[[str], None]) -> dict[str, str]:
    """Errors by name of the run; others go on."""
    task = ray.remote(num_cpus=0, max_retries=0)(_run)
    waiting, first = deque(jobs), (todo.folds[0], todo.seeds[0])
    running: dict[Any, Job] = {}
    errors: dict[str, str] = {}
    with relay(say) as progress:
        while waiting or running:
            while waiting and len(running) < args.parallel:
                job = waiting.popleft()
                said = {"job": _plain(job), "scaling": to_dict(args.scaling), "progress": progress}
                said |= {"dataset": args.dataset, "version": todo.dataset.number}
                said |= {"embeddings": (job.fold, job.seed) == first}
                running[task.remote(said)] = job
            (ready,), _ = ray.wait(list(running), num_returns=1)
            job = running.pop(ready)
            errors[job.name] = _error_of(ready)
            say(f"[{job.name}] {'failed: ' + errors[job.name] if errors[job.name] else 'done'}")
    return {name: error for name, error in errors.items() if error}


def _error_of(ready: Any) -> str:
    """Empty if the task ended well. A failure is recorded in the table, whatever it was."""
    try:
        ray.get(ready)
    except ray.exceptions.RayTaskError as error:
        cause = error.cause
        return str(cause) if isinstance(cause, MicaclError) else f"{type(cause).__name__}: {cause}"
    except ray.exceptions.RayError as error:
        return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
    return ""


def _plain(job: Job) -> dict[str, Any]:
    return {**{name: getattr(job, name) for name in ("recipe", "fold", "seed", "run")}, "config": to_dict(job.config)}


def _run(said: dict[str, Any]) -> None:
    """One run from where it is: train, then evaluate. A Ray task."""
    job = Job(**{**said["job"], "config": from_dict(RunConfig, said["job"]["config"])})
    scaling: ScalingConfig = from_dict(ScalingConfig, said["scaling"])

    def say(text: str) -> None:
        if "clips/s" not in text:  # a line a log of every run is too much; validations are said
            said["progress"].say.remote(f"[{job.name}] {text}")

    data = check_run(said["dataset"], job.run, job.config, scaling, said["version"])
    train(data, said["dataset"], job.run, scaling, say)
    _evaluate(job, said, scaling, ("val", "test") if data.val is not None else ("test",))


def _evaluate(job: Job, said: dict[str, Any], scaling: ScalingConfig, splits: Sequence[str]) -> None:
    """Validation first: its temperature is reported with the test. A checkpoint that is both is scored once."""
    best = read_best(open_store(job.run))
    scored: dict[tuple[str, int], Any] = {}
    for split in splits:
        for which in WHICH if best is not None else WHICH[:1]:
            bundle = load_model(job.run, best.step if best is not None and which == BEST else None)
            dataset = open_for(bundle, said["dataset"], said["version"], None, split)
            key = (split, int(bundle.origin["step"]))
            if key not in scored:
                embeddings = said["embeddings"] and split == "test"
                scored[key] = score(
                    bundle, dataset, split, workers=scaling.workers, gpu=scaling.gpu, embeddings=embeddings
                )
            out_url = open_store(job.run).url(folder_of(split, which))
            write_evaluation(bundle, dataset, split, scored[key], out_url=out_url, checkpoint=which)
