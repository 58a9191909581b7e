"""Ray Train around micacl.train.loop.fit: N workers, DeepSpeed, checkpoints in the bucket, resume by looking there.

Every attempt, the first or one after a worker died, does the same: find the newest complete checkpoint of the run,
continue from it. Ray Train restarts the workers; it keeps no checkpoint of its own (docs/decisions/0004), so what
`COMPLETE.json` says is all there is to know.
"""

from __future__ import annotations

import functools
import logging
import secrets
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Annotated, Any

import ray
import ray.train
import ray.train.torch
import torch
import tyro

from cluster.claim import claim, claimed
from cluster.deepspeed_engine import DeepSpeedConfig, DeepSpeedEngine
from cluster.progress import relay
from micacl.bundle import run_state
from micacl.config import RunConfig, from_dict, to_dict
from micacl.loss.objective import Objective
from micacl.model.micacl import build_model, parameter_count
from micacl.train.best import best_of_checkpoint, put_best, read_best
from micacl.train.checkpoint import complete_steps, read_checkpoint
from micacl.train.data import TrainData, open_training
from micacl.train.engine import Engine, PlainEngine
from micacl.train.hooks import Hook
from micacl.train.hooks.checkpoint import SaveCheckpoint
from micacl.train.hooks.console import Console
from micacl.train.hooks.jsonl import JsonLines, read_metrics
from micacl.train.hooks.validate import Validate
from micacl.train.loop import fit
from pipeline.cli import DatasetUrl
from pipeline.contract import MicaclError
from pipeline.holdout import describe
from pipeline.loader import ClipBatch, Loader
from pipeline.plan import PlanState
from pipeline.ray_stream import ray_batches
from pipeline.storage import open_store


@dataclass(frozen=True, kw_only=True, slots=True)
class ScalingConfig:
    """On how many and which machines."""

    workers: int = 2
    """Ranks. plan.global_batch must be a multiple."""
    gpu: bool = False
    """One GPU a worker (NCCL); else CPU (gloo)."""
    cpus_per_worker: int = 1
    max_failures: int = 2
    """Times that the group of workers is started again after one died."""
    decoders: int = 0
    """Ray Data actors per worker, of one CPU each, that read and decode for it; 0: threads of the worker itself."""
    engine: str = "deepspeed"
    """deepspeed | plain"""
    deepspeed: DeepSpeedConfig = field(default_factory=DeepSpeedConfig)

    def __post_init__(self) -> None:
        if self.engine not in ("deepspeed", "plain") or min(self.workers, self.cpus_per_worker, self.decoders + 1) < 1:
            raise MicaclError(
                f"--scaling has engine {self.engine!r}, {self.workers} workers, {self.cpus_per_worker} CPUs and "
                f"{self.decoders} decoders each.",
                "The run was not started.",
                "Use engine deepspeed or plain, 1 or more workers and CPUs, 0 or more decoders.",
            )


@dataclass(frozen=True, kw_only=True)
class TrainArgs:
    """Train a recipe. Run again with the same run URL, it continues from the last complete checkpoint."""

    dataset: DatasetUrl
    """Folder or s3://bucket/prefix."""
    run: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """Where the run goes: folder or s3://bucket/prefix."""
    version: int | None = None
    """Dataset version; default the newest."""
    from_run: str | None = None
    """Begin with weights and optimiser of this run's newest checkpoint, at the start of its epoch. For going on with
    another dataset version, global batch, policy or learning rate than that run was begun with."""
    address: str | None = None
    """Of a running Ray cluster to join; default RAY_ADDRESS, else a private one."""
    scaling: ScalingConfig = field(default_factory=ScalingConfig)
    config: Annotated[RunConfig, tyro.conf.arg(name="")]


def check_run(
    dataset_url: str,
    run_url: str,
    config: RunConfig,
    scaling: ScalingConfig,
    version: int | None,
    from_run: str | None = None,
) -> TrainData:
    """All that can be seen to be wrong before a worker starts. Raises MicaclError."""
    data = open_training(dataset_url, version, config)
    if config.plan.global_batch % scaling.workers:
        raise MicaclError(
            f"--plan.global-batch {config.plan.global_batch} is no multiple of --scaling.workers {scaling.workers}.",
            "Ranks would get unequal batches.",
            "Change one of them.",
        )
    open_store(run_url).check()
    claim(run_url, config, {"url": dataset_url, **_version(data)}, from_run)
    return data


