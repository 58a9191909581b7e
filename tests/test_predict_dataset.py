"""`micacl predict --split`: the bags of a dataset, each once, as the predictor sees them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from micacl.bundle import load_bundle
from micacl.evaluate import classify_rank
from micacl.predictor import Predictor
from pipeline import open_dataset
from pipeline.contract import DFEW_LABELS, MicaclError
from pipeline.rows import split_rows
from pipeline.stream import BagStream, StreamConfig
from tests.cli import micacl
from tests.tiny_bundle import make_bundle
from tests.tiny_dataset import CROP, make_dataset

pytestmark = pytest.mark.slow

COUNTS = {"train": dict.fromkeys(DFEW_LABELS, 1), "test": {"sad": 4, "unlabelled": 15}}


def test_a_split_is_predicted_without_its_videos(tmp_path: Path) -> None:
    url, bundle = make_dataset(tmp_path / "ds", COUNTS, 0, max_bags=4), make_bundle(tmp_path / "bundle", crop=CROP)
    done = micacl("predict", bundle, url, str(tmp_path / "out"), "--split", "test", "--workers", "2")
    assert done.code == 0, done.stderr
    assert (done.result["faces"], done.result["videos"]) == (19, 19)
    rows = {row["video"]: row for row in pq.read_table(done.result["out"]).to_pylist()}

    dataset = open_dataset(url)
    with BagStream(dataset, dataset.split("test"), StreamConfig()) as stream:
        bags = [stream.bag(row) for row in range(19)]
    for bag, face in zip(bags, Predictor(load_bundle(bundle)).classify(bags), strict=True):
        row = rows.pop(bag.meta.video)
        assert (row["label"], row["track"], row["reason"], row["box"]) == (face.label, face.track, None, None)
        assert [row[f"p_{label}"] for label in DFEW_LABELS] == pytest.approx(
            list(face.probabilities.values()), abs=1e-5
        )
        assert np.allclose(row["instance_weights"], face.instance_weights, atol=1e-3)
        assert row["seconds"] == face.seconds
    assert not rows


def test_a_dataset_of_other_labels_is_refused(tmp_path: Path) -> None:
    bundle = load_bundle(make_bundle(tmp_path / "bundle", crop=CROP))
    other = open_dataset(make_dataset(tmp_path / "other", {"test": {"x": 1, "y": 1}}, 0))
    with pytest.raises(MicaclError, match="has the labels x, y; the model has"):
        next(classify_rank(bundle, split_rows(other, "test")))
