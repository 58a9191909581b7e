"""`micacl compare` reads two evaluations, refuses what is not paired, and says what can be told."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from micacl.compare import compare_runs
from micacl.metrics import uar
from micacl.predictions import PREDICTIONS, Predictions, read_evaluation, read_predictions
from pipeline.contract import MicaclError
from pipeline.storage import open_store
from tests.cli import micacl
from tests.tiny_evaluation import LABELS, predictions, write_evaluation


def test_a_table_comes_back_as_it_was(tmp_path: Path) -> None:
    table = predictions(0)
    table = dataclasses.replace(table, subjects=(None, *table.subjects[1:]))
    back = read_predictions(table.to_parquet(), LABELS)
    assert (back.keys, back.subjects) == (table.keys, table.subjects)
    assert (back.truth_N == table.truth_N).all()
    assert (back.predicted_N == table.predicted_N).all()
    np.testing.assert_allclose(back.p_NK, table.p_NK)
    write_evaluation(str(tmp_path), table)
    found = read_evaluation(str(tmp_path))
    assert found.scores["uar"] == pytest.approx(uar(matrix(table)))
    assert read_evaluation(found.url).predictions.keys == table.keys  # the folder itself


def matrix(table: Predictions) -> np.ndarray:
    out = np.zeros((3, 3), np.int64)
    np.add.at(out, (table.truth_N, table.predicted_N), 1)
    return out


def test_two_runs_by_the_command(tmp_path: Path) -> None:
    for name, skill in (("a", 0.3), ("b", 3.0)):
        write_evaluation(str(tmp_path / name), predictions(1, skill=skill, clips=range(200), subjects=40))
    done = micacl("compare", str(tmp_path / "a"), str(tmp_path / "b"))
    assert done.code == 0, done.stderr
    assert done.result["clips"] == 200
    assert (done.result["by"], done.result["units"]) == ("subject", 40)
    assert {"UAR", "WAR"} <= set(done.result["resolved"])
    rows = {row["name"]: row for row in done.result["differences"]}
    assert list(rows) == ["UAR", "WAR", *LABELS]
    a, b = (read_evaluation(str(tmp_path / name)).scores for name in "ab")
    assert rows["UAR"]["difference"] == pytest.approx(b["uar"] - a["uar"])
    assert rows["sad"]["a"] == pytest.approx(a["recall"]["sad"])
    assert "McNemar p" in done.stderr
    assert "Resolved: UAR (+" in done.stderr


def test_a_run_against_itself_and_a_small_difference_are_not_resolved(tmp_path: Path) -> None:
    table = predictions(1)
    flipped = table.predicted_N.copy()
    flipped[np.flatnonzero(flipped == table.truth_N)[0]] += 1
    flipped %= 3
    for name, predicted in (("a", table.predicted_N), ("b", flipped)):
        write_evaluation(str(tmp_path / name), dataclasses.replace(table, predicted_N=predicted))
    a, b = str(tmp_path / "a"), str(tmp_path / "b")
    assert compare_runs(a, a)["resolved"] == []
    result = compare_runs(a, b)
    assert "Not resolved, so neither better nor equal can be said: UAR, WAR" in result["text"]
    assert result["resolved"] == []


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"dataset": {"url": "/ds", "version": 2, "sha256": "6" * 64}}, r"version 1 of /ds \(5555.*version 2 of /ds"),
        ({"fold": 2}, "the test fold of the first is None, of the second 2"),
        ({"split": "val"}, "the split of the first is test, of the second val"),
    ],
)
def test_what_is_not_of_the_same_clips_is_refused(change: dict[str, Any], match: str, tmp_path: Path) -> None:
    write_evaluation(str(tmp_path / "a"), predictions(1))
    write_evaluation(str(tmp_path / "b"), predictions(2))
    store = open_store(str(tmp_path / "b/evaluation/test"))
    store.put("scores.json", json.dumps({**json.loads(store.get("scores.json")), **change}).encode())
    with pytest.raises(MicaclError, match=match):
        compare_runs(str(tmp_path / "a"), str(tmp_path / "b"))


def test_other_clips_or_labels_are_refused(tmp_path: Path) -> None:
    write_evaluation(str(tmp_path / "a"), predictions(1))
    write_evaluation(str(tmp_path / "b"), predictions(1, clips=range(2, 60)))
    with pytest.raises(MicaclError, match="2 clips are in the first alone, 0 in the second alone, 58 in both"):
        compare_runs(str(tmp_path / "a"), str(tmp_path / "b"))
    table = predictions(1)
    write_evaluation(str(tmp_path / "c"), dataclasses.replace(table, truth_N=(table.truth_N + 1) % 3))
    with pytest.raises(MicaclError, match="60 clips have another label"):
        compare_runs(str(tmp_path / "a"), str(tmp_path / "c"))
    write_evaluation(str(tmp_path / "d"), predictions(1, labels=("happy", "sad", "anger")))
    with pytest.raises(
        MicaclError, match="label set of the first is happy, sad, fear, of the second happy, sad, anger"
    ):
        compare_runs(str(tmp_path / "a"), str(tmp_path / "d"))


def test_what_was_not_evaluated_is_told_how(tmp_path: Path) -> None:
    with pytest.raises(MicaclError, match=r"`micacl evaluate .* DATASET --split val --checkpoint best`"):
        compare_runs(str(tmp_path), str(tmp_path), "val", "best")


def test_a_table_of_an_earlier_release_is_compared_by_clip(tmp_path: Path) -> None:
    for name in "ab":
        write_evaluation(str(tmp_path / name), predictions(ord(name)))
        file = tmp_path / name / "evaluation/test" / PREDICTIONS
        pq.write_table(pq.read_table(file).drop_columns(["subject"]), file)
    result = compare_runs(str(tmp_path / "a"), str(tmp_path / "b"))
    assert (result["by"], result["units"]) == ("clip", 60)
    assert "No subject is known" in result["text"]


@pytest.mark.parametrize(
    "change",
    [
        lambda said: said.pop("split"),
        lambda said: said.pop("origin"),
        lambda said: said.pop("dataset"),
        lambda said: said.pop("classes"),
        lambda said: said.pop("calibration"),
        lambda said: said["train_clips"].pop("sad"),
        lambda said: said.update(uar=0.123),
        lambda said: said.update(classes=[*LABELS[::-1]]),
        lambda said: said["matrix"][0].reverse(),
    ],
)
def test_scores_that_were_changed_are_refused(tmp_path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    write_evaluation(str(tmp_path), predictions(1))
    key, store = "evaluation/test/scores.json", open_store(str(tmp_path))
    said = json.loads(store.get(key))
    change(said)
    store.put(key, json.dumps(said).encode())
    with pytest.raises(MicaclError, match=r"scores\.json"):
        compare_runs(str(tmp_path), str(tmp_path))


def repeated(table: pa.Table) -> pa.Table:
    return pa.concat_tables([table, table.slice(0, 3)])


def below_zero(table: pa.Table) -> pa.Table:
    return table.set_column(table.column_names.index("p_sad"), "p_sad", pa.array([-5.0] * len(table)))


@pytest.mark.parametrize(
    "change",
    [repeated, below_zero, lambda table: table.slice(0, 0), lambda table: table.slice(0, 9)],
)
def test_rows_that_were_changed_are_refused(tmp_path: Path, change: Callable[[pa.Table], pa.Table]) -> None:
    write_evaluation(str(tmp_path), predictions(1))
    path = tmp_path / "evaluation/test/predictions.parquet"
    pq.write_table(change(pq.read_table(path)), path)
    with pytest.raises(MicaclError, match=r"predictions\.parquet"):
        compare_runs(str(tmp_path), str(tmp_path))


def test_an_unknown_checkpoint_and_one_person(tmp_path: Path) -> None:
    write_evaluation(str(tmp_path), predictions(1, subjects=1))
    with pytest.raises(MicaclError, match="--checkpoint is 'foo'"):
        compare_runs(str(tmp_path), str(tmp_path), "test", "foo")
    assert compare_runs(str(tmp_path), str(tmp_path))["note"] == "Only 1 subject: no interval."
