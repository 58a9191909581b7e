"""Folds x seeds x recipes: which runs, which are done, what they say together; on predictions that are drawn."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cluster.crossval import CrossvalArgs, Plan, plan, report
from micacl import metrics
from micacl.config import RunConfig
from micacl.crossval import Job, Outcome, Wanted, claim, claimed, is_done, jobs_of, numbers_of, outcome_of, seeds_of
from micacl.crossval_page import to_html
from micacl.crossval_table import Versus, compare_seeds, pooled, rows_of, whole_seeds
from micacl.crossval_text import Report, text_files, to_markdown
from micacl.plots import principal_plane
from micacl.predictions import embeddings_parquet
from micacl.recipes import tiny_cpu
from pipeline.contract import MicaclError
from pipeline.dataset import open_dataset
from pipeline.storage import open_store
from tests.tiny_dataset import make_dataset
from tests.tiny_evaluation import LABELS, SHA256, write_run

RECIPES = {
    "base": tiny_cpu(),
    "better": dataclasses.replace(tiny_cpu(), loss=dataclasses.replace(tiny_cpu().loss, mccl=False)),
}
FOLDS, SEEDS = [1, 2, 3], [0, 1, 2]
DATA = {"url": "/ds", "version": 1, "sha256": SHA256}


def clips_of(fold: int | None) -> range:
    return range(180) if fold is None else range(60 * (fold - 1), 60 * fold)


def all_jobs(out: Path, folds: list[int | None] | None = None) -> list[Job]:
    return jobs_of(RECIPES, [*FOLDS] if folds is None else folds, SEEDS, str(out))


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> list[Outcome]:
    """18 runs; the second recipe is better; maps of the first fold and seed."""
    out = tmp_path_factory.mktemp("cv")
    for job in all_jobs(out):
        skill = {"base": 0.8, "better": 1.8}[job.recipe]
        write_run(job, skill=skill, clips=clips_of(job.fold), maps=(job.fold, job.seed) == (1, 0))
    return [outcome_of(job) for job in all_jobs(out)]


def test_numbers_and_seeds() -> None:
    assert numbers_of("--folds", "1..5") == [1, 2, 3, 4, 5]
    assert numbers_of("--folds", "1,3..4") == [1, 3, 4]
    assert (seeds_of("3"), seeds_of("0,4"), seeds_of("2..4")) == ([0, 1, 2], [0, 4], [2, 3, 4])
    for bad in (
        "",
        "a",
        "1,1",
        "5..1",
        "1,5..3",
        "1,x",
        "-1",
        "0",
        "2000000000",
        "1..2000000000",
        "9" * 5000,
        "1..1001",
    ):
        with pytest.raises(MicaclError):
            seeds_of(bad)


def test_a_seed_moves_weights_and_plan_and_not_who_is_held_out(tmp_path: Path) -> None:
    jobs = all_jobs(tmp_path)
    assert len(jobs) == len({job.run for job in jobs}) == len({job.name for job in jobs}) == 18
    assert [job.seed for job in jobs[:6]] == [0] * 6  # a whole comparison first
    one = jobs[-1]
    assert (one.config.train.seed, one.config.plan.seed, one.config.train.fold) == (2, RECIPES["base"].plan.seed + 2, 3)
    assert len({job.config.train.val_seed for job in jobs}) == 1
    assert one.run.endswith("runs/better/fold-3/seed-2")


def test_the_table_is_that_of_the_pooled_folds(outcomes: list[Outcome]) -> None:
    rows = rows_of(outcomes)
    assert [(row.recipe, row.which) for row in rows] == [(r, w) for r in RECIPES for w in ("last", "best")]
    row = rows[0]
    by_seed = []
    for seed in SEEDS:
        matrix = np.zeros((3, 3), np.int64)
        for outcome in outcomes:
            if (outcome.job.recipe, outcome.job.seed) == ("base", seed):
                matrix += np.array(outcome.evaluations["last"].scores["matrix"])
        by_seed.append(metrics.uar(matrix))
    assert row.numbers["uar"].mean == pytest.approx(np.mean(by_seed))
    assert row.numbers["uar"].spread == pytest.approx(np.std(by_seed, ddof=1))
    low, high = row.numbers["uar"].interval or (0, 0)
    assert low < row.numbers["uar"].mean < high
    assert (row.units.units, row.runs, row.planned, row.seeds) == (20, 9, 9, (0, 1, 2))
    runs = [o.evaluations["last"].scores["war"] for o in outcomes if o.job.recipe == "base"]
    assert row.mean_of_runs["war"] == pytest.approx(np.mean(runs))
    assert sum(map(sum, row.scores.matrix)) == 3 * 180
    assert row.groups["head"] == row.recall["happy"]
    assert row.groups["tail"] == row.recall["fear"]
    assert row.calibration["after"]["ece"] < row.calibration["before"]["ece"]


def test_the_difference_to_the_first_is_paired(outcomes: list[Outcome]) -> None:
    rows = {(row.recipe, row.which): row for row in rows_of(outcomes)}
    assert rows["base", "last"].versus == {}
    versus = rows["better", "last"].versus["uar"]
    difference = rows["better", "last"].numbers["uar"].mean - rows["base", "last"].numbers["uar"].mean
    assert versus.mean == pytest.approx(difference)
    assert len(versus.by_seed) == 3
    assert versus.resolved
    same = compare_seeds(*[whole_seeds([o for o in outcomes if o.job.recipe == "base"], "last")] * 2)
    assert same["uar"].by_seed == (0.0, 0.0, 0.0)
    assert not same["uar"].resolved


def test_seeds_that_disagree_resolve_nothing_whatever_the_subjects_say() -> None:
    sure = Versus(mean=0.1, by_seed=(0.09, 0.11, 0.10), by_subject=(0.08, 0.12))
    assert sure.resolved
    assert sure.interval == pytest.approx(
        (0.1 - np.hypot(0.02, 4.3027 * 0.01 / 3**0.5), 0.1 + np.hypot(0.02, 0.02484)), abs=1e-4
    )
    assert not Versus(mean=0.1, by_seed=(0.4, -0.2), by_subject=(0.08, 0.12)).resolved
    assert not Versus(mean=0.1, by_seed=(0.1,), by_subject=(0.08, 0.12)).resolved  # another seed is not known


def test_of_recipes_that_are_the_same_few_are_called_different() -> None:
    """2,000 pairs of 3 seeds whose true difference is 0: subjects and seeds err by one point each."""
    rng, resolved = np.random.default_rng(0), 0
    for _ in range(2000):
        by_subject = rng.normal(0, 0.01)
        by_seed = by_subject + rng.normal(0, 0.01, 3)
        mean = float(by_seed.mean())
        resolved += Versus(mean=mean, by_seed=tuple(by_seed), by_subject=(mean - 0.0196, mean + 0.0196)).resolved
    assert 0.005 < resolved / 2000 < 0.06


def test_a_seed_with_a_missing_fold_counts_in_nothing(outcomes: list[Outcome]) -> None:
    lost = outcomes[0].job
    broken = [outcome_of(lost, "it fell over") if o.job == lost else o for o in outcomes]
    row = rows_of(broken)[0]
    assert (row.seeds, row.runs, row.planned) == ((1, 2), 6, 9)
    versus = next(r for r in rows_of(broken) if r.recipe == "better").versus["uar"]
    assert len(versus.by_seed) == 2
    alone = [o for o in broken if o.job.seed == 0]
    assert [r.recipe for r in rows_of(alone)] == ["better", "better"]


def test_pooled_folds_have_every_clip_once(outcomes: list[Outcome]) -> None:
    one = pooled(whole_seeds([o for o in outcomes if o.job.recipe == "base"], "last")[0])
    assert list(one.keys) == sorted({f"{i:04d}_0" for i in range(180)})


def wanted_of(job: Job, **changed: Any) -> Wanted:
    keys = frozenset(f"{i:04d}_0" for i in clips_of(job.fold))
    return Wanted(**{"sha256": SHA256, "steps": 20, "labels": LABELS, "keys": keys, "validated": True, **changed})


def test_done_is_what_has_scores_of_this_config_version_and_step(tmp_path: Path) -> None:
    job = all_jobs(tmp_path)[0]
    assert not is_done(job, wanted_of(job))
    write_run(job, skill=1, clips=clips_of(1))
    assert is_done(job, wanted_of(job))
    assert not is_done(job, wanted_of(job, steps=40))  # evaluated in the middle of the run
    assert not is_done(job, wanted_of(job, sha256="6" * 64))
    assert not is_done(job, wanted_of(job, labels=LABELS[::-1]))
    assert not is_done(job, wanted_of(job, keys=frozenset({"another_0"})))
    assert not is_done(dataclasses.replace(job, config=RECIPES["better"]), wanted_of(job))
    open_store(job.run).delete("evaluation/test-best/scores.json")
    assert not is_done(job, wanted_of(job))


@pytest.mark.parametrize("said", [{"split": "val"}, {"posthoc": {"tau_norm": 1.0}}, {"uar": 0.123}, {"origin": {}}])
def test_scores_of_something_else_are_not_done(tmp_path: Path, said: dict[str, Any]) -> None:
    job = all_jobs(tmp_path)[0]
    write_run(job, skill=1, clips=clips_of(1), validated=False)
    assert not is_done(job, wanted_of(job))  # there were validation clips, so one checkpoint is the best
    assert is_done(job, wanted_of(job, validated=False))
    store, key = open_store(job.run), "evaluation/test/scores.json"
    store.put(key, json.dumps(json.loads(store.get(key)) | said).encode())
    assert not is_done(job, wanted_of(job, validated=False))


@pytest.mark.parametrize("body", [b"{}", b'{"dataset": {"url": "", "version": 1, "sha256": ""}, "recipes": []}'])
def test_a_claim_that_is_none(tmp_path: Path, body: bytes) -> None:
    open_store(str(tmp_path)).put("crossval.json", body)
    if b"[]" in body:
        assert claimed(open_store(str(tmp_path))) is not None
        return
    with pytest.raises(MicaclError, match=r"crossval\.json"):
        claimed(open_store(str(tmp_path)))


@pytest.mark.parametrize("lines", ['{"step": 1', '{"step":13,"val/uar":null}', '{"loss/total":1.0}'])
def test_curves_that_are_none(tmp_path: Path, lines: str) -> None:
    job = all_jobs(tmp_path)[0]
    write_run(job, skill=1, clips=clips_of(1))
    open_store(job.run).put("metrics.jsonl", lines.encode())
    with pytest.raises(MicaclError, match=r"metrics\.jsonl"):
        outcome_of(job)


@pytest.mark.slow
def test_a_map_of_other_clips_is_left_out(tmp_path: Path) -> None:
    jobs = all_jobs(tmp_path, [1])[:2]
    for job, maps in zip(jobs, (True, False), strict=True):
        write_run(job, skill=1, clips=clips_of(1), maps=maps)
    whole = to_html(reported([outcome_of(job) for job in jobs]))
    for damage in (embeddings_parquet(["x_0"], np.zeros((1, 6), np.float32)), b"PAR1"):
        open_store(jobs[0].run).put("evaluation/test/embeddings.parquet", damage)
        page = to_html(reported([outcome_of(job) for job in jobs]))
        assert page.count("<svg") == whole.count("<svg") - 1


def reported(outcomes: list[Outcome]) -> Report:
    return Report(dataset=DATA, labels=LABELS, folds=(1,), seeds=(0,), outcomes=outcomes, rows=rows_of(outcomes))


def test_words_in_the_table_are_text(tmp_path: Path) -> None:
    job = all_jobs(tmp_path)[0]
    failed = Outcome(job=job, error="a|b\n<img src=x onerror=alert(1)> [x](y)", evaluations={})
    labels = ("a|b", "<i>", "fear")
    text = to_markdown(dataclasses.replace(reported([failed]), labels=labels))
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert len(lines) == 3
    assert [len(re.findall(r"(?<!\\)\|", line)) for line in lines[:2]] == [16, 16]
    assert "<i" not in text
    assert r"a\|b" in text
    assert "[x](" not in text


def test_out_is_of_one_experiment(tmp_path: Path) -> None:
    out = str(tmp_path)
    claim(out, DATA, {"base": RECIPES["base"]})
    claim(out, DATA, {"better": RECIPES["better"]})  # recipes may be added
    assert set((claimed(open_store(out)) or {})["recipes"]) == {"base", "better"}
    with pytest.raises(MicaclError, match=r"begun with another configuration of base \(loss.mccl: True, now False\)"):
        claim(out, DATA, {"base": RECIPES["better"]})
    with pytest.raises(MicaclError, match="begun with version 1 of /ds"):
        claim(out, {**DATA, "version": 2, "sha256": "6" * 64}, RECIPES)


def test_files_say_the_same(outcomes: list[Outcome], tmp_path: Path) -> None:
    lost = outcomes[4].job
    found = [outcome_of(lost, "The loss is not finite | on the clips a, b.") if o.job == lost else o for o in outcomes]
    made = Report(dataset=DATA, labels=LABELS, folds=(1, 2, 3), seeds=(0, 1, 2), outcomes=found, rows=rows_of(found))
    files = text_files(made)
    table = list(csv.DictReader(io.StringIO(files["table.csv"].decode())))
    results = json.loads(files["results.json"])
    assert [float(line["uar"]) for line in table] == [row["numbers"]["uar"]["mean"] for row in results["rows"]]
    assert table[2]["uar_resolved"] == str(results["rows"][2]["versus"]["uar"]["resolved"])
    markdown = files["table.md"].decode()
    lines = [line for line in markdown.splitlines() if line.startswith("|")]
    assert len({line.replace("\\|", "").count("|") for line in lines[:6]}) == 1
    assert f"| {lost.name} |  | failed | The loss is not finite \\| on the clips a, b. |" in markdown
    runs = list(csv.DictReader(io.StringIO(files["runs.csv"].decode())))
    assert len(runs) == 17 * 2 + 1
    assert [run["error"] for run in runs if run["error"]] == ["The loss is not finite | on the clips a, b."]
    page = to_html(made)
    assert page == to_html(made)
    assert page.count("<svg") == 1 + 1 + 4 * 3  # recalls, curves, and three of each row
    for name in (*LABELS, "base", "better", lost.name):
        assert name in page
    assert "<script" not in page
    assert "s13" not in page.replace("#s13", "")  # no subject is named
    assert f"{100 * made.rows[0].numbers['uar'].mean:.2f}" in page


def test_a_table_without_a_whole_seed_is_written_all_the_same(tmp_path: Path) -> None:
    found = [outcome_of(job, "no") for job in all_jobs(tmp_path, [None])]
    made = Report(dataset=DATA, labels=LABELS, folds=(None,), seeds=(0, 1, 2), outcomes=found, rows=rows_of(found))
    assert b"no" in text_files(made)["table.md"]
    assert "No recipe has a seed" in to_html(made)


def test_failed_runs_are_in_the_exit_code(outcomes: list[Outcome], tmp_path: Path) -> None:
    url = make_dataset(tmp_path / "ds", {"train": dict.fromkeys(LABELS, 2), "test": dict.fromkeys(LABELS, 1)}, 0)
    todo = Plan(jobs=[o.job for o in outcomes], folds=(1, 2, 3), seeds=(0, 1, 2), dataset=open_dataset(url))
    said: list[str] = []
    assert report(todo, str(tmp_path / "a"), outcomes, said.append)["exit"] == 0
    broken = [outcome_of(outcomes[0].job, "no"), *outcomes[1:]]
    done = report(todo, str(tmp_path / "b"), broken, said.append)
    assert (done["exit"], done["failed"]) == (5, {"base fold 1 seed 0": "no"})
    names = {"table.md", "table.csv", "runs.csv", "results.json", "report.html"}
    assert {entry.key for entry in open_store(str(tmp_path / "b")).list()} == names


def in_fold(fold: int) -> RunConfig:
    return dataclasses.replace(tiny_cpu(), train=dataclasses.replace(tiny_cpu().train, fold=fold))


def with_classes(config: RunConfig) -> RunConfig:
    return dataclasses.replace(config, model=dataclasses.replace(config.model, classes=LABELS))


def with_weights(config: RunConfig, url: str) -> RunConfig:
    backbone = dataclasses.replace(config.model.backbone, weights=url)
    return dataclasses.replace(config, model=dataclasses.replace(config.model, backbone=backbone))


def test_what_is_wrong_is_refused_before_anything_is_started(tmp_path: Path) -> None:
    url = make_dataset(tmp_path / "ds", {"train": dict.fromkeys(LABELS, 2), "test": dict.fromkeys(LABELS, 1)}, 0)
    args = CrossvalArgs(dataset=url, out=str(tmp_path / "out"), config=tiny_cpu())
    with pytest.raises(MicaclError, match="label"):
        plan(args, RECIPES)  # seven classes
    assert claimed(open_store(args.out)) is None  # the corrected command is not refused
    with pytest.raises(MicaclError, match=r"--train\.fold is 3"):
        plan(dataclasses.replace(args, config=in_fold(3)), RECIPES)
    ours = {name: with_classes(config) for name, config in RECIPES.items()}
    missing = with_weights(ours["base"], str(tmp_path / "none.pth"))
    with pytest.raises(MicaclError, match="is not there"):
        plan(args, {**ours, "pretrained": missing})
    assert len(plan(args, ours).jobs) == 6
    with pytest.raises(MicaclError, match="has no fold 1"):
        plan(dataclasses.replace(args, folds="1..2"), RECIPES)
    with pytest.raises(MicaclError, match="--parallel is 0"):
        plan(dataclasses.replace(args, parallel=0), RECIPES)


def test_the_map_is_the_plane_of_most_variance() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(0, 1, (200, 5)) * [5, 3, 0.5, 0.5, 0.5] @ np.linalg.qr(rng.normal(0, 1, (5, 5)))[0]
    plane, shown = principal_plane(x)
    variance = np.linalg.eigvalsh(np.cov(x.T))[::-1]
    np.testing.assert_allclose(plane.var(0, ddof=1), variance[:2])
    assert shown == pytest.approx(variance[:2].sum() / variance.sum())
    np.testing.assert_allclose(principal_plane(-x)[0], -plane)
    assert principal_plane(np.ones((3, 4)))[1] == 0.0
    assert principal_plane(rng.normal(0, 1, (4, 1)))[0].shape == (4, 2)
