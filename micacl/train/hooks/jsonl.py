"""metrics.jsonl: one line a log and one a validation, put whole with each checkpoint: objects cannot be appended to.

{"step", "epoch", "lr", "clips_per_s", "wait_share", "loss/total", "loss/..."}      means over the ranks of one step
{"step", "epoch", "val/uar", "val/war", "val/loss", "val/clips"}                    over all validation clips
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from micacl.train.hooks import StepRecord
from pipeline.contract import canonical_json, expecting
from pipeline.storage import Store

METRICS = "metrics.jsonl"
_SHOWN = ("val/uar", "val/loss")


class JsonLines:
    """Keeps the lines of steps before `start_step` from an earlier attempt and goes on from there."""

    def __init__(self, store: Store, start_step: int) -> None:
        self.store = store
        self.lines: list[str] = []
        if start_step and store.exists(METRICS):
            before = store.get(METRICS).decode().splitlines()
            self.lines = [line for line in before if json.loads(line)["step"] <= start_step]

    def after_step(self, record: StepRecord) -> None:
        if record.losses is None:
            return
        fields = {
            "step": record.step,
            "epoch": record.epoch,
            "lr": record.lr,
            "clips_per_s": round(record.clips_per_s, 2),
            "wait_share": round(record.wait_share, 4),
            **{f"loss/{name}": value for name, value in record.losses.items()},
        }
        self.add(fields)

    def add(self, fields: Mapping[str, Any]) -> None:
        """One line."""
        self.lines.append(canonical_json(fields))

    def flush(self) -> None:
        self.store.put(METRICS, "".join(f"{line}\n" for line in self.lines).encode())


def read_metrics(store: Store) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(lines of logs, lines of validations), in the order of their steps. Raises MicaclError for lines not ours."""
    with expecting(store.url(METRICS)):
        lines = [json.loads(line) for line in store.get(METRICS).decode().splitlines()]
        logs, validations = ([x for x in lines if name in x] for name in ("loss/total", "val/uar"))
        for line, name in [(x, "loss/total") for x in logs] + [(x, n) for x in validations for n in _SHOWN]:
            float(line["step"]), float(line[name])
    return logs, validations
