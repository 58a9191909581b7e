"""Long-tail methods on the demo's expressions with their tail of 18:1: the same five seeds, the same level test split.

    python bench/science/data.py tail OUT
    python bench/science/tail.py OUT/dataset OUT/runs --seeds 5 --processes 2

The methods are the changes of micacl/recipes.py, so a table row is a recipe that a user can train. All keep the model
(with GEIIM and WIAN), the epochs and the learning rate. Post-hoc methods reuse the runs of cross-entropy and train
nothing. Intervals are 95 % t-intervals over seeds; differences are paired by seed, against oversampling.
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
from dynamics import base, replace
from experiment import Experiment
from grid import run_all

from micacl.batch import BatchConfig
from micacl.config import RunConfig
from micacl.loss.config import LossConfig
from micacl.metrics import group_recalls, long_tail_groups
from micacl.model.geiim import GEIIMConfig
from micacl.model.wian import WIANConfig
from micacl.recipes import CHANGES, LONG_TAIL
from pipeline.contract import DFEW_LABELS

T_95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 8: 2.365, 10: 2.262}
"""Student's t for a 95 % interval, by seeds."""
PRICE = "oversampling"
SIDE = 32


def full(epochs: int) -> RunConfig:
    """GEIIM, WIAN and MCCL at their defaults on the small network, with augmentation."""
    config = base(epochs=epochs)
    model = replace(config.model, geiim=GEIIMConfig(), wian=WIANConfig(), projection_dim=32, classes=DFEW_LABELS)
    batch = BatchConfig(side=SIDE, crop_share=0.9, jitter=0.1)
    return replace(config, model=model, loss=LossConfig(), batch=batch)


SMOOTHED = "oversampling, smoothing 0.1"


def smoothed(config: RunConfig, name: str) -> RunConfig:
    """A change of the recipes, with label smoothing."""
    changed = CHANGES[name](config)
    return replace(changed, loss=replace(changed.loss, label_smoothing=0.1))


def variants(config: RunConfig) -> dict[str, RunConfig]:
    """Of MCCL beside oversampling and label smoothing: what it takes to help, one change at a time."""
    start = smoothed(config, "mccl-oversampling")

    def loss(**fields: Any) -> RunConfig:
        return replace(start, loss=replace(start.loss, **fields))

    def prototypes(kind: str, **fields: Any) -> RunConfig:
        changed = loss(**fields)
        return replace(changed, model=replace(changed.model, prototypes=kind))

    return {
        "bag only": loss(scales=("bag",)),
        "bag, instance, frame": replace(
            loss(scales=("bag", "instance", "frame")),
            model=replace(start.model, projection_scales=("bag", "instance", "frame")),
        ),
        "weight 0.05": loss(mccl_weight=0.05),
        "weight 0.5": loss(mccl_weight=0.5),
        "weight 1": loss(mccl_weight=1.0),
        "class anchors": loss(mccl_anchors="classes"),
        "plain SupCon": loss(class_average=False),
        "learned prototypes": prototypes("learned"),
        "classifier prototypes": prototypes("classifier"),
        "projection 128": replace(start, model=replace(start.model, projection_dim=128)),
        "square root sampling, balanced softmax": replace(
            loss(name="balanced_softmax"), plan=replace(start.plan, policy="sqrt")
        ),
        "queue 8": loss(queue_clips_per_class=8),
        "cosine schedule": loss(mccl_schedule="cosine", mccl_weight=0.5),
        "bag, prototypes, weight 0.5": prototypes("learned", scales=("bag",), mccl_weight=0.5),
    }


def experiments(which: str, epochs: int) -> list[Experiment]:
    config = full(epochs)
    if which == "variants":
        beside = {SMOOTHED: smoothed(config, PRICE), "mccl-oversampling": smoothed(config, "mccl-oversampling")}
        return [Experiment(name=name, config=c) for name, c in (beside | variants(config)).items()]
    rows = {**{name: CHANGES[name](config) for name in LONG_TAIL}, SMOOTHED: smoothed(config, PRICE)}
    return [Experiment(name=name, config=c, posthoc=name == "cross-entropy") for name, c in rows.items()]


def numbers(result: dict[str, Any], matrix: list[list[int]]) -> dict[str, float]:
    """UAR; WAR of a test split with the tail of training; mean recall of head, mid and tail classes."""
    counts_KK, clips_K = np.array(matrix), np.array(result["train_clips"])
    recall_K = np.diagonal(counts_KK) / counts_KK.sum(1)
    groups = long_tail_groups(dict(zip(DFEW_LABELS, result["train_clips"], strict=True)))
    recall = dict(zip(DFEW_LABELS, recall_K.tolist(), strict=True))
    means = {name: float("nan") if mean is None else mean for name, mean in group_recalls(recall, groups).items()}
    return {"UAR": float(recall_K.mean()), "WAR": float((recall_K * clips_K).sum() / clips_K.sum()), **means}


def interval(values: list[float]) -> str:
    """Mean and half width in percent; a single value without."""
    mean = 100 * float(np.mean(values))
    if len(values) < 2:
        return f"{mean:.1f}"
    half = 100 * T_95[len(values)] * float(np.std(values, ddof=1)) / math.sqrt(len(values))
    return f"{mean:.1f} ± {half:.1f}"


def table(rows: dict[str, list[dict[str, float]]], price: str) -> str:
    """`rows`: by method the numbers of its seeds, in one order of seeds."""
    lines = [
        f"| method | UAR | WAR, long-tailed | head | mid | tail | UAR, less {price} |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, found in rows.items():
        cells = [interval([f[k] for f in found]) for k in ("UAR", "WAR", "head", "mid", "tail")]
        paired = [a["UAR"] - b["UAR"] for a, b in zip(found, rows[price], strict=True)]
        lines.append(f"| {name} | {' | '.join(cells)} | {interval(paired)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("dataset")
    parser.add_argument("out", type=Path)
    parser.add_argument("--which", choices=("methods", "variants"), default="methods")
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--only", default="", help="rows whose names contain one of these words; oversampling always")
    args = parser.parse_args()
    words = args.only.split(",")
    rows = experiments(args.which, args.epochs)
    chosen = [e for e in rows if e.name in (PRICE, SMOOTHED) or any(word in e.name for word in words)]
    results = run_all(chosen, args.dataset, range(args.seeds), args.out, args.processes)
    rows: dict[str, list[dict[str, float]]] = {}
    for result in results:
        rows.setdefault(result["name"], []).append(numbers(result, result["matrix"]))
        for name, matrix in result.get("posthoc", {}).items():
            rows.setdefault(f"{result['name']}, {name}", []).append(numbers(result, matrix))
    print(table(rows, PRICE if PRICE in rows else next(iter(rows))))
    sys.stdout.flush()


if __name__ == "__main__":
    main()
