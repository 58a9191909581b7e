"""Outcomes of runs -> the rows of one table: a row a recipe and checkpoint, with its difference to the first recipe.

A difference of recipes has two errors that know nothing of each other: other subjects (the paired bootstrap's interval,
L to U about the mean D over the seeds) and other seeds (a t interval of the S paired differences, D - H to D + H with
H = t sd / sqrt(S)). Together: D - sqrt((D - L)^2 + H^2) to D + sqrt((U - D)^2 + H^2), which is how intervals of a sum
are recovered from those of its parts (Zou and Donner, Statistics in Medicine 27, 2008). One seed tells nothing of
another, so with one nothing is resolved.

Legend: K classes, N clips of all folds of all seeds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from micacl.bootstrap import FEWEST_RESOLVED, Interval, Ints, Units, intervals, paired_intervals
from micacl.calibration import Floats, at_temperature
from micacl.crossval import WHICH, Outcome
from micacl.metrics import Scores, group_recalls, long_tail_groups
from micacl.predictions import Evaluation, Predictions, score_labels, score_predictions
from micacl.summary import calibration_fields, mean_of
from pipeline.contract import MicaclError

NUMBERS = ("uar", "war", "macro_f1")


@dataclass(frozen=True, kw_only=True, slots=True)
class Number:
    """One number of a recipe. Shares in [0, 1]."""

    mean: float
    """Over the seeds, of all folds together."""
    spread: float | None
    """Standard deviation over the seeds; None of one."""
    interval: Interval
    """95 % by subject, of the mean."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Versus:
    """Minus the first recipe, over the seeds that both have."""

    mean: float
    by_seed: tuple[float, ...]
    by_subject: Interval
    """95 %, of the mean over these seeds."""
    units: int = FEWEST_RESOLVED
    """Subjects, or clips, of which that interval is."""

    @property
    def interval(self) -> Interval:
        """95 %, by subject and seed; None with one seed or one subject."""
        from scipy import stats

        seeds = len(self.by_seed)
        if self.by_subject is None or seeds < 2:
            return None
        half = float(stats.t.ppf(0.975, seeds - 1) * np.std(self.by_seed, ddof=1) / np.sqrt(seeds))
        below, above = (float(np.hypot(self.mean - x, half)) for x in self.by_subject)
        return self.mean - below, self.mean + above

    @property
    def resolved(self) -> bool:
        interval = self.interval if self.units >= FEWEST_RESOLVED else None
        return interval is not None and not interval[0] <= 0 <= interval[1]

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "interval": self.interval, "resolved": self.resolved}


@dataclass(frozen=True, kw_only=True, eq=False, slots=True)
class Row:
    """A recipe by its last or its best checkpoints."""

    recipe: str
    which: str
    seeds: tuple[int, ...]
    """Of which all folds are done; the others count in nothing."""
    runs: int
    planned: int
    units: Units
    numbers: Mapping[str, Number]
    mean_of_runs: Mapping[str, float]
    """Of each number, the plain mean over runs: the mean of folds that papers print."""
    recall: Mapping[str, float | None]
    recall_interval: Mapping[str, Interval]
    train_clips: Mapping[str, float]
    """Mean over the runs."""
    groups: Mapping[str, float | None]
    scores: Scores
    """Of all clips of all folds and seeds."""
    calibration: Mapping[str, Any]
    """`before`, and `after` if a run has a temperature; of all clips of all folds and seeds."""
    temperatures: tuple[float, ...]
    versus: Mapping[str, Versus]
    """UAR and WAR minus those of the first recipe; empty for itself."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values for results.json."""
        return {
            **{name: getattr(self, name) for name in ("recipe", "which", "runs", "planned")},
            "seeds": list(self.seeds),
            "by": self.units.kind,
            "units": self.units.units,
            "note": self.units.note,
            "numbers": {name: asdict(number) for name, number in self.numbers.items()},
            "mean_of_runs": dict(self.mean_of_runs),
            "recall": dict(self.recall),
            "recall_interval": dict(self.recall_interval),
            "train_clips": dict(self.train_clips),
            "groups": dict(self.groups),
            "matrix": [list(row) for row in self.scores.matrix],
            "calibration": dict(self.calibration),
            "temperatures": list(self.temperatures),
            "versus": {name: versus.to_dict() for name, versus in self.versus.items()},
        }


def rows_of(outcomes: Sequence[Outcome]) -> list[Row]:
    """In the order of the recipes, last before best. A recipe without a whole seed has no row. Raises MicaclError."""
    recipes = list(dict.fromkeys(outcome.job.recipe for outcome in outcomes))
    rows: list[Row] = []
    for which in WHICH:
        of = {name: [o for o in outcomes if o.job.recipe == name] for name in recipes}
        first = whole_seeds(of[recipes[0]], which) if recipes else {}
        for name in recipes:
            seeds = whole_seeds(of[name], which)
            if seeds:
                versus = {} if name == recipes[0] else compare_seeds(first, seeds)
                rows.append(_row(name, which, seeds, len(of[name]), versus))
    return sorted(rows, key=lambda row: (recipes.index(row.recipe), WHICH.index(row.which)))


def whole_seeds(outcomes: Sequence[Outcome], which: str) -> dict[int, list[Evaluation]]:
    """Evaluations by seed, fold by fold, of the seeds of which no fold is missing."""
    folds = {outcome.job.fold for outcome in outcomes}
    seeds: dict[int, list[Evaluation]] = {}
    for outcome in outcomes:
        if which in outcome.evaluations:
            seeds.setdefault(outcome.job.seed, []).append(outcome.evaluations[which])
    return {seed: of for seed, of in sorted(seeds.items()) if len(of) == len(folds)}