def train(
    data: TrainData, dataset_url: str, run_url: str, scaling: ScalingConfig, say: Callable[[str], None]
) -> dict[str, Any]:
    """Run or continue a checked run on the Ray that is up. Returns counts for the JSON line. Raises MicaclError."""
    _require_cpus(scaling)
    store = open_store(run_url)
    if data.val is not None and data.config.train.val_share and data.val.table is not None:
        say(describe(data.dataset.split("train"), data.val.table))
    before, start_s = (complete_steps(store) or [0])[-1], time.monotonic()
    job = {
        "dataset": dataset_url,
        "version": data.dataset.number,
        "run": run_url,
        "config": to_dict(data.config),
        "scaling": to_dict(scaling),
    }
    with relay(say) as progress, tempfile.TemporaryDirectory(prefix="micacl-train-") as folder:
        _fit(_trainer({**job, "progress": progress}, scaling, folder), progress)
    return _summary(run_url, data, before, time.monotonic() - start_s)


def _require_cpus(scaling: ScalingConfig) -> None:
    """Ray Data waits without end for CPUs that the workers hold."""
    there, wanted = (
        ray.cluster_resources().get("CPU", 0),
        scaling.workers * (scaling.cpus_per_worker + scaling.decoders),
    )
    if scaling.decoders and there < wanted:
        raise MicaclError(
            f"{scaling.workers} workers with {scaling.cpus_per_worker} CPUs and {scaling.decoders} decoders each want "
            f"{wanted} CPUs, the Ray cluster has {there:g}.",
            "The decoders would wait for ever, and training with them.",
            "Add CPU machines, lower --scaling.decoders, or leave it out: then each rank decodes in its own threads.",
        )


def _trainer(job: dict[str, Any], scaling: ScalingConfig, folder: str) -> ray.train.torch.TorchTrainer:
    """`folder` takes Ray Train's own notes; nothing of ours is in it."""
    return ray.train.torch.TorchTrainer(
        _worker,
        train_loop_config=job,
        scaling_config=ray.train.ScalingConfig(
            num_workers=scaling.workers,
            use_gpu=scaling.gpu,
            resources_per_worker={"CPU": scaling.cpus_per_worker, **({"GPU": 1} if scaling.gpu else {})},
        ),
        torch_config=ray.train.torch.TorchConfig(backend="nccl" if scaling.gpu else "gloo"),
        run_config=ray.train.RunConfig(
            name=f"micacl-{secrets.token_hex(4)}",
            storage_path=folder,
            failure_config=ray.train.FailureConfig(max_failures=scaling.max_failures),
        ),
    )


def _fit(trainer: Any, progress: Any) -> None:
    """Run; bad input that a worker met comes out as itself."""
    try:
        trainer.fit()
    except ray.train.TrainingFailedError:
        failure = ray.get(progress.failed.remote())
        if failure is None:
            raise
    failure = ray.get(progress.failed.remote())
    if failure is not None:
        raise MicaclError(*failure)


def _version(data: TrainData) -> dict[str, Any]:
    train = data.config.train
    said = {"fold": train.fold, "where": train.where or None}
    said = {name: value for name, value in said.items() if value is not None}
    return {"version": data.dataset.number, "sha256": data.dataset.sha256, **said}


def _worker(job: dict[str, Any]) -> None:
    """One rank. Bad input is told to the driver and not tried again: a further attempt ends at once."""
    if ray.get(job["progress"].failed.remote()) is not None:
        return
    try:
        _train_rank(job)
    except MicaclError as error:
        ray.get(job["progress"].fail.remote(error.args))
        raise


