"""`micacl prepare`: a raw bucket -> shards. Crop every video, pack the bags, commit one version. Ray is here only.

    list ──> ledger ──> crop (a task for a few videos) ──> plan ──> pack (a task a shard) ──> commit (conditional put)

The steps are pure functions of other rooms; this one hands numbers of videos and rows of plans to Ray Data and writes
what comes back into a ledger on disk, so that the driver's memory does not grow with the bucket. Killed anywhere and
run again, it finds what is done by looking at storage and does the rest.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import ray
import ray.data

from pipeline.contract import (
    CropConfig,
    MicaclError,
    PackConfig,
    Reason,
    Video,
    canonical_json,
    require_label,
)
from pipeline.crop import CropRecord, crop_key, crop_video
from pipeline.dataset import bag_counts, commit, newest_version, version_body
from pipeline.ledger import Ledger, open_ledger
from pipeline.meter import Meter
from pipeline.pack import Member, ShardPlan, folder_name, pack_shard
from pipeline.quarantine import write_quarantine
from pipeline.records import read_records, write_records
from pipeline.sources import assign_split
from pipeline.storage import Store, open_store
from pipeline.tombstones import forgotten_of, is_forgotten
from pipeline.where import PACK_COLUMNS, parse_where
from pipeline.worklist import read_videos, write_worklist

_VIDEOS_PER_TASK = 4
"""Small enough that a lost task loses little, large enough that Ray's cost per task (some 10 ms) does not show."""
_MOST_BLOCKS = 20_000
"""Ray plans a read task a block before it starts any; above this many the tasks get larger instead."""
_PLANS_AT_ONCE = 256
"""Shard plans in the driver's memory, some 50 kB each."""

Progress = Callable[[str], None]
Session = Callable[[], contextlib.AbstractContextManager[Any]]
Enter = Callable[[], Any]
"""Starts or joins Ray, once."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PrepareConfig:
    """What `prepare` does."""

    test_share: float = 0.2
    """Of subjects, for sources that name no split."""
    crop: CropConfig = field(default_factory=CropConfig)
    pack: PackConfig = field(default_factory=PackConfig)


def prepare(
    videos: Iterable[Video],
    labels: tuple[str, ...],
    dataset_url: str,
    config: PrepareConfig,
    say: Progress,
    session: Session = contextlib.nullcontext,
    source: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Run the job. Returns counts for the JSON line.

    Args:
        videos: from a source, in any order; read once and not kept.
        labels: the label set in order; ("auto",) takes the words that are there, sorted.
        source: kind and layout of the raw bucket, for the version file; nothing that changes where it is mounted.
        session: makes Ray usable for a while (`ray_session`); entered only if there is work for it.

    Raises MicaclError if no video gives a bag, or if somebody else commits meanwhile; nothing is visible to readers
    until the last step.
    """
    store = open_store(dataset_url)
    parent, before = newest_version(store)
    stay_out = _StayOut(forgotten_of(before or {}))
    keep = parse_where(config.pack.where, PACK_COLUMNS).holds
    with open_ledger(keep) as ledger, contextlib.ExitStack() as stack:
        enter = functools.cache(lambda: stack.enter_context(session()))
        ledger.add(_listed(stay_out.let_in(videos), labels, config, say))
        labels = _label_set(ledger, labels)
        left_out = f", and {stay_out.videos} that were forgotten are left out" if stay_out.videos else ""
        say(f"{ledger.counts()['listed']} videos listed{left_out}; labels: {', '.join(labels) or 'none'}")
        _take_over(ledger, store, before, config.crop, say)
        cropped = _crop_all(ledger, store, config.crop, say, enter)
        counts = ledger.counts()
        if not counts["bags"]:
            raise MicaclError(
                f"None of the {counts['listed']} videos gave a bag ({_reasons(ledger)}).",
                "No version was committed.",
                _remedy(ledger),
            )
        shards, packed = _pack_all(ledger, store, before, config.pack, say, enter)
        body = _body(store, ledger, labels, shards, config, stay_out, source)
    number, new = commit(store, body, parent)
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


