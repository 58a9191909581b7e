"""Data of the science: the synthetic sets, drawn, prepared and committed once, and kept.

    python bench/science/data.py dynamics OUT      eight classes that differ in dynamics alone, level
    python bench/science/data.py tail OUT          the demo's seven expressions, ambiguous, with its tail of 18:1

Both go through the whole house: raw videos, `micacl prepare` with the face detector, one committed version.
"""

from __future__ import annotations

import argparse
import json
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from cluster.cli import VERBS
from pipeline.cli import run
from pipeline.contract import DFEW_LABELS
from pipeline.demo import DemoConfig, write_raw_bucket
from pipeline.demo_dynamics import DYNAMICS_LABELS, DynamicsConfig, write_dynamics_bucket
from pipeline.storage import Store, open_store

DYNAMICS = DynamicsConfig(seed=7, train_clips=(150,) * 8, test_clips=40, train_subjects=40, test_subjects=12)
TAIL = DemoConfig(
    seed=11,
    train_clips=(90, 30, 54, 40, 20, 5, 10),
    test_clips=24,
    train_subjects=15,
    test_subjects=8,
    unlabelled_clips=1,
    side=160,
    ambiguity=0.7,
)
"""Up to 0.7 of a clip's movement is another class's: without that the small network tells the classes apart, tail and
all, and there is nothing to see."""
PREPARE = {
    "dynamics": [
        "--labels",
        *DYNAMICS_LABELS,
        "--crop.size",
        "64",
        "--crop.margin",
        "1.0",
        "--crop.frames-per-instance",
        "8",
    ],
    "tail": ["--labels", *DFEW_LABELS, "--crop.size", "64"],
}


def draw(name: str, raw: Store, seed: int | None) -> dict[str, Any]:
    chosen: dict[str, Any] = {} if seed is None else {"seed": seed}
    if name == "tail":
        return write_raw_bucket(raw, replace(TAIL, **chosen))
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        return write_dynamics_bucket(raw, replace(DYNAMICS, **chosen), partial(pool.map, chunksize=16))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=sorted(PREPARE))
    parser.add_argument("out", type=Path)
    parser.add_argument("--seed", type=int, help="of other faces, clips and courses than those of docs/lab.md")
    args = parser.parse_args()
    out = args.out.resolve()
    raw = open_store(str(out / "raw"))
    if not raw.exists("labels.csv"):
        print(json.dumps(draw(args.name, raw, args.seed)), flush=True)
    table, dataset = str(out / "raw" / "labels.csv"), str(out / "dataset")
    sys.exit(run(VERBS, "micacl", ["prepare", table, dataset, *PREPARE[args.name]]))


if __name__ == "__main__":
    main()
