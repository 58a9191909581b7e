"""The part of `micacl verify` that needs all shards: counts, keys, labels, lists, and what two sides share."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.contract import SCHEMA_VERSION, MicaclError, canonical_json, digest, part_name
from pipeline.dataset import get_checked
from pipeline.leakage import leaks, suspects
from pipeline.pack import UNLABELLED
from pipeline.problems import DELETE_VERSION, LOOK, RECOMMIT, RESPLIT, UNFIT, Problem, Severity
from pipeline.quarantine import quarantine_lines
from pipeline.storage import Store


def check_rows(
    rows: pa.Table, told: Mapping[str, Mapping[str, int]], labels: Sequence[str], where: str
) -> Iterator[Problem]:
    """What can only be seen over all shards."""
    counted = _count(rows)
    for split in sorted({*counted, *told}):
        for label in sorted({*counted.get(split, {}), *told.get(split, {})}):
            have, said = counted.get(split, {}).get(label, 0), told.get(split, {}).get(label, 0)
            if have != said:
                what = f"It counts {said} bags of {split}/{label}, the index files have {have}."
                yield Problem(what=what, where=where, remedy=RECOMMIT)
            if label not in labels and label != UNLABELLED:
                what = (
                    f"{split} has {have} bags labelled {label!r}, which is not in the label set ({', '.join(labels)})."
                )
                yield Problem(what=what, where=where, remedy="Run `micacl prepare` again with --labels that has it.")
    keys = rows.group_by("key").aggregate([([], "count_all")])
    for key in keys.filter(pc.greater(keys["count_all"], 1))["key"].to_pylist():
        shards = sorted(set(rows.filter(pc.equal(rows["key"], key))["shard"].to_pylist()))
        yield Problem(what=f"The bag {key} is there twice, in {', '.join(shards)}.", where=where, remedy=RECOMMIT)


def _count(rows: pa.Table) -> dict[str, dict[str, int]]:
    out: dict[str, dict[str, int]] = {}
    for row in rows.group_by(["split", "fold", "label"]).aggregate([([], "count_all")]).to_pylist():
        out.setdefault(part_name(row["split"], row["fold"]), {})[str(row["label"])] = row["count_all"]
    return out


def check_crop_hash(rows: pa.Table, body: Mapping[str, Any], where: str) -> Iterator[Problem]:
    """Every bag was cut by the settings that the version names."""
    said = json.dumps(dict(body.get("crop") or {}).get("hash"))
    for other in sorted({json.dumps(value) for value in pc.unique(rows["crop"]).to_pylist()} - {said}):
        what = f"It says that crops are of settings {said}, but the index has bags of settings {other}."
        yield Problem(what=what, where=where, remedy=RECOMMIT)
    crop = {k: v for k, v in dict(body.get("crop") or {}).items() if k != "hash"}
    named = json.dumps(digest(canonical_json({"schema": SCHEMA_VERSION, **crop}).encode())[:12])
    if named != said:
        what = f"Its crop settings have the hash {named}, it says {said}."
        yield Problem(what=what, where=where, remedy=RECOMMIT)


def check_videos(rows: pa.Table, body: Mapping[str, Any], where: str) -> Iterator[Problem]:
    """Every video of the source is written, quarantined or forgotten: the counts add up."""
    videos = dict(body.get("videos") or {})
    parts = [int(videos.get(name, 0)) for name in ("written", "quarantined", "forgotten")]
    if sum(parts) != videos.get("listed"):
        what = "It lists {} videos, but {} written, {} quarantined and {} forgotten.".format(
            videos.get("listed"), *parts
        )
        yield Problem(what=what, where=where, remedy=RECOMMIT)
    have = len(pc.unique(rows["video"]))
    if have != parts[0]:
        yield Problem(
            what=f"It says {parts[0]} videos gave bags, the index files have {have}.", where=where, remedy=RECOMMIT
        )


def check_lists(store: Store, body: Mapping[str, Any]) -> Iterator[Problem]:
    """The quarantine list and the files of records are the ones that were written, and say what the version says."""
    listed = body.get("quarantine")
    if not listed and dict(body.get("videos") or {}).get("quarantined"):
        what = "It counts quarantined videos and names no list of them."
        yield Problem(what=what, where=store.root, remedy=DELETE_VERSION)
    if listed:
        yield from _check_list(store, dict(listed), _quarantine_fault(body))
    for listed in body.get("records") or []:
        yield from _check_list(store, dict(listed), lambda _: "")


def _check_list(store: Store, listed: Mapping[str, Any], fault: Callable[[bytes], str]) -> Iterator[Problem]:
    try:
        path, sha256 = str(listed["path"]), str(listed["sha256"])
    except KeyError as error:
        what = f"An entry of the version file names no {error.args[0]}: {canonical_json(dict(listed))[:200]}."
        yield Problem(what=what, where=store.root, remedy=DELETE_VERSION)
        return
    try:
        what = fault(get_checked(store, path, sha256))
    except (MicaclError, OSError, *UNFIT) as error:
        what = error.cause if isinstance(error, MicaclError) else f"The list cannot be read ({error})."
    if what:
        yield Problem(what=what, where=store.url(path), remedy=RECOMMIT)


def _quarantine_fault(body: Mapping[str, Any]) -> Callable[[bytes], str]:
    reasons = dict(body.get("quarantined") or {})
    said = int(dict(body.get("videos") or {}).get("quarantined", 0))

    def fault(data: bytes) -> str:
        counted = Counter(line["reason"] for line in quarantine_lines(data, "the quarantine list"))
        if counted == Counter(reasons) and counted.total() == said:
            return ""
        counts = dict(sorted(counted.items()))
        return f"The list has {counted.total()} videos ({counts}), the version says {said} ({reasons})."

    return fault


def check_sides(rows: pa.Table, where: str) -> Iterator[Problem]:
    for leak in leaks(rows):
        yield Problem(what=str(leak), where=where, remedy=RESPLIT, severity=Severity.LEAK)
    for pair in suspects(rows):
        yield Problem(what=str(pair), where=where, remedy=LOOK, severity=Severity.SUSPECT)
