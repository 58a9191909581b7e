"""Data sets in small, each in the layout in which the authors, or a public copy, distribute it."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from pipeline.contract import DFEW_LABELS, FOLDS, MicaclError, Video
from pipeline.sources import Source, SourceOptions, find_source, list_videos
from pipeline.sources.mafw import LABELS as MAFW_LABELS
from pipeline.storage import LocalStore

TEST = "EmoLabel_DataSplit/test(single-labeled)/set_{}.csv"
TRAIN = "EmoLabel_DataSplit/train(single-labeled)/set_{}.csv"
CLIPS = range(1, 11)
"""Of the small DFEW: clip n is tested in fold (n - 1) % 5 + 1 and has label (n - 1) % 7."""


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


FERV = {
    "4_setups/All_scenes/train_All.csv": "Action/Happy/0267 Happy\nCrime/Angry/0063 Angry\n",
    "4_setups/All_scenes/test_All.csv": "War/Fear/0001 Fear\n",
}
FERV_CLIPS = ["Action/Happy/0267", "Crime/Angry/0063", "War/Fear/0001"]


def ferv_frames(root: str = "2_ClipsforFaceCrop", images: int = 2) -> list[str]:
    return [f"{root}/{clip}/{i:02d}.jpg" for clip in FERV_CLIPS for i in range(images)]


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


def caer() -> list[str]:
    words = ("Anger", "Disgust", "Fear", "Happy")
    return [f"CAER/{split}/{word}/0001.avi" for split in ("train", "validation", "test") for word in words]
