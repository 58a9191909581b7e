"""Raw buckets -> Video rows. A source knows one layout; nothing after it knows any.

table     CSV or Parquet with `path`, `label` and more
folder    one folder a class
bucket    unlabelled
dfew, ferv39k, mafw, afew, caer, crema-d, ravdess    as the authors distribute them, and as copies vary

`find_source` looks at the upper folders and the lists; the rows come as a stream.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

from pipeline.contract import DFEW_LABELS, MicaclError, Video, digest, require_label
from pipeline.sources import actors, afew, caer, dfew, ferv39k, mafw
from pipeline.sources.base import FRAMES, Source, SourceOptions
from pipeline.sources.bucket import find_bucket
from pipeline.sources.folder import find_folder
from pipeline.sources.table import find_table, is_table
from pipeline.sources.tree import Survey, survey
from pipeline.storage import open_store

__all__ = ["AUTO", "FRAMES", "KINDS", "Source", "SourceOptions", "assign_split", "check_label", "choose_labels"]
__all__ += ["find_source", "label_set", "list_videos", "open_source"]

_SETS: Mapping[str, tuple[Callable[[Survey], bool], Callable[[Survey, SourceOptions], Source]]] = {
    "dfew": (dfew.looks_like, dfew.find_dfew),
    "ferv39k": (ferv39k.looks_like, ferv39k.find_ferv39k),
    "mafw": (mafw.looks_like, mafw.find_mafw),
    "afew": (afew.looks_like, afew.find_afew),
    "caer": (caer.looks_like, caer.find_caer),
    "crema-d": (actors.looks_like_crema_d, actors.find_crema_d),
    "ravdess": (actors.looks_like_ravdess, actors.find_ravdess),
}
KINDS = ("auto", "table", "folder", "bucket", *_SETS)
AUTO = ("auto",)
"""As a label set: the words that are there."""


def find_source(url: str, kind: str = "auto", *, options: SourceOptions = SourceOptions()) -> Source:  # noqa: B008
    """Find out how a raw bucket is laid out. Reads its upper folders and its lists, not its clips.

    Raises MicaclError if the bucket is missing, or what is there is not a `kind`, or parts of it contradict.
    """
    if kind not in KINDS:
        raise MicaclError(f"--source is {kind!r}.", "Nothing was read.", f"Use one of {', '.join(KINDS)}.")
    if kind == "table" or (kind == "auto" and is_table(url)):
        return _not_empty(url, find_table(url, options))
    store = open_store(url)
    store.check()
    if kind == "bucket":
        return _not_empty(url, find_bucket(store, options))
    look = survey(store)
    if kind == "auto":
        kind = _recognise(look)
    return _not_empty(url, find_folder(look, options) if kind == "folder" else _SETS[kind][1](look, options))


def _recognise(look: Survey) -> str:
    fits = [kind for kind, (looks_like, _) in _SETS.items() if looks_like(look)]
    if len(fits) > 1:
        raise MicaclError(
            f"{look.url} has the layouts of {' and of '.join(fits)}.",
            "It is not clear which is meant.",
            f"Say --source {' or --source '.join(fits)}, or give the folder of one of them.",
        )
    return fits[0] if fits else "folder"


def _not_empty(url: str, source: Source) -> Source:
    def videos() -> Iterator[Video]:
        number = 0
        for number, video in enumerate(source.videos(), 1):  # noqa: B007  (the last number is asked for below)
            yield video
        if not number:
            raise MicaclError(
                f"{url} holds no video.",
                "There is nothing to prepare.",
                "Check the URL; videos are told by their extension (mp4, mkv, avi, mov, webm, ...) or by the table, "
                "folders of images are taken with --frames images or --frames aligned.",
            )

    return Source(kind=source.kind, layout=source.layout, videos=videos, labels=source.labels, notes=source.notes)


def list_videos(url: str, kind: str = "auto", options: SourceOptions = SourceOptions()) -> list[Video]:  # noqa: B008
    """All videos of a source in memory, in name order. Raises MicaclError if one name comes twice, or none."""
    return _in_memory(url, find_source(url, kind, options=options))


def _in_memory(url: str, source: Source) -> list[Video]:
    videos = sorted(source.videos(), key=lambda v: v.name)
    for one, next_one in zip(videos, videos[1:], strict=False):
        if one.name == next_one.name:
            raise MicaclError(
                f"{url} lists {one.name!r} twice.", "It would be counted twice.", "Remove one of the two."
            )
    return videos


def open_source(raw_url: str, kind: str, labels: Sequence[str]) -> tuple[list[Video], tuple[str, ...]]:
    """(videos, label set) of a raw bucket, in memory. All that can be wrong with it is said. Raises MicaclError."""
    source = find_source(raw_url, kind)
    videos = _in_memory(raw_url, source)
    return videos, choose_labels(videos, tuple(labels) or source.labels or (), raw_url)


def label_set(labels: Sequence[str], source: Source) -> tuple[str, ...]:
    """The label set: the one given, else the data set's own, else DFEW's. ("auto",) stays: the rows decide.

    Raises MicaclError if a word is said twice.
    """
    chosen = tuple(labels) or source.labels or DFEW_LABELS
    if len(set(chosen)) < len(chosen) or "unlabelled" in chosen or ("auto" in chosen and chosen != AUTO):
        raise MicaclError(
            f"--labels {' '.join(chosen)} says a label twice, or `unlabelled`, or `auto` among others.",
            "Nothing was written.",
            "Name each class once, or say `auto` alone; `unlabelled` is the word for videos without a label.",
        )
    return chosen


def check_label(word: str | None, labels: Sequence[str], where: str) -> None:
    """Refuse a label outside the set, so that a typo makes no class; unlabelled and AUTO pass. Raises MicaclError.

    Args:
        where: the row, for the error: its name, or the table's line.
    """
    if word is not None and tuple(labels) != AUTO:
        require_label(word, labels, f"{where} (give the set with --labels, or --labels auto to take all words)")


def choose_labels(videos: Sequence[Video], labels: Sequence[str], where: str) -> tuple[str, ...]:
    """As label_set and check_label, over rows in memory; ("auto",) becomes the words that are there, sorted."""
    found = sorted({v.label for v in videos if v.label is not None})
    if tuple(labels) == AUTO:
        return tuple(found)
    chosen = label_set(labels, Source(kind="", layout="", videos=lambda: iter(videos)))
    for label in found:
        check_label(label, chosen, where)
    return chosen


def assign_split(video: Video, test_share: float) -> str:
    """The split of a video: what the source says, else by a hash of its subject (or name), so subjects never leak."""
    if video.split is not None:
        return video.split
    if video.label is None:
        return "test"
    place = int(digest((video.subject or video.name).encode())[:8], 16) / 16**8
    return "test" if place < test_share else "train"
