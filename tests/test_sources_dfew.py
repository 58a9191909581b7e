"""DFEW: five folds, its lists and folders by all their names, and lists that contradict each other."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.contract import DFEW_LABELS, MicaclError
from pipeline.sources import find_source, list_videos
from pipeline.sources.dfew import label_base
from pipeline.storage import LocalStore, open_store
from tests.source_trees import TEST, TRAIN, check_dfew, dfew_frames, dfew_lists, dfew_videos, fill, found, refused, rows


@pytest.fixture
def raw(tmp_path: Path) -> LocalStore:
    return LocalStore(str(tmp_path))


def test_dfew_as_distributed(raw: LocalStore) -> None:
    fill(raw, dfew_lists())
    fill(raw, [*dfew_frames(), *dfew_videos(), *dfew_frames("Clip/clip_224x224_16f", "{1}.jpg")])
    source = found(raw)
    assert (source.kind, source.labels) == ("dfew", DFEW_LABELS)
    assert "EmoLabel_DataSplit/test(single-labeled)/" in source.layout
    assert "--frames aligned: folders of frames in Clip/clip_224x224/" in source.layout
    assert any("fold-1: 2 clips, 2341 are published; happy 1 (489)" in note for note in source.notes)
    videos = rows(raw)
    check_dfew(videos)
    assert {v.kind for v in videos.values()} == {"frames"}
    assert videos["Clip/clip_224x224/00001"].url == raw.url("Clip/clip_224x224/00001")
    original = rows(raw, frames="original")
    check_dfew(original, "Clip/original", cropped=False)
    assert {v.kind for v in original.values()} == {"video"}
    check_dfew(rows(raw, frames="16f"), "Clip/clip_224x224_16f")


def test_dfew_on_s3_is_the_same(raw: LocalStore, s3: Callable[[str], str]) -> None:
    fill(raw, dfew_lists())
    fill(raw, dfew_frames())
    url = s3("dfew")
    for entry in raw.list():
        open_store(url).put(entry.key, raw.get(entry.key))
    there = list_videos(url)
    check_dfew({v.name: v for v in there})
    assert all(v.url == f"{url}/{v.name}" for v in there)
    assert find_source(url).layout.replace(url, raw.root) == found(raw).layout


@pytest.mark.parametrize(
    ("test", "train"),
    [
        (
            "EmoLabel_DataSplit/test(single-labeled)/test_set_{}.csv",
            "EmoLabel_DataSplit/train(single-labeled)/train_set_{}.csv",
        ),
        ("label/single_testset_{}.csv", "label/single_trainset_{}.csv"),
        ("EmoLabel_DataSplit/test(single_labeled)/set_{}.csv", "EmoLabel_DataSplit/train(single_labeled)/set_{}.csv"),
        ("EmoLabel_DataSplit/test/set_{}.csv", "EmoLabel_DataSplit/train/set_{}.csv"),
        ("DFEW-part2/DFEW-part2/EmoLabel_DataSplit/test/set_{}.csv", None),
    ],
)
def test_dfew_lists_by_other_names(raw: LocalStore, test: str, train: str | None) -> None:
    fill(fill(raw, dfew_lists(test, train)), dfew_frames())
    check_dfew(rows(raw))
    assert any("0 of 5 training lists" in note for note in found(raw).notes) is (train is None)


@pytest.mark.parametrize("root", ["Clip/clip_224x224/clip_224x224", "Clip/jpg_256", "clip_jpg_256", "data"])
def test_dfew_frames_by_other_names(raw: LocalStore, root: str) -> None:
    check_dfew(rows(fill(fill(raw, dfew_lists()), dfew_frames(root))), root)


def test_dfew_16f_alone_by_another_name(raw: LocalStore) -> None:
    fill(fill(raw, dfew_lists()), dfew_frames("DFEW/Clip/clip_224x16f", "{1}.jpg", images=16))
    check_dfew(rows(raw), "DFEW/Clip/clip_224x16f")
    assert "--frames 16f" in found(raw).layout


def test_dfew_aligned_videos_are_cropped(raw: LocalStore) -> None:
    videos = rows(fill(fill(raw, dfew_lists()), dfew_videos("Clip/clip_224x224_avi", "{:05d}.avi")))
    assert {(v.kind, v.cropped) for v in videos.values()} == {("video", True)}


def test_dfew_from_the_parts_of_an_archive(raw: LocalStore) -> None:
    keys = [key.replace("clip_224x224/", f"clip_224x224/part_{n % 2}/") for n, key in enumerate(dfew_frames(images=1))]
    videos = rows(fill(fill(raw, dfew_lists()), keys))
    assert sorted(videos) == sorted(key.rpartition("/")[0] for key in keys)
    assert len({v.label for v in videos.values()}) == 7


@pytest.mark.parametrize(
    "change",
    [
        {"base": 0},
        {"line": "{},{}\n"},
        {"line": "{:05d},{}\r\n", "head": "\ufeffvideo_name,label\r\n"},
        {"line": "{}.0,{}.0\n"},
        {"line": "{:05d}.mp4,{}\n"},
        {"head": ""},
        {"line": '"{:05d}","{}"\n\n'},
    ],
)
def test_dfew_lists_as_tools_leave_them(raw: LocalStore, change: dict[str, object]) -> None:
    fill(fill(raw, dfew_lists(**change)), dfew_frames())  # type: ignore[arg-type]
    check_dfew(rows(raw))
    assert any("0 to 6" in note for note in found(raw).notes) is (change.get("base") == 0)


def test_dfew_clips_that_are_missing_or_unlisted(raw: LocalStore) -> None:
    fill(fill(raw, dfew_lists()), [k for k in dfew_frames() if "/00004/" not in k])
    fill(raw, ["Clip/clip_224x224/16372/16372_00001.jpg", "Clip/clip_224x224/00001/._00001_00001.jpg"])
    source, videos = found(raw), rows(raw)
    assert any("1 of 10 listed clips are not there (00004)" in note for note in source.notes)
    assert any("1 clips are there and in no list (16372)" in note for note in source.notes)
    gone = videos["Clip/clip_224x224/00004"]
    assert (gone.fingerprint, gone.label, gone.url) == ("", "angry", raw.url("Clip/clip_224x224/00004"))
    assert len(videos) == 10


def test_dfew_a_changed_frame_changes_the_clip(raw: LocalStore) -> None:
    fill(fill(raw, dfew_lists()), dfew_frames())
    before = rows(raw)
    raw.put("Clip/clip_224x224/00002/00002_00002.jpg", b"other")
    raw.put("Clip/clip_224x224/00003/notes.txt", b"other")
    after = rows(raw)
    assert [name for name in before if before[name] != after[name]] == ["Clip/clip_224x224/00002"]


def edited(fold: int, part: str, old: str, new: str) -> dict[str, str]:
    lists = dfew_lists()
    key = (TEST if part == "test" else TRAIN).format(fold)
    assert old in lists[key]
    return {**lists, key: lists[key].replace(old, new)}


@pytest.mark.parametrize(
    ("lists", "match"),
    [
        (edited(2, "test", "00002,2", "00001,1"), r"Clip 00001 is tested in fold 1 .*set_1\.csv line 2.*fold 2"),
        (edited(2, "train", "00001,1", "00001,3"), r"Clip 00001 is happy in .*line 2, and neutral in .*set_2\.csv"),
        (edited(1, "train", "00002,2", "00001,1"), r"Clip 00001 is trained on in fold 1 .* and tested in it"),
        (edited(1, "train", "00002,2", "00042,2"), r"trains on clip 00042, which is in no test list"),
        (edited(1, "test", "00006,6", "00001,1"), r"set_1\.csv line 3 lists clip 00001, as .*line 2 does"),
        (edited(1, "test", "00006,6", "00006,happy"), r"set_1\.csv line 3 is '00006,happy'.*A line looks like 00001,2"),
        (edited(1, "test", "00006,6", "00006,8"), r"line 3 is '00006,8'"),
        (edited(1, "test", "00006,6", "00006,0"), r"hold both 0 and 7"),
        ({k: v.replace(",7", ",6") for k, v in dfew_lists().items()}, r"hold neither 0 nor 7.*shift by one"),
        ({k: v for k, v in dfew_lists().items() if k != TEST.format(3)}, r"folds 1, 2, 4, 5 of DFEW, not of 3"),
        ({**dfew_lists(), "copy/test/set_1.csv": "00001,1\n"}, r"2 lists for test set 1: .*copy/test/set_1\.csv"),
    ],
)
def test_dfew_lists_that_contradict_are_refused(raw: LocalStore, lists: dict[str, str], match: str) -> None:
    refused(fill(fill(raw, lists), dfew_frames()), match)


def test_dfew_a_training_list_that_leaves_a_clip_out_is_noted(raw: LocalStore) -> None:
    fill(fill(raw, edited(3, "train", "00007,7\n", "")), dfew_frames())
    assert any("Training list 3 leaves out 1 clips (00007)" in note for note in found(raw).notes)


def test_dfew_what_cannot_be_told_is_asked(raw: LocalStore) -> None:
    fill(raw, dfew_lists())
    refused(raw, "has the lists of the data set, and no clips", "dfew")
    fill(raw, [*dfew_videos(), *dfew_frames("Clip/clip_224x224_16f")])
    said = refused(raw, "clips in 2 forms: .*16f: folders of frames in Clip/clip_224x224_16f/")
    assert "Say which with --frames 16f or original." in said
    refused(raw, "--frames is aligned, and .* has only 16f", frames="aligned")
    refused(raw, "--frames is 'all'.*auto, original, images, aligned, 16f", frames="all")
    fill(raw, [*dfew_frames("Clip/clip_224x224"), *dfew_frames("Clip/jpg_256")])
    refused(raw, r"Clip 0\d+ lies in .*(clip_224x224|jpg_256)/.* and in .*Move one of them away")


def test_dfew_without_lists(raw: LocalStore) -> None:
    said = refused(fill(raw, dfew_frames()), r"holds Clip/, and no lists of DFEW", "dfew")
    assert "Unpack EmoLabel_DataSplit.zip" in said


@given(labels=st.lists(st.integers(0, 7), max_size=12))
def test_the_label_base_is_certain_or_refused(labels: list[int]) -> None:
    try:
        base = label_base(labels)
    except MicaclError:
        assert (0 in labels) == (7 in labels)
        return
    assert all(0 <= label - base < 7 for label in labels)
    assert not all(0 <= label - (1 - base) < 7 for label in labels)  # the other base would not fit
