"""`status` tells the truth from storage alone: nothing, a run under way, a whole dataset, a damaged one."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from pipeline.contract import CropConfig, MicaclError, Video
from pipeline.crop import crop_video
from pipeline.dataset import version_key
from pipeline.forget import forget
from pipeline.status import UNREADABLE_RECORD, dataset_status
from pipeline.storage import LocalStore
from pipeline.storage_s3 import _s3_client
from pipeline.worklist import write_worklist
from tests.tiny_dataset import CROP, make_dataset

COUNTS = {"train": {"happy": 4, "sad": 2}, "test": {"happy": 2}}
LOST = {"a.mp4": ("empty", "the file has zero bytes"), "b.mp4": ("no_face", "x" * 3000), "c.mp4": ("empty", "")}


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(make_dataset(tmp_path, COUNTS, 0, max_bags=2, quarantined=LOST))


def test_a_whole_dataset(store: LocalStore) -> None:
    status = dataset_status(store.root)
    assert status["versions"] == [1]
    assert status["newest"]["counts"] == COUNTS
    assert (status["newest"]["bags"], status["newest"]["quarantined"]) == (8, {"empty": 2, "no_face": 1})
    assert list(status["crops"]) == [CROP.hash]
    crops = status["crops"][CROP.hash]
    assert (crops["objects"], crops["videos"], crops["quarantined"]) == (11, 11, {"empty": 2, "no_face": 1})
    shards = status["shards"]
    assert (shards["listed"], shards["present"], shards["missing"], shards["unreferenced"]) == (4, 4, 0, 0)
    assert "all 4 shards are there" in status["says"]
    json.dumps(status)


def test_before_the_first_version(store: LocalStore) -> None:
    store.delete(version_key(1))
    status = dataset_status(store.root)
    assert (status["versions"], status["newest"]) == ([], None)
    assert status["says"].startswith("No version yet: 11 crops and 4 shards")
    assert status["crops"][CROP.hash]["quarantined"] == {"empty": 2, "no_face": 1}
    assert status["shards"]["unreferenced"] == 4


def test_nothing_at_all(tmp_path: Path) -> None:
    assert dataset_status(str(tmp_path / "empty"))["says"].startswith("There is nothing here")


def test_damage_is_said(store: LocalStore) -> None:
    first, second, third, *_ = json.loads(store.get(version_key(1)))["shards"]
    store.delete(first["path"])
    store.put(second["path"], b"short")
    store.delete(third["index"]["path"])
    crop = next(e.key for e in store.list("crops/") if e.size < 8000)
    store.put(crop, b"\0" * 600)
    status = dataset_status(store.root)
    shards = status["shards"]
    assert (shards["missing"], shards["wrong_size"], shards["without_index"]) == (1, 1, 1)
    assert "is damaged: 1 shards are missing, 1 have another size" in status["says"]
    assert status["crops"][CROP.hash]["quarantined"][UNREADABLE_RECORD] == 1


def test_shards_of_older_versions_are_unreferenced(store: LocalStore) -> None:
    forget(store.root, videos=["train/sad/0000.mp4"])
    status = dataset_status(store.root)
    assert status["versions"] == [1, 2]
    assert (status["shards"]["listed"], status["shards"]["unreferenced"]) == (4, 1)
    assert "1 shards are not listed by it" in status["says"]


class _NoBucket(BaseHTTPRequestHandler):
    """What an S3 server answers when the bucket is not there."""

    def do_GET(self) -> None:
        data = b"<Error><Code>NoSuchBucket</Code><Message>The bucket does not exist</Message></Error>"
        self.send_response(404)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args: object) -> None:
        """Quiet."""


@pytest.fixture
def s3_without_buckets(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    server = HTTPServer(("127.0.0.1", 0), _NoBucket)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
    for name, value in (("ACCESS_KEY_ID", "a"), ("SECRET_ACCESS_KEY", "b"), ("DEFAULT_REGION", "us-east-1")):
        monkeypatch.setenv(f"AWS_{name}", value)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    _s3_client.cache_clear()
    yield
    _s3_client.cache_clear()
    server.shutdown()
    server.server_close()


@pytest.mark.usefixtures("s3_without_buckets")
def test_a_missing_bucket_is_refused_in_words() -> None:
    with pytest.raises(MicaclError, match=r"NoSuchBucket.*Create the bucket"):
        dataset_status("s3://nowhere/ds")


def test_what_is_left_of_a_run_is_counted_from_storage(store: LocalStore) -> None:
    store.delete(version_key(1))
    there = [Video(url="/x", name=f"train/happy/{i:04d}.mp4", fingerprint="1") for i in range(4)]
    left = [Video(url="/x", name=f"new/{i}.mp4", fingerprint="1") for i in range(3)]
    write_worklist(store, sorted([*there, *left], key=lambda v: v.id), listed=12, crop=CROP.hash)
    status = dataset_status(store.root)
    assert status["run"] == {"listed": 12, "done": 9, "left": 3}
    assert "9 are cropped, 3 are left" in status["says"]


def test_when_everything_is_quarantined_it_says_so(tmp_path: Path) -> None:
    store = LocalStore(str(tmp_path / "dataset"))
    for name in ("a.mp4", "b.mp4"):
        crop_video(Video(url=str(tmp_path / name), name=name), CropConfig(), store)
    said = dataset_status(store.root)["says"]
    assert said.startswith("No version: all 2 videos that were looked at are quarantined")
