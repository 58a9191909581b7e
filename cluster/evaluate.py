"""`micacl evaluate`: one Ray task a rank scores its share of a split; the driver counts each clip once."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import ray

from micacl.bundle import Bundle, load_model
from micacl.evaluate import Scored, confusion_png, gather_scores, open_for, predictions_of, score_rank, train_clips
from micacl.posthoc import PostHoc
from micacl.predictions import EMBEDDINGS, PREDICTIONS, SCORES, Predictions, embeddings_parquet
from micacl.summary import OF_BUNDLE, Temperature, stored_temperature, summarise, to_text
from micacl.train.best import RULE
from pipeline.contract import MicaclError, canonical_json
from pipeline.dataset import Dataset
from pipeline.storage import open_store


def evaluate(
    bundle: Bundle,
    dataset: Dataset,
    split: str,
    *,
    out_url: str,
    workers: int,
    gpu: bool = False,
    checkpoint: str = "last",
    embeddings: bool = False,
) -> dict[str, Any]:
    """Score a run or bundle on a split with `workers` ranks, and write what `write_evaluation` says.

    Args:
        dataset: from `micacl.evaluate.open_for`.
        checkpoint: last or best; said in scores.json, `bundle` is that one.

    Raises MicaclError on bad input.
    """
    open_store(out_url).check()
    scored = score(bundle, dataset, split, workers=workers, gpu=gpu, embeddings=embeddings)
    return write_evaluation(bundle, dataset, split, scored, out_url=out_url, checkpoint=checkpoint)


def score(
    bundle: Bundle, dataset: Dataset, split: str, *, workers: int, gpu: bool = False, embeddings: bool = False
) -> list[Scored]:
    """Every clip of the split once, by `workers` tasks on the Ray that is up. Raises MicaclError."""
    rank_task = ray.remote(num_cpus=1, num_gpus=1 if gpu else 0)(_score)
    of = (dataset.store.root, dataset.number, dataset.fold, split)
    said = (bundle.url, bundle.origin["step"], bundle.posthoc, *of, embeddings)
    parts = [rank_task.remote(*said, rank, workers) for rank in range(workers)]
    try:
        return [one for part in ray.get(parts) for one in part]
    except ray.exceptions.RayTaskError as error:
        raise (error.cause if isinstance(error.cause, MicaclError) else error) from error


def write_evaluation(
    bundle: Bundle, dataset: Dataset, split: str, scored: list[Scored], *, out_url: str, checkpoint: str = "last"
) -> dict[str, Any]:
    """Put predictions.parquet, confusion.png, embeddings.parquet if there are features, and scores.json last.

    On `val` the temperature is fitted; other splits take the one that was fitted there for the same checkpoint, and a
    bundle that has one keeps it.
    """
    scores, _ = gather_scores(scored, dataset.labels, dataset.split(split).num_rows)
    predictions = predictions_of(scored, dataset, split)
    temperature = _temperature(bundle, predictions, split)
    fields = summarise(predictions, scores, train_clips=train_clips(bundle, dataset), temperature=temperature)
    summary = {**_said(bundle, dataset, split, checkpoint), **fields}
    store = open_store(out_url)
    store.put(PREDICTIONS, predictions.to_parquet())
    store.put("confusion.png", confusion_png(scores, f"{split} split"))
    if any(one.features for one in scored):
        features_ND = np.array([one.features for one in scored], np.float32)
        store.put(EMBEDDINGS, embeddings_parquet([one.key for one in scored], features_ND))
    else:
        store.delete(EMBEDDINGS)  # of an evaluation before
    store.put(SCORES, canonical_json(summary).encode())
    return {**summary, "text": to_text(scores, fields, changed=bool(bundle.posthoc)), "out": out_url}


def _temperature(bundle: Bundle, predictions: Predictions, split: str) -> Temperature | None:
    step = int(bundle.origin["step"])
    if bundle.temperature != 1.0:
        return Temperature(value=bundle.temperature, split=OF_BUNDLE, clips=0, step=step)
    if split == "val":
        return Temperature.fit(predictions, split, step)
    return None if bundle.posthoc else stored_temperature(bundle.url, step)  # it was fitted to the unchanged scores


def _said(bundle: Bundle, dataset: Dataset, split: str, checkpoint: str) -> dict[str, Any]:
    """Of what the numbers are. The dataset's split is that of the version file: held-out clips are of `train`."""
    own = any(shard["split"] == split for shard in dataset.body["shards"])
    held_out = split == "val" and not own
    data = {"url": dataset.store.root, "version": dataset.number, "sha256": dataset.sha256}
    data |= {} if dataset.fold is None else {"fold": dataset.fold}
    return {
        "model": bundle.url,
        "origin": dict(bundle.origin),
        "posthoc": dataclasses.asdict(bundle.posthoc),
        "checkpoint": {
            "which": checkpoint,
            "step": bundle.origin["step"],
            "chosen": "the newest" if checkpoint == "last" else RULE,
        },
        "config_hash": bundle.config.hash,
        "dataset": {**data, **({"split": "train"} if held_out else {})},
        "split": split,
        "fold": dataset.fold,
    }


def _score(
    model_url: str,
    step: int,
    posthoc: PostHoc,
    dataset_url: str,
    version: int,
    fold: int | None,
    split: str,
    embeddings: bool,
    rank: int,
    ranks: int,
) -> list[Scored]:
    bundle = dataclasses.replace(load_model(model_url, step), posthoc=posthoc)
    dataset = open_for(bundle, dataset_url, version, fold, split)
    return list(score_rank(bundle, dataset, split, rank, ranks, embeddings=embeddings))
