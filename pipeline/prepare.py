"""`micacl prepare`: a raw bucket -> shards. Crop every video, pack the bags, commit one version. Ray is here only.

    list ──> crop (a task for a few videos) ──> plan ──> pack (a task a shard) ──> commit (one conditional put)

The steps are pure functions of other rooms; this one hands rows to Ray Data and counts what comes back. Killed
anywhere and run again, it finds what is done by looking at storage and does the rest.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import ray
import ray.data

from pipeline.contract import (
    CropConfig,
    MicaclError,
    PackConfig,
    Video,
    canonical_json,
    digest,
)
from pipeline.crop import CropRecord, crop_video
from pipeline.dataset import bag_counts, commit, version_body
from pipeline.pack import Member, ShardPlan, pack_shard, plan_shards
from pipeline.sources import assign_split
from pipeline.storage import open_store

_VIDEOS_PER_TASK = 4
"""Small enough that a lost task loses little, large enough that Ray's cost per task (some 10 ms) does not show."""

Progress = Callable[[str], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class PrepareConfig:
    """What `prepare` does."""

    test_share: float = 0.2
    """Of subjects, for sources that name no split."""
    crop: CropConfig = field(default_factory=CropConfig)
    pack: PackConfig = field(default_factory=PackConfig)


def prepare(
    videos: Sequence[Video], labels: tuple[str, ...], dataset_url: str, config: PrepareConfig, say: Progress
) -> dict[str, Any]:
    """Run the job on the Ray that is up. Returns counts for the JSON line.

    Args:
        videos, labels: from pipeline.sources.open_source.

    Raises MicaclError if no video gives a bag; nothing is visible to readers until the last step.
    """
    store = open_store(dataset_url)
    records, cropped = _crop_all(videos, config.crop, dataset_url, say)
    written = [(v, assign_split(v, config.test_share), records[v.name]) for v in videos if records[v.name].bags]
    if not written:
        raise MicaclError(
            f"None of the {len(videos)} videos gave a bag ({_reasons(records)}).",
            "No version was committed.",
            "`micacl status URL` lists the reasons; check that the videos show faces.",
        )
    shards, packed = _pack_all(plan_shards(written, config.pack), dataset_url, say)
    quarantined = {name: r for name, r in records.items() if r.reason}
    body = version_body(
        labels=labels,
        shards=shards,
        rows=bag_counts(shards),
        crop={**dataclasses.asdict(config.crop), "hash": config.crop.hash},
        videos={"listed": len(videos), "written": len(written), "quarantined": len(quarantined)},
        quarantined=dict(sorted(Counter(r.reason for r in quarantined.values()).items())),
        quarantine=_write_quarantine(dataset_url, quarantined),
    )
    number, new = commit(store, body)
    say(f"version {number} {'committed' if new else 'is there already and says the same: nothing was written'}")
    return {
        "dataset": store.root,
        "version": number,
        "committed": new,
        "videos": body["videos"],
        "videos_decoded": cropped,
        "shards": len(shards),
        "shards_written": packed,
        "bags": body["counts"],
        "quarantined": body["quarantined"],
    }


def _crop_all(
    videos: Sequence[Video], config: CropConfig, dataset_url: str, say: Progress
) -> tuple[dict[str, CropRecord], int]:
    """Every video's record by name, and how many were decoded in this run."""

    def crop_batch(batch: dict[str, Any]) -> dict[str, list[Any]]:
        store = open_store(dataset_url)
        done = [crop_video(_video(text), config, store) for text in batch["video"]]
        return {"record": [r.to_json() for r, _ in done], "worked": [worked for _, worked in done]}

    rows = [{"video": canonical_json(dataclasses.asdict(v))} for v in videos]
    records: dict[str, CropRecord] = {}
    worked, start, last = 0, time.monotonic(), 0.0
    for row in _ray_map(rows, crop_batch, _VIDEOS_PER_TASK):
        record = CropRecord.from_json(row["record"])
        records[record.video] = record
        worked += bool(row["worked"])
        now = time.monotonic()
        if now - last > 2 or len(records) == len(videos):
            last = now
            say(_progress(records, worked, len(videos), now - start))
    return records, worked


def _pack_all(plans: Sequence[ShardPlan], dataset_url: str, say: Progress) -> tuple[list[dict[str, Any]], int]:
    """The version's entry of every shard, and how many were written in this run."""

    def pack_batch(batch: dict[str, Any]) -> dict[str, list[Any]]:
        store = open_store(dataset_url)
        done = [pack_shard(_plan(text), store) for text in batch["plan"]]
        return {"entry": [canonical_json(entry) for entry, _ in done], "wrote": [wrote for _, wrote in done]}

    rows = [{"plan": canonical_json(dataclasses.asdict(p))} for p in plans]
    done = list(_ray_map(rows, pack_batch, 1))
    wrote = sum(bool(row["wrote"]) for row in done)
    say(f"{len(plans)} shards, {wrote} written")
    return [_json(row["entry"]) for row in done], wrote


def _ray_map(rows: list[dict[str, Any]], function: Callable[..., Any], rows_per_task: int) -> Iterator[dict[str, Any]]:
    """Rows through Ray Data in tasks of `rows_per_task`, as they finish. Our own errors come out as themselves."""
    quiet_ray_data()
    blocks = -(-len(rows) // rows_per_task)

    def guarded(batch: dict[str, Any]) -> dict[str, list[Any]]:
        """Ray Data wraps what a function raises beyond recognition: our errors travel as rows."""
        try:
            done = function(batch)
        except MicaclError as error:
            return {"error": [json.dumps(error.args)]}
        except OSError as error:
            said = (f"{type(error).__name__}: {error}.", "The job stopped.", "Check the path, its rights and the disk.")
            return {"error": [json.dumps(said)]}
        return {**done, "error": [""] * len(next(iter(done.values())))}

    data = ray.data.from_items(rows, override_num_blocks=blocks).map_batches(
        guarded, batch_size=None, batch_format="numpy", num_cpus=1
    )
    for row in data.iter_rows():
        if row["error"]:
            raise MicaclError(*json.loads(row["error"]))
        yield row


def quiet_ray_data() -> None:
    """Our own progress lines take the place of Ray Data's bars and notes."""
    for name in ("ray.data", "ray.data._internal.progress", "ray.data._internal.execution.streaming_executor"):
        logging.getLogger(name).setLevel(logging.ERROR)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False


def _progress(records: dict[str, CropRecord], worked: int, total: int, seconds: float) -> str:
    done, bad = len(records), sum(1 for r in records.values() if r.reason)
    rate = done / max(seconds, 1e-3)
    bags = sum(len(r.bags) for r in records.values())
    return (
        f"cropped {done}/{total} videos ({worked} decoded now), {bags} bags, {bad} quarantined, "
        f"{rate:.1f} videos/s, {max(0.0, (total - done) / max(rate, 1e-3)):.0f} s left"
    )


def _video(text: str) -> Video:
    return Video(**_json(text))


def _plan(text: str) -> ShardPlan:
    fields = _json(text)
    return ShardPlan(**{**fields, "members": tuple(Member(**m) for m in fields["members"])})


def _json(text: Any) -> dict[str, Any]:
    value: dict[str, Any] = json.loads(str(text))
    return value


def _reasons(records: dict[str, CropRecord]) -> str:
    counts = Counter(r.reason for r in records.values() if r.reason)
    return ", ".join(f"{n} {reason}" for reason, n in sorted(counts.items()))


def _write_quarantine(dataset_url: str, quarantined: dict[str, CropRecord]) -> dict[str, str]:
    """One JSON line a video: name, reason, detail. Named by its content, so equal runs write equal objects."""
    lines = [
        canonical_json({"video": name, "reason": r.reason, "detail": r.detail})
        for name, r in sorted(quarantined.items())
    ]
    data = "".join(f"{line}\n" for line in lines).encode()
    key = f"quarantine/{digest(data)[:32]}.jsonl"
    open_store(dataset_url).put_if_absent(key, data)
    return {"path": key, "sha256": digest(data)}
