"""The ledger: the plan of the pure planner, from disk, whatever the order in which records come."""

from __future__ import annotations

import dataclasses
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.contract import MicaclError, PackConfig, Reason, Video
from pipeline.crop import BagStub, CropRecord
from pipeline.ledger import Ledger, open_ledger
from pipeline.pack import plan_shards
from pipeline.prepare import PrepareConfig, prepare
from pipeline.records import read_records, write_records
from pipeline.storage import LocalStore
from pipeline.worklist import iter_worklist, read_videos, read_worklist, write_worklist


def video_of(number: int, label: str | None = "happy", fold: int | None = None) -> Video:
    split = "train" if fold is None else "folds"
    return Video(url=f"/x/{number}.mp4", name=f"{number}.mp4", label=label, split=split, fold=fold, fingerprint="1")


def record_of(video: Video, sizes: list[int]) -> CropRecord:
    bags = tuple(
        BagStub(key=f"{video.id}_{i}", sha256=f"{i}", size=size, columns={"blur": float(size)})
        for i, size in enumerate(sizes)
    )
    return CropRecord(video=video.name, object=f"crops/{video.id}", reason=None if sizes else "no_face", bags=bags)


CASES = st.lists(
    st.tuples(
        st.sampled_from(["happy", "sad", None]), st.sampled_from([None, 1, 2]), st.lists(st.integers(1, 50), max_size=4)
    ),
    max_size=30,
)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    cases=CASES,
    config=st.builds(PackConfig, max_bags=st.integers(1, 6), max_bytes=st.integers(1, 120)),
    seed=st.integers(0, 9),
)
def test_the_plan_is_the_pure_one(
    cases: list[tuple[str | None, int | None, list[int]]], config: PackConfig, seed: int
) -> None:
    pairs = [(v := video_of(i, label, fold), record_of(v, sizes)) for i, (label, fold, sizes) in enumerate(cases)]
    shuffled = list(pairs)
    random.Random(seed).shuffle(shuffled)
    with open_ledger() as ledger:
        ledger.add((v, r.object) for v, r in pairs)
        for _, record in [*shuffled, *shuffled]:  # a task that was run twice counts once
            ledger.record(record)
        assert sorted(ledger.plans(config), key=lambda p: p.path) == sorted(
            plan_shards([(v, v.split or "", r) for v, r in pairs], config), key=lambda p: p.path
        )
        counts = ledger.counts()
        assert counts["listed"] == counts["done"] == counts["written"] + counts["quarantined"] == len(cases)
        assert [q["object"] for q in ledger.quarantined()] == [
            r.object for _, r in sorted(pairs, key=lambda p: p[1].video) if not r.bags
        ]
        assert not list(ledger.todo())


@pytest.fixture
def ledger() -> Iterator[Ledger]:
    with open_ledger(lambda row: row["blur"] > 20 and row["label"] == "happy") as opened:
        yield opened


def test_bags_that_a_filter_drops_are_counted_with_their_video(ledger: Ledger) -> None:
    videos = [video_of(0), video_of(1), video_of(2, "sad")]
    ledger.add((v, "") for v in videos)
    for video, sizes in zip(videos, ([10, 30], [10, 20], [90]), strict=True):
        ledger.record(record_of(video, sizes))
    assert ledger.counts() == {"listed": 3, "done": 3, "written": 1, "quarantined": 2, "bags": 1}
    assert ledger.reasons() == {Reason.FILTERED.value: 2}
    assert [len(p.members) for p in ledger.plans(PackConfig())] == [1]


def test_a_name_that_comes_twice_is_refused(ledger: Ledger) -> None:
    with pytest.raises(MicaclError, match=r"'1\.mp4' twice"):
        ledger.add((video_of(i), "") for i in (0, 1, 2, 1))
    ledger.add([])
    with pytest.raises(MicaclError, match=r"'3\.mp4' twice"):
        ledger.add([(video_of(3), ""), (video_of(3), "")])


def test_only_records_whose_crop_is_needed_and_there_are_taken_over() -> None:
    videos = [video_of(i) for i in range(4)]
    records = [record_of(v, [10]) for v in videos]
    other = dataclasses.replace(records[3], object="crops/of-other-settings")
    with open_ledger() as ledger:
        ledger.add((v, r.object) for v, r in zip(videos, records, strict=True))
        ledger.know([records[0], records[1], other], (r.object for r in (records[0], records[2], other)))
        assert ledger.counts()["done"] == 1
        assert {v.name for v in ledger.todo()} == {"1.mp4", "2.mp4", "3.mp4"}


def test_records_come_back_and_have_the_same_name_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.records.FILE_RECORDS", 3)
    store, records = LocalStore(str(tmp_path)), [record_of(video_of(i), [i + 1] * (i % 3)) for i in range(8)]
    with_subject = [(record, "s1") for record in records]
    files = write_records(store, iter(with_subject))
    assert len(files) == 3
    assert list(read_records(store, files)) == records
    assert write_records(store, with_subject) == files
    store.put(files[1]["path"], b"other")
    with pytest.raises(MicaclError, match="sha256"):
        list(read_records(store, files))


def test_a_work_list_is_read_in_any_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.worklist.PART_VIDEOS", 3)
    store = LocalStore(str(tmp_path))
    videos = [dataclasses.replace(video_of(i), box=(1.0, 2.0, 3.0, 4.0), start_s=0.5) for i in range(8)]
    assert read_worklist(store) is None
    work = write_worklist(store, iter(videos), listed=10, crop="abc")
    assert read_worklist(store) == work
    assert (work.videos, work.listed, work.crop, len(work.parts)) == (8, 10, "abc", 3)
    assert list(iter_worklist(store, work)) == videos
    for start in range(8):
        for stop in range(start + 1, 9):
            assert read_videos(store.root, work.parts, start, stop) == videos[start:stop]
    store.delete(work.parts[1][0])
    with pytest.raises(MicaclError, match="missing"):
        read_videos(str(tmp_path) + "/.", work.parts, 0, 8)


FILL = """
import contextlib, os, sys
from pipeline.contract import Video
from pipeline.ledger import open_ledger
with open_ledger() as ledger:
    ledger.add((Video(url="", name=f"{i:02000d}"), "") for i in range(20_000))
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):
            print(os.readlink(f"/proc/self/fd/{fd}"), end=" ")
    print(flush=True)
    sys.stdin.read()
"""


def test_a_killed_driver_leaves_no_ledger(tmp_path: Path) -> None:
    """Nor is it in memory: it has more than SQLite's cache."""
    environment = {**os.environ, "TMPDIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path))}
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", FILL], stdin=pipe, stdout=pipe, text=True, env=environment) as process:
        assert process.stdout is not None
        said = process.stdout.readline()
        process.kill()
    assert f"{tmp_path}/etilqs" in said
    assert [path.name for path in tmp_path.iterdir()] == []


def test_two_spellings_of_a_label_are_no_two_classes(tmp_path: Path) -> None:
    videos = [Video(url=f"/x/{n}.mp4", name=f"{n}.mp4", label=word) for n, word in enumerate(("Happy", "sad", "happy"))]
    with pytest.raises(MicaclError, match="differ only in their capitals"):
        prepare(videos, ("auto",), str(tmp_path), PrepareConfig(), lambda _: None)
    assert list(LocalStore(str(tmp_path)).list()) == []
