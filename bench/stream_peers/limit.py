"""The decode limit: the same 16 JPEGs a clip from bytes in memory, in as many processes as the job says.

Nothing is read, checked, balanced, allocated, copied or handed over: one batch's memory is written over and over.
No loader on these cores can be faster.
"""

from __future__ import annotations

import json
import multiprocessing
import sys
import time

import numpy as np
from work import BATCH, INSTANCES, SIDE, WANTED, Job, decode, pick, read_bags


def main() -> None:
    job = Job(**json.loads(sys.argv[1]))
    bags = [jpegs for tars in job.data.values() for tar in tars[:1] for _, _, jpegs in read_bags(tar)]
    context = multiprocessing.get_context("fork")  # the bags are shared
    ready, found = context.Barrier(job.workers), context.Queue()
    workers = [context.Process(target=_decode, args=(job, bags, n, ready, found)) for n in range(job.workers)]
    for worker in workers:
        worker.start()
    parts = [found.get() for _ in workers]
    for worker in workers:
        worker.join()
    rate = sum(clips / wall_s for clips, wall_s, _ in parts)
    cpu_ms = sum(cpu_s for *_, cpu_s in parts) / sum(clips for clips, *_ in parts) * 1000
    print(json.dumps({"clips_per_s": rate, "cpu_ms": cpu_ms}))


def _decode(job: Job, bags: list, number: int, ready: object, found: object) -> None:
    rng = np.random.default_rng(number)
    batch = np.zeros((BATCH, INSTANCES, WANTED, SIDE, SIDE, 3), np.uint8)
    ready.wait()
    start, start_cpu, clips = time.perf_counter(), time.process_time(), 0
    while time.perf_counter() - start < job.seconds:
        for place, jpegs in zip(batch, [bags[i] for i in rng.integers(0, len(bags), BATCH)], strict=True):
            decode([jpegs[i] for i in pick(rng)], place)
        clips += BATCH
    found.put((clips, time.perf_counter() - start, time.process_time() - start_cpu))


if __name__ == "__main__":
    main()
