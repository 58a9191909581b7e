"""Which models were trained on somebody: files that train and export really write, and files that they do not."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from cluster.scaling import ScalingConfig
from cluster.train import check_run
from micacl.bundle import export_bundle, run_state
from micacl.model.micacl import build_model
from micacl.recipes import tiny_cpu
from micacl.train.checkpoint import Checkpoint, write_checkpoint
from pipeline.contract import DFEW_LABELS, FOLDS, MicaclError, canonical_json
from pipeline.dataset import INDEX_SCHEMA, open_dataset
from pipeline.forget import forget
from pipeline.storage import LocalStore, open_store
from pipeline.trained_on import MAX_JSON_BYTES, Held, trained_on
from tests.tiny_dataset import make_dataset

COUNTS = {"train": dict.fromkeys(DFEW_LABELS, 4), "test": {"happy": 2, "sad": 2}}
TRAINED, TESTED = "s1", "s14"
"""A subject of the training split, one of the test split."""


def write_run(url: str, dataset_url: str, steps: tuple[int, ...]) -> dict[str, Any]:
    """What `micacl train` leaves, less the training. Returns config.json."""
    data = check_run(dataset_url, url, tiny_cpu(), ScalingConfig(workers=1), None)
    weights = {name: value.contiguous() for name, value in build_model(tiny_cpu().model, seed=0).state_dict().items()}
    said = json.loads(open_store(url).get("config.json"))
    for step in steps:
        state = run_state(data.config, data.dataset.body["crop"], said["dataset"], data.state_at(step))
        write_checkpoint(open_store(url), Checkpoint(step, weights, {}, state))
    return said


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ds: a dataset. models/a: a run of it with two checkpoints, a-bundle: its bundle, b: a run without checkpoints."""
    folder = tmp_path_factory.mktemp("made")
    url = make_dataset(folder / "ds", COUNTS, 0, max_bags=1)
    write_run(str(folder / "models/a"), url, (50, 100))
    write_run(str(folder / "models/b"), url, ())
    export_bundle(str(folder / "models/a"), str(folder / "models/a-bundle"), 50)
    return folder


@pytest.fixture
def place(made: Path, tmp_path: Path) -> Path:
    """A copy, at another path than the files say."""
    return Path(shutil.copytree(made, tmp_path / "copy"))


def models(result: dict[str, Any], which: str = "models") -> list[tuple[str, str, int | None, int | None]]:
    return [(m["kind"], Path(m["url"]).name, m["version"], m["step"]) for m in result["models"][which]]


def look(place: Path, *runs: str, subject: str = TRAINED) -> dict[str, Any]:
    urls = [str(place / run) for run in runs or ("models",)]
    return forget(str(place / "ds"), subjects=[subject], dry_run=True, runs=urls)


def write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(canonical_json(value))


def test_runs_and_bundles_that_saw_the_subject_in_training(place: Path) -> None:
    result = look(place)
    assert models(result) == [("bundle", "a-bundle", 1, 50), ("run", "a", 1, 100), ("run", "b", 1, None)]
    assert models(result, "unknown") == []
    assert result["models"]["searched"] == {
        "urls": [str(place / "models")], "runs": 2, "bundles": 1, "evaluations": 0, "skipped": [], "skipped_found": 0,
    }  # fmt: skip
    where = {item["where"] for item in result["remains"] if "trained on them" in item["what"]}
    assert where == {str(place / "models" / name) for name in ("a", "b", "a-bundle")}


def test_a_subject_of_the_test_split_trained_nobody_but_stands_in_evaluations(place: Path) -> None:
    dataset = json.loads((place / "models/a/config.json").read_bytes())["dataset"]
    for split in ("test", "train"):
        scores = {"dataset": dataset, "split": split, "origin": {"step": 100}}
        write_json(place / f"models/a/evaluation/{split}/scores.json", scores)
    assert models(look(place, subject=TESTED)) == [("evaluation", "test", 1, 100)]
    assert ("evaluation", "train", 1, 100) in models(look(place))


def test_the_list_is_made_before_the_files_are_deleted(place: Path) -> None:
    result = forget(str(place / "ds"), subjects=[TRAINED], delete=True, runs=[str(place / "models")])
    assert len(models(result)) == 3
    sha256 = json.loads((place / "models/a/config.json").read_bytes())["dataset"]["sha256"]
    assert result["held"] == [{"version": 1, "sha256": sha256, "parts": ["train"], "bags": 2}]
    after = look(place)
    assert models(after) == []  # which it was cannot be told any more, and that is said
    assert models(after, "unknown") == [("bundle", "a-bundle", 1, 50), ("run", "a", 1, 100), ("run", "b", 1, None)]
    assert all("index files" in model["why"] for model in after["models"]["unknown"])
    assert any("perhaps" in item["what"] for item in after["remains"])


def test_lost_index_files_of_another_split_leave_no_doubt(place: Path) -> None:
    forget(str(place / "ds"), subjects=[TESTED], delete=True)
    assert models(look(place, subject=TESTED), "unknown") == []


def test_a_run_on_the_new_version_is_clean(place: Path) -> None:
    forget(str(place / "ds"), subjects=["s0"])
    write_run(str(place / "models/new"), str(place / "ds"), (10,))
    result = look(place, subject="s0")
    assert "new" not in [name for _, name, _, _ in models(result)]
    assert ("run", "new", 2, 10) in models(look(place))