def _body(
    store: Store,
    ledger: Ledger,
    labels: tuple[str, ...],
    shards: list[dict[str, Any]],
    config: PrepareConfig,
    stay_out: _StayOut,
    source: Mapping[str, str] | None,
) -> dict[str, Any]:
    """What the version says; the lists that it names are written."""
    return version_body(
        labels=labels,
        shards=shards,
        rows=bag_counts(shards),
        crop={**dataclasses.asdict(config.crop), "hash": config.crop.hash},
        pack={**dataclasses.asdict(config.pack), "test_share": config.test_share},
        videos=_video_counts(ledger.counts(), stay_out.videos),
        quarantined=ledger.reasons(),
        quarantine=write_quarantine(store, _said_of(ledger, config.pack.where)),
        records=write_records(store, ledger.records()),
        **({"source": dict(source)} if source else {}),
        **({"forgotten": sorted(stay_out.forgotten)} if stay_out.forgotten else {}),
    )


@dataclass(slots=True)
class _StayOut:
    """Videos that `micacl forget` took out do not come back."""

    forgotten: frozenset[str]
    videos: int = 0

    def let_in(self, videos: Iterable[Video]) -> Iterator[Video]:
        for video in videos:
            if self.forgotten and is_forgotten(video, self.forgotten):
                self.videos += 1
            else:
                yield video


def _video_counts(counts: Mapping[str, int], forgotten: int) -> dict[str, int]:
    """listed = written + quarantined + forgotten."""
    out = {name: counts[name] for name in ("listed", "written", "quarantined")}
    return {**out, "listed": out["listed"] + forgotten, "forgotten": forgotten} if forgotten else out


def _listed(
    videos: Iterable[Video], labels: tuple[str, ...], config: PrepareConfig, say: Progress
) -> Iterator[tuple[Video, str]]:
    """Each video with its split, and the key of its crop if its fingerprint is known."""
    last, seen = time.monotonic(), set[str]()
    for number, video in enumerate(videos):
        if video.label is not None and video.label not in seen:
            seen.add(folder_name(video.label))
        if video.label is not None and labels != ("auto",):
            require_label(video.label, labels, f"{video.name} (give the set with --labels, or --labels auto)")
        whole = dataclasses.replace(video, split=assign_split(video, config.test_share))
        yield whole, crop_key(whole, config.crop) if video.fingerprint else ""
        if time.monotonic() - last > 5:
            last = time.monotonic()
            say(f"listing: {number + 1} videos")


def _take_over(ledger: Ledger, store: Store, before: Mapping[str, Any] | None, crop: CropConfig, say: Progress) -> None:
    """What the newest version knows of crops that are still there need not be asked again."""
    files = (before or {}).get("records") or []
    if not files:
        return
    try:
        ledger.know(read_records(store, files), (entry.key for entry in store.list(f"crops/{crop.hash}/")))
    except MicaclError as error:
        say(f"the records of the newest version are not used, each crop is looked at instead: {error.cause}")


