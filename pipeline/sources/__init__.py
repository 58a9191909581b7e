"""Raw buckets -> Video rows. A source knows one layout; nothing after it knows any.

table   CSV or Parquet with `path` and `label`, optionally `split` and `subject`
folder  one folder a class
bucket  unlabelled videos
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import PurePosixPath

from pipeline.contract import DFEW_LABELS, MicaclError, Video, digest, require_label
from pipeline.sources.bucket import list_bucket
from pipeline.sources.folder import list_folder
from pipeline.sources.table import list_table

KINDS = ("auto", "table", "folder", "bucket")


def list_videos(url: str, kind: str = "auto") -> list[Video]:
    """All videos of a source in name order. Raises MicaclError if the bucket is missing or holds none."""
    if kind not in KINDS:
        raise MicaclError(f"--source is {kind!r}.", "Nothing was read.", f"Use one of {', '.join(KINDS)}.")
    if kind == "table" or (kind == "auto" and PurePosixPath(url).suffix.lower() in (".csv", ".parquet")):
        videos = list_table(url)
    elif kind == "bucket":
        videos = list_bucket(url)
    else:
        videos = list_folder(url)
    if not videos:
        raise MicaclError(
            f"{url} holds no video.",
            "There is nothing to prepare.",
            "Check the URL; videos are told by their extension (mp4, mkv, avi, mov, webm, ...) or by the table.",
        )
    return sorted(videos, key=lambda v: v.name)


def open_source(raw_url: str, kind: str, labels: Sequence[str]) -> tuple[list[Video], tuple[str, ...]]:
    """(videos, label set) of a raw bucket. All that can be wrong with it is said here. Raises MicaclError."""
    videos = list_videos(raw_url, kind)
    return videos, choose_labels(videos, labels, raw_url)


def choose_labels(videos: Sequence[Video], labels: Sequence[str], where: str) -> tuple[str, ...]:
    """The label set: the one given, or DFEW's seven. A word outside it is refused, so that a typo makes no class.

    `labels` of ("auto",) takes the words that are there, sorted. Raises MicaclError.
    """
    found = sorted({v.label for v in videos if v.label is not None})
    if tuple(labels) == ("auto",):
        return tuple(found)
    chosen = tuple(labels) or DFEW_LABELS
    if len(set(chosen)) < len(chosen) or "unlabelled" in chosen:
        raise MicaclError(
            f"--labels {' '.join(chosen)} says a label twice, or `unlabelled`.",
            "Nothing was written.",
            "Name each class once; `unlabelled` is the word for videos without a label.",
        )
    for label in found:
        require_label(label, chosen, f"{where} (give the set with --labels, or --labels auto to take all words)")
    return chosen


def assign_split(video: Video, test_share: float) -> str:
    """The split of a video: what the source says, else by a hash of its subject (or name), so subjects never leak."""
    if video.split is not None:
        return video.split
    if video.label is None:
        return "test"
    place = int(digest((video.subject or video.name).encode())[:8], 16) / 16**8
    return "test" if place < test_share else "train"
