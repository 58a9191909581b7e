"""Data of the science: the synthetic sets, drawn, prepared and committed once, and kept.

    python bench/science/data.py dynamics OUT      eight classes that differ in dynamics alone, level
    python bench/science/data.py tail OUT          the same with an 18:1 tail

Both go through the whole house: raw videos, `micacl prepare` with the face detector, one committed version.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from pipeline.contract import CropConfig
from pipeline.dataset import open_dataset
from pipeline.demo_dynamics import DYNAMICS_LABELS, DynamicsConfig, write_dynamics_bucket
from pipeline.storage import open_store

SETS = {
    "dynamics": DynamicsConfig(seed=7, train_clips=(100,) * 8, test_clips=40),
    "tail": DynamicsConfig(seed=8, train_clips=(270, 180, 120, 80, 50, 35, 22, 15), test_clips=40),
}
CROP = CropConfig(size=64, frames_per_instance=8)


def draw(name: str, out: Path) -> str:
    """Write the raw bucket and its labels. Returns the URL of the table."""
    raw = open_store(str(out / "raw"))
    if not raw.exists("labels.csv"):
        print(json.dumps(write_dynamics_bucket(raw, SETS[name])), flush=True)
    return str(out / "raw" / "labels.csv")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=sorted(SETS))
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    out = args.out.resolve()
    table = draw(args.name, out)
    crop = ["--crop.size", str(CROP.size), "--crop.frames-per-instance", str(CROP.frames_per_instance)]
    from cluster.cli import VERBS
    from pipeline.cli import run

    code = run(VERBS, "micacl", ["prepare", table, str(out / "dataset"), "--labels", *DYNAMICS_LABELS, *crop])
    print(open_dataset(str(out / "dataset")).number)
    sys.exit(code)


if __name__ == "__main__":
    main()
