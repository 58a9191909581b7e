"""Files that somebody changed by hand: every verb that reads them says so, none stumbles."""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import ray_leftovers
from pipeline.contract import CropConfig, MicaclError, Quarantined, Reason, Video, canonical_json, digest
from pipeline.crop import CropRecord, crop_key, crop_video, read_crop
from pipeline.dataset import body_sha256, open_dataset, read_index, read_version, version_key
from pipeline.forget import forget
from pipeline.raw import fetch_clip
from pipeline.records import read_records
from pipeline.report import write_report
from pipeline.rows import split_rows
from pipeline.shapes import QUARANTINED, RECORD, VERSION, misfit
from pipeline.sources import list_videos
from pipeline.status import dataset_status
from pipeline.storage import LocalStore
from pipeline.verify import verify_dataset
from tests.tiny_dataset import make_dataset

COUNTS = {"train": {"happy": 3, "sad": 2}, "test": {"happy": 1}}
LOST = {"lost.mp4": ("no_face", "no face")}
WRONG: tuple[Any, ...] = (None, 7, -1.5, "x", True, [], {}, [7], {"x": 7}, [[]], [{}], {"x": {"y": []}})
VERBS: dict[str, Callable[[str], object]] = {
    "open": open_dataset,
    "status": dataset_status,
    "verify": verify_dataset,
    "report": write_report,
    "forget": lambda url: forget(url, subjects=["s0"], dry_run=True),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> LocalStore:
    return LocalStore(make_dataset(tmp_path_factory.mktemp("whole"), COUNTS, 0, quarantined=LOST))


def places(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The way to every value in a JSON text."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, inner in items:
        yield (*at, name)
        yield from places(inner, (*at, name))


def changed(body: dict[str, Any], place: tuple[Any, ...], value: Any) -> dict[str, Any]:
    """A copy with another value there; with `...` without it."""
    copy = json.loads(canonical_json(body))
    inner = copy
    for name in place[:-1]:
        inner = inner[name]
    if value is ...:
        del inner[place[-1]]
    else:
        inner[place[-1]] = value
    copy["sha256"] = body_sha256(copy)
    return copy


@pytest.mark.slow
@pytest.mark.parametrize("verb", VERBS)
def test_a_version_of_another_shape_is_refused_in_words(whole: LocalStore, verb: str) -> None:
    """Every field, each wrong kind of value: an answer or a MicaclError, never another exception."""
    key = version_key(1)
    body = json.loads(whole.get(key))
    try:
        for place in places(body):
            for value in (..., *WRONG):
                whole.put(key, canonical_json(changed(body, place, value)).encode())
                with contextlib.suppress(MicaclError):
                    VERBS[verb](whole.root)
    finally:
        whole.put(key, canonical_json(body).encode())


def test_what_is_no_json_is_refused(whole: LocalStore) -> None:
    key = version_key(1)
    data = whole.get(key)
    try:
        whole.put(key, data.replace(b'"bags":1', b'"bags":NaN'))
        with pytest.raises(MicaclError, match="NaN"):
            read_version(whole)
    finally:
        whole.put(key, data)


def without(table: pa.Table, column: str) -> pa.Table:
    return table.drop_columns([column])


def nulled(table: pa.Table, column: str) -> pa.Table:
    at = table.schema.get_field_index(column)
    return table.set_column(at, column, pa.nulls(table.num_rows, table[column].type))


@pytest.mark.parametrize("change", [without, nulled])
@pytest.mark.parametrize("column", ["key", "split", "offset", "size", "sha256", "phash", "blur"])
def test_an_index_file_of_another_shape_is_refused(
    whole: LocalStore, change: Callable[..., pa.Table], column: str
) -> None:
    body = read_version(whole)[1]
    rows = read_index(whole.get(body["shards"][0]["index"]["path"]))
    out = io.BytesIO()
    pq.write_table(change(rows, column), out)
    with pytest.raises(MicaclError, match="an index file"):
        read_index(out.getvalue())
    with pytest.raises(MicaclError, match="an index file"):
        read_index(b"PAR1")


@pytest.mark.parametrize(("column", "value"), [("size", 2**60), ("size", 0), ("offset", -1), ("offset", 2**60)])
def test_a_bag_outside_its_shard_is_refused(tmp_path: Path, column: str, value: int) -> None:
    store = LocalStore(make_dataset(tmp_path, COUNTS, 0))
    body = read_version(store)[1]
    shard = body["shards"][0]
    rows = read_index(store.get(shard["index"]["path"]))
    at, out = rows.schema.get_field_index(column), io.BytesIO()
    pq.write_table(rows.set_column(at, column, pa.array([value] * rows.num_rows, pa.int64())), out)
    store.put(shard["index"]["path"], out.getvalue())
    shard["index"]["sha256"] = digest(out.getvalue())
    store.put(version_key(1), canonical_json({**body, "sha256": body_sha256(body)}).encode())
    dataset = open_dataset(store.root)
    with pytest.raises(MicaclError, match="lies outside its shard"):
        _ = dataset.index
    rows = split_rows(dataset, shard["split"])
    with pytest.raises(MicaclError, match="lies outside its shard"):
        rows.place(rows.rows_of(rows.shards.index(shard["path"]))[0])


@pytest.mark.parametrize(
    "table",
    [
        b"", b"PAR1", {"other": ["x"]}, {"record": [7]}, {"record": [None]}, {"record": ["{}"]},
        {"record": ['{"schema":2}']},
    ],
)  # fmt: skip
def test_records_of_another_shape_are_refused(tmp_path: Path, table: bytes | dict[str, list[Any]]) -> None:
    store, data = LocalStore(str(tmp_path)), table
    if isinstance(data, dict):
        out = io.BytesIO()
        pq.write_table(pa.table(data), out)
        data = out.getvalue()
    store.put("records/x.parquet", data)
    with pytest.raises(MicaclError):
        list(read_records(store, [{"path": "records/x.parquet", "sha256": digest(data)}]))


@settings(max_examples=150, deadline=None, derandomize=True)
@given(data=st.data())
def test_a_record_is_ours_or_refused(data: st.DataObject) -> None:
    record = json.loads(CropRecord(video="a.mp4", object="crops/x", reason="no_face").to_json())
    place = data.draw(st.sampled_from(list(places(record))))
    text = canonical_json({**changed(record, place, data.draw(st.sampled_from((..., *WRONG))))})
    try:
        found = CropRecord.from_json(text)
    except MicaclError:
        return
    assert misfit(json.loads(found.to_json()), RECORD) == ""
    assert found.reason is None or found.reason in list(Reason)


def test_a_crop_of_another_video_is_refused(tmp_path: Path, face_video: Callable[..., bytes]) -> None:
    raw, store = LocalStore(str(tmp_path / "raw")), LocalStore(str(tmp_path / "out"))
    raw.put("a.mp4", face_video())
    video, config = Video(url=raw.url("a.mp4"), name="a.mp4", fingerprint="1"), CropConfig()
    record, _ = crop_video(video, config, store)
    key = crop_key(video, config)
    data = store.get(key)
    store.put(key, data.replace(b'"video":"a.mp4"', b'"video":"b.mp4"'))
    with pytest.raises(MicaclError, match=r"it is of b\.mp4"):
        crop_video(video, config, store)
    store.put(key, data[: len(data) // 2])
    with pytest.raises(MicaclError, match="is missing") as caught:
        read_crop(store, key)
    assert caught.value.remedy.startswith("Delete that object")
    assert record.bags


def test_quarantine_lines_are_ours_or_refused(whole: LocalStore) -> None:
    assert misfit({"video": "a", "reason": "b", "detail": "c", "object": None}, QUARANTINED) == ""
    assert misfit(read_version(whole)[1], VERSION) == ""
    key, body = version_key(1), json.loads(whole.get(version_key(1)))
    for line in (b"{}", b"no json", b"\xff", b'{"video":1,"reason":"x","detail":"y"}'):
        whole.put("quarantine/x.jsonl", line)
        listed = {"path": "quarantine/x.jsonl", "sha256": digest(line)}
        whole.put(key, canonical_json(changed(body, ("quarantine",), listed)).encode())
        assert b"The list cannot be shown" in write_report(whole.root)
        assert not verify_dataset(whole.root)["ok"]
    whole.put(key, canonical_json(body).encode())


# What a table says.


def rows(tmp_path: Path, text: str) -> list[Video]:
    (tmp_path / "t.csv").write_text(text)
    return list_videos(str(tmp_path / "t.csv"))


def test_spaces_around_words_make_nobody_else(tmp_path: Path) -> None:
    a, b = rows(tmp_path, "path,label,subject,scene\na.mp4, happy ,s0 ,x\nb.mp4,happy,s0, x\n")
    assert (a.label, a.subject, a.scene) == (b.label, b.subject, b.scene) == ("happy", "s0", "x")


@pytest.mark.parametrize(
    "lines",
    [
        "a.mp4,\na.mp4,0\n", "a.mp4,-0.0\na.mp4,\n", "x/../a.mp4,\na.mp4,\n", "./a.mp4,\n.//a.mp4,\n",
        "a.mp4,1e-9\na.mp4,\n",
    ],
)  # fmt: skip
def test_the_same_part_twice_is_refused_however_it_is_written(tmp_path: Path, lines: str) -> None:
    with pytest.raises(MicaclError, match="twice"):
        rows(tmp_path, "path,start_s\n" + lines)


@pytest.mark.parametrize("value", ['"1,5"', "0 1", "1e15", "-1", "x", "nan"])
def test_seconds_that_make_no_sense_are_refused_with_the_line(tmp_path: Path, value: str) -> None:
    with pytest.raises(MicaclError, match="line 2 has start_s"):
        rows(tmp_path, f"path,start_s\na.mp4,{value}\n")


@pytest.mark.parametrize("path", ["..", "x/../..", "../.."])
def test_a_path_that_names_no_file_is_refused_with_the_line(tmp_path: Path, path: str) -> None:
    with pytest.raises(MicaclError, match="line 2 has path"):
        rows(tmp_path, f"path,label\n{path},happy\n")


def test_a_table_may_lie_beside_its_videos(tmp_path: Path) -> None:
    (one,) = rows(tmp_path, "path\n../videos/./a.mp4\n")
    assert one.name == "../videos/a.mp4"


@pytest.mark.parametrize("value", [0, -5, float("nan"), float("inf")])
def test_image_fps_has_borders(value: float) -> None:
    with pytest.raises(MicaclError, match="image-fps"):
        CropConfig(image_fps=value)


# Files that cannot be read.


def test_a_link_that_leads_nowhere_is_a_missing_video(tmp_path: Path) -> None:
    (tmp_path / "loop.mp4").symlink_to(tmp_path / "loop.mp4")
    (tmp_path / "dead.mp4").symlink_to(tmp_path / "nowhere.mp4")
    for video in list_videos(str(tmp_path), "bucket"):
        with pytest.raises(Quarantined) as caught:
            fetch_clip(video, CropConfig())
        assert caught.value.reason is Reason.MISSING


def test_a_locked_file_is_a_quarantined_video(tmp_path: Path) -> None:
    """As another user, in a process of its own: root may read everything."""
    locked = tmp_path / "a.mp4"
    locked.write_bytes(b"x")
    locked.chmod(0)
    for folder in (tmp_path, *tmp_path.parents[:-1]):
        if folder.stat().st_uid == os.getuid() and str(folder).startswith("/tmp/"):
            folder.chmod(0o755)
    code = f"""
import os
from pipeline.contract import CropConfig, Quarantined, Video
from pipeline.raw import fetch_clip
if os.getuid() == 0: os.setresuid(65534, 65534, 65534)
try: fetch_clip(Video(url={str(locked)!r}, name="a"), CropConfig())
except Quarantined as why: print(why)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.startswith("unreadable: "), done.stderr
    assert "may not be read" in done.stdout


# What a killed driver leaves.


def test_the_folder_of_a_dead_owner_is_removed_and_no_other(tmp_path: Path) -> None:
    mine, dead, foreign = (tmp_path / f"micacl-ray-{name}" for name in ("mine", "dead", "foreign"))
    for folder in (mine, dead, foreign):
        folder.mkdir()
    (mine / ray_leftovers.OWNER).write_text(ray_leftovers.who(os.getpid()))
    (dead / ray_leftovers.OWNER).write_text(f"{os.getpid()} 1")  # the number came again
    code = "import time; print(flush=True); time.sleep(60)"
    left = subprocess.Popen([sys.executable, "-c", code, str(dead)], stdout=subprocess.PIPE)
    assert left.stdout is not None
    left.stdout.readline()  # it runs, so /proc says what it is
    ray_leftovers.sweep(tmp_path)
    assert left.wait(10) != 0
    assert sorted(folder.name for folder in tmp_path.iterdir()) == ["micacl-ray-foreign", "micacl-ray-mine"]
