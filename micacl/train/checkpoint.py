"""Training state <-> storage. A checkpoint is visible when its COMPLETE file is, and that is put last.

    <run>/checkpoints/00000050/model.safetensors       weights and buffers
                               optimizer.safetensors   AdamW moments of every parameter, whole (not by rank)
                               objective.safetensors   the loss's queue, if it has one; no part of a bundle
                               state.json              step, plan state, config
                               COMPLETE.json           every file with bytes and sha256

Whole tensors by name, so a run continues at any number of ranks and with either engine; safetensors, so that reading
a checkpoint runs no code. (DeepSpeed's own format is pickle and tied to the number of ranks: docs/decisions/0004.)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor

from pipeline.contract import (
    SCHEMA_VERSION,
    MicaclError,
    canonical_json,
    digest,
    expecting,
    foreign,
    json_object,
    require_schema,
)
from pipeline.storage import Store

_COMPLETE = "COMPLETE.json"
_OBJECTIVE = "objective.safetensors"
_FILES = ("model.safetensors", "optimizer.safetensors", "state.json")


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """All that a run needs to continue, or an export to start from."""

    step: int
    """Updates done."""
    weights: Mapping[str, Tensor]
    moments: Mapping[str, Tensor]
    state: Mapping[str, Any]
    """`config`, `plan` (PlanState), `dataset` (url, version, sha256), `class_counts`, and the `best` so far."""
    objective: Mapping[str, Tensor] = field(default_factory=dict)
    """Of `Objective.export_state`; often empty."""


def folder(step: int) -> str:
    return f"checkpoints/{step:08d}"


def write_checkpoint(store: Store, checkpoint: Checkpoint) -> str:
    """Put the files, then COMPLETE. Returns the checkpoint's folder. One rank writes."""
    at = folder(checkpoint.step)
    files = {
        "model.safetensors": safetensors.torch.save(dict(checkpoint.weights)),
        "optimizer.safetensors": safetensors.torch.save(dict(checkpoint.moments)),
        "state.json": canonical_json({"schema": SCHEMA_VERSION, "step": checkpoint.step, **checkpoint.state}).encode(),
    }
    if checkpoint.objective:
        files[_OBJECTIVE] = safetensors.torch.save(dict(checkpoint.objective))
    for name, data in files.items():
        store.put(f"{at}/{name}", data)
    listing = {name: {"bytes": len(data), "sha256": digest(data)} for name, data in files.items()}
    complete = {"schema": SCHEMA_VERSION, "step": checkpoint.step, "files": listing}
    store.put(f"{at}/{_COMPLETE}", canonical_json(complete).encode())
    return at


def complete_steps(store: Store) -> list[int]:
    """Steps of the checkpoints that are complete, ascending."""
    keys = (e.key.split("/") for e in store.list("checkpoints/"))
    return sorted(int(parts[1]) for parts in keys if parts[-1] == _COMPLETE and parts[1].isdecimal())


def newest_checkpoint(store: Store) -> str:
    """The newest complete checkpoint in words: for the message of a run that must stop."""
    steps = complete_steps(store)
    if not steps:
        return f"the run's beginning: {store.root} has no complete checkpoint yet"
    return f"the checkpoint of step {steps[-1]}, {store.url(folder(steps[-1]))}"


def read_checkpoint(store: Store, step: int | None = None) -> Checkpoint:
    """A complete checkpoint, the newest by default, hash-checked. Raises MicaclError."""
    store.check()
    steps = complete_steps(store)
    if not steps or (step is not None and step not in steps):
        raise MicaclError(
            f"{store.root} has no complete checkpoint{'' if step is None else f' of step {step}'}.",
            "There is nothing to read.",
            f"Train first (`micacl train`), or name one of {steps}." if steps else "Train first: `micacl train`.",
        )
    at = folder(step if step is not None else steps[-1])
    where = store.url(at)
    complete = json_object(store.get(f"{at}/{_COMPLETE}"), f"{where}/{_COMPLETE}")
    require_schema(complete.get("schema"), where)
    with expecting(f"a checkpoint in {where}"):
        names = [*_FILES, *([_OBJECTIVE] if _OBJECTIVE in complete["files"] else [])]
        files = {name: _checked(store, f"{at}/{name}", complete["files"][name]) for name in names}
        state = json_object(files["state.json"], f"{where}/state.json")
        missing = sorted({"config", "crop", "dataset", "plan"} - set(state))
        if missing:
            raise KeyError(*missing)
        return Checkpoint(
            int(complete["step"]),
            load_tensors(files["model.safetensors"], f"{where}/model.safetensors"),
            load_tensors(files["optimizer.safetensors"], f"{where}/optimizer.safetensors"),
            state,
            load_tensors(files[_OBJECTIVE], f"{where}/{_OBJECTIVE}") if _OBJECTIVE in files else {},
        )


def load_tensors(data: bytes, where: str) -> dict[str, Tensor]:
    """The tensors of a safetensors file. Raises MicaclError."""
    try:
        tensors: dict[str, Tensor] = safetensors.torch.load(data)
    except safetensors.SafetensorError as error:
        raise foreign(where, error) from error
    return tensors


def _checked(store: Store, key: str, listed: Mapping[str, Any]) -> bytes:
    try:
        data = store.get(key)
    except FileNotFoundError:
        data = b""
    if len(data) != listed["bytes"] or digest(data) != listed["sha256"]:
        raise MicaclError(
            f"{store.url(key)} is not the file that COMPLETE.json lists.",
            "Training from it would continue from a damaged state.",
            "Delete that checkpoint's folder; the run continues from the one before.",
        )
    return data


def drop_old(store: Store, keep: int, best: int | None = None) -> None:
    """Delete all complete checkpoints but the newest `keep` and the best; COMPLETE goes first: none is half there."""
    for step in complete_steps(store)[:-keep]:
        if step == best:
            continue
        at = folder(step)
        store.delete(f"{at}/{_COMPLETE}")
        for entry in list(store.list(f"{at}/")):
            store.delete(entry.key)
