"""The second stage of decoupled training: what moves, what stands still, and runs that stop in either stage."""

from __future__ import annotations

import contextlib
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cluster.deepspeed_engine import DeepSpeedConfig, DeepSpeedEngine
from cluster.rank import _head_step
from micacl.batch import BatchConfig
from micacl.bundle import run_state
from micacl.config import RunConfig, TrainConfig
from micacl.loss import LossConfig, Objective
from micacl.model.backbone import BackboneConfig
from micacl.model.micacl import ModelConfig, build_model
from micacl.train.checkpoint import read_checkpoint
from micacl.train.data import train_data
from micacl.train.engine import Engine, PlainEngine
from micacl.train.hooks.checkpoint import SaveCheckpoint
from micacl.train.loop import fit
from micacl.train.optim import OptimConfig, lr_at, make_optimizer, progress_at
from pipeline.contract import MicaclError
from pipeline.dataset import open_dataset
from pipeline.plan import PlanConfig
from pipeline.storage import open_store
from pipeline.stream import StreamConfig
from tests.gloo import run_ranks
from tests.tiny_dataset import make_dataset

LABELS = ("happy", "sad", "neutral")
SWITCH, STEPS = 8, 16
"""Two epochs of 4 steps for the whole model, two for the head."""


def config_of(retrain_head_from: int | None = 2) -> RunConfig:
    """A batch norm, so that running statistics could move; a queue, so that a checkpoint has something to keep."""
    return RunConfig(
        model=ModelConfig(
            backbone=dataclasses.replace(BackboneConfig.tiny(4), norm="batch"), classes=LABELS, projection_dim=8
        ),
        loss=LossConfig(queue_clips_per_class=2, mccl_schedule="cosine", drw_from=0.25),
        plan=PlanConfig(policy="natural", then="uniform", then_from=2, global_batch=4, steps_per_epoch=4),
        stream=StreamConfig(frames=1, threads=1),
        batch=BatchConfig(side=16),
        train=TrainConfig(epochs=4, lr=1e-2, log_every=1, retrain_head_from=retrain_head_from),
    )


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> str:
    counts = {"train": {"happy": 9, "sad": 4, "neutral": 2}}
    return make_dataset(tmp_path_factory.mktemp("dataset"), counts, seed=0)


class Stopped(Exception):
    pass


class Watch:
    """Keeps the logged losses and learning rates; stops the run after step `stop`, as if the process were killed."""

    def __init__(self, stop: int) -> None:
        self.stop, self.losses, self.lrs, self.parts = stop, [], [], []

    def after_step(self, record: Any) -> None:
        self.losses.append(record.losses["total"])
        self.lrs.append(record.lr)
        self.parts.append(sorted(record.losses))
        if record.step == self.stop:
            raise Stopped


def make_engine(kind: str, config: RunConfig, ranks: int) -> Engine:
    model = build_model(config.model, config.train.seed)
    if kind == "plain":
        return PlainEngine(model, config.train)
    stage = DeepSpeedConfig(stage=int(kind[-1]))
    clips = config.plan.global_batch // ranks
    return DeepSpeedEngine(model, config.train, clips_per_rank=clips, deepspeed=stage, device=torch.device("cpu"))


def train(kind: str, url: str, run: str, stop: int, rank: int = 0, ranks: int = 1) -> Watch:
    """Begin or continue the run at `run`, with a checkpoint every 2 steps, until after `stop`."""
    config, watch, store = config_of(), Watch(stop), open_store(run)
    data = train_data(open_dataset(url), config)
    engine, objective, start = make_engine(kind, config, ranks), Objective(config.loss, data.seen_counts), 0
    if (Path(run) / "checkpoints").exists():
        found = read_checkpoint(store)
        start = found.step
        engine.import_state(found.weights, found.moments, start, _head_step(data, start))
        objective.import_state(found.objective)

    def state_at(step: int) -> dict[str, Any]:
        return run_state(config, data.dataset.body["crop"], {"url": "", "version": 1}, data.state_at(step))

    saver = SaveCheckpoint(engine, store, every=2, keep=99, state_at=state_at, metrics=None, objective=objective)
    with contextlib.suppress(Stopped):
        fit(
            engine,
            data.batches(start, rank, ranks),
            objective,
            config.train,
            start_step=start,
            steps=data.steps,
            steps_per_epoch=data.steps_per_epoch,
            log_every=1,
            hooks=[saver, watch],
        )
    return watch


