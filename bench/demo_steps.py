"""Seconds of each demo step as a Markdown table: python bench/demo_steps.py demo-out/demo.json

Says with it what the numbers hang on: command, commit, machine, date.
"""

from __future__ import annotations

import datetime as dt
import json
import os
import platform
import subprocess
import sys
from pathlib import Path


def machine() -> str:
    cpu = next(
        (x.split(":")[1].strip() for x in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in x), ""
    )
    memory_gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return f"{os.cpu_count()} cores ({cpu or platform.machine()}), {memory_gib:.0f} GiB, no GPU used"


def commit() -> str:
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], check=False, capture_output=True, text=True)
    return done.stdout.strip() or "unknown"


def main(path: str) -> None:
    said = json.loads(Path(path).read_text())
    print(f"`micacl demo`, commit {commit()}, {machine()}, {dt.date.today().isoformat()}\n")  # noqa: DTZ011
    print("| step | seconds |\n| --- | ---: |")
    for name, seconds in said["seconds"].items():
        print(f"| {name} | {seconds:g} |")
    scores = said.get("evaluate", {})
    uar, war, clips = scores.get("uar", 0), scores.get("war", 0), scores.get("clips")
    print(f"\nHeld-out subjects: UAR {uar:.3f}, WAR {war:.3f}, {clips} clips.")


if __name__ == "__main__":
    main(*sys.argv[1:])
