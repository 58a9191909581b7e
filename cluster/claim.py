"""<run>/config.json: what a run is, written by the first to come. Who continues it must mean the same run.

    {"config": RunConfig, "dataset": {url, version, sha256, ..., "before": [...]}, "from": {"run", "step"} | null}

A run that begins with another run's checkpoint (`--from-run`) has seen that one's clips too. "before" lists the
datasets of all runs that it descends from: `micacl forget --runs` goes by it.
"""

from __future__ import annotations

import json
from typing import Any

from micacl.config import RunConfig, first_difference, to_dict
from micacl.train.checkpoint import read_checkpoint
from pipeline.contract import MicaclError, canonical_json, json_object
from pipeline.storage import open_store

CONFIG = "config.json"


def claim(run_url: str, config: RunConfig, dataset: dict[str, Any], from_run: str | None = None) -> None:
    """Write config.json, or check it. Raises MicaclError if the run was begun as another one.

    Args:
        dataset: where it is and which version, as checkpoints name it.
        from_run: the run whose newest checkpoint this one begins with; which step that is, is decided once.
    """
    store = open_store(run_url)
    if store.exists(CONFIG):
        _require_same(run_url, config, from_run)
        return
    origin, before = _origin(from_run, config, dataset) if from_run else (None, [])
    said = {
        "config": to_dict(config),
        "dataset": {**dataset, **({"before": before} if before else {})},
        "from": origin,
    }
    if not store.put_if_absent(CONFIG, canonical_json(said).encode()):
        _require_same(run_url, config, from_run)


def claimed(run_url: str) -> dict[str, Any]:
    """What config.json says. Raises MicaclError."""
    store = open_store(run_url)
    return {"from": None, **json_object(store.get(CONFIG), store.url(CONFIG))}


def _origin(from_run: str, config: RunConfig, dataset: dict[str, Any]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """(run and step to begin with, datasets that it has seen). Raises MicaclError for a model of another shape."""
    checkpoint = read_checkpoint(open_store(from_run))
    theirs, ours = checkpoint.state["config"]["model"], json.loads(canonical_json(to_dict(config.model)))
    if theirs != ours:
        raise MicaclError(
            f"--from-run {from_run} has another model ({first_difference(theirs, ours)}).",
            "Its weights do not fit.",
            "Give the --model flags of that run.",
        )
    if any(checkpoint.state["dataset"].get(name) == dataset[name] for name in ("url", "sha256")):
        _require_unseen(from_run, checkpoint.state["config"]["train"], config)
    data = {**checkpoint.state["dataset"], "split": checkpoint.state["config"]["train"]["split"]}
    return {"run": from_run, "step": checkpoint.step}, [*data.pop("before", []), data]


def _require_unseen(from_run: str, theirs: dict[str, Any], config: RunConfig) -> None:
    """What this run validates and tests on, the other must not have been trained on. Raises MicaclError."""
    train = config.train
    held_out = ("val_share", "val_seed") if train.val_share else ()
    for name in ("fold", *held_out):
        if theirs.get(name) != getattr(train, name):
            raise MicaclError(
                f"--from-run {from_run} was trained with train.{name} {theirs.get(name)}, this run has "
                f"{getattr(train, name)}.",
                "It has seen clips that this run would be tested or validated on.",
                f"Give --train.{name.replace('_', '-')} as that run has it.",
            )


def _require_same(run_url: str, config: RunConfig, from_run: str | None) -> None:
    found, ours = claimed(run_url), json.loads(canonical_json(to_dict(config)))
    if found.get("config") != ours:
        raise MicaclError(
            f"{run_url} was begun with another configuration ({first_difference(found.get('config'), ours)}).",
            "Continuing would mix two runs.",
            f"Give the flags that the run was begun with, or a new run URL with `--from-run {run_url}`.",
        )
    if from_run and (found["from"] or {}).get("run") != from_run:
        raise MicaclError(
            f"{run_url} was not begun from {from_run}.",
            "It has steps of its own already.",
            "Leave --from-run out to continue it, or give a new run URL.",
        )
