"""`micacl predict ... --split`: the bags of a dataset -> Parquet, each once, without decoding a video again.

One Ray task a rank reads its share of the split through the stream, as `micacl evaluate` does; bags need no labels.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import ray

from cluster.predict import predictions_parquet
from micacl.bundle import Bundle, load_bundle
from micacl.evaluate import classify_rank
from pipeline.contract import MicaclError, canonical_json, digest
from pipeline.dataset import Dataset, open_dataset
from pipeline.rows import split_rows
from pipeline.storage import open_store


def predict_dataset(
    bundle: Bundle, dataset: Dataset, split: str, out_url: str, *, workers: int, gpu: bool
) -> dict[str, Any]:
    """Predict a split on the Ray that is up. Returns counts for the JSON line. Raises MicaclError."""
    known = {row["key"]: row for row in dataset.split(split).to_pylist()}
    rank_task = ray.remote(num_cpus=1, num_gpus=1 if gpu else 0)(_classify)
    said = (bundle.url, dataset.store.root, dataset.number, dataset.fold, dataset.where, split)
    try:
        parts = ray.get([rank_task.remote(*said, rank, workers) for rank in range(workers)])
    except ray.exceptions.RayTaskError as error:
        raise (error.cause if isinstance(error.cause, MicaclError) else error) from error
    found = {key: (p_K, weights_N) for part in parts for key, p_K, weights_N in part}
    if found.keys() != known.keys() or sum(map(len, parts)) != len(known):
        raise MicaclError(
            f"{sum(map(len, parts))} clips were predicted, the split has {len(known)}.",
            "Nothing was written.",
            "Run the same command again; if it stays, `micacl verify URL`.",
        )
    rows = [_row(known[key], *found[key], bundle.labels) for key in sorted(known, key=lambda k: (known[k]["video"], k))]
    store = open_store(out_url)
    name = digest(canonical_json([bundle.id, dataset.identity, split]).encode())[:16]
    store.put(f"predictions-{name}.parquet", predictions_parquet(rows, bundle.labels, bundle.id))
    return {
        "out": store.url(f"predictions-{name}.parquet"),
        "bundle": bundle.id,
        "dataset": {"url": dataset.store.root, "version": dataset.number, "split": split},
        "videos": len({row["video"] for row in rows}),
        "faces": len(rows),
        "labels": dict(sorted(Counter(row["label"] for row in rows).items())),
    }


def _classify(
    bundle_url: str, dataset_url: str, version: int, fold: int | None, where: str, split: str, rank: int, ranks: int
) -> list[tuple[str, list[float], list[float]]]:
    """(key, probabilities, instance weights) of this rank's bags."""
    rows = split_rows(open_dataset(dataset_url, version, fold, where), split)
    found = classify_rank(load_bundle(bundle_url), rows, rank, ranks)
    return [(one.key, one.p_K.tolist(), one.weights_N.tolist()) for one in found]


def _row(known: dict[str, Any], p_K: list[float], weights_N: list[float], labels: tuple[str, ...]) -> dict[str, Any]:
    """As `micacl predict` of a video has it; the index does not keep the box."""
    return {
        "video": known["video"],
        "track": int(known["key"].rpartition("_")[2]),
        "label": labels[p_K.index(max(p_K))],
        "probabilities": {label: round(p, 6) for label, p in zip(labels, p_K, strict=True)},
        "seconds": known["seconds"],
        "detector_score": known["detector_score"],
        "box": None,
        "instance_weights": [round(w, 4) for w in weights_N],
        "reason": "",
    }