def train_rank(rank: int, ranks: int, kind: str, url: str, run: str, stop: int) -> list[float]:
    """To the end, with a stop on the way behind which an engine is made anew."""
    return [loss for until in (stop, STEPS) for loss in train(kind, url, run, until, rank, ranks).losses]


def tensors(run: Path, step: int) -> dict[str, Tensor]:
    """All of a checkpoint, by one name each."""
    found = read_checkpoint(open_store(str(run)), step)
    return {**found.weights, **found.moments, **{f"objective.{name}": t for name, t in found.objective.items()}}


@pytest.fixture(scope="module")
def whole(dataset: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Watch]:
    """The run without a stop, plain, in one process."""
    run = tmp_path_factory.mktemp("whole") / "run"
    return run, train("plain", dataset, str(run), STEPS)


def moved(before: dict[str, Tensor], after: dict[str, Tensor]) -> set[str]:
    return {name for name in before if not torch.equal(before[name], after[name])}


def test_only_the_head_moves_in_the_second_stage(whole: tuple[Path, Watch]) -> None:
    run, watch = whole
    first, last = (tensors(run, step) for step in (SWITCH, STEPS))
    assert moved(first, last) == {
        f"{kind}head.{name}" for kind in ("", "exp_avg.", "exp_avg_sq.") for name in ("weight", "bias")
    }
    assert len(moved(tensors(run, SWITCH - 2), first)) > 100  # running statistics, moments and the queue too
    assert watch.losses[-1] < watch.losses[SWITCH]  # and it learns


def test_the_head_begins_again_from_its_first_weights(whole: tuple[Path, Watch]) -> None:
    run, watch = whole
    built = build_model(config_of().model, config_of().train.seed).head.weight
    # Two updates of Adam move no weight by more than 2 lr; eight of the first stage moved some by more than that.
    reach = 2 * max(watch.lrs[SWITCH : SWITCH + 2]) * 1.01
    assert (tensors(run, SWITCH + 2)["head.weight"] - built).abs().max() < reach
    assert (tensors(run, SWITCH)["head.weight"] - built).abs().max() > reach


def test_the_learning_rate_starts_anew_and_the_contrastive_loss_ends(whole: tuple[Path, Watch]) -> None:
    _, watch = whole
    assert watch.lrs[:SWITCH] == watch.lrs[SWITCH:]
    assert {tuple(parts) for parts in watch.parts[:SWITCH]} == {
        ("classification", "mccl_bag", "mccl_instance", "total")
    }
    assert {tuple(parts) for parts in watch.parts[SWITCH:]} == {("classification", "total")}


@pytest.mark.parametrize("stop", [4, SWITCH, SWITCH + 4], ids=["first stage", "at the switch", "second stage"])
def test_a_run_that_stopped_continues_bit_for_bit(
    stop: int, dataset: str, whole: tuple[Path, Watch], tmp_path: Path
) -> None:
    before = train("plain", dataset, str(tmp_path / "run"), stop)
    after = train("plain", dataset, str(tmp_path / "run"), STEPS)
    assert (len(before.losses), len(after.losses)) == (stop, STEPS - stop)
    assert [*before.losses, *after.losses] == whole[1].losses
    assert not moved(tensors(whole[0], STEPS), tensors(tmp_path / "run", STEPS))
    assert any(name.startswith("objective.queues.bag") for name in tensors(whole[0], STEPS))


