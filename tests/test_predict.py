"""`micacl predict` takes the clips that `prepare` takes: folders of images, face crops, parts, given boxes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from cluster import predict as predict_module
from pipeline.codec import encode_jpeg
from pipeline.contract import CropConfig, Video
from pipeline.crop import crop_video, read_crop
from pipeline.demo_faces import Bytes
from pipeline.shards import read_bags
from pipeline.storage import LocalStore
from tests.cli import Done, micacl
from tests.tiny_bundle import make_bundle

CROP = CropConfig(size=64)
SIDE = 160
"""Of the pictures."""
TABLE = """path,kind,cropped,start_s,end_s,box
faces/a,frames,true,,,
frames/b,frames,,,,
v.mp4,,,,,
v.mp4,,,0.2,0.6,
v.mp4,,,,,20 30 100 90
gone.mp4,,,,,
"""


@pytest.fixture(scope="module")
def raw(
    tmp_path_factory: pytest.TempPathFactory, face_frames: Callable[..., Bytes], face_video: Callable[..., bytes]
) -> LocalStore:
    store = LocalStore(str(tmp_path_factory.mktemp("raw")))
    for number, frame_HW3 in enumerate(face_frames("happy", 24, SIDE)):
        for folder in ("faces/a", "frames/b"):
            store.put(f"{folder}/{number}.jpg", encode_jpeg(frame_HW3, 95))
    store.put("faces/a/._0.jpg", b"litter")
    store.put("v.mp4", face_video("sad", 24, SIDE))
    store.put("t.csv", TABLE.encode())
    return store


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_bundle(tmp_path_factory.mktemp("bundle"), crop=CROP)


def rows_of(done: Done) -> dict[str, dict[str, Any]]:
    """Predictions by name; one face each."""
    assert done.code == 0, done.stderr
    rows = pq.read_table(done.result["out"]).to_pylist()
    assert len({row["video"] for row in rows}) == len(rows)
    return {row["video"]: row for row in rows}


@pytest.mark.slow
def test_each_row_of_a_table_is_cropped_as_it_says(raw: LocalStore, bundle: str, tmp_path: Path) -> None:
    rows = rows_of(micacl("predict", bundle, raw.url("t.csv"), str(tmp_path), "--source", "table"))
    assert set(rows) == {"faces/a", "frames/b", "v.mp4", "v.mp4#0.2-0.6", "v.mp4#box=20,30,100,90", "gone.mp4"}
    assert rows["gone.mp4"]["reason"] == "missing"
    assert rows["faces/a"]["box"] == [SIDE / 2, SIDE / 2, SIDE]  # the whole picture, without a margin
    assert rows["frames/b"]["box"][2] < SIDE
    assert rows["v.mp4#box=20,30,100,90"]["box"] == pytest.approx([70, 75, 130])  # 1.3 times the longer side
    assert rows["v.mp4"]["seconds"] == pytest.approx(23 / 25)
    assert rows["v.mp4#0.2-0.6"]["seconds"] == pytest.approx(9 / 25)
    given = {name for name, row in rows.items() if row["detector_score"] == 1}
    assert given == {"faces/a", "v.mp4#box=20,30,100,90"}


@pytest.mark.slow
def test_folders_of_images_are_clips(raw: LocalStore, bundle: str, tmp_path: Path) -> None:
    done = micacl("predict", bundle, raw.root, str(tmp_path), "--frames", "aligned")
    assert {name: row["box"][2] for name, row in rows_of(done).items()} == {"faces/a": SIDE, "frames/b": SIDE}


@pytest.mark.slow
def test_frames_of_another_kind_are_refused(raw: LocalStore, bundle: str, tmp_path: Path) -> None:
    done = micacl("predict", bundle, raw.url("t.csv"), str(tmp_path), "--source", "table", "--frames", "images")
    assert (done.code, done.result["error"]["cause"][:19]) == (2, "--frames is 'images")


def test_the_bags_are_those_of_prepare(raw: LocalStore, tmp_path: Path) -> None:
    store = LocalStore(str(tmp_path))
    part = Video(url=raw.url("faces/a"), name="p", kind="frames", cropped=True, start_s=0.2, end_s=0.6)
    box = Video(url=raw.url("v.mp4"), name="b", box=(20, 30, 100, 90))
    for video in (part, box):
        tar, reason, error = predict_module._crop_one(Video.from_json(video.to_json()), CROP)
        assert (reason, error) == ("", "")
        assert list(read_bags(tar, "predict")) == read_crop(store, crop_video(video, CROP, store)[0].object)
