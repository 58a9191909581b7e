"""`micacl report`: one HTML page on a dataset version, for people who decide whether to train on it.

The page is a function of the version alone (no time, no machine name), needs no script and loads nothing from
anywhere: styles are inline and pictures are data: URIs. Every name that came from outside is escaped by the template.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

import jinja2
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.bags import Bag
from pipeline.codec import decode_instance, encode_jpeg
from pipeline.contract import SPLITS, MicaclError, digest
from pipeline.dataset import Dataset, get_checked, open_dataset
from pipeline.pack import UNLABELLED
from pipeline.shards import read_bag

BAGS_PER_CLASS = 3
"""On the contact sheet."""
MAX_QUARANTINE_ROWS = 500
"""Of the table; the counts by reason are complete."""
_PICTURE_QUALITY = 90
"""Of a frame that is not stored as JPEG."""
_VIDEO_COUNTS = ("listed", "written", "quarantined", "forgotten")


@dataclass(frozen=True, kw_only=True, slots=True)
class ClassCount:
    """One row of the count table."""

    label: str
    by_split: tuple[int, ...]
    total: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """One bag of the contact sheet."""

    video: str
    split: str
    subject: str
    seconds: float
    pictures: tuple[str, ...] = ()
    """One data: URI an instance."""
    problem: str = ""


def write_report(url: str, version: int | None = None) -> bytes:
    """The page of a version (the newest by default) in UTF-8. Same version, same bytes.

    A damaged bag is said on the page and stops nothing. Raises MicaclError if there is no version.
    """
    dataset = open_dataset(url, version)
    return _template().render(page=_page(dataset)).encode()


def _template() -> jinja2.Template:
    text = files("pipeline").joinpath("templates/report.html.j2").read_text("utf-8")
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.from_string(text)


def _page(dataset: Dataset) -> dict[str, Any]:
    """Everything the template says."""
    body, index = dataset.body, dataset.index
    splits = sorted(body["counts"], key=lambda s: (SPLITS.index(s) if s in SPLITS else len(SPLITS), s))
    counts = _class_counts(dataset, splits)
    records, note = _quarantine(dataset)
    return {
        "dataset": dataset.store.root,
        "version": dataset.number,
        "parent": body.get("parent"),
        "sha256": dataset.sha256,
        "splits": splits,
        "counts": counts,
        "split_totals": [sum(c.by_split[i] for c in counts) for i in range(len(splits))],
        "bags": index.num_rows,
        "largest": max((c.total for c in counts), default=0) or 1,
        "imbalance": _imbalance(counts, splits),
        "videos": {k: int((body.get("videos") or {}).get(k, 0)) for k in _VIDEO_COUNTS},
        "subjects": len(pc.unique(index["subject"].drop_null())),
        "hours": (pc.sum(index["seconds"]).as_py() or 0.0) / 3600,
        "bytes": sum(shard["bytes"] for shard in body["shards"]),
        "shards": len(body["shards"]),
        "crop": sorted((body.get("crop") or {}).items()),
        "detectors": _detectors(index),
        "sheet": [(c.label, _samples(dataset, c.label)) for c in counts if c.total],
        "reasons": sorted((body.get("quarantined") or {}).items()),
        "quarantine": records[:MAX_QUARANTINE_ROWS],
        "quarantine_more": max(0, len(records) - MAX_QUARANTINE_ROWS),
        "quarantine_note": note,
    }


def _class_counts(dataset: Dataset, splits: Sequence[str]) -> list[ClassCount]:
    """In the order of the label set, then what is outside it."""
    counts: Mapping[str, Mapping[str, int]] = dataset.body["counts"]
    found = {label for of_split in counts.values() for label in of_split}
    others = sorted(found - set(dataset.labels))
    labels = [] if found == {UNLABELLED} else list(dataset.labels)
    rows = [(label, tuple(counts[s].get(label, 0) for s in splits)) for label in [*labels, *others]]
    return [ClassCount(label=label, by_split=by_split, total=sum(by_split)) for label, by_split in rows]


def _imbalance(counts: Sequence[ClassCount], splits: Sequence[str]) -> str:
    """Largest class of train over the smallest, in words."""
    if "train" not in splits:
        return "There is no train split."
    place = splits.index("train")
    train = [(c.by_split[place], c.label) for c in counts if c.label != UNLABELLED]
    empty = [label for n, label in train if not n]
    if empty or not train:
        return f"No bag in train for: {', '.join(empty) or 'any class'}. It cannot be trained on with this label set."
    (low, rare), (high, common) = min(train), max(train)
    return f"Imbalance of train: {high / low:.1f} ({common} {high}, {rare} {low})."


def _detectors(index: pa.Table) -> list[tuple[str, int, float]]:
    """(name, bags, mean score) of each face detector."""
    groups = index.group_by("detector").aggregate([([], "count_all"), ("detector_score", "mean")]).sort_by("detector")
    return [(str(g["detector"]), int(g["count_all"]), float(g["detector_score_mean"])) for g in groups.to_pylist()]


def _samples(dataset: Dataset, label: str) -> list[Sample]:
    """A few bags of a class, spread evenly over its rows."""
    rows = dataset.index.filter(pc.equal(dataset.index["label"], label))
    count = min(BAGS_PER_CLASS, rows.num_rows)
    places = sorted({(2 * i + 1) * rows.num_rows // (2 * count) for i in range(count)})
    return [_sample(dataset, row) for row in rows.take(places).to_pylist()]


def _sample(dataset: Dataset, row: Mapping[str, Any]) -> Sample:
    said = {"video": row["video"], "split": row["split"], "subject": row["subject"] or "", "seconds": row["seconds"]}
    where = f"{dataset.store.url(row['shard'])} bag {row['key']}"
    try:
        span = dataset.store.read_range(row["shard"], row["offset"], row["size"])
        if digest(span) != row["sha256"]:
            return Sample(**said, problem="Its bytes are not the ones that were written: run micacl verify.")
        return Sample(**said, pictures=_pictures(read_bag(span, where)))
    except FileNotFoundError:
        return Sample(**said, problem="Its shard is missing: run micacl verify.")
    except MicaclError as error:
        return Sample(**said, problem=error.cause)


def _pictures(bag: Bag) -> tuple[str, ...]:
    """The middle frame of each instance as a data: URI. Only what decodes gets onto the page."""
    pictures = []
    for i, members in enumerate(bag.encoded):
        middle = bag.meta.instance_frames[i] // 2
        (frame_HWC,) = decode_instance(members, bag.meta, i, [middle])
        pictures.append(members[middle] if bag.meta.codec == "jpeg" else encode_jpeg(frame_HWC, _PICTURE_QUALITY))
    return tuple(f"data:image/jpeg;base64,{base64.b64encode(jpeg).decode()}" for jpeg in pictures)


def _quarantine(dataset: Dataset) -> tuple[list[dict[str, str]], str]:
    """The quarantined videos, and what is to be said if their list cannot be read."""
    listed = dataset.body.get("quarantine")
    if not listed:
        return [], ""
    try:
        lines = get_checked(dataset.store, listed["path"], listed["sha256"]).decode().splitlines()
        return [{k: str(v) for k, v in json.loads(line).items()} for line in lines], ""
    except MicaclError as error:
        return [], f"The list cannot be shown: {error.cause}"
