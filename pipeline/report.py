"""`micacl report`: one HTML page on a dataset version, for people who decide whether to train on it.

The page is a function of what the version lists (no time, no machine name), needs no script and loads nothing from
anywhere: styles are inline and pictures are data: URIs. Every name that came from outside is escaped by the template.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jinja2
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.contract import SPLITS, MicaclError, part_name
from pipeline.dataset import Dataset, get_checked, open_dataset
from pipeline.histograms import HEIGHT, MEASURES, WIDTH, Histogram, histogram
from pipeline.leakage import Suspect, leaks, suspects
from pipeline.pack import UNLABELLED
from pipeline.pictures import Strip, strip_of, thumbnail
from pipeline.quarantine import quarantine_lines
from pipeline.verify import version_notes

BAGS_PER_CLASS = 6
"""On the contact sheet."""
MAX_SUSPECTS = 12
"""Pairs in pictures; the count is complete."""
MAX_QUARANTINE_ROWS = 500
"""Of the table; the counts by reason are complete."""
MAX_THUMBNAILS = 100
_VIDEO_COUNTS = ("listed", "written", "quarantined", "forgotten")


@dataclass(frozen=True, kw_only=True, slots=True)
class ClassCount:
    """One row of the count table."""

    label: str
    by_split: tuple[int, ...]
    total: int


def write_report(url: str, version: int | None = None) -> bytes:
    """The page of a version (the newest by default) in UTF-8. Same version, same bytes.

    A damaged bag is said on the page and stops nothing. Raises MicaclError if there is no version.
    """
    dataset = open_dataset(url, version)
    return _template().render(page=_page(dataset)).encode()


def _template() -> jinja2.Template:
    return jinja2.Environment(
        loader=jinja2.PackageLoader("pipeline"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    ).get_template("report.html.j2")


def _page(dataset: Dataset) -> dict[str, Any]:
    """Everything the template says."""
    body, index = dataset.body, dataset.index
    splits = sorted(body["counts"], key=_split_order)
    counts = _class_counts(dataset, splits)
    records, note = _quarantine(dataset)
    pairs = suspects(index)
    return {
        "dataset": dataset.store.root,
        "version": dataset.number,
        "parent": body.get("parent"),
        "sha256": dataset.sha256,
        "notes": version_notes(body),
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
        "settings": [
            (f"{kind}.{name}", value)
            for kind in ("crop", "pack")
            for name, value in sorted((body.get(kind) or {}).items())
        ],
        "detectors": _detectors(index),
        "charts": _charts(index),
        "chart": {"width": WIDTH, "height": HEIGHT},
        "sheet": [(c.label, _samples(dataset, c.label)) for c in counts if c.total],
        "leaks": [str(leak).removeprefix("Leakage: ") for leak in leaks(index)],
        "pairs": [_pair(dataset, pair) for pair in pairs[:MAX_SUSPECTS]],
        "pairs_more": max(0, len(pairs) - MAX_SUSPECTS),
        "reasons": sorted((body.get("quarantined") or {}).items()),
        "quarantine": records[:MAX_QUARANTINE_ROWS],
        "quarantine_more": max(0, len(records) - MAX_QUARANTINE_ROWS),
        "quarantine_note": note,
    }


def _split_order(name: str) -> tuple[int, int, str]:
    """train, val, test, then fold-1, fold-2, ..., fold-10."""
    number = re.search(r"(\d+)$", name)
    return SPLITS.index(name) if name in SPLITS else len(SPLITS), int(number[1]) if number else 0, name


def _class_counts(dataset: Dataset, splits: Sequence[str]) -> list[ClassCount]:
    """In the order of the label set, then what is outside it."""
    counts: Mapping[str, Mapping[str, int]] = dataset.body["counts"]
    found = {label for of_split in counts.values() for label in of_split}
    others = sorted(found - set(dataset.labels))
    labels = [] if found == {UNLABELLED} else list(dataset.labels)
    rows = [(label, tuple(counts[s].get(label, 0) for s in splits)) for label in [*labels, *others]]
    return [ClassCount(label=label, by_split=by_split, total=sum(by_split)) for label, by_split in rows]


def _imbalance(counts: Sequence[ClassCount], splits: Sequence[str]) -> str:
    """Largest class of what is trained on over the smallest, in words."""
    folds = [i for i, split in enumerate(splits) if split not in SPLITS]
    places, name = ([splits.index("train")], "train") if "train" in splits else (folds, "all folds together")
    if not places:
        return "There is no train split."
    train = [(sum(c.by_split[i] for i in places), c.label) for c in counts if c.label != UNLABELLED]
    empty = [label for n, label in train if not n]
    if empty or not train:
        return f"No bag in {name} for: {', '.join(empty) or 'any class'}. It cannot be trained on with this label set."
    (low, rare), (high, common) = min(train), max(train)
    return f"Imbalance of {name}: {high / low:.1f} ({common} {high}, {rare} {low})."


def _detectors(index: pa.Table) -> list[tuple[str, int, float]]:
    """(name, bags, mean score) of each face detector."""
    groups = index.group_by("detector").aggregate([([], "count_all"), ("detector_score", "mean")]).sort_by("detector")
    return [(str(g["detector"]), int(g["count_all"]), float(g["detector_score_mean"])) for g in groups.to_pylist()]


def _charts(index: pa.Table) -> list[Histogram]:
    charts = (histogram(index[measure.column], measure) for measure in MEASURES)
    return [chart for chart in charts if chart is not None]


def _samples(dataset: Dataset, label: str) -> list[Strip]:
    """A few bags of a class, spread evenly over its rows."""
    rows = dataset.index.filter(pc.equal(dataset.index["label"], label))
    count = min(BAGS_PER_CLASS, rows.num_rows)
    places = sorted({(2 * i + 1) * rows.num_rows // (2 * count) for i in range(count)})
    return [_strip(dataset, row) for row in rows.take(pa.array(places, pa.int64())).to_pylist()]


def _pair(dataset: Dataset, pair: Suspect) -> tuple[Strip, Strip, int]:
    one, other = (_strip(dataset, row) for row in dataset.index.take(list(pair.rows)).to_pylist())
    return one, other, pair.distance


def _strip(dataset: Dataset, row: Mapping[str, Any]) -> Strip:
    return strip_of(dataset, row, part_name(row["split"], row["fold"]))


def _quarantine(dataset: Dataset) -> tuple[list[dict[str, str]], str]:
    """The quarantined videos with their pictures, and what is to be said if their list cannot be read."""
    listed = dataset.body.get("quarantine")
    if not listed:
        return [], ""
    try:
        data = get_checked(dataset.store, listed["path"], listed["sha256"])
        records = [{k: str(v) for k, v in line.items()} for line in quarantine_lines(data, "the quarantine list")]
    except MicaclError as error:
        return [], f"The list cannot be shown: {error.cause}"
    for i, record in enumerate(records):
        record["picture"] = thumbnail(dataset.store, record.get("object", "")) if i < MAX_THUMBNAILS else ""
    return records, ""
