"""An unlabelled bucket: every object that looks like a video."""

from __future__ import annotations

from pathlib import PurePosixPath

from pipeline.contract import Video
from pipeline.storage import open_store

EXTENSIONS = frozenset(
    {".3gp", ".asf", ".avi", ".flv", ".m2ts", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".mts", ".mxf"}
    | {".ogv", ".ts", ".webm", ".wmv"}
)


def is_video(key: str) -> bool:
    """Told by the extension; what is inside is found out when it is decoded."""
    return PurePosixPath(key).suffix.lower() in EXTENSIONS


def list_bucket(url: str) -> list[Video]:
    """Videos below `url`, unlabelled. Raises MicaclError if the bucket cannot be read."""
    store = open_store(url)
    store.check()
    return [Video(url=store.url(e.key), name=e.key, fingerprint=e.fingerprint) for e in store.list() if is_video(e.key)]
