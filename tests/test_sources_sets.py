"""FERV39k, MAFW, AFEW, CAER, CREMA-D, RAVDESS; which layout a bucket has; lists with anything in them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.contract import DFEW_LABELS, FOLDS, MicaclError, Video
from pipeline.sources import SourceOptions, list_videos
from pipeline.sources.ferv39k import SCENES
from pipeline.sources.mafw import LABELS as MAFW_LABELS
from pipeline.storage import LocalStore
from tests.source_trees import (
    CLIPS,
    FERV,
    FERV_CLIPS,
    TEST,
    caer,
    check_dfew,
    dfew_frames,
    dfew_lists,
    dfew_videos,
    ferv_frames,
    fill,
    found,
    mafw_lists,
    refused,
    rows,
)


@pytest.fixture
def raw(tmp_path: Path) -> LocalStore:
    return LocalStore(str(tmp_path))


# FERV39k.


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
        "Val_AFEW/Angry/000046280.avi",
        "Val_AFEW/Happy/000046282.avi",
    ]


@pytest.mark.parametrize("doubled", ["", "Train_AFEW/"])
def test_afew_videos(raw: LocalStore, doubled: str) -> None:
    source, videos = found(fill(raw, [*afew(doubled), "Test_AFEW/000000001.avi"])), rows(raw)
    assert source.kind == "afew"
    assert any("Test_AFEW has no labels: left out" in note for note in source.notes)
    assert {(v.name, v.label, v.split) for v in videos.values()} == {
        (f"Train_AFEW/{doubled}Angry/000046280.avi", "angry", "train"),
        (f"Train_AFEW/{doubled}Sad/000046281.avi", "sad", "train"),
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