def pooled(evaluations: Sequence[Evaluation]) -> Predictions:
    """The test clips of several runs as one table, by key; in crossvalidation no clip comes twice."""
    parts = [one.predictions for one in evaluations]
    keys = [key for part in parts for key in part.keys]
    order = np.array(sorted(range(len(keys)), key=keys.__getitem__), np.int64)
    subjects = [subject for part in parts for subject in part.subjects]
    return Predictions(
        labels=parts[0].labels,
        keys=tuple(keys[i] for i in order),
        subjects=tuple(subjects[i] for i in order),
        truth_N=np.concatenate([part.truth_N for part in parts])[order],
        predicted_N=np.concatenate([part.predicted_N for part in parts])[order],
        p_NK=np.concatenate([part.p_NK for part in parts])[order],
    )


def stacked(tables: Sequence[Predictions]) -> tuple[Units, Ints, Ints]:
    """(units, truth, prediction) of the same clips by several seeds: a subject is drawn with all its predictions.

    Right and present clips add up over the seeds, so a recall of the sums is the mean of the seeds' recalls.
    """
    units = Units.of([k for t in tables for k in t.keys], [s for t in tables for s in t.subjects])
    return units, np.concatenate([t.truth_N for t in tables]), np.concatenate([t.predicted_N for t in tables])


def compare_seeds(first: Mapping[int, list[Evaluation]], other: Mapping[int, list[Evaluation]]) -> dict[str, Versus]:
    """Other minus first, over the seeds that both have. Raises MicaclError if they are not of the same clips."""
    common = sorted(first.keys() & other.keys())
    if not common:
        return {}
    a, b = ([pooled(of[seed]) for seed in common] for of in (first, other))
    if any(x.keys != y.keys or (x.truth_N != y.truth_N).any() for x, y in zip(a, b, strict=True)):
        raise MicaclError(
            "Two recipes were evaluated on different clips.",
            "Their difference would be one of clips.",
            "Give a new OUT, or delete the evaluations under OUT/runs.",
        )
    units, truth_N, a_N = stacked(a)
    found = paired_intervals(units, truth_N, a_N, stacked(b)[2], len(a[0].labels))
    scores = [(score_predictions(x), score_predictions(y)) for x, y in zip(a, b, strict=True)]
    out = {}
    for name in ("uar", "war"):
        by_seed = tuple(getattr(y, name) - getattr(x, name) for x, y in scores)
        out[name] = Versus(mean=float(np.mean(by_seed)), by_seed=by_seed, by_subject=found[name], units=units.units)
    return out


def _row(
    recipe: str, which: str, seeds: Mapping[int, list[Evaluation]], planned: int, versus: Mapping[str, Versus]
) -> Row:
    tables = {seed: pooled(of) for seed, of in seeds.items()}
    units, truth_N, predicted_N = stacked(list(tables.values()))
    labels = next(iter(tables.values())).labels
    found, runs = intervals(units, truth_N, predicted_N, len(labels)), [one for of in seeds.values() for one in of]
    by_seed = [score_predictions(table) for table in tables.values()]
    recall = {word: mean_of([s.recall[word] for s in by_seed]) for word in labels}
    train_clips = _train_clips(runs, labels)
    return Row(
        recipe=recipe,
        which=which,
        seeds=tuple(seeds),
        runs=len(runs),
        planned=planned,
        units=units,
        numbers={name: _number([getattr(s, name) for s in by_seed], found[name]) for name in NUMBERS},
        mean_of_runs={name: float(np.mean([run.scores[name] for run in runs])) for name in NUMBERS},
        recall=recall,
        recall_interval=dict(zip(labels, found["recall"], strict=True)),
        train_clips=train_clips,
        groups=group_recalls(recall, long_tail_groups({word: round(n) for word, n in train_clips.items()})),
        scores=score_labels(truth_N, predicted_N, labels),
        calibration=_calibration(runs),
        temperatures=tuple(t for run in runs if (t := _temperature(run)) is not None),
        versus=versus,
    )


def _number(values: Sequence[float], interval: Interval) -> Number:
    spread = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return Number(mean=float(np.mean(values)), spread=spread, interval=interval)


def _train_clips(runs: Sequence[Evaluation], labels: Sequence[str]) -> dict[str, float]:
    known = [clips for run in runs if (clips := run.scores.get("train_clips")) is not None]
    return {word: float(np.mean([clips[word] for clips in known])) for word in labels} if known else {}


def _temperature(run: Evaluation) -> float | None:
    said = run.scores["calibration"]["temperature"]
    value = None if said is None else said["value"]
    return None if value is None else float(value)


def _calibration(runs: Sequence[Evaluation]) -> dict[str, Any]:
    """Each run at its own temperature, or as it is where validation decided none; then all together."""
    p_NK: Floats = np.concatenate([run.predictions.p_NK for run in runs])
    truth_N = np.concatenate([run.predictions.truth_N for run in runs])
    before = calibration_fields(p_NK, truth_N, None)["before"]
    temperatures = [_temperature(run) for run in runs]
    if all(t is None for t in temperatures):
        return {"before": before, "after": None}
    pairs = zip(runs, temperatures, strict=True)
    after_NK = np.concatenate([at_temperature(run.predictions.p_NK, t or 1.0) for run, t in pairs])
    return {"before": before, "after": calibration_fields(after_NK, truth_N, None)["before"]}
