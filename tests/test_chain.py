"""The whole chain by its commands, on real S3, Ray, DeepSpeed and video: raw bucket to predictions."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import webdataset as wds

from pipeline.dataset import open_dataset
from pipeline.demo import DemoConfig, write_raw_bucket
from pipeline.storage import open_store
from tests.cli import micacl

pytestmark = pytest.mark.slow

TINY = DemoConfig(
    train_clips=(3, 2, 2, 2, 2, 2, 2),
    test_clips=1,
    train_subjects=2,
    test_subjects=1,
    unlabelled_clips=2,
    frames=(14, 16),
    side=160,
)
STEPS = ("--plan.global-batch", "8", "--train.epochs", "2", "--train.checkpoint-every", "2", "--train.log-every", "1")


@pytest.fixture(scope="module")
def chain(s3: Callable[[str], str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Every verb once, in order; what each said."""
    root = s3("chain")
    media = Path(__file__).parents[2] / "shared" / "media" / "asl"
    raw = open_store(f"{root}/raw")
    write_raw_bucket(raw, TINY)
    table = raw.get("labels.csv").decode()
    for video in sorted(media.glob("b*.mkv"))[:2]:  # real faces, when they are there; the label is only a name here
        raw.put(f"real/{video.name}", video.read_bytes())
        table += f"real/{video.name},neutral,{video.stem},train\n"
    raw.put("labels.csv", table.encode())
    dataset, run, bundle, out = (f"{root}/{name}" for name in ("dataset", "run", "bundle", "out"))
    report = tmp_path_factory.mktemp("report") / "report.html"
    said: dict[str, Any] = {"root": root, "real": len(table.split("real/")) - 1}
    for name, command in {
        "prepare": ["prepare", f"{root}/raw/labels.csv", dataset, "--max-quarantined", "0.5"],
        "again": ["prepare", f"{root}/raw/labels.csv", dataset, "--max-quarantined", "0.5"],
        "status": ["status", dataset],
        "verify": ["verify", dataset],
        "report": ["report", dataset, "--out", str(report)],
        "train": ["train", "tiny-cpu", dataset, run, *STEPS],
        "train_again": ["train", "tiny-cpu", dataset, run, *STEPS],
        "evaluate": ["evaluate", run, dataset, "--workers", "2"],
        "export": ["export", run, bundle],
        "evaluate_bundle": ["evaluate", bundle, dataset, "--workers", "1", "--out", f"{root}/scores"],
        "predict": ["predict", bundle, f"{root}/raw/unlabelled", out],
        "forget": ["forget", dataset, "--subject", "s00"],
    }.items():
        done = micacl(*command)
        assert done.code == 0, f"{name}: {done.stderr[-3000:]}"
        said[name] = done.result
    said["html"] = report.read_text()
    return said


def test_every_video_is_written_or_quarantined(chain: dict[str, Any]) -> None:
    videos = chain["prepare"]["videos"]
    assert videos == {"listed": 22 + 5 + chain["real"], "written": 22 + chain["real"], "quarantined": 5}
    assert chain["prepare"]["quarantined"] == {"empty": 1, "no_face": 1, "no_video_stream": 1, "unreadable": 2}
    assert chain["prepare"]["videos_decoded"] == videos["listed"]


def test_a_second_prepare_writes_nothing_and_says_so(chain: dict[str, Any]) -> None:
    assert (chain["again"]["version"], chain["again"]["committed"]) == (1, False)
    assert (chain["again"]["videos_decoded"], chain["again"]["shards_written"]) == (0, 0)


def test_too_many_quarantined_is_exit_code_3(chain: dict[str, Any]) -> None:
    root = chain["root"]
    done = micacl("prepare", f"{root}/raw/labels.csv", f"{root}/dataset", "--max-quarantined", "0.01")
    assert done.code == 3
    assert "more than --max-quarantined 0.01" in done.stderr
    assert not done.result["committed"]  # who was forgotten stays out, though the videos are still in the bucket


def test_the_dataset_verifies(chain: dict[str, Any]) -> None:
    assert chain["verify"]["ok"]
    assert chain["verify"]["bags"] == 22 + chain["real"]
    assert "<table" in chain["html"]


def test_plain_webdataset_reads_the_shards(chain: dict[str, Any], tmp_path: Path) -> None:
    dataset = open_dataset(f"{chain['root']}/dataset", 1)
    keys = []
    for shard in dataset.body["shards"]:
        local = tmp_path / "shard.tar"
        local.write_bytes(dataset.store.get(shard["path"]))
        for sample in wds.WebDataset(str(local), shardshuffle=False, empty_check=False):
            keys.append(sample["__key__"])
            frames = [name for name in sample if name.endswith(".jpg")]
            assert len(frames) == len({*frames}) >= 4
            assert sample[frames[0]].startswith(b"\xff\xd8")
            assert b'"label":"' + shard["label"].encode() in sample["json"]
    assert sorted(keys) == sorted(dataset.index["key"].to_pylist())


def test_training_checkpoints_and_does_nothing_twice(chain: dict[str, Any]) -> None:
    assert chain["train"]["steps"] == chain["train"]["steps_now"] > 0
    assert chain["train_again"]["steps"] == chain["train"]["steps"]
    assert chain["train_again"]["steps_now"] == 0
    keys = {e.key for e in open_store(f"{chain['root']}/run").list()}
    assert {"config.json", "metrics.jsonl"} < keys
    assert not [key for key in keys if key.endswith((".pt", ".pkl", ".pth", ".bin"))]


def test_evaluation_counts_each_clip_once(chain: dict[str, Any]) -> None:
    assert chain["evaluate"]["clips"] == 7
    assert sum(map(sum, chain["evaluate"]["matrix"])) == 7
    assert chain["evaluate_bundle"]["matrix"] == chain["evaluate"]["matrix"]
    store = open_store(f"{chain['root']}/run/evaluation/test")
    assert store.get("confusion.png").startswith(b"\x89PNG")
    table = pq.read_table(io.BytesIO(store.get("predictions.parquet")))
    assert table.num_rows == len(set(table["key"].to_pylist())) == 7


def test_predictions_have_a_row_for_every_video(chain: dict[str, Any]) -> None:
    predicted = chain["predict"]
    store, _, key = predicted["out"].rpartition("/")
    table = pq.read_table(io.BytesIO(open_store(store).get(key))).to_pylist()
    assert predicted["videos"] == len({row["video"] for row in table}) == 3
    assert predicted["quarantined"] == {"unreadable": 1}
    faces = [row for row in table if row["reason"] is None]
    assert [row["track"] for row in faces if row["video"] == "two_faces.mp4"] == [0, 1]
    for row in faces:
        assert sum(v for k, v in row.items() if k.startswith("p_")) == pytest.approx(1, abs=1e-4)


def test_a_forgotten_subject_is_in_no_new_version(chain: dict[str, Any]) -> None:
    assert chain["forget"]["version"] == 2
    dataset = open_dataset(f"{chain['root']}/dataset", 2)
    assert "s00" not in dataset.index["subject"].to_pylist()
    assert dataset.index.num_rows + chain["forget"]["bags"] == 22 + chain["real"]
