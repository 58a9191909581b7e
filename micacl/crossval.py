"""Recipes x folds x seeds: which runs there are, which are done, and what they say together.

    OUT/crossval.json                            what it is of: dataset version, config of each recipe
    OUT/runs/<recipe>/<fold-1>/<seed-0>/         a run as `micacl train` makes it, with its evaluations
    OUT/results.json, table.md, table.csv, runs.csv, report.html

A seed s moves the seeds of weights and plan by s; who is held out for validation stays the same. Of one seed the test
folds are laid together: every clip of the data set is predicted once, by the run that has not seen it, and UAR and WAR
are those of all of them. Over the seeds stand mean and spread (standard deviation); the interval is by subject, of the
mean over the seeds. Two recipes are compared on the seeds that both have, clip by clip. The interval of their
difference is of both, other people and other seeds (micacl.crossval_table); it is *resolved* if that leaves out 0.

Nothing here knows Ray: cluster/crossval.py runs the jobs.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from micacl.config import RunConfig, first_difference, to_dict
from micacl.predictions import BEST, LAST, Evaluation, read_evaluation
from micacl.train.best import read_best
from pipeline.contract import MicaclError, canonical_json, expecting, json_object
from pipeline.storage import Store, open_store

CLAIM = "crossval.json"
WHICH = (LAST, BEST)
MOST = 1000
"""Folds, or seeds."""
_RANGE = re.compile(r"([0-9]{1,9})(?:\.\.([0-9]{1,9}))?")


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """One run."""

    recipe: str
    fold: int | None
    """Test fold; None is the dataset's own train and test."""
    seed: int
    """Added to the seeds of the recipe."""
    config: RunConfig
    run: str
    """Its URL."""

    @property
    def name(self) -> str:
        fold = "" if self.fold is None else f" fold {self.fold}"
        return f"{self.recipe}{fold} seed {self.seed}"


@dataclass(frozen=True, kw_only=True, eq=False, slots=True)
class Outcome:
    """What became of a job."""

    job: Job
    error: str = ""
    evaluations: Mapping[str, Evaluation]
    """Of the test split, by `last` and `best`; without validation there is no best. Empty if the run failed."""
    logs: Sequence[Mapping[str, Any]] = ()
    validations: Sequence[Mapping[str, Any]] = ()


def jobs_of(
    recipes: Mapping[str, RunConfig], folds: Sequence[int | None], seeds: Sequence[int], out_url: str
) -> list[Job]:
    """Seed by seed, so that what is done first is a whole comparison."""
    out = open_store(out_url)
    return [
        Job(
            recipe=name,
            fold=fold,
            seed=seed,
            config=_seeded(config, fold, seed),
            run=out.url(f"runs/{name}/{'all' if fold is None else f'fold-{fold}'}/seed-{seed}"),
        )
        for seed in seeds
        for fold in folds
        for name, config in recipes.items()
    ]


def _seeded(config: RunConfig, fold: int | None, seed: int) -> RunConfig:
    return replace(
        config,
        train=replace(config.train, fold=fold, seed=config.train.seed + seed),
        plan=replace(config.plan, seed=config.plan.seed + seed),
    )


def numbers_of(flag: str, text: str) -> list[int]:
    """`1..5`, `1,3,4`, or both mixed. Raises MicaclError."""
    out: list[int] = []
    for part in filter(None, text.split(",")):
        found = _RANGE.fullmatch(part.strip())
        first, last = (int(found[1]), int(found[2] or found[1])) if found else (1, 0)
        if not first <= last < first + MOST:
            out = []
            break
        out += range(first, last + 1)
    if not 0 < len(set(out)) == len(out) <= MOST:
        raise MicaclError(
            f"{flag} is {text[:80]!r}.",
            "No run was started.",
            f"Give numbers, each once, such as 1..5 or 1,3,4; {MOST} at most.",
        )
    return out


