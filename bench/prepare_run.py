"""One job in a process of its own, so that its time and memory are its own. Called by bench/prepare.py.

    python bench/prepare_run.py ray TABLE DATASET WORKERS     what `micacl prepare --workers N` does
    python bench/prepare_run.py plain TABLE DATASET PART OF   what its crop tasks do, of each OF-th row, without Ray

The last line of stdout is JSON; times are of time.monotonic(), which all processes of a machine share. `plain` waits
for a line on stdin before it begins.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
import time
from collections.abc import Iterator

from pipeline.contract import CropConfig
from pipeline.sources import find_source

_CROPPED = re.compile(r"cropped (\d+)/")


def run_ray(table: str, dataset: str, workers: int) -> dict[str, object]:
    """The job as `pipeline.cli.prepare` starts it. `crop_s`: from when Ray is there to the last crop."""
    from pipeline.prepare import PrepareConfig, prepare
    from pipeline.ray_local import ray_session

    started, lines = [], []

    @contextlib.contextmanager
    def session() -> Iterator[str]:
        with ray_session(num_cpus=workers) as kind:
            started.append(time.monotonic())
            yield kind

    def say(text: str) -> None:
        if found := _CROPPED.match(text):
            lines.append((time.monotonic(), int(found[1])))

    found = find_source(table)
    result = prepare(found.videos(), ("auto",), dataset, PrepareConfig(), say, session)
    return {"start_s": started[0], "lines": lines, "videos": result["videos"], "decoded": result["videos_decoded"]}


def run_plain(table: str, dataset: str, part: int, of: int) -> dict[str, object]:
    """`crop_video` of one video after another; the first one is not counted, so that the sandbox is there."""
    from pipeline.crop import crop_video
    from pipeline.storage import open_store

    videos, config, store = list(find_source(table).videos())[part::of], CropConfig(), open_store(dataset)
    crop_video(videos[0], config, store)
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    sys.stdin.readline()
    start = time.monotonic()
    worked = sum(crop_video(video, config, store)[1] for video in videos[1:])
    return {"start_s": start, "stop_s": time.monotonic(), "decoded": worked}


def main(how: str, table: str, dataset: str, *numbers: str) -> None:
    run = {"ray": run_ray, "plain": run_plain}[how]
    sys.stdout.write(json.dumps(run(os.path.abspath(table), os.path.abspath(dataset), *map(int, numbers))) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
