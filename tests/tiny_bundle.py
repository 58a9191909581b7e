"""A bundle of the tiny model with random weights, as `export_bundle` writes one; no training, no checkpoint."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import safetensors.torch

from micacl.bundle import BUNDLE, WEIGHTS
from micacl.config import RunConfig, to_dict
from micacl.model.micacl import build_model
from micacl.recipes import tiny_cpu
from pipeline.contract import SCHEMA_VERSION, CropConfig, canonical_json, digest
from pipeline.storage import open_store


def make_bundle(
    folder: str | Path, *, config: RunConfig | None = None, crop: CropConfig | None = None, seed: int = 0
) -> str:
    """Write a bundle. Returns its URL."""
    config, crop = config or tiny_cpu(), crop or CropConfig()
    model = build_model(config.model, seed=seed)
    weights = safetensors.torch.save({name: value.contiguous() for name, value in model.state_dict().items()})
    body = {
        "schema": SCHEMA_VERSION,
        "config": to_dict(config),
        "crop": {**dataclasses.asdict(crop), "hash": crop.hash},
        "weights": {"path": WEIGHTS, "bytes": len(weights), "sha256": digest(weights)},
        "origin": {"run": "none", "step": 0, "dataset": {}},
    }
    store = open_store(str(folder))
    store.put(WEIGHTS, weights)
    store.put(BUNDLE, canonical_json(body).encode())
    return store.root