def _crop_all(ledger: Ledger, store: Store, config: CropConfig, say: Progress, enter: Enter) -> int:
    """Complete the ledger. Returns how many videos were worked on in this run (not: found done)."""
    listed, known = (ledger.counts()[name] for name in ("listed", "done"))
    if known == listed:
        say(f"all {listed} videos were cropped before")
        return 0
    work = write_worklist(store, ledger.todo(), listed, config.hash)
    url, parts, videos = store.root, work.parts, work.videos

    def crop_batch(batch: dict[str, Any]) -> dict[str, list[Any]]:
        target, done = open_store(url), []
        for task in batch["id"]:
            start = int(task) * _VIDEOS_PER_TASK
            for video in read_videos(url, parts, start, min(start + _VIDEOS_PER_TASK, videos)):
                done.append(crop_video(video, config, target))
        return {"record": [r.to_json() for r, _ in done], "worked": [worked for _, worked in done]}

    enter()
    tasks = -(-videos // _VIDEOS_PER_TASK)
    rows = ray.data.range(tasks, override_num_blocks=min(tasks, _MOST_BLOCKS))
    worked, meter = 0, Meter(known, listed)
    for row in _ray_map(rows, crop_batch):
        ledger.record(CropRecord.from_json(row["record"]))
        worked += bool(row["worked"])
        if meter.due():
            say(meter.line(ledger, worked))
    say(meter.line(ledger, worked))
    if (done := ledger.counts()["done"]) != listed:
        raise RuntimeError(f"{listed} videos went in and {done} came out")  # a failure of code, never of data
    return worked


def _pack_all(
    ledger: Ledger, store: Store, before: Mapping[str, Any] | None, config: PackConfig, say: Progress, enter: Enter
) -> tuple[list[dict[str, Any]], int]:
    """The version's entry of every shard, and how many were written in this run."""
    there = {entry.key for folder in ("shards/", "index/") for entry in store.list(folder)}
    known = {str(shard["path"]): dict(shard) for shard in (before or {}).get("shards", [])}
    url = store.root

    def pack_batch(batch: dict[str, Any]) -> dict[str, list[Any]]:
        target = open_store(url)
        done = [pack_shard(_plan(text), target) for text in batch["plan"]]
        return {"entry": [canonical_json(entry) for entry, _ in done], "wrote": [wrote for _, wrote in done]}

    entries, wrote, plans = [], 0, ledger.plans(config)
    while part := list(islice(plans, _PLANS_AT_ONCE)):
        kept = [known[p.path] for p in part if p.path in known and {p.path, p.index_path} <= there]
        fresh = [p for p in part if p.path not in known or not {p.path, p.index_path} <= there]
        rows = [{"plan": canonical_json(dataclasses.asdict(p))} for p in fresh]
        done = []
        if rows:
            enter()
            done = list(_ray_map(ray.data.from_items(rows, override_num_blocks=len(rows)), pack_batch))
        wrote += sum(bool(row["wrote"]) for row in done)
        entries += [*kept, *(_json(row["entry"]) for row in done)]
        say(f"{len(entries)} shards, {wrote} written")
    return entries, wrote


def _ray_map(rows: ray.data.Dataset, function: Callable[..., Any]) -> Iterator[dict[str, Any]]:
    """Blocks of rows through Ray Data, as they finish. Our own errors come out as themselves."""
    quiet_ray_data()

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

    for row in rows.map_batches(guarded, batch_size=None, batch_format="numpy", num_cpus=1).iter_rows():
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


def _plan(text: str) -> ShardPlan:
    fields = _json(text)
    return ShardPlan(**{**fields, "members": tuple(Member(**m) for m in fields["members"])})


def _json(text: Any) -> dict[str, Any]:
    value: dict[str, Any] = json.loads(str(text))
    return value


def _label_set(ledger: Ledger, labels: tuple[str, ...]) -> tuple[str, ...]:
    """The words that are there if ("auto",) was said. Raises MicaclError if two are one word in two spellings."""
    if labels != ("auto",):
        return labels
    found = tuple(ledger.labels())
    spelt = {word.casefold(): word for word in found}
    for word in found:
        if spelt[word.casefold()] != word:
            raise MicaclError(
                f"The labels {word!r} and {spelt[word.casefold()]!r} differ only in their capitals.",
                "Nothing was written: they would be two classes.",
                "Write them alike in the source, or name the classes with --labels.",
            )
    return found


def _remedy(ledger: Ledger) -> str:
    first = next(ledger.quarantined())
    return (
        f"The first is {first['video']}: {first['detail'] or first['reason']}. Paths of a table are relative to it; "
        "`micacl status URL` counts the reasons."
    )


def _said_of(ledger: Ledger, where: str) -> Iterator[dict[str, Any]]:
    """The quarantined videos, with the filter that a filtered one did not pass."""
    for said in ledger.quarantined():
        filtered = said["reason"] == Reason.FILTERED.value
        yield {**said, "detail": f"none of its bags passes --pack.where {where!r}"} if filtered else said


def _reasons(ledger: Ledger) -> str:
    return ", ".join(f"{n} {reason}" for reason, n in ledger.reasons().items())
