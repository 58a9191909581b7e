"""`micacl plan` says what the plan does."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pipeline import PlanConfig, StreamConfig, open_dataset
from pipeline.contract import MicaclError
from pipeline.plan_report import describe_plan
from tests.cli import micacl
from tests.tiny_dataset import make_dataset

COUNTS = {"train": {"sad": 20, "happy": 31, "neutral": 2}}


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_dataset(tmp_path_factory.mktemp("said"), COUNTS, 0, max_bags=4)


def test_what_is_said_is_what_is_drawn(url: str) -> None:
    dataset, config = open_dataset(url), PlanConfig(policy="sqrt", global_batch=12, clips_per_class=2)
    said = describe_plan(dataset, "train", config, StreamConfig(frames=2), ranks=2, nodes=1, epoch=3)
    loader = dataset.loader("train", config)
    plan = loader.plan(3)
    drawn = np.concatenate([plan.batch(step) for step in range(said["steps"])])
    uses = np.bincount(drawn, minlength=53)
    labels = np.array([loader.rows.label(row) for row in range(53)])
    for number, row in enumerate(said["classes"]):
        assert row["clips"] == (labels == number).sum()
        assert row["draws"] == uses[labels == number].sum() == pytest.approx(row["quota"] * said["steps"], abs=1e-2)
        assert row["uses"] == [uses[labels == number].min(), uses[labels == number].max()]
        assert row["quota"] >= 2
    assert said["clips_per_rank"] == 6
    assert said["plan"] == plan.hash
    assert said["shards"] == said["shards_read_whole"] == len(loader.rows.shards)


def test_many_nodes_read_ranges(url: str) -> None:
    said = describe_plan(open_dataset(url), "train", PlanConfig(), StreamConfig(), ranks=4, nodes=4, epoch=0)
    assert said["shards_read_whole"] == 0


def test_the_command(url: str, tmp_path: Path) -> None:
    done = micacl("plan", url, "--plan.policy", "natural", module="pipeline")
    assert done.code == 0
    assert [row["label"] for row in done.result["classes"]] == ["happy", "sad", "neutral"]
    assert "uses of a clip" in done.stderr
    bad = micacl("plan", url, "--plan.policy", "uniforn", module="pipeline")
    assert (bad.code, bad.result["error"]["cause"]) == (2, "--plan.policy is 'uniforn'.")
    assert micacl("plan", str(tmp_path), module="pipeline").code == 2


def test_a_split_that_cannot_be_shared_is_refused(url: str) -> None:
    with pytest.raises(MicaclError, match="not a multiple of 5 ranks"):
        describe_plan(open_dataset(url), "train", PlanConfig(), StreamConfig(), ranks=5, nodes=1, epoch=0)


@pytest.mark.parametrize("wrong", [{"ranks": 0}, {"nodes": 0}, {"nodes": -1}, {"epoch": -1}], ids=str)
def test_numbers_that_count_nothing_are_refused(url: str, wrong: dict[str, int]) -> None:
    (flag,) = wrong
    with pytest.raises(MicaclError, match=rf"--{flag} is {wrong[flag]}\."):
        describe_plan(
            open_dataset(url), "train", PlanConfig(), StreamConfig(), **{"ranks": 1, "nodes": 1, "epoch": 0, **wrong}
        )
