"""The rows of a crossvalidation in text: table.md, table.csv, runs.csv, results.json. They name no clip, no subject."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from micacl.bootstrap import Interval
from micacl.crossval import Outcome
from micacl.crossval_table import Number, Row, Versus
from micacl.predictions import LAST
from micacl.train.best import RULE
from pipeline.contract import canonical_json

Run = dict[str, Any]
_MARKS = re.compile(r"[|<>&`*\[\]\\]")


@dataclass(frozen=True, kw_only=True, eq=False, slots=True)
class Report:
    """All that the files say."""

    dataset: Mapping[str, Any]
    """url, version, sha256."""
    labels: tuple[str, ...]
    folds: tuple[int | None, ...]
    seeds: tuple[int, ...]
    outcomes: Sequence[Outcome]
    rows: Sequence[Row]

    @property
    def failed(self) -> list[Outcome]:
        return [outcome for outcome in self.outcomes if outcome.error]


def text_files(report: Report) -> dict[str, bytes]:
    """Name -> bytes of every file but the page."""
    return {
        "table.md": to_markdown(report).encode(),
        "table.csv": to_csv(report).encode(),
        "runs.csv": runs_csv(report).encode(),
        "results.json": canonical_json(to_dict(report)).encode(),
    }


def to_dict(report: Report) -> dict[str, Any]:
    """results.json."""
    return {
        "dataset": dict(report.dataset),
        "labels": list(report.labels),
        "folds": [fold for fold in report.folds if fold is not None],
        "seeds": list(report.seeds),
        "best": RULE,
        "rows": [row.to_dict() for row in report.rows],
        "runs": runs_of(report),
    }


def runs_of(report: Report) -> list[Run]:
    """A run and checkpoint each; one that failed once, with its error."""
    out: list[Run] = []
    for outcome in report.outcomes:
        job = outcome.job
        about = {"recipe": job.recipe, "fold": job.fold, "seed": job.seed, "run": job.run}
        if not outcome.evaluations:
            out.append({**about, "which": "", "error": outcome.error})
        for which, one in outcome.evaluations.items():
            numbers = {name: one.scores[name] for name in ("uar", "war", "macro_f1", "recall")}
            out.append({**about, "which": which, "step": one.scores["origin"]["step"], **numbers, "error": ""})
    return out


def percent(value: float | None, digits: int = 2) -> str:
    return "" if value is None else f"{100 * value:.{digits}f}"


def span(interval: Interval, digits: int = 1) -> str:
    return "" if interval is None else f"{percent(interval[0], digits)} to {percent(interval[1], digits)}"


def signed(value: float) -> str:
    return f"{100 * value:+.2f}"


def cell(number: Number) -> str:
    """`56.31 ± 0.42 (52.0 to 60.4)`."""
    spread = "" if number.spread is None else f" ± {percent(number.spread)}"
    return f"{percent(number.mean)}{spread}" + (f" ({span(number.interval)})" if number.interval else "")


def versus_cell(versus: Versus | None) -> str:
    """`+1.20 (-0.3 to +2.7)`, and whether it is resolved."""
    if versus is None:
        return ""
    inside = "" if versus.interval is None else f" ({signed(versus.interval[0])} to {signed(versus.interval[1])})"
    return f"{signed(versus.mean)}{inside}{', resolved' if versus.resolved else ''}"


def to_markdown(report: Report) -> str:
    """One table, then what its numbers are."""
    head = ["recipe", "checkpoint", "runs", "UAR", "WAR", "UAR minus first", "WAR minus first", "head", "mid", "tail"]
    head += ["ECE", "ECE at T", *report.labels]
    lines = [_line(head), f"|{' --- |' * 3}{' ---: |' * (len(head) - 3)}"]
    for row in report.rows:
        values = [
            row.recipe,
            row.which,
            f"{row.runs} of {row.planned}",
            *(cell(row.numbers[n]) for n in ("uar", "war")),
        ]
        values += [versus_cell(row.versus.get(name)) for name in ("uar", "war")]
        values += [percent(row.groups.get(name)) for name in ("head", "mid", "tail")]
        values += [*_eces(row), *(percent(row.recall[word]) for word in report.labels)]
        lines.append(_line(values))
    lines += [_line([o.job.name, "", "failed", o.error]) for o in report.failed]
    return "\n".join([*lines, "", *notes_of(report), ""])


def _line(cells: Sequence[str]) -> str:
    """A line of the table; what cells hold is text, not Markdown or HTML."""
    return f"| {' | '.join(_MARKS.sub(_escaped, ' '.join(cell.split())) for cell in cells)} |"


def _escaped(mark: re.Match[str]) -> str:
    return {"<": "&lt;", ">": "&gt;", "&": "&amp;"}.get(mark[0], f"\\{mark[0]}")


def _eces(row: Row) -> tuple[str, str]:
    after = row.calibration["after"]
    return percent(row.calibration["before"]["ece"]), "" if after is None else percent(after["ece"])


_NOTES = (
    (
        "Percent. UAR and WAR: of all test folds of a seed together, mean over the seeds, ± standard deviation over "
        "the seeds, and in brackets the 95 % interval of the mean by subject. An interval says what other people would "
        "change, the deviation what another seed would."
    ),
    f"Checkpoint: last is the newest of a run; best is the one of {RULE}. The test clips choose nothing.",
    (
        "Minus first: on the same clips and seeds, with the 95 % interval of both other people and other seeds; "
        "resolved if that leaves out 0; with one seed nothing is. Each recipe is one test: of twenty without an "
        "effect, one is resolved by chance."
    ),
    (
        "Head, mid, tail: mean recall of the classes with at least half, between, and at most a quarter of the "
        "training clips of the largest class."
    ),
)


def notes_of(report: Report) -> list[str]:
    """What the numbers are, a sentence a line."""
    data = report.dataset
    folds = "the data set's own train and test" if report.folds == (None,) else f"folds {_list(report.folds)}"
    units = max((row.units for row in report.rows), key=lambda u: u.units, default=None)
    version = f"Version {data['version']} of {data['url']} ({str(data['sha256'])[:12]})"
    out = [f"{version}, {folds}, seeds {_list(report.seeds)}.", *_NOTES]
    if units is not None:
        out.append(f"Drawn were {units.units} {units.kind}s. {units.note}".strip())
    if not any(row.which != LAST for row in report.rows):
        out.append("The runs had no validation clips, so none is called best; --train.val-share holds some out.")
    return out


def _list(values: Sequence[int | None]) -> str:
    return ", ".join(str(value) for value in values if value is not None)


def to_csv(report: Report) -> str:
    """The table in numbers: a column a number, shares in [0, 1]."""
    out: list[dict[str, Any]] = []
    for row in report.rows:
        line: dict[str, Any] = {"recipe": row.recipe, "checkpoint": row.which, "runs": row.runs, "planned": row.planned}
        for name, number in row.numbers.items():
            low, high = number.interval or (None, None)
            line |= {name: number.mean, f"{name}_sd": number.spread, f"{name}_low": low, f"{name}_high": high}
            line[f"{name}_mean_of_runs"] = row.mean_of_runs[name]
        for name in ("uar", "war"):
            versus = row.versus.get(name)
            low, high = (versus.interval if versus else None) or (None, None)
            line |= {f"{name}_minus_first": versus.mean if versus else None, f"{name}_minus_first_low": low}
            line |= {f"{name}_minus_first_high": high, f"{name}_resolved": versus.resolved if versus else None}
        after = row.calibration["after"]
        line |= {f"recall_{name}": row.groups.get(name) for name in ("head", "mid", "tail")}
        line |= {"ece": row.calibration["before"]["ece"], "ece_at_t": None if after is None else after["ece"]}
        line |= {f"recall_{word}": row.recall[word] for word in report.labels}
        out.append(line)
    return _csv(out)


def runs_csv(report: Report) -> str:
    """A line a run and checkpoint."""
    out = []
    for run in runs_of(report):
        recall = run.pop("recall", None) or {}
        out.append({**run, **{f"recall_{word}": recall.get(word) for word in report.labels}})
    columns = ["recipe", "fold", "seed", "run", "which", "step", "uar", "war", "macro_f1", "error"]
    return _csv(out, [*columns, *(f"recall_{word}" for word in report.labels)])


def _csv(lines: Sequence[Mapping[str, Any]], columns: Sequence[str] | None = None) -> str:
    out = io.StringIO()
    writer = csv.DictWriter(out, columns or (list(lines[0]) if lines else ["recipe"]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return out.getvalue()
