"""One rank of a training run, as Ray Train starts it: build everything from plain values, continue, fit.

Every attempt, the first or one after a worker died, does the same: find the newest complete checkpoint of the run,
continue from it. What `COMPLETE.json` says is all there is to know.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import ray
import ray.train
import ray.train.torch
import torch
from torch import Tensor

from cluster.claim import claimed
from cluster.deepspeed_engine import DeepSpeedEngine
from cluster.scaling import ScalingConfig
from micacl.bundle import run_state
from micacl.config import RunConfig, from_dict
from micacl.loss.objective import Objective
from micacl.model.micacl import MICACL, build_model, parameter_count
from micacl.model.weights import begin_with_weights
from micacl.train.best import best_of_checkpoint, put_best, read_best
from micacl.train.checkpoint import complete_steps, newest_checkpoint, read_checkpoint
from micacl.train.data import TrainData, open_training
from micacl.train.engine import Engine, PlainEngine
from micacl.train.hooks import Hook
from micacl.train.hooks.checkpoint import SaveCheckpoint
from micacl.train.hooks.console import Console
from micacl.train.hooks.jsonl import JsonLines
from micacl.train.hooks.validate import Validate
from micacl.train.loop import fit
from micacl.train.optim import progress_at
from micacl.train.precision import check_bf16_conv3d
from pipeline.contract import MicaclError
from pipeline.loader import ClipBatch, Loader
from pipeline.plan import PlanState
from pipeline.ray_stream import ray_batches
from pipeline.storage import open_store


def worker(job: dict[str, Any]) -> None:
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
    say = _say_as(rank, job["progress"])
    model = build_model(config.model, config.train.seed)
    if begins_anew(job["run"], claimed(job["run"])["from"]) and (report := begin_with_weights(model.backbone)):
        say(report.to_text())
    engine = _engine(model, config, scaling, config.plan.global_batch // ranks)
    store = open_store(job["run"])
    start, kept = _resume(engine, data, job["run"])
    objective = Objective(config.loss, data.seen_counts, engine.model)
    objective.import_state(kept)
    say(f"{parameter_count(engine.model)} parameters, {ranks} workers, step {start} of {data.steps}")
    metrics = JsonLines(store, start) if rank == 0 else None
    before = {k: v for k, v in claimed(job["run"])["dataset"].items() if k == "before"}
    validation = _validation(engine, data, job["run"], start, metrics, say)
    torch.manual_seed(
        ((config.train.seed << 40) + (start << 16) + rank) % 2**63
    )  # dropout: other numbers on every rank

    def state_at(step: int) -> dict[str, Any]:
        seen = {"url": job["dataset"], **version_of(data), **before}
        counts = {"dataset": list(data.class_counts), "seen": data.seen_counts((step - 1) // data.steps_per_epoch)}
        return run_state(config, data.dataset.body["crop"], seen, data.state_at(step), counts)

    saver = SaveCheckpoint(
        engine,
        store,
        every=config.train.checkpoint_every,
        keep=config.train.keep_checkpoints,
        state_at=state_at,
        metrics=metrics,
        objective=objective,
        validation=validation,
    )
    hooks: list[Hook] = [Console(say), *([metrics] if metrics else []), *([validation] if validation else []), saver]
    fit(
        engine,
        data.batches(start, rank, ranks, nodes=-(-ranks // context.get_local_world_size()), read=_reader(scaling)),
        objective.to(engine.device),
        config.train,
        start_step=start,
        steps=data.steps,
        steps_per_epoch=data.steps_per_epoch,
        log_every=config.train.log_every,
        hooks=hooks,
        newest=functools.partial(newest_checkpoint, store),
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


def _engine(model: MICACL, config: RunConfig, scaling: ScalingConfig, clips_per_rank: int) -> Engine:
    device = ray.train.torch.get_device()
    if scaling.engine == "plain":
        return PlainEngine(model, config.train, device, scaling.compute)
    if scaling.deepspeed.bf16:
        check_bf16_conv3d(device)
    return DeepSpeedEngine(
        model, config.train, clips_per_rank=clips_per_rank, deepspeed=scaling.deepspeed, device=device
    )


def _resume(engine: Engine, data: TrainData, run_url: str) -> tuple[int, Mapping[str, Tensor]]:
    """(updates done, state of the objective): of the newest complete checkpoint, or of where the run is to begin."""
    store = open_store(run_url)
    if not complete_steps(store):
        return _begin(engine, data, run_url), {}
    checkpoint = read_checkpoint(store)
    data.require_same(PlanState.from_dict(checkpoint.state["plan"]))
    engine.import_state(checkpoint.weights, checkpoint.moments, checkpoint.step, _head_step(data, checkpoint.step))
    return checkpoint.step, checkpoint.objective


def _head_step(data: TrainData, step: int) -> int:
    """Updates of the classifier since it was last begun."""
    if step == 0:
        return 0
    return progress_at(step - 1, data.steps, data.steps_per_epoch, data.config.train).step + 1


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
    engine.import_state(checkpoint.weights, checkpoint.moments if start else {}, start, _head_step(data, start))
    return start


def _say_as(rank: int, progress: Any) -> Callable[[str], None]:
    def say(text: str) -> None:
        if rank == 0:
            progress.say.remote(text)

    return say


def version_of(data: TrainData) -> dict[str, Any]:
    train = data.config.train
    said = {"fold": train.fold, "where": train.where or None}
    said = {name: value for name, value in said.items() if value is not None}
    return {"version": data.dataset.number, "sha256": data.dataset.sha256, **said}


def begins_anew(run_url: str, origin: object) -> bool:
    """Whether neither a checkpoint of this run nor one of another has the weights to begin with."""
    return origin is None and not complete_steps(open_store(run_url))
