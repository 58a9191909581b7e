"""Evaluations and runs as `micacl evaluate` and `micacl train` leave them; predictions are drawn, not made."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from micacl.crossval import Job
from micacl.metrics import score
from micacl.predictions import EMBEDDINGS, PREDICTIONS, SCORES, Predictions, embeddings_parquet, folder_of
from micacl.summary import Temperature, summarise
from micacl.train.best import Validated, put_best
from pipeline.contract import canonical_json
from pipeline.storage import open_store

LABELS = ("happy", "sad", "fear")
TRAIN_CLIPS = {"happy": 90, "sad": 40, "fear": 10}
SHA256 = "5" * 64


def predictions(
    seed: int,
    *,
    skill: float = 1.5,
    clips: Sequence[int] = range(60),
    subjects: int = 20,
    labels: Sequence[str] = LABELS,
) -> Predictions:
    """Of clips that are the same whatever the seed; the seed and the skill decide how they are taken."""
    at, rng = np.array(clips), np.random.default_rng(seed)
    truth_N = (at * 7 % 10 > 5).astype(int) + (at % 10 == 3)
    logits_NK = rng.normal(0, 1, (len(at), len(labels)))
    logits_NK[np.arange(len(at)), truth_N] += skill
    p_NK = np.exp(2 * logits_NK) / np.exp(2 * logits_NK).sum(1, keepdims=True)
    return Predictions(
        labels=tuple(labels),
        keys=tuple(f"{i:04d}_0" for i in at),
        subjects=tuple(f"s{i % subjects}" for i in at),
        truth_N=truth_N,
        predicted_N=p_NK.argmax(1),
        p_NK=p_NK,
    )


def write_evaluation(
    run: str,
    table: Predictions,
    *,
    split: str = "test",
    which: str = "last",
    step: int = 20,
    maps: bool = False,
    **said: Any,
) -> None:
    """What lies in RUN/evaluation/SPLIT. `said` replaces fields of scores.json."""
    matrix = np.zeros((len(table.labels),) * 2, np.int64)
    np.add.at(matrix, (table.truth_N, table.predicted_N), 1)
    temperature = Temperature(value=1.7, split="val", clips=9, step=step)
    train_clips = dict(zip(table.labels, TRAIN_CLIPS.values(), strict=True))
    about = {
        "origin": {"step": step},
        "config_hash": "c",
        "dataset": {"url": "/ds", "version": 1, "sha256": SHA256},
        "split": split,
        "fold": None,
    }
    fields = summarise(table, score(matrix, table.labels), train_clips=train_clips, temperature=temperature)
    store = open_store(open_store(run).url(folder_of(split, which)))
    store.put(PREDICTIONS, table.to_parquet())
    store.put(SCORES, canonical_json({**about, **fields, **said}).encode())
    if maps:
        features_ND = np.random.default_rng(0).normal(0, 1, (len(table), 6)) + 3 * np.eye(6)[table.truth_N]
        store.put(EMBEDDINGS, embeddings_parquet(table.keys, features_ND.astype(np.float32)))


def write_run(job: Job, *, skill: float, clips: Sequence[int], validated: bool = True, maps: bool = False) -> None:
    """A run that is done: curves, the best, and its evaluations."""
    store, rng = open_store(job.run), np.random.default_rng([job.seed, job.fold or 0])
    lines = [{"step": s, "epoch": s // 10, "loss/total": 2 / (1 + s), "clips_per_s": 9.0} for s in (5, 10, 15, 20)]
    if validated:
        lines += [
            {"step": s, "epoch": s // 10, "val/uar": rng.uniform(0.4, 0.6), "val/loss": 1.0, "val/war": 0.5}
            for s in (10, 20)
        ]
        put_best(store, Validated(step=10, uar=0.5, war=0.5, loss=1.0, clips=9))
    store.put("metrics.jsonl", "".join(f"{canonical_json(line)}\n" for line in lines).encode())
    for which, step in (("last", 20), ("best", 10)) if validated else (("last", 20),):
        table = predictions(100 * job.seed + step + len(job.recipe), skill=skill, clips=clips)
        said = {"fold": job.fold, "config_hash": job.config.hash}
        write_evaluation(job.run, table, which=which, step=step, maps=maps, **said)
