"""Data sets with lists or names of their own: DFEW, FERV39k, MAFW, AFEW, CAER, CREMA-D, RAVDESS, in small.

Each tree has the layout in which the authors, or a public copy, distribute it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.contract import DFEW_LABELS, FOLDS, MicaclError, Video
from pipeline.sources import Source, SourceOptions, find_source, list_videos
from pipeline.sources.dfew import label_base
from pipeline.sources.ferv39k import SCENES
from pipeline.sources.mafw import LABELS as MAFW_LABELS
from pipeline.storage import LocalStore, open_store

TEST = "EmoLabel_DataSplit/test(single-labeled)/set_{}.csv"
TRAIN = "EmoLabel_DataSplit/train(single-labeled)/set_{}.csv"
CLIPS = range(1, 11)
"""Of the small DFEW: clip n is tested in fold (n - 1) % 5 + 1 and has label (n - 1) % 7."""


@pytest.fixture
def raw(tmp_path: Path) -> LocalStore:
    return LocalStore(str(tmp_path))


def fill(store: LocalStore, keys: Mapping[str, str | bytes] | list[str]) -> LocalStore:
    for key in keys:
        data = keys[key] if isinstance(keys, Mapping) else key
        store.put(key, data.encode() if isinstance(data, str) else data)
    return store


def rows(store: LocalStore, kind: str = "auto", frames: str = "auto") -> dict[str, Video]:
    return {v.name: v for v in list_videos(store.root, kind, SourceOptions(frames=frames))}


def found(store: LocalStore, kind: str = "auto", frames: str = "auto") -> Source:
    return find_source(store.root, kind, options=SourceOptions(frames=frames))


def refused(store: LocalStore, match: str, kind: str = "auto", frames: str = "auto") -> str:
    with pytest.raises(MicaclError, match=match) as caught:
        list(found(store, kind, frames).videos())
    return str(caught.value)


# DFEW.


def dfew_lists(
    test: str = TEST,
    train: str | None = TRAIN,
    base: int = 1,
    line: str = "{:05d},{}\n",
    head: str = "video_name,label\n",
) -> dict[str, str]:
    said = {n: line.format(n, (n - 1) % 7 + base) for n in CLIPS}
    lists = {}
    for fold in range(1, 6):
        tested = [n for n in CLIPS if (n - 1) % 5 + 1 == fold]
        lists[test.format(fold)] = head + "".join(said[n] for n in tested)
        if train:
            lists[train.format(fold)] = head + "".join(said[n] for n in CLIPS if n not in tested)
    return lists


def dfew_frames(root: str = "Clip/clip_224x224", name: str = "{0:05d}_{1:05d}.jpg", images: int = 3) -> list[str]:
    return [f"{root}/{n:05d}/{name.format(n, i + 1)}" for n in CLIPS for i in range(images)]


def dfew_videos(root: str = "Clip/original", name: str = "{:05d}.mp4") -> list[str]:
    return [f"{root}/{name.format(n)}" for n in CLIPS]


def check_dfew(videos: Mapping[str, Video], root: str = "Clip/clip_224x224", *, cropped: bool = True) -> None:
    assert len(videos) == len(CLIPS)
    for n in CLIPS:
        video = videos[f"{root}/{n:05d}" if cropped else f"{root}/{n:05d}.mp4"]
        assert (video.label, video.fold, video.split) == (DFEW_LABELS[(n - 1) % 7], (n - 1) % 5 + 1, FOLDS)
        assert video.cropped is cropped
        assert video.fingerprint
        assert (video.subject, video.scene) == (None, None)


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


# FERV39k.

FERV = {
    "4_setups/All_scenes/train_All.csv": "Action/Happy/0267 Happy\nCrime/Angry/0063 Angry\n",
    "4_setups/All_scenes/test_All.csv": "War/Fear/0001 Fear\n",
}
FERV_CLIPS = ["Action/Happy/0267", "Crime/Angry/0063", "War/Fear/0001"]


def ferv_frames(root: str = "2_ClipsforFaceCrop", images: int = 2) -> list[str]:
    return [f"{root}/{clip}/{i:02d}.jpg" for clip in FERV_CLIPS for i in range(images)]


def check_ferv(videos: Mapping[str, Video], root: str = "2_ClipsforFaceCrop") -> None:
    assert {name: (v.label, v.split, v.scene, v.kind, v.cropped, v.fold) for name, v in videos.items()} == {
        f"{root}/Action/Happy/0267": ("happy", "train", "Action", "frames", True, None),
        f"{root}/Crime/Angry/0063": ("angry", "train", "Crime", "frames", True, None),
        f"{root}/War/Fear/0001": ("fear", "test", "War", "frames", True, None),
    }
    assert all(v.fingerprint for v in videos.values())


@pytest.mark.parametrize(
    ("root", "lists"),
    [
        ("2_ClipsforFaceCrop", ""),
        ("2_ClipsforFaceCrop/2_ClipsforFaceCrop", ""),
        ("2_ClipsforFaceCrop-002/2_ClipsforFaceCrop", "drive-download-20260101T000000Z-003/"),
        ("FERV39k/FERV39k/2_ClipsforFaceCrop", "FERV39k/FERV39k/"),
    ],
)
def test_ferv39k_as_distributed(raw: LocalStore, root: str, lists: str) -> None:
    fill(fill(raw, {lists + key: text for key, text in FERV.items()}), ferv_frames(root))
    fill(raw, ["4_setups/22_scenes/Action/train.txt"])
    source = found(raw)
    assert (source.kind, source.labels) == ("ferv39k", DFEW_LABELS)
    assert source.layout.endswith(f"--frames aligned: folders of frames in {root}/.")
    assert any("test: 1 clips, 7847 are published" in note for note in source.notes)
    check_ferv(rows(raw), root)


def test_ferv39k_videos_and_whole_frames(raw: LocalStore) -> None:
    fill(fill(raw, FERV), [f"0_7_LabelClips/{clip}.mp4" for clip in FERV_CLIPS])
    fill(raw, ferv_frames("3_ClipsforScenImages"))
    assert {(v.kind, v.cropped, v.name[-4:]) for v in rows(raw).values()} == {("video", False, ".mp4")}
    assert {(v.kind, v.cropped) for v in rows(raw, frames="images").values()} == {("frames", False)}
    fill(raw, ferv_frames())
    check_ferv(rows(raw))


def test_ferv39k_in_the_parts_of_a_download(raw: LocalStore) -> None:
    keys = [
        key.replace("FaceCrop/", f"FaceCrop-00{1 + ('Crime' in key)}/2_ClipsforFaceCrop/", 1) for key in ferv_frames()
    ]
    videos = rows(fill(fill(raw, FERV), keys))
    assert sorted(videos) == sorted({key.rpartition("/")[0] for key in keys})
    fill(raw, ["2_ClipsforFaceCrop-002/2_ClipsforFaceCrop/War/Fear/0001/99.jpg"])
    refused(raw, r"Clip War/Fear/0001 lies in .*FaceCrop-00[12].*merge the parts into one folder")


def test_ferv39k_lists_with_numbers(raw: LocalStore) -> None:
    lists = {
        "Annotation/train.csv": "path,id\r\nAction/Happy/0267,3\r\nCrime/Angry/0063,0\r\n",
        "Annotation/test.csv": "path,id\r\nWar/Fear/0001,2\r\n",
    }
    fill(fill(raw, lists), ferv_frames())
    check_ferv(rows(raw))
    raw.put("Annotation/label_index.txt", b"Happy 0\r\nAngry 3\r\nFear 2\r\n")
    said = refused(
        raw, r"train\.csv line 2 calls Action/Happy/0267 angry \(number 3\), and it lies in the folder Happy"
    )
    assert "label_index.txt" in said
    raw.put("Annotation/label_index.txt", b"Angry 0\r\nFear 2\r\n")
    refused(raw, r"line 2 is 'Action/Happy/0267,3'.*5 \(a number of label_index\.txt\)")
    raw.put("Annotation/label_index.txt", b"Angry 0\r\nFear 2\r\nHappy 3\r\n")
    check_ferv(rows(raw))


@pytest.mark.parametrize(
    ("part", "text", "match"),
    [
        (
            "test",
            "War/Fear/0001 Sad\n",
            r"test_All\.csv line 1 calls War/Fear/0001 sad, and it lies in the folder Fear",
        ),
        ("test", "Action/Happy/0267 Happy\n", r"Action/Happy/0267 is in both lists: .*train_All\.csv line 1.*test_All"),
        ("train", "Action/Happy/0267 Happy\nAction/Happy/0267 Happy\n", "line 2 lists clip Action/Happy/0267, as"),
        ("train", "Action/Happy/0267 Happy\nAction/0268 Happy\n", r"line 2 is 'Action/0268 Happy'.*scene/emotion/clip"),
        ("train", "Action/Happy/0267 Joy\n", "line 1 is 'Action/Happy/0267 Joy'"),
    ],
)
def test_ferv39k_lists_that_contradict_are_refused(raw: LocalStore, part: str, text: str, match: str) -> None:
    fill(fill(raw, {**FERV, f"4_setups/All_scenes/{part}_All.csv": text}), ferv_frames())
    refused(raw, match)


def test_ferv39k_with_one_list(raw: LocalStore) -> None:
    raw.put("4_setups/All_scenes/train_All.csv", b"Action/Happy/0267 Happy\n")
    refused(fill(raw, ferv_frames()), r"and no test_All\.csv.*Without both lists", "ferv39k")
    assert len(SCENES) == 22


# MAFW.


def mafw_lists(caption: str = "", encoding: str = "utf-8") -> dict[str, bytes]:
    lists = {}
    which = "with" if caption else "no"
    for fold in range(1, 6):
        for part in ("train", "test"):
            lines = [
                f"{n:05d}.mp4\t{MAFW_LABELS[n]}\t{caption}\tA woman.\r\n"
                if caption
                else f"{n:05d}.mp4 {MAFW_LABELS[n]}\r\n"
                for n in CLIPS
                if ((n - 1) % 5 + 1 == fold) == (part == "test")
            ]
            key = f"Train & Test Set/single/{which}_caption/set_{fold}/{part}.txt"
            lists[key] = "".join(lines).encode(encoding)
    return lists


@pytest.mark.parametrize(
    ("caption", "encoding"), [("", "utf-8"), ("一位女士皱眉、　她很生气。", "gbk"), ("她很生气", "utf-8")]
)
def test_mafw_as_distributed(raw: LocalStore, caption: str, encoding: str) -> None:
    fill(fill(raw, mafw_lists(caption, encoding)), dfew_videos("data/clips"))
    fill(raw, {"Train & Test Set/compound/no_caption/set_1/test.txt": "00001.mp4 anger_disgust\n"})
    source, videos = found(raw), rows(raw)
    assert (source.kind, source.labels) == ("mafw", MAFW_LABELS)
    assert any("fold-5: 2 clips, 1831 are published." in note for note in source.notes)
    assert {(v.name, v.label, v.fold, v.split, v.cropped) for v in videos.values()} == {
        (f"data/clips/{n:05d}.mp4", MAFW_LABELS[n], (n - 1) % 5 + 1, FOLDS, False) for n in CLIPS
    }


def test_mafw_frames_need_a_word(raw: LocalStore) -> None:
    fill(fill(raw, mafw_lists()), dfew_frames("data/frames", "{1}.png"))
    refused(raw, r"folders of frames in data/frames/, and no videos.*--frames images .*--frames aligned")
    for frames in ("images", "aligned"):
        videos = rows(raw, frames=frames)
        assert {(v.kind, v.cropped) for v in videos.values()} == {("frames", frames == "aligned")}
        assert len(videos) == 10
    fill(raw, dfew_videos("data/clips"))
    assert {v.kind for v in rows(raw).values()} == {"video"}


def test_mafw_with_a_word_that_is_no_label(raw: LocalStore) -> None:
    fill(fill(raw, mafw_lists()), dfew_videos("data/clips"))
    key = "Train & Test Set/single/no_caption/set_2/test.txt"
    raw.put(key, raw.get(key).replace(b"disgust", b"disgusted") + b"00099.mp4 rage\n")
    refused(raw, r"set_2/test\.txt line 3 is '00099\.mp4 rage'.*one of anger, disgust")
    refused(LocalStore(raw.url("data")), "holds clips/, and no lists of MAFW", "mafw")


# AFEW.


def afew(doubled: str = "") -> list[str]:
    return [
        f"Train_AFEW/{doubled}Angry/000046280.avi",
        f"Train_AFEW/{doubled}Sad/000046281.avi",
        f"Val_AFEW/{doubled}Angry/000046280.avi",
        f"Val_AFEW/{doubled}Happy/000046282.avi",
    ]


def test_afew_videos(raw: LocalStore) -> None:
    for doubled in ("", "Train_AFEW/"):
        fill(raw, afew(doubled)[:2])
    fill(raw, [*afew()[2:], "Test_AFEW/000000001.avi"])
    raw.delete("Train_AFEW/Train_AFEW/Sad/000046281.avi")
    raw.delete("Train_AFEW/Train_AFEW/Angry/000046280.avi")
    (Path(raw.root) / "Train_AFEW/Train_AFEW").joinpath("Sad").rmdir()
    (Path(raw.root) / "Train_AFEW/Train_AFEW").joinpath("Angry").rmdir()
    source, videos = found(raw), rows(raw)
    assert source.kind == "afew"
    assert any("Test_AFEW has no labels: left out" in note for note in source.notes)
    assert {(v.name, v.label, v.split) for v in videos.values()} == {
        ("Train_AFEW/Angry/000046280.avi", "angry", "train"),
        ("Train_AFEW/Sad/000046281.avi", "sad", "train"),
        ("Val_AFEW/Angry/000046280.avi", "angry", "val"),
        ("Val_AFEW/Happy/000046282.avi", "happy", "val"),
    }


@pytest.mark.parametrize("faces", ["AlignedFaces_LBPTOP_Points/Faces", "AlignedFaces_LBPTOP_Points_Val/Faces/Faces"])
def test_afew_face_crops_have_the_labels_of_the_videos(raw: LocalStore, faces: str) -> None:
    fill(raw, afew())
    for part, name in (("Train", "000046280"), ("Train", "000046281"), ("Val", "000046280")):
        fill(raw, [f"{part}_AFEW/{faces}/{name}/{i:03d}.jpg" for i in range(3)])
    videos = rows(raw)
    assert {(v.name, v.label, v.split, bool(v.fingerprint)) for v in videos.values()} == {
        (f"Train_AFEW/{faces}/000046280", "angry", "train", True),
        (f"Train_AFEW/{faces}/000046281", "sad", "train", True),
        (f"Val_AFEW/{faces}/000046280", "angry", "val", True),
        (f"Val_AFEW/{faces}/000046282", "happy", "val", False),
    }
    assert {(v.kind, v.cropped) for v in videos.values()} == {("frames", True)}
    assert {v.kind for v in rows(raw, frames="original").values()} == {"video"}


def test_afew_what_is_refused(raw: LocalStore) -> None:
    fill(raw, afew()[:2])
    refused(raw, "and no Val_AFEW with folders of emotions", "afew")
    fill(raw, [*afew(), "Val_AFEW/Joy/1.avi"])
    refused(raw, "has the folder Joy, with 1 videos.*none of AFEW's seven")


# CAER.


def caer() -> list[str]:
    words = ("Anger", "Disgust", "Fear", "Happy")
    return [f"CAER/{split}/{word}/0001.avi" for split in ("train", "validation", "test") for word in words]


def test_caer(raw: LocalStore) -> None:
    source = found(fill(raw, caer()))
    assert source.kind == "caer"
    videos = rows(raw)
    assert (videos["CAER/validation/Anger/0001.avi"].label, videos["CAER/validation/Anger/0001.avi"].split) == (
        "anger",
        "val",
    )
    assert Counter(v.split for v in videos.values()) == {"train": 4, "val": 4, "test": 4}
    assert {v.cropped for v in videos.values()} == {False}
    refused(raw, "--frames is 'aligned', and a source of kind caer", "caer", "aligned")
    raw.put("CAER/test/Rage/0001.avi", b"x")
    refused(raw, r"test/Rage/0001\.avi lies in no folder <split>/<emotion>/ of CAER")


def test_caer_that_is_not_there(raw: LocalStore) -> None:
    refused(fill(raw, ["a/b.mp4"]), r"holds a/, and no train/ and test/", "caer")
    fill(raw, [*caer(), *(f"copy/{key}" for key in caer())])
    refused(raw, "it has 2 folders with CAER's splits: CAER, copy/CAER", "caer")


# CREMA-D and RAVDESS.


def test_crema_d(raw: LocalStore) -> None:
    names = [
        "1001_DFA_ANG_XX",
        "1018_IEO_SAD_HI",
        "1019_IEO_SAD_HI",
        "1072_TIE_NEU_XX",
        "1073_MTI_HAP_XX",
        "1091_WSI_FEA_XX",
    ]
    fill(raw, [f"VideoFlash/{name}.flv" for name in (*names, "1076_MTI_NEU_XX")])
    fill(raw, ["AudioWAV/1001_DFA_ANG_XX.wav"])
    source, videos = found(raw), rows(raw)
    assert (source.kind, source.labels) == ("crema-d", ("angry", "disgust", "fear", "happy", "neutral", "sad"))
    assert any("1076_MTI_NEU_XX: named as damaged" in note for note in source.notes)
    assert any("7 clips, 7442 are published" in note for note in source.notes)
    folds = [videos[f"VideoFlash/{name}.flv"].fold for name in names]
    assert folds == [1, 1, 2, 4, 5, 5]
    first = videos["VideoFlash/1001_DFA_ANG_XX.flv"]
    assert (first.label, first.subject, first.scene, first.split) == ("angry", "1001", "DFA", FOLDS)
    raw.put("VideoMP4/1001_DFA_ANG_XX.mp4", b"x")
    refused(raw, r"1001_DFA_ANG_XX is there twice: .*VideoFlash.*VideoMP4")
    raw.delete("VideoMP4/1001_DFA_ANG_XX.mp4")
    raw.put("VideoFlash/holiday.mp4", b"x")
    refused(raw, r"holiday\.mp4 has no name of this data set.*1001_DFA_ANG_XX", "crema-d")


def ravdess(modality: str, actor: int, channel: str = "01", emotion: str = "05", folder: str = "") -> str:
    return f"{folder or f'Actor_{actor:02d}'}/{modality}-{channel}-{emotion}-01-02-01-{actor:02d}.mp4"


def test_ravdess(raw: LocalStore) -> None:
    keys = [ravdess(m, actor) for actor in (1, 4, 5, 24) for m in ("01", "02")]
    fill(raw, [*keys, ravdess("01", 1, emotion="08"), ravdess("02", 1, "02"), ravdess("01", 1, "02")])
    source, videos = found(raw), rows(raw)
    assert source.kind == "ravdess"
    assert source.labels is not None
    assert source.labels[1] == "calm"
    assert {(v.name, v.label, v.subject, v.fold, v.split) for v in videos.values()} == {
        (ravdess("02", 1), "angry", "01", 1, FOLDS),
        (ravdess("02", 4), "angry", "04", 1, FOLDS),
        (ravdess("02", 5), "angry", "05", 2, FOLDS),
        (ravdess("02", 24), "angry", "24", 6, FOLDS),
        (ravdess("01", 1, emotion="08"), "surprised", "01", 1, FOLDS),
    }
    assert [note[:2] for note in source.notes[:2]] == ["4 ", "2 "]
    assert "songs" in source.notes[1]


def test_ravdess_what_is_refused(raw: LocalStore) -> None:
    raw.put(ravdess("02", 3, folder="Actor_05"), b"x")
    refused(raw, "of actor 03 by its name, and lies in the folder of actor 05")
    raw.delete(ravdess("02", 3, folder="Actor_05"))
    fill(raw, [ravdess("02", 3), ravdess("02", 3, folder="copy")])
    refused(raw, "02-01-05-01-02-01-03 is there twice")


# Which layout it is.


def test_two_layouts_in_one_bucket_are_asked(raw: LocalStore) -> None:
    fill(fill(raw, {f"a/{k}": v for k, v in dfew_lists().items()}), dfew_frames("a/Clip/clip_224x224"))
    fill(raw, [f"b/{key}" for key in caer()])
    refused(raw, "has the layouts of dfew and of caer.*Say --source dfew or --source caer")
    check_dfew(rows(raw, "dfew"), "a/Clip/clip_224x224")
    assert len(rows(raw, "caer")) == 12
    check_dfew(rows(LocalStore(raw.url("a"))))


LISTS = {
    "dfew": TEST.format(1),
    "ferv39k": "4_setups/All_scenes/train_All.csv",
    "mafw": "Train & Test Set/single/no_caption/set_1/test.txt",
}


@pytest.mark.parametrize("kind", sorted(LISTS))
@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    text=st.one_of(
        st.binary(max_size=60),
        st.lists(
            st.sampled_from(["00001", "1", ",", " ", "\n", "\r\n", "anger", "Action/Happy/0267", "Happy", '"', "\0"])
        ).map(lambda words: "".join(words).encode()),
    )
)
def test_whatever_a_list_holds_is_read_or_refused_in_words(raw: LocalStore, kind: str, text: bytes) -> None:
    fill(raw, {**dfew_lists(), **FERV, **mafw_lists()})
    fill(raw, [*dfew_frames(images=1), *ferv_frames(images=1), *dfew_videos("data/clips")])
    raw.put(LISTS[kind], text)
    try:
        videos = list_videos(raw.root, kind, SourceOptions(frames="original" if kind == "mafw" else "auto"))
    except MicaclError as error:
        assert "line" in str(error) or "clip" in str(error)  # noqa: PT017  (an error, or rows)
    else:
        assert videos