def test_without_its_queue_a_run_would_go_on_differently(
    dataset: str, whole: tuple[Path, Watch], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    train("plain", dataset, str(run), 4)
    config, data = config_of(), train_data(open_dataset(dataset), config_of())
    found = read_checkpoint(open_store(str(run)), 4)
    engine, watch = make_engine("plain", config, 1), Watch(6)
    engine.import_state(found.weights, found.moments, 4)
    with contextlib.suppress(Stopped):
        fit(
            engine,
            data.batches(4, 0, 1),
            Objective(config.loss, data.seen_counts),
            config.train,
            start_step=4,
            steps=STEPS,
            steps_per_epoch=4,
            log_every=1,
            hooks=[watch],
        )
    assert watch.losses != whole[1].losses[4:6]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "ranks", "stop"),
    [("zero1", 2, SWITCH), ("zero1", 1, SWITCH + 4)],
)
def test_deepspeed_does_the_same(
    kind: str, ranks: int, stop: int, dataset: str, whole: tuple[Path, Watch], tmp_path: Path
) -> None:
    """Two ranks have other batch statistics in the first stage: of them only what must stand still is asked."""
    run = tmp_path / "run"
    losses = run_ranks(train_rank, ranks, tmp_path / "ranks", kind, dataset, str(run), stop)[0]
    first, last = (tensors(run, step) for step in (SWITCH, STEPS))
    weights = set(read_checkpoint(open_store(str(run)), STEPS).weights)
    assert moved(first, last) & weights == {"head.weight", "head.bias"}
    if ranks == 1:
        assert losses == pytest.approx(whole[1].losses, abs=2e-4)


def test_stages_are_functions_of_the_step() -> None:
    config = OptimConfig(retrain_head_from=2)
    at = [progress_at(step, 16, 4, config) for step in range(16)]
    assert [(p.step, p.steps, p.epoch, p.epochs, p.head_only) for p in (at[0], at[7], at[8], at[15])] == [
        (0, 8, 0, 4, False), (7, 8, 1, 4, False), (0, 8, 2, 4, True), (7, 8, 3, 4, True),
    ]  # fmt: skip
    only = progress_at(0, 16, 4, OptimConfig(retrain_head_from=0))
    assert (only.step, only.steps, only.head_only) == (0, 16, True)
    assert not any(progress_at(step, 16, 4, OptimConfig()).head_only for step in range(16))
    assert lr_at(at[8].step, at[8].steps, config) == lr_at(0, 8, config)


def test_groups_of_a_run_with_one_stage_are_as_ever() -> None:
    model = build_model(config_of().model, 0)
    one, two = (make_optimizer(model, OptimConfig(retrain_head_from=epoch)) for epoch in (None, 1))
    assert [group["weight_decay"] for group in one.param_groups] == [0.05, 0.0]
    assert [(group["weight_decay"], group["head"], len(group["params"])) for group in two.param_groups[2:]] == [
        (0.05, True, 1), (0.0, True, 1),
    ]  # fmt: skip
    assert sum(len(g["params"]) for g in one.param_groups) == sum(len(g["params"]) for g in two.param_groups)


def test_an_epoch_that_the_run_does_not_have_is_refused() -> None:
    for epoch in (4, -1):
        with pytest.raises(MicaclError, match=r"--train\.retrain-head-from"):
            config_of(epoch)


def test_the_head_begins_again_without_memory() -> None:
    """One update moves each of its weights by as much as Adam's first one, whatever it learned before."""
    config = config_of()
    engine = PlainEngine(build_model(config.model, 0), config.train)
    engine.model.train()
    clips, built = torch.rand(4, 4, 3, 1, 16, 16), engine.model.head.bias.detach().clone()
    for _ in range(5):
        engine.step(engine.forward(clips).logits_BK.square().sum(), 0.1)
    engine.head_only = True
    engine.restart_head()
    engine.step(engine.forward(clips).logits_BK.square().sum(), 0.1)
    torch.testing.assert_close((engine.model.head.bias - built).abs(), torch.full((3,), 0.1), rtol=1e-3, atol=0)
