"""How `prepare` grows with the bucket: listing, planning and committing of 10^4 .. 10^6 videos, without their pixels.

    python bench/prepare_scale.py 10000 100000 1000000

A store that makes up its listing stands for the bucket, and made-up records stand for the crops; ledger, work list,
records, shard plan and version file are the real ones, written to a temporary folder. Each size runs in a process of
its own, so that peak memory is its own. Prints a Markdown table.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator

from pipeline.contract import DFEW_LABELS, CropConfig, PackConfig, Video, digest
from pipeline.crop import BagStub, CropRecord, crop_key
from pipeline.dataset import bag_counts, commit, version_body
from pipeline.ledger import Ledger, open_ledger
from pipeline.records import read_records, write_records
from pipeline.storage import Entry, LocalStore
from pipeline.worklist import write_worklist

CROP, PACK = CropConfig(), PackConfig()
BAG_BYTES = 220_000
SHARES = (0.209, 0.162, 0.228, 0.186, 0.126, 0.012, 0.077)
"""Of DFEW's classes."""


class MadeUpBucket(LocalStore):
    """A folder that says it has `videos` videos."""

    videos = 0

    def list(self, prefix: str = "") -> Iterator[Entry]:
        assert not prefix
        for i in range(self.videos):
            yield Entry(f"{i // 1000:04d}/clip_{i:07d}.mp4", 50_000, f"50000-{i}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("videos", type=int, nargs="+")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.inside:
        print(json.dumps(run(arguments.videos[0])))
        return
    rows = [inside(n) for n in arguments.videos]
    steps = list(rows[0]["seconds"])
    print(f"| videos | {' | '.join(steps)} | all, s | shards | version file, MB | peak memory, MB |")
    print(f"| {' | '.join(['---:'] * (len(steps) + 5))} |")
    for row in rows:
        seconds = row["seconds"]
        cells = [f"{seconds[s]:.1f}" for s in steps]
        print(
            f"| {row['videos']:,} | {' | '.join(cells)} | {sum(seconds.values()):.1f} | {row['shards']:,} | "
            f"{row['version_bytes'] / 1e6:.1f} | {row['peak_mb']:.0f} |"
        )


def inside(videos: int) -> dict:
    command = [sys.executable, __file__, str(videos), "--inside"]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def run(videos: int) -> dict:
    seconds: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder, open_ledger() as ledger:
        store = LocalStore(folder)
        for step, work in (
            ("list, s", lambda: ledger.add(listed(videos))),
            ("write work list, s", lambda: write_worklist(store, ledger.todo(), videos, CROP.hash)),
            ("take in records, s", lambda: [ledger.record(r) for r in records(ledger)] and None),
            ("plan, s", lambda: shards_of(ledger)),
            ("write records, s", lambda: write_records(store, ledger.records())),
        ):
            start = time.monotonic()
            made = work()
            seconds[step] = time.monotonic() - start
            shards, files = (made, None) if step.startswith("plan") else (locals().get("shards"), made)
        start = time.monotonic()
        body = version_body(labels=DFEW_LABELS, shards=shards, rows=bag_counts(shards), records=files)
        number, _ = commit(store, body, parent=0)
        seconds["commit, s"] = time.monotonic() - start
        version_bytes = store.size(f"versions/{number:06d}.json")
        start = time.monotonic()
        known = sum(1 for _ in read_records(store, files))
        seconds["read records again, s"] = time.monotonic() - start
        assert known == videos
    peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {
        "videos": videos,
        "seconds": seconds,
        "shards": len(shards),
        "version_bytes": version_bytes,
        "peak_mb": peak_mb,
    }


def listed(videos: int) -> Iterator[tuple[Video, str]]:
    """The bucket as the source lists it, with a label and a split made up by the name."""
    bucket = MadeUpBucket("/made-up")
    bucket.videos = videos
    for entry in bucket.list():
        place = int(digest(entry.key.encode())[:8], 16) / 16**8
        label = next(w for w, edge in zip(DFEW_LABELS, edges(), strict=True) if place < edge)
        video = Video(
            url=bucket.url(entry.key), name=entry.key, fingerprint=entry.fingerprint, label=label, split="train"
        )
        yield video, crop_key(video, CROP)


def edges() -> list[float]:
    return [sum(SHARES[: i + 1]) + (1 if i == len(SHARES) - 1 else 0) for i in range(len(SHARES))]


def records(ledger: Ledger) -> Iterator[CropRecord]:
    """One bag a video; every twentieth is quarantined."""
    for number, video in enumerate(ledger.todo()):
        stub = BagStub(key=f"{video.id}_0", sha256=digest(video.id.encode()), size=BAG_BYTES, columns={"blur": 1.0})
        bad = number % 20 == 0
        yield CropRecord(
            video=video.name,
            object=crop_key(video, CROP),
            frames=75,
            reason="no_face" if bad else None,
            bags=() if bad else (stub,),
        )


def shards_of(ledger: Ledger) -> list[dict]:
    """The entry of each shard in the version file, as pack would return it."""
    return [
        {
            "path": plan.path,
            "split": plan.split,
            "label": plan.label,
            "bags": len(plan.members),
            "bytes": sum(m.size for m in plan.members) + 1024,
            "index": {"path": plan.index_path, "sha256": plan.id * 2},
        }
        for plan in ledger.plans(PACK)
    ]


if __name__ == "__main__":
    main()
