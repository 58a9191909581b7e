"""Ray Train around micacl.train.loop.fit: N workers, DeepSpeed, checkpoints in the bucket, resume by looking there.

Ray Train restarts the workers (cluster/rank.py); it keeps no checkpoint of its own (docs/decisions/0004).
"""

from __future__ import annotations

import dataclasses
import secrets
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated, Any

import ray
import ray.train
import ray.train.torch
import tyro

from cluster.claim import claim
from cluster.progress import relay
from cluster.rank import begins_anew, version_of, worker
from cluster.scaling import ScalingConfig, require_cpus
from micacl.config import RunConfig, to_dict
from micacl.loss.objective import require_projections
from micacl.model.micacl import require_input
from micacl.model.weights import check_encoder_weights
from micacl.train.best import read_best
from micacl.train.checkpoint import complete_steps
from micacl.train.data import TrainData, open_training
from micacl.train.hooks.jsonl import read_metrics
from pipeline.cli import DatasetUrl, absolute
from pipeline.contract import MicaclError
from pipeline.holdout import describe
from pipeline.storage import open_store


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
    """All that can be seen to be wrong before a worker starts; then the run is of this config. Raises MicaclError."""
    config = _with_absolute_weights(config)
    data = check_config(dataset_url, config, scaling, version)
    open_store(run_url).check()
    if begins_anew(run_url, from_run):
        check_encoder_weights(config.model.backbone)
    claim(run_url, config, {"url": dataset_url, **version_of(data)}, from_run)
    return data


def check_config(dataset_url: str, config: RunConfig, scaling: ScalingConfig, version: int | None) -> TrainData:
    """What can be seen to be wrong with a config on a dataset; weights are left to the caller. Raises MicaclError."""
    data = open_training(dataset_url, version, config)
    if config.plan.global_batch % scaling.workers:
        raise MicaclError(
            f"--plan.global-batch {config.plan.global_batch} is no multiple of --scaling.workers {scaling.workers}.",
            "Ranks would get unequal batches.",
            "Change one of them.",
        )
    require_projections(config.loss, config.model)
    side = config.batch.side
    require_input(config.model, data.dataset.body["crop"]["instances"], config.stream.frames, side, side)
    return data


def _with_absolute_weights(config: RunConfig) -> RunConfig:
    """Workers have other working folders."""
    backbone = dataclasses.replace(config.model.backbone, weights=absolute(config.model.backbone.weights))
    return dataclasses.replace(config, model=dataclasses.replace(config.model, backbone=backbone))


def train(
    data: TrainData, dataset_url: str, run_url: str, scaling: ScalingConfig, say: Callable[[str], None]
) -> dict[str, Any]:
    """Run or continue a checked run on the Ray that is up. Returns counts for the JSON line. Raises MicaclError."""
    require_cpus(scaling)
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


def _trainer(job: dict[str, Any], scaling: ScalingConfig, folder: str) -> ray.train.torch.TorchTrainer:
    """`folder` takes Ray Train's own notes; nothing of ours is in it."""
    return ray.train.torch.TorchTrainer(
        worker,
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
