"""`micacl evaluate`: one Ray task a rank scores its share of a split; the driver counts each clip once."""

from __future__ import annotations

import dataclasses
import io
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import ray

from micacl.bundle import Bundle, load_model
from micacl.evaluate import Scored, confusion_png, gather_scores, score_rank
from micacl.posthoc import PostHoc
from pipeline.contract import MicaclError, canonical_json
from pipeline.dataset import Dataset, open_dataset
from pipeline.storage import open_store


def evaluate(
    bundle: Bundle, dataset: Dataset, split: str, *, out_url: str, workers: int, gpu: bool = False
) -> dict[str, Any]:
    """Score a run or bundle on a split with `workers` ranks. Writes scores.json, confusion.png, predictions.parquet.

    Raises MicaclError on bad input.
    """
    clips, model_url, dataset_url = dataset.split(split).num_rows, bundle.url, dataset.store.root
    rank_task = ray.remote(num_cpus=1, num_gpus=1 if gpu else 0)(_score)
    said = (model_url, bundle.origin["step"], bundle.posthoc, dataset_url, dataset.number, dataset.fold, split)
    parts = [rank_task.remote(*said, rank, workers) for rank in range(workers)]
    try:
        scored = [one for part in ray.get(parts) for one in part]
    except ray.exceptions.RayTaskError as error:
        raise (error.cause if isinstance(error.cause, MicaclError) else error) from error
    scores, _ = gather_scores(scored, dataset.labels, clips)
    store = open_store(out_url)
    summary = {
        "model": model_url,
        "origin": dict(bundle.origin),
        "posthoc": dataclasses.asdict(bundle.posthoc),
        "dataset": {"url": dataset_url, "version": dataset.number, "sha256": dataset.sha256},
        "split": split,
        "fold": dataset.fold,
        **scores.to_dict(),
    }
    store.put("scores.json", canonical_json(summary).encode())
    store.put("confusion.png", confusion_png(scores, f"{split} split"))
    store.put("predictions.parquet", _table(scored, dataset))
    return {**summary, "text": scores.to_text(), "out": out_url}


def _score(
    model_url: str,
    step: int,
    posthoc: PostHoc,
    dataset_url: str,
    version: int,
    fold: int | None,
    split: str,
    rank: int,
    ranks: int,
) -> list[Scored]:
    bundle = dataclasses.replace(load_model(model_url, step), posthoc=posthoc)
    return list(score_rank(bundle, open_dataset(dataset_url, version, fold), split, rank, ranks))


def _table(scored: list[Scored], dataset: Dataset) -> bytes:
    """One row a clip: key, truth, prediction, probability of each class."""
    labels, ordered = dataset.labels, sorted(scored, key=lambda s: s.key)
    columns: dict[str, Any] = {
        "key": [s.key for s in ordered],
        "truth": [labels[s.truth] for s in ordered],
        "predicted": [labels[s.predicted] for s in ordered],
    }
    columns |= {f"p_{label}": [s.probabilities[i] for s in ordered] for i, label in enumerate(labels)}
    out = io.BytesIO()
    pq.write_table(pa.table(columns), out, compression="zstd")
    return out.getvalue()
