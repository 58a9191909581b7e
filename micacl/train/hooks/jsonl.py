"""metrics.jsonl: one line a log. Objects cannot be appended to, so the file is put whole with each checkpoint."""

from __future__ import annotations

import json

from micacl.train.hooks import StepRecord
from pipeline.contract import canonical_json
from pipeline.storage import Store

METRICS = "metrics.jsonl"


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
        self.lines.append(canonical_json(fields))

    def flush(self) -> None:
        self.store.put(METRICS, "".join(f"{line}\n" for line in self.lines).encode())
