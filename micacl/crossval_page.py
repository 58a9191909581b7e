"""The rows of a crossvalidation as a page, made like the data report (pipeline/report.py).

No script, nothing loaded, pictures are SVG inside it. It is a function of the results; it names no clip, no subject.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
import numpy as np
from numpy.typing import NDArray

from micacl import plots
from micacl.crossval import Outcome
from micacl.crossval_table import Row
from micacl.crossval_text import Report, cell, notes_of, percent, span, versus_cell
from micacl.predictions import LAST, Evaluation, read_embeddings
from pipeline.contract import MicaclError
from pipeline.storage import open_store


def to_html(report: Report) -> str:
    """The page."""
    loader = jinja2.ChoiceLoader([jinja2.PackageLoader("micacl"), jinja2.PackageLoader("pipeline")])
    environment = jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update(percent=percent, span=span, cell=cell, versus=versus_cell)
    return environment.get_template("crossval.html.j2").render(
        page=report, pictures=_pictures(report), notes=notes_of(report)
    )


def _pictures(report: Report) -> dict[str, Any]:
    """SVG by section."""
    return {
        "curves": _curves(report),
        "recall": _recall(report),
        "recipes": [_of_row(i, row, report) for i, row in enumerate(report.rows)],
    }


def _curves(report: Report) -> str:
    done = [o for o in report.outcomes if o.logs]
    panels = {"training loss": [_curve(o, o.logs, "loss/total") for o in done]}
    validated = [o for o in done if o.validations]
    if validated:
        panels["loss on validation"] = [_curve(o, o.validations, "val/loss") for o in validated]
        panels["UAR on validation"] = [_curve(o, o.validations, "val/uar") for o in validated]
    return plots.curves(panels, "curves") if done else ""


def _curve(outcome: Outcome, lines: Sequence[Mapping[str, Any]], name: str) -> plots.Curve:
    return plots.Curve(group=outcome.job.recipe, x=[x["step"] for x in lines], y=[x[name] for x in lines])


def _recall(report: Report) -> str:
    points = [
        plots.Recall(group=row.recipe, label=word, clips=row.train_clips[word], recall=recall, low=low, high=high)
        for row in report.rows
        if row.which == LAST and row.train_clips
        for word in report.labels
        if (recall := row.recall[word]) is not None and row.train_clips[word]
        for low, high in [row.recall_interval[word] or (recall, recall)]
    ]
    return plots.recall_by_count(points, "recall") if points else ""


def _of_row(number: int, row: Row, report: Report) -> dict[str, Any]:
    embedding, shown = _embedding(row, report, f"map{number}")
    return {
        "row": row,
        "confusion": plots.confusion(row.scores.matrix, report.labels, f"confusion{number}"),
        "reliability": plots.reliability(*_bins(row), f"bins{number}"),
        "map": embedding,
        "shown": shown,
    }


def _bins(row: Row) -> tuple[Any, Any]:
    before, after = row.calibration["before"], row.calibration["after"]
    return before["reliability"], None if after is None else after["reliability"]


def _embedding(row: Row, report: Report, prefix: str) -> tuple[str, float]:
    """Of the first run of the recipe that has one."""
    for outcome in report.outcomes:
        one = outcome.evaluations.get(row.which) if outcome.job.recipe == row.recipe else None
        found = None if one is None else _features(one)
        if one is None or found is None:
            continue
        truth_of = dict(zip(one.predictions.keys, one.predictions.truth_N.tolist(), strict=True))
        truth_N = np.array([truth_of[key] for key in found[0]], np.int64)
        return plots.embedding_map(found[1], truth_N, report.labels, prefix)
    return "", 0.0


def _features(one: Evaluation) -> tuple[list[str], NDArray[np.float32]] | None:
    """None also for a file that is not of these clips: a map is not worth the table."""
    try:
        found = read_embeddings(open_store(one.url))
    except MicaclError:
        return None
    return found if found is not None and set(found[0]) == set(one.predictions.keys) else None
