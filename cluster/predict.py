"""`micacl predict`: a bucket of unlabelled videos -> Parquet, with Ray Data.

    list ──> crop (tasks on CPUs; bags as tar blocks) ──> classify (actors that hold the model) ──> one row a face

A video that cannot be used gives one row with its reason: as many videos come out as went in. Output files are named
by the clips in them and the bundle, so running again writes the same objects.
"""

from __future__ import annotations

import dataclasses
import io
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray
import ray.data

from micacl.bundle import Bundle, load_bundle
from micacl.predictor import Predictor
from pipeline.bags import Bag
from pipeline.contract import CropConfig, MicaclError, Quarantined, Video, canonical_json, digest
from pipeline.prepare import quiet_ray_data
from pipeline.raw import fetch_clip
from pipeline.sandbox import crop_in_sandbox
from pipeline.shards import read_bags
from pipeline.storage import open_store

_VIDEOS_PER_TASK = 4


def predict(
    bundle: Bundle, videos: Sequence[Video], out_url: str, *, workers: int, faces: str, gpu: bool
) -> dict[str, Any]:
    """Predict videos on the Ray that is up. Returns counts for the JSON line. Raises MicaclError."""
    store, crop = open_store(out_url), dataclasses.replace(bundle.crop, faces=faces)
    rows = [{"name": v.name, "video": v.to_json()} for v in videos]
    found = _run(rows, bundle.url, crop, workers=workers, gpu=gpu)
    out = sorted(found, key=lambda row: (row["video"], row["track"]))
    inputs = canonical_json([bundle.id, crop.hash, [[v.name, v.kind, v.cropped] for v in videos]])
    key = f"predictions-{digest(inputs.encode())[:16]}.parquet"
    store.put(key, predictions_parquet(out, bundle.labels, bundle.id))
    bad = Counter(row["reason"] for row in out if row["reason"])
    return {
        "out": store.url(key),
        "bundle": bundle.id,
        "videos": len({row["video"] for row in out}),
        "faces": sum(1 for row in out if not row["reason"]),
        "quarantined": dict(sorted(bad.items())),
        "labels": dict(sorted(Counter(row["label"] for row in out if not row["reason"]).items())),
    }


def _run(
    rows: list[dict[str, Any]], bundle_url: str, crop: CropConfig, *, workers: int, gpu: bool
) -> Iterator[dict[str, Any]]:
    quiet_ray_data()

    def crop_batch(batch: dict[str, Any]) -> dict[str, list[Any]]:
        done = [_crop_one(Video.from_json(str(text)), crop) for text in batch["video"]]
        tars, reasons, errors = zip(*done, strict=True)
        return {"name": list(batch["name"]), "tar": list(tars), "reason": list(reasons), "error": list(errors)}

    data = (
        ray.data.from_items(rows, override_num_blocks=-(-len(rows) // _VIDEOS_PER_TASK))
        .map_batches(crop_batch, batch_size=None, num_cpus=1)
        .map_batches(
            _Classify,
            fn_constructor_args=(bundle_url, "cuda" if gpu else "cpu"),
            compute=ray.data.ActorPoolStrategy(size=workers),
            batch_size=_VIDEOS_PER_TASK,
            num_cpus=0 if gpu else 0.5,
            num_gpus=1 if gpu else 0,
        )
    )
    for row in data.iter_rows():
        if row["error"]:
            raise MicaclError(*json.loads(str(row["error"])))
        yield from json.loads(str(row["faces"]))


def _crop_one(video: Video, crop: CropConfig) -> tuple[bytes, str, str]:
    """(tar blocks of the bags, reason, error): two of them are empty. Ray Data would garble an error that is raised."""
    try:
        raw = fetch_clip(video, crop)
        return crop_in_sandbox(raw, name=video.name, video_id=video.id, config=crop).require(), "", ""
    except Quarantined as why:
        return b"", why.reason.value, ""
    except MicaclError as error:
        return b"", "", json.dumps(error.args)


class _Classify:
    """An actor that holds the model."""

    def __init__(self, bundle_url: str, device: str) -> None:
        self.predictor = Predictor(load_bundle(bundle_url), device)

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[str]]:
        bags: list[Bag] = []
        owners: list[str] = []
        out: list[list[dict[str, Any]]] = []
        errors = [str(e) for e in batch["error"] if e]
        if errors:
            return {"faces": ["[]"], "error": errors[:1]}
        for name, tar, reason in zip(batch["name"], batch["tar"], batch["reason"], strict=True):
            found = [] if reason else list(read_bags(bytes(tar), str(name)))
            bags += found
            owners += [str(name)] * len(found)
            if reason:
                out.append([{"video": str(name), "track": -1, "reason": str(reason)}])
        for name, face in zip(owners, self.predictor.classify(bags), strict=True):
            out.append([{"video": name, "reason": "", **face.to_dict()}])
        return {"faces": [canonical_json([row for rows in out for row in rows])], "error": [""]}


def predictions_parquet(rows: list[dict[str, Any]], labels: tuple[str, ...], bundle_id: str) -> bytes:
    """One row a face; a quarantined video has one row with its reason and nulls."""
    columns: dict[str, list[Any]] = {
        "video": [r["video"] for r in rows],
        "track": [r["track"] for r in rows],
        "label": [r.get("label") for r in rows],
        **{f"p_{label}": [r.get("probabilities", {}).get(label) for r in rows] for label in labels},
        "seconds": [r.get("seconds") for r in rows],
        "detector_score": [r.get("detector_score") for r in rows],
        "box": [r.get("box") for r in rows],
        "instance_weights": [r.get("instance_weights") for r in rows],
        "reason": [r["reason"] or None for r in rows],
        "bundle": np.repeat(bundle_id, len(rows)).tolist(),
    }
    types = {name: pa.string() for name in ("video", "label", "reason", "bundle")}
    types |= {"track": pa.int32(), "box": pa.list_(pa.float64()), "instance_weights": pa.list_(pa.float64())}
    arrays = {name: pa.array(values, types.get(name, pa.float64())) for name, values in columns.items()}
    out = io.BytesIO()
    pq.write_table(pa.table(arrays), out, compression="zstd")
    return out.getvalue()