def seeds_of(text: str) -> list[int]:
    """`3` is 0, 1, 2; `0,4` and `2..4` are those. Raises MicaclError."""
    if not re.fullmatch("[0-9]+", text):
        return numbers_of("--seeds", text)
    if len(text) > len(str(MOST)) or not 1 <= int(text) <= MOST:
        raise MicaclError(f"--seeds is {text[:80]}.", "No run was started.", f"Give 1 or more, {MOST} at most.")
    return list(range(int(text)))


def claim(out_url: str, dataset: Mapping[str, Any], recipes: Mapping[str, RunConfig]) -> None:
    """Write crossval.json, or add recipes to it. Raises MicaclError if a recipe was begun with another config.

    Args:
        dataset: url, version, sha256.
    """
    store = open_store(out_url)
    store.check()
    ours = {name: json.loads(canonical_json(to_dict(config))) for name, config in recipes.items()}
    before = claimed(store)
    if before is not None:
        if before["dataset"]["sha256"] != dataset["sha256"]:
            _refuse(out_url, f"version {before['dataset']['version']} of {before['dataset']['url']}")
        for name in sorted(ours.keys() & before["recipes"].keys()):
            if ours[name] != before["recipes"][name]:
                where = first_difference(before["recipes"][name], ours[name])
                _refuse(out_url, f"another configuration of {name} ({where})")
        ours = {**before["recipes"], **ours}
    body = canonical_json({"dataset": dict(dataset), "recipes": ours}).encode()
    if before is not None:
        store.put(CLAIM, body)
    elif not store.put_if_absent(CLAIM, body):
        claim(out_url, dataset, recipes)  # somebody else was first: the same questions about theirs


def claimed(store: Store) -> dict[str, Any] | None:
    """What crossval.json says; None if there is none. Raises MicaclError."""
    if not store.exists(CLAIM):
        return None
    body = json_object(store.get(CLAIM), store.url(CLAIM))
    with expecting(store.url(CLAIM)):
        data = {name: body["dataset"][name] for name in ("url", "version", "sha256")}
        return {"dataset": {**data, "version": int(data["version"])}, "recipes": dict(body["recipes"])}


def _refuse(out_url: str, what: str) -> None:
    raise MicaclError(
        f"{out_url} was begun with {what}.",
        "Its table would mix two experiments.",
        "Give the flags that it was begun with, or a new OUT.",
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Wanted:
    """What the evaluations of a finished run are of."""

    sha256: str
    """Of the dataset version."""
    steps: int
    labels: tuple[str, ...]
    keys: frozenset[str]
    """Every clip of the test split."""
    validated: bool
    """There are validation clips, so one checkpoint is the best."""


def is_done(job: Job, wanted: Wanted) -> bool:
    """Whether its scores are there, whole, and of this config, dataset, last step, and of the best."""
    best = read_best(open_store(job.run))
    if wanted.validated and best is None:
        return False
    steps = {LAST: wanted.steps, **({} if best is None else {BEST: best.step})}
    try:
        return all(_is_of(read_evaluation(job.run, "test", which), job, wanted, step) for which, step in steps.items())
    except MicaclError:
        return False


def _is_of(one: Evaluation, job: Job, wanted: Wanted, step: int) -> bool:
    said = one.scores
    found = (said.get("config_hash"), said["dataset"].get("sha256"), said["origin"]["step"], said["split"])
    ours = (job.config.hash, wanted.sha256, step, "test")
    unchanged = not any((said.get("posthoc") or {}).values())
    return (
        found == ours
        and unchanged
        and one.predictions.labels == wanted.labels
        and {*one.predictions.keys} == wanted.keys
    )


def outcome_of(job: Job, error: str = "") -> Outcome:
    """What its folder says; `error` is why it was not finished. Raises MicaclError if files are damaged."""
    from micacl.train.hooks.jsonl import METRICS, read_metrics  # torch comes with it

    if error:
        return Outcome(job=job, error=error, evaluations={})
    store = open_store(job.run)
    logs, validations = read_metrics(store) if store.exists(METRICS) else ([], [])
    which = WHICH if read_best(store) is not None else (LAST,)
    evaluations = {name: read_evaluation(job.run, "test", name) for name in which}
    return Outcome(job=job, evaluations=evaluations, logs=logs, validations=validations)
