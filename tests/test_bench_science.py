"""The science's runs: what a control does to a clip, that a run is kept, and what a table says."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import numpy as np
import pytest

from pipeline.contract import DFEW_LABELS
from pipeline.demo_dynamics import DYNAMICS_LABELS
from pipeline.loader import ClipBatch
from tests.tiny_dataset import make_dataset

SCIENCE = str(Path(__file__).resolve().parents[1] / "bench" / "science")


@pytest.fixture(autouse=True)
def _beside_the_scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(SCIENCE)
    for name in ("experiment", "dynamics", "tail", "grid"):
        monkeypatch.delitem(sys.modules, name, raising=False)


def batch(clips: int = 3) -> ClipBatch:
    frames = np.arange(clips * 16, dtype=np.uint8).reshape(clips, 4, 4, 1, 1, 1)
    return ClipBatch(
        frames_BNTHWC=np.broadcast_to(frames, (clips, 4, 4, 2, 2, 3)),
        labels_B=np.zeros(clips, np.int64),
        keys=tuple("abc"[:clips]),
        rows_B=np.arange(clips),
        positions_B=np.arange(clips),
        rng_keys_B2=np.arange(2 * clips, dtype=np.uint64).reshape(clips, 2),
        mask_B=np.ones(clips, bool),
        epoch=0,
        step=0,
        state={"step": 1},
    )


def test_controls_take_time_away_and_nothing_else() -> None:
    from dynamics import base
    from experiment import Experiment, changed

    plain = batch()
    for control in ("single", "shuffled"):
        experiment = Experiment(name="x", config=base(), control=control)
        frames = changed(plain, experiment).frames_BNTHWC
        assert np.array_equal(frames, changed(plain, experiment).frames_BNTHWC)
        for was, now in zip(plain.frames_BNTHWC, frames, strict=True):
            before, after = was[..., 0, 0, 0].ravel(), now[..., 0, 0, 0].ravel()
            if control == "single":
                assert len(set(after)) == 1
                assert after[0] in before
            else:
                assert sorted(after) == sorted(before)
                assert list(after) != list(before)


def test_regrouping_keeps_the_order_of_frames() -> None:
    from dynamics import base
    from experiment import Experiment, changed

    frames = changed(batch(), Experiment(name="x", config=base(16), regroup=True)).frames_BNTHWC
    assert frames.shape == (3, 16, 1, 2, 2, 3)
    assert list(frames[1, :, 0, 0, 0, 0]) == list(range(16, 32))


def test_a_run_is_kept_and_read_again(tmp_path: Path) -> None:
    from experiment import Experiment, run
    from tail import full, numbers, table

    counts = {"train": dict.fromkeys(DFEW_LABELS, 4) | {"happy": 8, "fear": 2}, "test": dict.fromkeys(DFEW_LABELS, 2)}
    url = make_dataset(tmp_path / "dataset", counts, seed=1)
    config = full(epochs=1)
    config = dataclasses.replace(config, plan=dataclasses.replace(config.plan, policy="natural", global_batch=8))
    experiment = Experiment(name="x", config=config, posthoc=True)
    first = run(experiment, url, 0, tmp_path / "runs")
    kept = next((tmp_path / "runs").glob("x-none-0-*.json"))
    stamp = kept.stat().st_mtime_ns
    assert run(experiment, url, 0, tmp_path / "runs")["rows"] == first["rows"]
    assert kept.stat().st_mtime_ns == stamp
    assert len(first["rows"]) == sum(map(sum, first["matrix"])) == 14
    assert set(first["posthoc"]) == {"tau-norm 0.5", "tau-norm 1", "logit adjustment"}
    assert tuple(first["train_clips"]) == (8, 4, 4, 4, 4, 4, 2)
    found = numbers(first, first["matrix"])
    assert found["UAR"] == pytest.approx(first["uar"])
    assert "| x |" in table({"x": [found, found], "oversampling": [found, found]}, "oversampling")


def test_factors_are_read_from_the_confusion() -> None:
    from dynamics import factors

    right = np.eye(8, dtype=int) * 5
    assert factors(right.tolist()) == {"speed": 1.0, "way": 1.0, "profile": 1.0}
    mirrored = [[0] * 8 for _ in range(8)]
    for i, label in enumerate(DYNAMICS_LABELS):
        speed, way, profile = label.split("_")
        other = "_".join([speed, "left" if way == "right" else "right", profile])
        mirrored[i][DYNAMICS_LABELS.index(other)] = 5
    assert factors(mirrored) == {"speed": 1.0, "way": 0.0, "profile": 1.0}
