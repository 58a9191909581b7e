"""What a run is, and a run that begins where another one was."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from cluster.claim import claim, claimed
from cluster.rank import _begin
from micacl.bundle import run_state
from micacl.config import RunConfig, TrainConfig
from micacl.model.backbone import BackboneConfig
from micacl.model.micacl import ModelConfig, build_model
from micacl.train.checkpoint import Checkpoint, write_checkpoint
from micacl.train.data import TrainData, train_data
from micacl.train.engine import PlainEngine
from pipeline.contract import MicaclError
from pipeline.dataset import open_dataset
from pipeline.plan import PlanConfig
from pipeline.storage import open_store
from pipeline.stream import StreamConfig
from pipeline.trained_on import held_by_versions, trained_on
from tests.tiny_dataset import make_dataset

LABELS = ("happy", "sad", "neutral")


def config_of(global_batch: int = 4, features: int = 8, **train: Any) -> RunConfig:
    return RunConfig(
        model=ModelConfig(backbone=BackboneConfig.tiny(features), classes=LABELS, projection_dim=16),
        plan=PlanConfig(global_batch=global_batch),
        stream=StreamConfig(frames=2),
        train=TrainConfig(epochs=5, **train),
    )


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_dataset(tmp_path_factory.mktemp("ds"), {"train": {"happy": 12, "sad": 8, "neutral": 4}}, seed=0)


def data_of(url: str, config: RunConfig) -> TrainData:
    return train_data(open_dataset(url), config)


def said_of(url: str) -> dict[str, Any]:
    opened = open_dataset(url)
    return {"url": url, "version": opened.number, "sha256": opened.sha256}


@pytest.fixture
def old(dataset: str, tmp_path: Path) -> str:
    """A run of 6 steps an epoch with a checkpoint in the middle of its third epoch."""
    config, url = config_of(), str(tmp_path / "old")
    claim(url, config, said_of(dataset))
    engine, data = PlainEngine(build_model(config.model, 1), config.train), data_of(dataset, config)
    model = engine.model
    weights, moments = engine.export_state()
    moments = {
        f"{kind}.{n}": torch.full_like(p, 0.25)
        for n, p in model.named_parameters()
        for kind in ("exp_avg", "exp_avg_sq")
    }
    state = run_state(config, data.dataset.body["crop"], claimed(url)["dataset"], data.state_at(15))
    write_checkpoint(open_store(url), Checkpoint(15, weights, moments, state))
    return url


def test_the_first_to_come_says_what_a_run_is(dataset: str, tmp_path: Path) -> None:
    url = str(tmp_path / "run")
    claim(url, config_of(), said_of(dataset))
    claim(url, config_of(), said_of(dataset))
    assert claimed(url)["from"] is None
    with pytest.raises(MicaclError, match=r"another configuration \(plan.global_batch: 4, now 8\).*--from-run"):
        claim(url, config_of(8), said_of(dataset))


def test_a_run_begins_where_another_one_was_at_the_start_of_its_epoch(dataset: str, old: str, tmp_path: Path) -> None:
    config, url = config_of(8), str(tmp_path / "new")
    claim(url, config, said_of(dataset), old)
    assert claimed(url)["from"] == {"run": old, "step": 15}
    engine, data = PlainEngine(build_model(config.model, 2), config.train), data_of(dataset, config)
    assert data.steps_per_epoch == 3
    assert _begin(engine, data, url) == 6  # the third epoch, in steps of 8 clips
    wanted = build_model(config.model, 1).state_dict()
    assert all(torch.equal(t, wanted[name]) for name, t in engine.model.state_dict().items())
    state = next(iter(engine.optimizer.state.values()))
    assert float(state["step"]) == 6
    assert torch.all(state["exp_avg"] == 0.25)


def test_a_run_with_nothing_left_to_train_is_refused(dataset: str, old: str, tmp_path: Path) -> None:
    config = dataclasses.replace(config_of(8), train=TrainConfig(epochs=2))
    claim(str(tmp_path / "new"), config, said_of(dataset), old)
    engine = PlainEngine(build_model(config.model, 2), config.train)
    with pytest.raises(MicaclError, match=r"has done 2 epochs and this run has 2.*more --train.epochs"):
        _begin(engine, data_of(dataset, config), str(tmp_path / "new"))


def test_where_it_begins_is_decided_once(dataset: str, old: str, tmp_path: Path) -> None:
    url = str(tmp_path / "new")
    claim(url, config_of(8), said_of(dataset), old)
    step = json.loads((tmp_path / "old/checkpoints/00000015/state.json").read_text())
    (tmp_path / "old/checkpoints/00000099").mkdir()
    assert step["plan"]["step"] == 3
    claim(url, config_of(8), said_of(dataset), old)
    claim(url, config_of(8), said_of(dataset))
    assert claimed(url)["from"]["step"] == 15
    with pytest.raises(MicaclError, match="was not begun from"):
        claim(url, config_of(8), said_of(dataset), str(tmp_path / "other"))


def test_another_model_or_no_checkpoint_is_refused(dataset: str, old: str, tmp_path: Path) -> None:
    with pytest.raises(MicaclError, match=r"another model \(.*now 16.*Its weights do not fit"):
        claim(str(tmp_path / "new"), config_of(8, features=16), said_of(dataset), old)
    with pytest.raises(MicaclError, match="no complete checkpoint"):
        claim(str(tmp_path / "new"), config_of(8), said_of(dataset), str(tmp_path / "empty"))
    assert not (tmp_path / "new").exists()


def test_a_run_was_trained_on_what_its_ancestors_were_trained_on(dataset: str, old: str, tmp_path: Path) -> None:
    other = make_dataset(tmp_path / "other", {"train": {"happy": 2, "sad": 2, "neutral": 2}}, seed=1, prefix="other/")
    config = config_of(8)
    for name, parent in (("second", old), ("third", str(tmp_path / "second"))):
        claim(str(tmp_path / name), config, said_of(other), parent)
        data = data_of(other, config)
        state = run_state(config, data.dataset.body["crop"], claimed(str(tmp_path / name))["dataset"], data.state_at(3))
        weights, moments = PlainEngine(build_model(config.model, 1), config.train).export_state()
        write_checkpoint(open_store(str(tmp_path / name)), Checkpoint(3, weights, moments, state))
    store = open_store(dataset)
    held = held_by_versions(store, lambda key: open_dataset(dataset).index if key else None)
    found = trained_on(store, held, [str(tmp_path / name) for name in ("old", "second", "third")])
    assert {(model["kind"], Path(model["url"]).name) for model in found["models"]} == {
        ("run", "old"), ("run", "second"), ("run", "third"),
    }  # fmt: skip
    third = claimed(str(tmp_path / "third"))["dataset"]
    assert [one["url"] for one in third["before"]] == [dataset, other]
    assert dataclasses.asdict(config)["plan"]["global_batch"] == 8


def test_a_run_that_has_seen_the_test_or_validation_clips_is_no_beginning(
    dataset: str, old: str, tmp_path: Path
) -> None:
    for name, train in (("fold", {"fold": 2}), ("val_share", {"val_share": 0.2})):
        with pytest.raises(MicaclError, match=rf"train.{name} .* has seen clips that this run would be tested"):
            claim(str(tmp_path / name), config_of(**train), said_of(dataset), old)
    elsewhere = {**said_of(dataset), "url": "elsewhere", "sha256": "0" * 64}
    claim(str(tmp_path / "elsewhere"), config_of(fold=2), elsewhere, old)  # no clip of another data set was seen
    claim(str(tmp_path / "seed"), config_of(val_seed=3), said_of(dataset), old)  # without a share it decides nothing
