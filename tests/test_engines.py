"""DeepSpeed against the plain engine, and runs that stop and continue, on real gloo processes."""

from __future__ import annotations

import contextlib
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from cluster.deepspeed_engine import DeepSpeedConfig, DeepSpeedEngine
from micacl.batch import BatchConfig
from micacl.bundle import run_state
from micacl.config import RunConfig, TrainConfig, to_dict
from micacl.loss.objective import Objective
from micacl.model.backbone import BackboneConfig
from micacl.model.micacl import ModelConfig, build_model
from micacl.train.checkpoint import complete_steps, newest_checkpoint, read_checkpoint
from micacl.train.data import TrainData, train_data
from micacl.train.engine import Engine, PlainEngine
from micacl.train.hooks.checkpoint import SaveCheckpoint
from micacl.train.loop import fit
from pipeline.contract import MicaclError
from pipeline.dataset import open_dataset
from pipeline.plan import PlanConfig
from pipeline.storage import open_store
from pipeline.stream import StreamConfig
from tests.gloo import run_ranks
from tests.tiny_dataset import make_dataset

LABELS = ("happy", "sad", "neutral")
STEPS = 20
TOLERANCE = 2e-4
"""Absolute, on losses near 1: the engines sum gradients and norms in different orders, in float32."""


def config_of(epochs: int = 5) -> RunConfig:
    return RunConfig(
        model=ModelConfig(backbone=BackboneConfig.tiny(8), classes=LABELS, projection_dim=16),
        plan=PlanConfig(global_batch=4, steps_per_epoch=4),
        stream=StreamConfig(frames=2, threads=1),
        batch=BatchConfig(side=24),
        train=TrainConfig(epochs=epochs, lr=1e-3, checkpoint_every=10, log_every=1),
    )


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> str:
    counts = {"train": {"happy": 9, "sad": 4, "neutral": 2}, "test": {"happy": 5, "sad": 3, "neutral": 3}}
    return make_dataset(tmp_path_factory.mktemp("dataset"), counts, seed=0)


