"""One folder a class: `<class>/.../clip.mp4`, or `<split>/<class>/.../clip.mp4`. Clips in no folder are unlabelled."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from pipeline.contract import MicaclError, Video
from pipeline.sources.base import Source, SourceOptions
from pipeline.sources.bucket import list_clips, require_plain_frames
from pipeline.sources.tree import Survey

SPLIT_WORDS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}


def find_folder(look: Survey, options: SourceOptions) -> Source:
    """Clips with the name of a folder, in lower case, as label."""
    top, what = look.folders[""], require_plain_frames(options)
    split = bool(top.folders) and all(name.lower() in SPLIT_WORDS for name in top.folders)

    def videos() -> Iterator[Video]:
        for video in list_clips(look.store, options):
            yield _in_split(video) if split else _of_class(video, video.name.split("/")[:-1])

    way = "<split>/<class>/" if split else "<class>/"
    return Source(kind="folder", layout=f"One folder a class ({way}) below {look.url}: {what}.", videos=videos)


def _of_class(video: Video, folders: list[str]) -> Video:
    if video.kind == "frames" and not folders:
        raise MicaclError(
            f"{video.url} holds images itself.",
            "One folder of images is one clip: those of a class would become a single clip.",
            "Give each clip a folder of its own, <class>/<clip>/<number>.jpg.",
        )
    return dataclasses.replace(video, label=folders[0].strip().lower() or None if folders else None)


def _in_split(video: Video) -> Video:
    split, *folders = video.name.split("/")[:-1] or ("",)
    if split.lower() not in SPLIT_WORDS:
        raise MicaclError(
            f"{video.url} lies beside the folders of the splits.",
            "It is not clear which split it belongs to.",
            "Move it into one of them, or list the clips in a table (docs/data.md).",
        )
    return dataclasses.replace(_of_class(video, folders), split=SPLIT_WORDS[split.lower()])