def _train_rank(job: dict[str, Any]) -> None:
    """Build everything from the job's plain values, continue from the bucket, fit."""
    context = ray.train.get_context()
    rank, ranks = context.get_world_rank(), context.get_world_size()
    config: RunConfig = from_dict(RunConfig, job["config"])
    scaling: ScalingConfig = from_dict(ScalingConfig, job["scaling"])
    torch.set_num_threads(scaling.cpus_per_worker)
    logging.getLogger("ray.train").setLevel(logging.WARNING)
    data = open_training(job["dataset"], job["version"], config)
    engine = _engine(config, scaling, config.plan.global_batch // ranks)
    store = open_store(job["run"])
    start = _resume(engine, data, job["run"])
    say = _say_as(rank, job["progress"])
    say(f"{parameter_count(engine.model)} parameters, {ranks} workers, step {start} of {data.steps}")
    metrics = JsonLines(store, start) if rank == 0 else None
    before = {k: v for k, v in claimed(job["run"])["dataset"].items() if k == "before"}
    validation = _validation(engine, data, job["run"], start, metrics, say)
    torch.manual_seed(((config.train.seed << 40) + (start << 16) + rank) % 2**63)  # dropout, apart by rank

    def state_at(step: int) -> dict[str, Any]:
        seen = {"url": job["dataset"], **_version(data), **before}
        return run_state(config, data.dataset.body["crop"], seen, data.state_at(step))

    saver = SaveCheckpoint(
        engine,
        store,
        every=config.train.checkpoint_every,
        keep=config.train.keep_checkpoints,
        state_at=state_at,
        metrics=metrics,
        validation=validation,
    )
    hooks: list[Hook] = [Console(say), *([metrics] if metrics else []), *([validation] if validation else []), saver]
    fit(
        engine,
        data.batches(start, rank, ranks, nodes=-(-ranks // context.get_local_world_size()), read=_reader(scaling)),
        Objective(config.loss, data.seen_counts).to(engine.device),
        config.train,
        start_step=start,
        steps=data.steps,
        steps_per_epoch=data.steps_per_epoch,
        log_every=config.train.log_every,
        hooks=hooks,
    )


def _validation(
    engine: Engine, data: TrainData, run_url: str, start: int, metrics: JsonLines | None, say: Callable[[str], None]
) -> Validate | None:
    """The hook, with the best so far as the checkpoint says it that the run continues from."""
    if data.val is None:
        return None
    store = open_store(run_url)
    best = best_of_checkpoint(store, start) if start in complete_steps(store) else None
    if engine.rank == 0 and best is not None and read_best(store) != best:  # it stopped between the two files
        put_best(store, best)
    config = data.config
    return Validate(
        engine, data.val, config.stream, config.batch, every=data.val_steps, best=best, metrics=metrics, say=say
    )


def _reader(scaling: ScalingConfig) -> Callable[[Loader, int], Iterator[ClipBatch]]:
    """(loader, epochs) -> batches: by the threads of the rank, or by Ray Data."""
    if not scaling.decoders:
        return Loader.batches
    return functools.partial(ray_batches, actors=scaling.decoders)


def _engine(config: RunConfig, scaling: ScalingConfig, clips_per_rank: int) -> Engine:
    model = build_model(config.model, config.train.seed)
    device = ray.train.torch.get_device()
    if scaling.engine == "plain":
        return PlainEngine(model, config.train, device)
    return DeepSpeedEngine(
        model, config.train, clips_per_rank=clips_per_rank, deepspeed=scaling.deepspeed, device=device
    )


def _resume(engine: Engine, data: TrainData, run_url: str) -> int:
    """Updates done: those of the newest complete checkpoint, which is loaded, or of where the run was told to begin."""
    store = open_store(run_url)
    if not complete_steps(store):
        return _begin(engine, data, run_url)
    checkpoint = read_checkpoint(store)
    data.require_same(PlanState.from_dict(checkpoint.state["plan"]))
    engine.import_state(checkpoint.weights, checkpoint.moments, checkpoint.step)
    return checkpoint.step


def _begin(engine: Engine, data: TrainData, run_url: str) -> int:
    """0, or the first step of the epoch in which the run that this one goes on from was."""
    origin = claimed(run_url)["from"]
    if origin is None:
        return 0
    checkpoint = read_checkpoint(open_store(origin["run"]), origin["step"])
    epoch, epochs = PlanState.from_dict(checkpoint.state["plan"]).epoch, data.config.train.epochs
    if epoch >= epochs:
        raise MicaclError(
            f"{origin['run']} has done {epoch} epochs and this run has {epochs}.",
            "Nothing is left to train.",
            "Give a new run URL and more --train.epochs.",
        )
    start = epoch * data.steps_per_epoch
    engine.import_state(checkpoint.weights, checkpoint.moments if start else {}, start)
    return start


def _say_as(rank: int, progress: Any) -> Callable[[str], None]:
    def say(text: str) -> None:
        if rank == 0:
            progress.say.remote(text)

    return say


def _summary(run_url: str, data: TrainData, before: int, seconds: float) -> dict[str, Any]:
    store = open_store(run_url)
    lines, validations = read_metrics(store)
    best = read_best(store)
    return {
        "run": run_url,
        "dataset_version": data.dataset.number,
        "steps": (complete_steps(store) or [0])[-1],
        "steps_now": (complete_steps(store) or [0])[-1] - before,
        "clips_per_class": dict(zip(data.dataset.labels, data.class_counts, strict=True)),
        "first": {k: v for k, v in lines[0].items() if k.startswith("loss/")} if lines else {},
        "last": {k: v for k, v in lines[-1].items() if k.startswith("loss/")} if lines else {},
        "validation": {"last": validations[-1], "best": best.to_dict()} if validations and best else None,
        "clips_per_s": lines[-1]["clips_per_s"] if lines else None,
        "seconds": round(seconds, 1),
    }
