"""CAER: clips of TV shows, `CAER/{train,validation,test}/<Emotion>/0001.avi`. Whole frames: faces are searched."""

from __future__ import annotations

from collections.abc import Iterator

from pipeline.contract import MicaclError, Video
from pipeline.sources.base import Source, SourceOptions, no_frames_choice
from pipeline.sources.bucket import is_video
from pipeline.sources.folder import SPLIT_WORDS
from pipeline.sources.tree import Folder, Survey

LABELS = ("anger", "disgust", "fear", "happy", "neutral", "sad", "surprise")
"""CAER says `anger`, not `angry`."""


def _roots(look: Survey) -> list[Folder]:
    def emotions(folder: Folder, part: str) -> int:
        below = look.folders.get(folder.path(part))
        return sum(name.lower() in LABELS for name in below.folders) if below else 0

    return [
        folder
        for folder in look
        if {"train", "test"} <= set(folder.folders) and max(emotions(folder, part) for part in ("train", "test")) >= 4
    ]


def looks_like(look: Survey) -> bool:
    """Folders train and test with CAER's words in them (`anger` is one that others do not use)."""
    return any("anger" in map(str.lower, look.folders[root.path("train")].folders) for root in _roots(look))


def find_caer(look: Survey, options: SourceOptions) -> Source:
    """Rows of CAER, as they are listed. Raises MicaclError if there is no such folder, or several."""
    no_frames_choice("caer", options)
    roots = _roots(look)
    if len(roots) != 1:
        many = f"{len(roots)} folders with CAER's splits: {', '.join(root.key or '.' for root in roots)}"
        raise MicaclError(
            f"{look.says()}; it has {many}."
            if roots
            else f"{look.says()}, and no train/ and test/ with CAER's emotions.",
            "It is not clear which clips are meant.",
            "Give the folder that holds train, validation and test, each with Anger, Disgust and so on.",
        )
    root = roots[0].key
    return Source(
        kind="caer",
        layout=f"caer in {look.store.url(root)}: <split>/<emotion>/<clip>, whole frames.",
        videos=lambda: _videos(look, root),
        labels=LABELS,
    )


def _videos(look: Survey, root: str) -> Iterator[Video]:
    prefix = f"{root}/" if root else ""
    for entry in look.store.list(prefix):
        if not is_video(entry.key):
            continue
        split, label, *rest = [*entry.key[len(prefix) :].lower().split("/"), "", ""]
        if split not in SPLIT_WORDS or label not in LABELS or not rest[0]:
            raise MicaclError(
                f"{look.store.url(entry.key)} lies in no folder <split>/<emotion>/ of CAER.",
                "Its label and split are not known.",
                f"Move it away; splits are train, validation and test, emotions are {', '.join(LABELS)}.",
            )
        yield Video(
            url=look.store.url(entry.key),
            name=entry.key,
            fingerprint=entry.fingerprint,
            label=label,
            split=SPLIT_WORDS[split],
        )