def test_a_run_that_went_on_with_another_version_is_told_by_its_checkpoint(place: Path) -> None:
    """config.json is written once; a run without a checkpoint may be continued on a newer version."""
    forget(str(place / "ds"), subjects=["s0"])
    body = json.loads((place / "models/a/checkpoints/00000100/state.json").read_bytes())
    newest = open_dataset(str(place / "ds"))
    body["dataset"] |= {"version": newest.number, "sha256": newest.sha256}
    write_json(place / "models/b/checkpoints/00000070/state.json", body)
    assert ("run", "b", 2, 70) in models(look(place))


def test_a_dataset_is_known_by_its_hash_wherever_it_lies(place: Path) -> None:
    said = json.loads((place / "models/b/config.json").read_bytes())
    write_json(place / "more/moved/config.json", {**said, "dataset": {**said["dataset"], "url": "s3://elsewhere/ds"}})
    other = {"url": "s3://elsewhere/ds", "version": 1, "sha256": "0" * 64}
    write_json(place / "more/other/config.json", {**said, "dataset": other})
    assert models(look(place, "more")) == [("run", "moved", 1, None)]


def test_without_a_hash_url_and_number_decide(place: Path) -> None:
    said = json.loads((place / "models/b/config.json").read_bytes())
    for name, dataset in {
        "same": {"url": f"{place / 'ds'}/", "version": 1},
        "elsewhere": {"url": "s3://elsewhere/ds", "version": 1},
        "gone": {"url": str(place / "ds"), "version": 9},
        "rewritten": {"url": str(place / "ds"), "version": 1, "sha256": "0" * 64},
    }.items():
        write_json(place / f"more/{name}/config.json", {**said, "dataset": dataset})
    result = look(place, "more")
    assert models(result) == [("run", "same", 1, None)]
    assert [name for _, name, _, _ in models(result, "unknown")] == ["gone", "rewritten"]


@pytest.mark.parametrize(
    ("dataset", "split", "seen"),
    [
        ({"fold": 1}, "train", True),
        ({"fold": 2}, "train", False),
        ({"fold": 2}, "test", True),
        ({}, "train", True),  # it does not say which fold: as if seen
        ({"fold": 1, "where": "face_px > 40"}, "train", True),
        ({"fold": 1, "where": "face_px > 60"}, "train", False),
        ({"fold": 1, "where": "of another release"}, "train", True),
    ],
)
def test_fold_and_filter_of_a_run_are_its_own(tmp_path: Path, dataset: dict[str, Any], split: str, seen: bool) -> None:
    row = {**dict.fromkeys(INDEX_SCHEMA.names), "split": FOLDS, "fold": 2, "face_px": 50.0}
    held = Held(number=1, sha256="a" * 64, rows=pa.Table.from_pylist([row], schema=INDEX_SCHEMA))
    said = {"dataset": {"url": "x", "version": 1, "sha256": "a" * 64, **dataset}, "config": {"train": {"split": split}}}
    write_json(tmp_path / "run/config.json", said)
    found = trained_on(LocalStore(str(tmp_path / "ds")), [held], [str(tmp_path / "run")])
    assert bool(found["models"]) is seen
    assert found["unknown"] == []


FOREIGN: dict[str, bytes] = {
    "config.json": b'{"architectures": ["SomethingElse"], "model_type": "x"}',
    "deep/config.json": b"[" * 200_000,
    "list/config.json": b"[1, 2]",
    "torn/config.json": b'{"config": {"tra',
    "bytes/bundle.json": b"\xff\xfe\x00",
    "none/bundle.json": b'{"origin": {"dataset": {}, "step": 1}, "config": {"train": {"split": "train"}}}',
    "number/scores.json": b'{"origin": {"step": "ten"}, "split": "test", "dataset": {"url": "x"}}',
    "loose/state.json": b'{"config": {"train": {"split": "train"}}, "dataset": {"url": "x"}}',
    "huge/config.json": b" " * (MAX_JSON_BYTES + 1),
}


def test_foreign_files_are_skipped_and_counted(place: Path) -> None:
    store = LocalStore(str(place / "models"))
    for name, data in FOREIGN.items():
        store.put(f"foreign/{name}", data)
    store.put("foreign/weights.bin", b"not looked at")
    result = look(place)
    assert len(models(result)) == 3
    assert result["models"]["searched"]["skipped"] == sorted(store.url(f"foreign/{name}") for name in FOREIGN)
    assert any(item["what"] == f"{len(FOREIGN)} foreign files" for item in result["remains"])


@pytest.mark.parametrize("runs", ["nowhere", "ds", "models/a/checkpoints/00000050/none"])
def test_a_wrong_url_does_not_end_as_none(place: Path, runs: str) -> None:
    before = {e.key for e in LocalStore(str(place)).list()}
    with pytest.raises(MicaclError, match="holds no run and no bundle"):
        forget(str(place / "ds"), subjects=[TRAINED], delete=True, runs=[str(place / "models"), str(place / runs)])
    assert {e.key for e in LocalStore(str(place)).list()} == before


def test_one_model_is_listed_once_however_it_is_reached(place: Path) -> None:
    assert models(look(place, "models", "models/a", "models/a-bundle")) == models(look(place))


def test_models_in_a_bucket(place: Path, s3: Callable[[str], str]) -> None:
    target = s3("models")
    for entry in LocalStore(str(place / "models")).list():
        if entry.key.endswith(".json"):
            open_store(target).put(entry.key, LocalStore(str(place / "models")).get(entry.key))
    result = forget(str(place / "ds"), subjects=[TRAINED], dry_run=True, runs=[target])
    assert [m["url"] for m in result["models"]["models"]] == [f"{target}/{name}" for name in ("a-bundle", "a", "b")]
