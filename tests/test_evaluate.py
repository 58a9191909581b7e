"""Evaluation counts each clip once, at any number of ranks, and says what it saw."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from micacl.batch import collate
from micacl.bundle import BUNDLE, export_bundle, load_bundle, load_model
from micacl.calibration import at_temperature
from micacl.evaluate import Scored, classify_rank, confusion_png, gather_scores, kept_out_fold, open_for, score_rank
from micacl.predictions import embeddings_parquet, read_embeddings
from micacl.predictor import forward
from micacl.recipes import RECIPES
from pipeline.contract import MicaclError
from pipeline.dataset import open_dataset
from pipeline.rows import split_rows
from pipeline.storage import open_store
from tests.test_engines import LABELS, STEPS, train_rank
from tests.tiny_dataset import make_dataset

SIZES = (1, 2, 7, 16, 17)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A run of 20 steps on a dataset whose splits have awkward sizes."""
    folder = tmp_path_factory.mktemp("evaluate")
    url = make_dataset(folder / "train", {"train": dict.fromkeys(LABELS, 3)}, seed=0)
    train_rank(0, 1, "plain", url, str(folder / "run"), STEPS)
    return str(folder / "run")


@pytest.mark.parametrize("clips", SIZES)
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_each_clip_is_counted_once(run: str, clips: int, ranks: int, tmp_path: Path) -> None:
    counts = {"test": {label: clips // 3 + (clips % 3 > i) for i, label in enumerate(LABELS)}}
    url = make_dataset(tmp_path, {**counts, "train": dict.fromkeys(LABELS, 1)}, seed=1)
    bundle, dataset = load_model(run), open_dataset(url)
    parts = [list(score_rank(bundle, dataset, "test", rank, ranks)) for rank in range(ranks)]
    scored = [one for part in parts for one in part]
    assert sorted(s.key for s in scored) == sorted(dataset.split("test")["key"].to_pylist())
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    scores, _ = gather_scores(scored, dataset.labels, clips)
    assert scores.clips == clips
    assert sum(map(sum, scores.matrix)) == clips


def test_probabilities_do_not_depend_on_ranks(run: str, tmp_path: Path) -> None:
    url = make_dataset(tmp_path, {"test": dict.fromkeys(LABELS, 3)}, seed=1)
    bundle, dataset = load_model(run), open_dataset(url)
    alone = {s.key: s.probabilities for s in score_rank(bundle, dataset, "test")}
    shared = {s.key: s.probabilities for r in range(2) for s in score_rank(bundle, dataset, "test", r, 2)}
    assert alone.keys() == shared.keys()
    for key, probabilities in alone.items():
        assert shared[key] == pytest.approx(probabilities, abs=1e-6)
        assert sum(probabilities) == pytest.approx(1, abs=1e-5)


def test_a_clip_twice_or_missing_is_refused() -> None:
    one = Scored("a_0", 0, 0, (1.0, 0.0, 0.0))
    with pytest.raises(MicaclError, match="twice"):
        gather_scores([one, one], LABELS, 2)
    with pytest.raises(MicaclError, match="1 clips were scored, the split has 2"):
        gather_scores([one], LABELS, 2)


def test_the_picture_is_a_png(tmp_path: Path) -> None:
    scores, _ = gather_scores([Scored("a_0", 0, 1, (0.1, 0.8, 0.1)), Scored("b_0", 1, 1, (0, 1, 0))], LABELS, 2)
    picture = confusion_png(scores, "test split")
    assert picture.startswith(b"\x89PNG")
    assert picture == confusion_png(scores, "test split")


def test_a_missing_split_is_named(run: str, tmp_path: Path) -> None:
    url = make_dataset(tmp_path, {"test": dict.fromkeys(LABELS, 1)}, seed=1)
    with pytest.raises(MicaclError, match="no bag in split 'val'"):
        list(score_rank(load_model(run), open_dataset(url), "val"))


def test_bundles_are_checked(run: str, tmp_path: Path) -> None:
    made = export_bundle(run, str(tmp_path / "bundle"))
    assert made.labels == LABELS
    assert load_bundle(str(tmp_path / "bundle")).id == made.id
    store = open_store(str(tmp_path / "bundle"))
    body = store.get(BUNDLE)
    for bad, words in (
        (body.replace(b'"schema":2', b'"schema":99'), "schema 99"),
        (body.replace(made.crop.hash.encode(), b"0" * 12), "preprocessing has the hash"),
        (b"[]", "not what this release writes"),
        (b"{", "not what this release writes"),
        (body.replace(b'"width":8', b'"width":16'), "weights do not fit the config"),
        (body.replace(b'"origin"', b'"orphan"'), "KeyError: 'origin'"),
    ):
        store.put(BUNDLE, bad)
        with pytest.raises(MicaclError, match=words):
            load_bundle(str(tmp_path / "bundle"))
    store.put(BUNDLE, body)
    weights = bytearray(store.get("model.safetensors"))
    weights[-1] ^= 1
    store.put("model.safetensors", bytes(weights))
    with pytest.raises(MicaclError, match="not the file that"):
        load_bundle(str(tmp_path / "bundle"))
    with pytest.raises(MicaclError, match=r"has no bundle\.json"):
        load_bundle(str(tmp_path / "nothing"))


def test_a_bundle_is_not_put_into_a_run_and_not_taken_for_another_step(run: str, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run" / "config.json").write_text("{}")  # as `micacl train` leaves it
    with pytest.raises(MicaclError, match="is a run"):
        export_bundle(run, str(tmp_path / "run"))
    assert not (tmp_path / "run" / BUNDLE).exists()
    made = export_bundle(run, str(tmp_path / "bundle"))
    assert load_model(str(tmp_path / "bundle"), made.origin["step"]).id == made.id
    with pytest.raises(MicaclError, match=rf"bundle of step {made.origin['step']}, not 999"):
        load_model(str(tmp_path / "bundle"), 999)


def test_a_temperature_scales_predictions_and_not_scores(run: str, tmp_path: Path) -> None:
    url = make_dataset(tmp_path / "ds", {"train": dict.fromkeys(LABELS, 1), "test": dict.fromkeys(LABELS, 2)}, seed=1)
    plain = export_bundle(run, str(tmp_path / "plain"))
    warm = export_bundle(run, str(tmp_path / "warm"), temperature=3.0)
    assert (plain.temperature, warm.temperature) == (1.0, 3.0)
    rows = split_rows(open_dataset(url), "test")
    one, other = ([c.p_K for c in classify_rank(bundle, rows)] for bundle in (plain, warm))
    np.testing.assert_allclose(at_temperature(np.stack(one).astype(float), 3.0), np.stack(other), atol=1e-6)
    scored = [list(score_rank(bundle, open_dataset(url), "test")) for bundle in (plain, warm)]
    assert scored[0] == scored[1]
    bags = list(open_dataset(url).eval_loader("test", stream=warm.config.stream, clips_per_batch=6))
    batch = collate(bags[0], warm.config.batch, train=False)
    p_BK, _ = forward(warm.build(), batch, torch.device("cpu"), warm.temperature)
    np.testing.assert_allclose(p_BK, np.stack(other), atol=1e-6)


def test_features_come_only_if_asked_for(run: str, tmp_path: Path) -> None:
    url = make_dataset(tmp_path, {"train": dict.fromkeys(LABELS, 1), "test": dict.fromkeys(LABELS, 1)}, seed=1)
    bundle, dataset = load_model(run), open_dataset(url)
    with_them = list(score_rank(bundle, dataset, "test", embeddings=True))
    assert {len(one.features) for one in with_them} == {bundle.config.model.backbone.features}
    assert {one.features for one in score_rank(bundle, dataset, "test")} == {()}
    features_ND = np.array([one.features for one in with_them], np.float32)
    store = open_store(str(tmp_path / "out"))
    store.put("embeddings.parquet", embeddings_parquet([one.key for one in with_them], features_ND))
    keys, back_ND = read_embeddings(store) or ([], np.empty(0))
    assert keys == sorted(one.key for one in with_them)
    assert {tuple(row) for row in back_ND.tolist()} == {tuple(row) for row in features_ND.tolist()}


def test_validation_is_not_made_up_for_a_run_without_it(run: str, tmp_path: Path) -> None:
    url = make_dataset(tmp_path, {"train": dict.fromkeys(LABELS, 2), "test": dict.fromkeys(LABELS, 1)}, seed=1)
    with pytest.raises(MicaclError, match=r"no split val, and .* was trained without --train.val-share"):
        open_for(load_model(run), url, None, None, "val")


def test_a_model_is_scored_on_the_fold_that_it_has_not_seen() -> None:
    config = RECIPES["tiny-cpu"]()
    trained = dataclasses.replace(config, train=dataclasses.replace(config.train, fold=2))
    assert kept_out_fold(trained, None) == kept_out_fold(trained, 2) == 2
    assert (kept_out_fold(config, None), kept_out_fold(config, 3)) == (None, 3)
    with pytest.raises(MicaclError, match="trained with fold 2 kept out"):
        kept_out_fold(trained, 1)
