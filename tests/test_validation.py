"""Validation while training: the same at any number of ranks, out of the way of training, and the best is kept."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch

from micacl.bundle import load_model, run_state
from micacl.config import RunConfig
from micacl.evaluate import gather_scores, open_for, score_rank
from micacl.loss.objective import Objective
from micacl.train.best import BEST, Validated, best_of_checkpoint, put_best, read_best, step_of
from micacl.train.checkpoint import complete_steps, drop_old, read_checkpoint
from micacl.train.data import open_training
from micacl.train.hooks import StepRecord
from micacl.train.hooks.checkpoint import SaveCheckpoint
from micacl.train.hooks.jsonl import JsonLines, read_metrics
from micacl.train.hooks.validate import Validate, validate
from micacl.train.loop import fit
from pipeline.contract import MicaclError
from pipeline.storage import open_store
from tests.gloo import run_ranks
from tests.test_engines import LABELS, Losses, StopAt, Stopped, config_of, make_engine
from tests.tiny_dataset import make_dataset

STEPS = 20


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> str:
    counts = {"train": {"happy": 14, "sad": 8, "neutral": 8}, "test": dict.fromkeys(LABELS, 2)}
    return make_dataset(tmp_path_factory.mktemp("dataset"), counts, seed=0)


def with_validation(share: float = 0.3, **train: Any) -> RunConfig:
    config = config_of()
    return dataclasses.replace(config, train=dataclasses.replace(config.train, val_share=share, **train))


def train_rank(
    rank: int, ranks: int, kind: str, url: str, run: str, stop: int = STEPS, every: int = 1, hook: bool = True
) -> dict[str, Any]:
    """Continue a run as cluster/rank.py does; its losses and validations of now."""
    config, losses, store = with_validation(val_every=every), Losses(), open_store(run)
    data, start, best = open_training(url, None, config), 0, None
    engine = make_engine(kind, config, ranks)
    if complete_steps(store):
        checkpoint = read_checkpoint(store)
        engine.import_state(checkpoint.weights, checkpoint.moments, checkpoint.step)
        start, best = checkpoint.step, best_of_checkpoint(store, checkpoint.step)
    metrics = JsonLines(store, start) if rank == 0 else None
    assert data.val is not None
    said: list[str] = []
    validation = Validate(
        engine, data.val, config.stream, config.batch, every=data.val_steps, best=best, metrics=metrics, say=said.append
    )

    def state_at(step: int) -> dict[str, Any]:
        seen = {"url": url, "version": 1, "sha256": data.dataset.sha256}
        return run_state(config, data.dataset.body["crop"], seen, data.state_at(step))

    saver = SaveCheckpoint(
        engine, store, every=10, keep=1, state_at=state_at, metrics=metrics, validation=validation if hook else None
    )
    hooks = [losses, *([metrics] if metrics else []), *([validation] if hook else []), saver, StopAt(stop)]
    with contextlib.suppress(Stopped):
        fit(
            engine,
            data.batches(start, rank, ranks),
            Objective(config.loss, [1.0] * 3),
            config.train,
            start_step=start,
            steps=data.steps,
            steps_per_epoch=data.steps_per_epoch,
            log_every=1,
            hooks=hooks,
        )
    found = validate(engine, data.val, config.stream, config.batch, stop).to_dict()
    return {"losses": losses.values, "now": found, "said": said}


@pytest.fixture(scope="module")
def whole(url: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, Any]]:
    run = str(tmp_path_factory.mktemp("whole") / "run")
    return run, train_rank(0, 1, "plain", url, run)


def lines_of(run: str) -> list[dict[str, Any]]:
    return read_metrics(open_store(run))[1]


def test_validation_is_written_every_epoch_and_the_best_is_named(whole: tuple[str, dict[str, Any]]) -> None:
    run, done = whole
    lines, store = lines_of(run), open_store(run)
    assert [line["step"] for line in lines] == [4, 8, 12, 16, 20]
    best = max(lines, key=lambda line: (line["val/uar"], -line["val/loss"], -line["step"]))
    assert json.loads(store.get(BEST))["step"] == best["step"] == step_of(store, "best")
    assert complete_steps(store) == sorted({best["step"], 20})
    assert done["now"]["uar"] == lines[-1]["val/uar"]
    assert sum("best so far" in text for text in done["said"]) >= 1
    assert lines[0]["val/clips"] == 8


def test_the_hooks_numbers_are_those_of_evaluation(whole: tuple[str, dict[str, Any]], url: str) -> None:
    """`micacl evaluate --split val` of the same checkpoint, by another path and two ranks."""
    run, done = whole
    bundle = load_model(run, 20)
    dataset = open_for(bundle, url, None, None, "val")
    scored = [one for rank in range(2) for one in score_rank(bundle, dataset, "val", rank, 2)]
    scores, _ = gather_scores(scored, LABELS, dataset.split("val").num_rows)
    assert (scores.uar, scores.war) == (done["now"]["uar"], done["now"]["war"])


def test_a_run_with_validation_has_the_losses_of_one_without(
    whole: tuple[str, dict[str, Any]], url: str, tmp_path: Path
) -> None:
    assert train_rank(0, 1, "plain", url, str(tmp_path / "run"), hook=False)["losses"] == whole[1]["losses"]


def test_a_run_that_stopped_goes_on_with_its_best(whole: tuple[str, dict[str, Any]], url: str, tmp_path: Path) -> None:
    """Stopped at every validation in turn: the same lines, the same best, the same checkpoints."""
    run = str(tmp_path / "run")
    for stop in (4, 10, 12, STEPS):
        train_rank(0, 1, "plain", url, run, stop)
    assert lines_of(run) == lines_of(whole[0])
    assert read_best(open_store(run)) == read_best(open_store(whole[0]))
    assert complete_steps(open_store(run)) == complete_steps(open_store(whole[0]))


def test_a_best_that_was_not_named_any_more_is_known_by_its_checkpoint(url: str, tmp_path: Path) -> None:
    """Stopped between checkpoint and best.json."""
    store = open_store(str(tmp_path / "run"))
    train_rank(0, 1, "plain", url, store.root, 4)
    named = read_best(store)
    assert named is not None
    store.delete(BEST)
    assert best_of_checkpoint(store, 4) == named


@pytest.mark.slow
def test_two_ranks_of_deepspeed_share_the_clips(whole: tuple[str, dict[str, Any]], url: str, tmp_path: Path) -> None:
    run = str(tmp_path / "run")
    ranks = run_ranks(train_rank, 2, tmp_path, "zero1", url, run, 4)
    assert ranks[0]["now"] == ranks[1]["now"]
    (here,), there = lines_of(run), lines_of(whole[0])[0]
    assert (here["step"], here["val/clips"]) == (there["step"], there["val/clips"])
    assert here["val/loss"] == pytest.approx(there["val/loss"], abs=2e-3)


class Scripted(Validate):
    """Validation with results that are given beforehand, by step."""

    def __init__(self, uars: dict[int, float], best: Validated | None) -> None:
        self.uars, self.best = uars, best

    def after_step(self, record: StepRecord) -> None:
        found = validated(record.step, self.uars[record.step])
        if found.beats(self.best):
            self.best = found


def test_the_best_stays_while_newer_ones_come_and_go(url: str, tmp_path: Path) -> None:
    """Best at step 2; checkpoints every 2 steps, one is kept; then a new attempt that finds a better one at step 7."""
    config, store = with_validation(), open_store(str(tmp_path))
    data, engine = open_training(url, None, config), make_engine("plain", config, 1)
    uars, seen = {1: 0.4, 2: 0.9, 3: 0.8, 4: 0.7, 5: 0.9, 6: 0.1, 7: 0.95, 8: 0.1}, {}

    def go_on(steps: range, best: Validated | None) -> None:
        validation = Scripted(uars, best)
        saver = SaveCheckpoint(
            engine, store, every=2, keep=1, metrics=None, validation=validation,
            state_at=lambda step: run_state(config, data.dataset.body["crop"], {}, data.state_at(step)),
        )  # fmt: skip
        for step in steps:
            record = StepRecord(step, 8, 0, 0.1, None, 0.0, 0.0, ())
            validation.after_step(record)
            saver.after_step(record)
            seen[step] = complete_steps(store)

    go_on(range(1, 6), None)
    assert seen == {1: [1], 2: [2], 3: [2], 4: [2, 4], 5: [2, 4]}
    go_on(range(5, 9), best_of_checkpoint(store, 4))
    assert (seen[6], seen[7], seen[8]) == ([2, 6], [7], [7, 8])
    assert step_of(store, "best") == 7


def test_the_model_is_in_evaluation_mode_meanwhile_and_trains_afterwards(url: str) -> None:
    """With dropout and a batch norm, whose statistics would move."""
    config = with_validation()
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, dropout=0.5))
    data, engine = open_training(url, None, config), make_engine("plain", config, 1)
    before = {name: buffer.clone() for name, buffer in engine.model.named_buffers()}
    generator = torch.random.get_rng_state()
    assert data.val is not None
    one, two = (validate(engine, data.val, config.stream, config.batch, 1) for _ in range(2))
    assert one == two
    assert engine.model.training
    assert all(torch.equal(buffer, before[name]) for name, buffer in engine.model.named_buffers())
    assert torch.equal(torch.random.get_rng_state(), generator)


def validated(step: int, uar: float, loss: float = 1.0) -> Validated:
    return Validated(step=step, uar=uar, war=0.0, loss=loss, clips=9)


def test_what_beats_what() -> None:
    assert validated(1, 0.0).beats(None)
    assert validated(2, 0.6).beats(validated(1, 0.5, loss=0.1))
    assert validated(2, 0.5, loss=0.9).beats(validated(1, 0.5))
    assert not validated(2, 0.5).beats(validated(1, 0.5))  # the earliest stays


def test_the_best_is_not_dropped_however_old(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    for step in range(1, 6):
        store.put(f"checkpoints/{step:08d}/COMPLETE.json", b"{}")
    drop_old(store, 2, best=1)
    assert complete_steps(store) == [1, 4, 5]
    drop_old(store, 2)
    assert complete_steps(store) == [4, 5]


def test_a_run_without_validation_has_no_best(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    assert step_of(store, "last") is None
    with pytest.raises(MicaclError, match=r"has no best\.json.*must not be asked of the test split"):
        step_of(store, "best")
    put_best(store, validated(7, 0.5))
    with pytest.raises(MicaclError, match="names step 7, whose checkpoint is gone"):
        step_of(store, "best")
    with pytest.raises(MicaclError, match="--checkpoint is 'first'"):
        step_of(store, "first")


def splits(url: str, config: RunConfig) -> Iterable[int | None]:
    data = open_training(url, None, config)
    return len(data.rows), None if data.val is None else len(data.val)


def test_which_clips_are_validated_on(url: str, tmp_path: Path) -> None:
    assert splits(url, config_of()) == (30, None)
    assert splits(url, with_validation()) == (22, 8)
    assert splits(url, with_validation(val_every=0)) == (22, None)
    own = make_dataset(tmp_path, {"train": dict.fromkeys(LABELS, 4), "val": dict.fromkeys(LABELS, 2)}, seed=0)
    assert splits(own, config_of()) == splits(own, with_validation()) == (12, 6)
    assert splits(own, with_validation(0.0, where="label != 'x'")) == (12, 6)
    assert splits(own, with_validation(0.0, split="val")) == (6, None)


def test_another_version_than_that_of_training_has_no_validation(url: str, whole: Any, tmp_path: Path) -> None:
    other = make_dataset(tmp_path, {"train": dict.fromkeys(LABELS, 4), "test": dict.fromkeys(LABELS, 1)}, seed=0)
    bundle = load_model(whole[0])
    assert open_for(bundle, other, None, None, "test").split("test").num_rows == 3
    with pytest.raises(MicaclError, match=r"validation clips of .* are of version 1"):
        open_for(bundle, other, None, None, "val")
