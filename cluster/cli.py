"""`micacl VERB`: all doors of the house, in the order of the data."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import tyro

from pipeline.cli import VERBS as PIPELINE_VERBS
from pipeline.cli import Arguments, DatasetUrl, Raw, Verb, absolute, run, say, stop_on_sigterm
from pipeline.contract import MicaclError, require_at_least

Model = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
Run = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
BundleUrl = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="BUNDLE")]
Out = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")]

VERBS: dict[str, Verb] = {
    "demo": Verb("the whole chain on synthetic faces: raw videos to a served prediction", "cluster.cli:demo"),
    "doctor": Verb("check this machine, its packages and a bucket", "cluster.cli:doctor"),
    **{name: verb for name, verb in PIPELINE_VERBS.items() if name != "demo"},
    "model": Verb("parameters and multiply-accumulates of a recipe, part by part", "cluster.cli:model"),
    "train": Verb("train a recipe on a dataset: micacl train RECIPE DATASET RUN", "cluster.cli:train"),
    "evaluate": Verb("score a run or bundle on a split, every clip once", "cluster.cli:evaluate"),
    "compare": Verb("two evaluated runs: which differences can be told from chance", "cluster.cli:compare"),
    "crossval": Verb(
        "folds x seeds x recipes on Ray -> one table: crossval RECIPES DATASET OUT", "cluster.cli:crossval"
    ),
    "export": Verb("checkpoint -> bundle for inference", "cluster.cli:export"),
    "predict": Verb("a bucket of clips -> Parquet of probabilities", "cluster.cli:predict"),
    "serve": Verb("answer predictions over HTTP", "cluster.cli:serve"),
}


def main() -> None:
    """The `micacl` command."""
    stop_on_sigterm()
    sys.exit(run(VERBS, "micacl", sys.argv[1:]))


def demo(out: str = "demo-out", storage: str = "seaweedfs", until: str = "serve", seed: int = 7) -> dict[str, Any]:
    """Run the demo.

    Args:
        out: folder for everything that the demo writes; emptied first.
        storage: seaweedfs (a real S3 server on loopback), file, or your own s3://bucket/prefix.
        until: last step to run: raw, prepare, train, evaluate, export, predict or serve.
        seed: of the synthetic videos.
    """
    from cluster.demo import run_demo

    return run_demo(out, storage, until, seed, say)


def doctor(url: Annotated[str | None, tyro.conf.Positional] = None) -> dict[str, Any]:
    """Check what a run will need, before it costs anything. Exit code 2 if a check fails.

    Args:
        url: a bucket or folder to write to, read back and clean up.
    """
    from cluster.doctor import format_table, run_checks

    checks = run_checks(absolute(url) if url else None)
    say(format_table(checks))
    bad = [c.name for c in checks if not c.ok]
    return {"ok": not bad, "checks": len(checks), "failed": bad, "exit": 2 if bad else 0}


def model(arguments: Arguments, prog: str) -> dict[str, Any]:
    """`micacl model RECIPE [flags]`: counts at its instances, frames and side; how a named weight file fits."""
    from cluster.recipe_args import parse_recipe, recipe_named
    from micacl.config import RunConfig
    from micacl.model.count import count_model
    from micacl.model.weights import check_encoder_weights

    name = recipe_named(arguments, prog)
    config: RunConfig = parse_recipe(RunConfig, name, prog, arguments[1:], default=lambda config: config)
    weights = check_encoder_weights(config.model.backbone)
    count = count_model(config.model, config.stream.frames, config.batch.side)
    say(count.to_text())
    if weights is not None:
        say(weights.to_text())
    return {"recipe": name, **count.to_dict()}


model.takes_arguments = True  # type: ignore[attr-defined]


def train(arguments: Arguments, prog: str) -> dict[str, Any]:
    """`micacl train RECIPE DATASET RUN [flags]`; the recipe decides the defaults of the flags."""
    from cluster.recipe_args import parse_recipe, recipe_named
    from cluster.train import TrainArgs, check_run
    from cluster.train import train as job
    from pipeline.ray_local import ray_session

    name = recipe_named(arguments, prog, "DATASET RUN ")
    args: TrainArgs = parse_recipe(
        TrainArgs,
        name,
        prog,
        arguments[1:],
        default=lambda config: TrainArgs(dataset=tyro.MISSING, run=tyro.MISSING, config=config),
    )
    dataset, run_url = absolute(args.dataset), absolute(args.run)
    from_run = absolute(args.from_run) if args.from_run else None
    data = check_run(dataset, run_url, args.config, args.scaling, args.version, from_run)
    scaling = args.scaling
    cpus = None if scaling.gpu or scaling.decoders else scaling.workers * scaling.cpus_per_worker
    store_mb = 1000 if scaling.decoders else 400  # decoded batches on their way
    with ray_session(address=args.address, num_cpus=cpus, object_store_mb=store_mb):
        return {"recipe": name, **job(data, dataset, run_url, args.scaling, say)}


train.takes_arguments = True  # type: ignore[attr-defined]


def evaluate(
    model: Model,
    dataset: DatasetUrl,
    split: str = "test",
    fold: int | None = None,
    checkpoint: str = "last",
    out: str | None = None,
    version: int | None = None,
    embeddings: bool = False,
    tau_norm: float = 0.0,
    adjust: float = 0.0,
    workers: int = 1,
    gpu: bool = False,
    address: str | None = None,
) -> dict[str, Any]:
    """Score a run or bundle. Writes scores.json, confusion.png and predictions.parquet.

    Args:
        model: a run or a bundle: folder or s3://bucket/prefix.
        dataset: folder or s3://bucket/prefix.
        split: train, val or test. On val the temperature is fitted that later evaluations report.
        fold: test fold of a dataset in folds; default the one that was kept out of training.
        checkpoint: of a run: last, or best on validation.
        out: where the files go; default MODEL/evaluation/SPLIT, or SPLIT-best, with the changes below in its name.
        version: dataset version; default the newest.
        embeddings: also write embeddings.parquet: the features of each bag.
        tau_norm: normalise the classifier's weights by this power of their length, as `micacl export` does.
        adjust: take this much of the log prior of training out of the scores, as `micacl export` does.
        workers: ranks that share the clips.
        gpu: one GPU a worker.
        address: of a running Ray cluster to join; default RAY_ADDRESS, else a private one.
    """
    from cluster.evaluate import evaluate as job
    from micacl.bundle import load_model
    from micacl.evaluate import open_for
    from micacl.predictions import folder_of
    from micacl.train.best import step_of
    from pipeline.ray_local import ray_session
    from pipeline.storage import open_store

    require_at_least(1, ("--workers", workers))
    url, changes = absolute(model), ""
    bundle = load_model(url, step_of(open_store(url), checkpoint))
    if tau_norm or adjust:
        bundle, changes = bundle.changed(tau_norm, adjust), f"-tau-norm{tau_norm:g}-adjust{adjust:g}"
    opened = open_for(bundle, absolute(dataset), version, fold, split)
    opened.split(split)
    out = absolute(out or f"{model.rstrip('/')}/{folder_of(split, checkpoint)}{changes}")
    with ray_session(address=address, num_cpus=workers):
        result = job(
            bundle, opened, split, out_url=out, workers=workers, gpu=gpu, checkpoint=checkpoint, embeddings=embeddings
        )
    say(result["text"])
    return result


def compare(
    run_a: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN_A")],
    run_b: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN_B")],
    split: str = "test",
    checkpoint: str = "last",
) -> dict[str, Any]:
    """Compare what `micacl evaluate` has left of two runs, clip by clip; nothing is evaluated here.

    Args:
        run_a: a run, a bundle, or a folder with a predictions.parquet.
        run_b: another one; differences are B - A.
        split: which evaluation.
        checkpoint: which evaluation: of the last checkpoint, or of the best on validation.
    """
    from micacl.compare import compare_runs

    result = compare_runs(absolute(run_a), absolute(run_b), split, checkpoint)
    say(result["text"])
    return result


def crossval(arguments: Arguments, prog: str) -> dict[str, Any]:
    """`micacl crossval RECIPES DATASET OUT [flags]`; each recipe decides the defaults of its flags.

    RECIPES are names with commas between; `dfew+ablation` stands for a set (micacl/recipes.py).
    """
    from dataclasses import replace

    from cluster.crossval import CrossvalArgs, plan
    from cluster.crossval import crossval as job
    from cluster.recipe_args import parse_recipe, recipe_named
    from micacl.recipes import expand
    from pipeline.ray_local import ray_session

    names = expand(recipe_named(arguments, prog, "DATASET OUT ", "[,RECIPE...]"))
    parsed: dict[str, CrossvalArgs] = {}
    for name in names:
        parsed[name] = parse_recipe(
            CrossvalArgs,
            name,
            prog,
            arguments[1:],
            default=lambda config: CrossvalArgs(dataset=tyro.MISSING, out=tyro.MISSING, config=config),
        )
    first = next(iter(parsed.values()))
    args = replace(first, dataset=absolute(first.dataset), out=absolute(first.out))
    todo, scaling = plan(args, {name: of.config for name, of in parsed.items()}), args.scaling
    cpus = args.parallel * scaling.workers * (scaling.cpus_per_worker + scaling.decoders)
    store_mb = args.parallel * (1000 if scaling.decoders else 400)
    with ray_session(address=args.address, num_cpus=None if scaling.gpu else cpus, object_store_mb=store_mb):
        return job(todo, args, say)


crossval.takes_arguments = True  # type: ignore[attr-defined]


def export(
    run: Run,
    bundle: BundleUrl,
    step: int | None = None,
    checkpoint: str = "last",
    temperature: str = "none",
    tau_norm: float = 0.0,
    adjust: float = 0.0,
) -> dict[str, Any]:
    """Write a bundle from a run's checkpoint.

    Args:
        run: the run: folder or s3://bucket/prefix.
        bundle: where the bundle goes.
        step: which checkpoint, by number; it must be one that is kept.
        checkpoint: without --step: last, or best on validation.
        temperature: of the probabilities: none, a number, or auto: what `micacl evaluate --split val` fitted.
        tau_norm: normalise the classifier's weights by this power of their length; 1 makes them equally long.
        adjust: take this much of the log prior of training out of the scores; 1 takes all.
    """
    from micacl.bundle import export_bundle
    from micacl.summary import temperature_of
    from micacl.train.best import step_of
    from micacl.train.checkpoint import read_checkpoint
    from pipeline.storage import open_store

    store = open_store(absolute(run))
    if temperature == "auto" and (tau_norm or adjust):
        raise MicaclError(
            "--temperature auto stands with --tau-norm or --adjust.",
            "That temperature was fitted to the unchanged scores; no bundle was written.",
            "Give a number, or leave one of them out.",
        )
    chosen = step if step is not None else step_of(store, checkpoint)
    if chosen is None:
        chosen = read_checkpoint(store).step
    made = export_bundle(
        absolute(run),
        absolute(bundle),
        chosen,
        temperature=temperature_of(absolute(run), chosen, temperature),
        tau_norm=tau_norm,
        adjust=adjust,
    )
    say(f"bundle {made.id} of step {made.origin['step']}, temperature {made.temperature:g}, in {made.url}")
    return {
        "bundle": made.url,
        "id": made.id,
        "labels": list(made.labels),
        "temperature": made.temperature,
        "origin": dict(made.origin),
    }


def predict(
    bundle: BundleUrl,
    raw: Raw,
    out: Out,
    source: str = "bucket",
    frames: str = "auto",
    faces: str = "all",
    split: str | None = None,
    fold: int | None = None,
    where: str = "",
    workers: int = 1,
    gpu: bool = False,
    address: str | None = None,
) -> dict[str, Any]:
    """Predict every face of every clip of a bucket, or with --split every bag of a dataset.

    Args:
        bundle: from `micacl export`.
        raw: folder or s3://bucket/prefix of clips, or a table of them; with --split, a dataset.
        out: where predictions-*.parquet goes.
        source: bucket, table, folder, auto, or a data set (dfew, ferv39k, ...; docs/data.md).
        frames: as in prepare: images takes each folder of whole frames as a clip, aligned each folder of face crops.
        faces: all, or largest for one face a video.
        split: RAW is a dataset, and its bags of this split are predicted; no video is decoded again.
        fold: test fold of a dataset in folds.
        where: only bags of which this holds, e.g. `face_px >= 48`.
        workers: actors that hold the model.
        gpu: one GPU an actor.
        address: of a running Ray cluster to join; default RAY_ADDRESS, else a private one.
    """
    from cluster.predict import predict as job
    from cluster.predict_dataset import predict_dataset
    from micacl.bundle import load_bundle
    from pipeline.dataset import open_dataset
    from pipeline.ray_local import ray_session
    from pipeline.sources import SourceOptions, list_videos
    from pipeline.storage import open_store

    require_at_least(1, ("--workers", workers))
    open_store(absolute(out)).check()
    loaded = load_bundle(absolute(bundle))
    if split is not None:
        opened = open_dataset(absolute(raw), fold=fold, where=where)
        say(f"{opened.split(split).num_rows} bags in {raw}, split {split}, bundle {loaded.id}")
        with ray_session(address=address, num_cpus=workers):
            return predict_dataset(loaded, opened, split, absolute(out), workers=workers, gpu=gpu)
    videos = list_videos(absolute(raw), source, SourceOptions(frames=frames))
    say(f"{len(videos)} videos in {raw}, bundle {loaded.id}")
    with ray_session(address=address):
        return job(loaded, videos, absolute(out), workers=workers, faces=faces, gpu=gpu)


def serve(bundle: BundleUrl, host: str = "127.0.0.1", port: int = 8000, address: str | None = None) -> dict[str, Any]:
    """Serve a bundle over HTTP until interrupted.

    Args:
        bundle: from `micacl export`.
        host: address to listen on; 127.0.0.1 is this machine only.
        port: below 10000 or above 20000.
        address: of a running Ray cluster to join; default RAY_ADDRESS, else a private one.
    """
    import signal
    import threading

    from cluster.serve.app import check_port, run_server
    from micacl.bundle import load_bundle
    from pipeline.ray_local import ray_session

    check_port(host, port)
    load_bundle(absolute(bundle))
    stop = threading.Event()
    with ray_session(address=address), run_server(absolute(bundle), host, port, say) as url:
        for number in (signal.SIGINT, signal.SIGTERM):  # here, because Ray puts handlers of its own when it starts
            signal.signal(number, lambda *_: stop.set())
        say(f"serving {url} (Ctrl-C stops)")
        stop.wait()
    return {"served": url}
