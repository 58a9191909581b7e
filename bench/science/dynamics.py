"""Which part sees dynamics? Runs of bench/science/experiment.py on the set whose classes differ in dynamics alone.

    python bench/science/data.py dynamics OUT
    python bench/science/dynamics.py OUT/dataset OUT/runs --seeds 3 --processes 2

Writes one JSON file a run (finished runs are not done again) and prints a Markdown table.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
from experiment import Experiment
from grid import run_all

from micacl.batch import BatchConfig
from micacl.config import RunConfig, TrainConfig
from micacl.loss.objective import LossConfig
from micacl.model.backbone import BackboneConfig
from micacl.model.geiim import GEIIMConfig
from micacl.model.micacl import ModelConfig
from micacl.model.wian import WIANConfig
from pipeline.decode import StreamConfig
from pipeline.demo_dynamics import DYNAMICS_LABELS
from pipeline.plan import PlanConfig

replace = dataclasses.replace


def base(instances: int = 4, epochs: int = 12) -> RunConfig:
    """A small network without GEIIM, WIAN and MCCL: a mean over instances and cross entropy."""
    return RunConfig(
        model=ModelConfig(
            backbone=BackboneConfig.tiny(8),
            geiim=GEIIMConfig(enabled=False),
            wian=WIANConfig(kind="mean"),
            instances=instances,
            classes=DYNAMICS_LABELS,
            projection_dim=0,
        ),
        loss=LossConfig(mccl=False),
        plan=PlanConfig(policy="uniform", global_batch=16),
        stream=StreamConfig(frames=4, threads=1, processes=0),
        batch=BatchConfig(side=32, augment=False),
        train=TrainConfig(epochs=epochs, lr=2e-3, min_lr=2e-5),
    )


def with_geiim(config: RunConfig) -> RunConfig:
    return replace(config, model=replace(config.model, geiim=GEIIMConfig()))


def with_wian(config: RunConfig) -> RunConfig:
    return replace(config, model=replace(config.model, wian=WIANConfig()))


def with_mccl(config: RunConfig) -> RunConfig:
    return replace(config, model=replace(config.model, projection_dim=32), loss=LossConfig())


def experiments(epochs: int) -> list[Experiment]:
    out = []
    for grouping, regroup, instances in (("4x4", False, 4), ("16x1", True, 16)):
        plain = base(instances, epochs)
        parts = {
            "baseline": plain,
            "+GEIIM": with_geiim(plain),
            "+WIAN": with_wian(plain),
            "+MCCL": with_mccl(plain),
            "all": with_mccl(with_wian(with_geiim(plain))),
        }
        out += [Experiment(name=f"{grouping} {n}", config=c, regroup=regroup) for n, c in parts.items()]
    full = with_mccl(with_wian(with_geiim(base(epochs=epochs))))
    return out + [Experiment(name="4x4 all", config=full, control=c) for c in ("single", "shuffled")]


def factors(matrix: list[list[int]]) -> dict[str, float]:
    """Share of test clips right in each factor, whatever the others: chance is 0.5."""
    counts_KK, out = np.array(matrix), {}
    for place, name in enumerate(("speed", "way", "profile")):
        words = [label.split("_")[place] for label in DYNAMICS_LABELS]
        same_KK = np.array([[a == b for b in words] for a in words])
        out[name] = float(counts_KK[same_KK].sum() / counts_KK.sum())
    return out


def table(results: list[dict[str, Any]]) -> str:
    lines = ["| instances | model | control | UAR, by seed | speed | way | profile |", "|---|---|---|---|---|---|---|"]
    for name, control in dict.fromkeys((r["name"], r["control"]) for r in results):
        cell = [r for r in results if (r["name"], r["control"]) == (name, control)]
        parts = [factors(r["matrix"]) for r in cell]
        means = " | ".join(f"{np.mean([p[f] for p in parts]):.3f}" for f in ("speed", "way", "profile"))
        grouping, model = name.split(" ", 1)
        uars = ", ".join(f"{r['uar']:.3f}" for r in cell)
        lines.append(f"| {grouping} | {model} | {control} | {uars} | {means} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("dataset")
    parser.add_argument("out", type=Path)
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--only", default="", help="run experiments whose name contains this")
    args = parser.parse_args()
    chosen = [e for e in experiments(args.epochs) if args.only in f"{e.name} {e.control}"]
    print(table(run_all(chosen, args.dataset, range(args.seeds), args.out, args.processes)))


if __name__ == "__main__":
    main()