class Losses:
    """A hook that keeps what was logged."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def after_step(self, record: Any) -> None:
        self.values.append(record.losses["total"])


def make_engine(kind: str, config: RunConfig, ranks: int) -> Engine:
    model = build_model(config.model, config.train.seed)
    if kind == "plain":
        return PlainEngine(model, config.train)
    stage = DeepSpeedConfig(stage=int(kind[-1]))
    clips = config.plan.global_batch // ranks
    return DeepSpeedEngine(model, config.train, clips_per_rank=clips, deepspeed=stage, device=torch.device("cpu"))


def train_rank(rank: int, ranks: int, kind: str, url: str, run: str, stop: int) -> list[float]:
    """Continue the run at `run` to step `stop`; the losses of the steps done now."""
    config, losses = config_of(), Losses()
    data = train_data(open_dataset(url), config)
    engine = make_engine(kind, config, ranks)
    start, store = 0, open_store(run)
    if (Path(run) / "checkpoints").exists():
        checkpoint = read_checkpoint(store)
        engine.import_state(checkpoint.weights, checkpoint.moments, checkpoint.step)
        start = checkpoint.step
    saver = SaveCheckpoint(
        engine, store, every=10, keep=9, state_at=lambda step: state_of(config, data, step), metrics=None
    )
    with contextlib.suppress(Stopped):  # as if the process were killed right after the checkpoint of `stop`
        fit(
            engine,
            data.batches(start, rank, ranks),
            Objective(config.loss, [1.0] * 3),
            config.train,
            start_step=start,
            steps=data.steps,
            steps_per_epoch=data.steps_per_epoch,
            log_every=1,
            hooks=[losses, saver, StopAt(stop)],
        )
    return losses.values


class Stopped(Exception):
    pass


class StopAt:
    def __init__(self, step: int) -> None:
        self.step = step

    def after_step(self, record: Any) -> None:
        if record.step == self.step:
            raise Stopped


def state_of(config: RunConfig, data: TrainData, step: int) -> dict[str, Any]:
    return run_state(config, data.dataset.body["crop"], {"url": "", "version": 1}, data.state_at(step))


@pytest.fixture(scope="module")
def reference(dataset: str, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """20 losses of the plain engine in one process."""
    folder = tmp_path_factory.mktemp("reference")
    return list(run_ranks(train_rank, 1, folder, "plain", dataset, str(folder / "run"), STEPS)[0])


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "ranks"), [("plain", 2), ("zero1", 1), ("zero1", 2), ("zero0", 2)])
def test_engines_have_equal_losses(kind: str, ranks: int, dataset: str, reference: list[float], tmp_path: Path) -> None:
    losses = run_ranks(train_rank, ranks, tmp_path, kind, dataset, str(tmp_path / "run"), STEPS)
    assert len(losses[0]) == STEPS
    assert reference[0] - min(reference) > 10 * TOLERANCE  # it learns, else equality would say little
    for got in losses:  # means over ranks: every rank logs the same
        assert got == pytest.approx(reference, abs=TOLERANCE)


@pytest.mark.slow
@pytest.mark.parametrize(("first", "then"), [(("zero1", 2), ("zero1", 1)), (("plain", 1), ("zero1", 2))])
def test_a_run_continues_at_another_number_of_ranks_and_engine(
    first: tuple[str, int], then: tuple[str, int], dataset: str, reference: list[float], tmp_path: Path
) -> None:
    run = str(tmp_path / "run")
    before = run_ranks(train_rank, first[1], tmp_path / "a", first[0], dataset, run, 10)[0]
    after = run_ranks(train_rank, then[1], tmp_path / "b", then[0], dataset, run, STEPS)[0]
    assert (len(before), len(after)) == (10, STEPS - 10)
    assert [*before, *after] == pytest.approx(reference, abs=TOLERANCE)


def test_a_plain_run_continues_bit_for_bit(dataset: str, tmp_path: Path) -> None:
    whole = train_rank(0, 1, "plain", dataset, str(tmp_path / "whole"), STEPS)
    part = train_rank(0, 1, "plain", dataset, str(tmp_path / "part"), 10)
    rest = train_rank(0, 1, "plain", dataset, str(tmp_path / "part"), STEPS)
    assert [*part, *rest] == whole


def test_a_checkpoint_without_complete_is_not_there(dataset: str, tmp_path: Path) -> None:
    train_rank(0, 1, "plain", dataset, str(tmp_path / "run"), STEPS)
    store = open_store(str(tmp_path / "run"))
    assert read_checkpoint(store).step == STEPS
    store.delete(f"checkpoints/{STEPS:08d}/COMPLETE.json")
    assert read_checkpoint(store).step == 10
    with pytest.raises(MicaclError, match=r"no complete checkpoint of step 20"):
        read_checkpoint(store, STEPS)


def test_a_changed_checkpoint_is_refused(dataset: str, tmp_path: Path) -> None:
    train_rank(0, 1, "plain", dataset, str(tmp_path / "run"), STEPS)
    file = tmp_path / "run" / "checkpoints" / f"{STEPS:08d}" / "optimizer.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(MicaclError, match=r"optimizer\.safetensors is not the file"):
        read_checkpoint(open_store(str(tmp_path / "run")))


def test_a_loss_that_is_not_finite_stops_with_step_and_clips(dataset: str) -> None:
    config = config_of()
    data = train_data(open_dataset(dataset), config)
    engine = PlainEngine(build_model(config.model, 0), config.train)
    with torch.no_grad():
        next(iter(engine.model.parameters())).fill_(float("nan"))
    with pytest.raises(MicaclError, match=r"loss of step 1 is not finite .* on the clips [0-9a-f]{16}_0"):
        fit(
            engine,
            data.batches(0, 0, 1),
            Objective(config.loss, [1.0] * 3),
            config.train,
            start_step=0,
            steps=2,
            steps_per_epoch=4,
            log_every=1,
            hooks=[],
        )


def stop_of(dataset: str, folder: Path, spoil: str) -> MicaclError:
    """What a run says that has a checkpoint of step 2 and then meets `spoil`: a bad loss, or a bad gradient."""
    config, store = config_of(), open_store(str(folder))
    data = train_data(open_dataset(dataset), config)
    engine = PlainEngine(build_model(config.model, 0), config.train)
    saver = SaveCheckpoint(
        engine, store, every=2, keep=9, state_at=lambda step: state_of(config, data, step), metrics=None
    )

    class Spoil:
        def after_step(self, record: Any) -> None:
            if record.step == 2 and spoil == "loss":
                engine.model.head.weight.data.fill_(float("nan"))
            if record.step == 3 and spoil == "gradient":  # an infinite gradient behind a finite loss
                engine.model.head.bias.register_hook(lambda grad: grad * float("inf"))

    with pytest.raises(MicaclError) as stopped:
        fit(
            engine,
            data.batches(0, 0, 1),
            Objective(config.loss, [1.0] * 3),
            config.train,
            start_step=0,
            steps=8,
            steps_per_epoch=4,
            log_every=1,
            hooks=[saver, Spoil()],
            newest=lambda: newest_checkpoint(store),
        )
    return stopped.value


def test_a_run_that_must_stop_names_the_checkpoint_that_is_good(dataset: str, tmp_path: Path) -> None:
    error = stop_of(dataset, tmp_path / "loss", "loss")
    assert "The loss of step 3 is not finite" in error.cause
    assert "on the clips" in error.cause
    assert f"good is the checkpoint of step 2, {tmp_path}/loss/checkpoints/00000002" in error.consequence
    read_checkpoint(open_store(str(tmp_path / "loss")), 2)


def test_weights_that_are_not_finite_are_never_a_checkpoint(dataset: str, tmp_path: Path) -> None:
    error = stop_of(dataset, tmp_path / "gradient", "gradient")
    assert "weights are not finite after step 4 (first " in error.cause
    assert "on the clips" in error.cause
    assert "good is the checkpoint of step 2" in error.consequence
    assert complete_steps(open_store(str(tmp_path / "gradient"))) == [2]


def test_without_a_checkpoint_the_beginning_is_good(tmp_path: Path) -> None:
    assert newest_checkpoint(open_store(str(tmp_path))).startswith("the run's beginning")


def test_another_plan_or_version_is_refused_on_resume(dataset: str, tmp_path: Path) -> None:
    config = config_of()
    data = train_data(open_dataset(dataset), config)
    state = data.state_at(6)
    assert (state.epoch, state.step) == (1, 2)
    data.require_same(state)
    other = dataclasses.replace(config, plan=PlanConfig(global_batch=6, steps_per_epoch=4))
    with pytest.raises(MicaclError, match="global batch 4 and this run has 6"):
        train_data(open_dataset(dataset), other).require_same(state)
    moved = make_dataset(tmp_path, {"train": {"happy": 9, "sad": 5, "neutral": 2}}, seed=0)
    with pytest.raises(MicaclError, match="version"):
        train_data(open_dataset(moved), config).require_same(state)


def test_labels_of_dataset_and_model_must_agree(dataset: str) -> None:
    config = dataclasses.replace(config_of(), model=ModelConfig(backbone=BackboneConfig.tiny(8)))
    with pytest.raises(MicaclError, match=r"--model\.classes"):
        train_data(open_dataset(dataset), config)


def test_config_survives_json() -> None:
    from micacl.config import from_dict

    config = config_of()
    assert from_dict(RunConfig, to_dict(config)) == config
    values = to_dict(config)
    with pytest.raises(MicaclError, match="unknown field 'wodth'"):
        values["model"]["backbone"]["wodth"] = 3
        from_dict(RunConfig, values)
    with pytest.raises(MicaclError, match="lacks the field 'loss'"):
        from_dict(RunConfig, {"model": values["model"]})
