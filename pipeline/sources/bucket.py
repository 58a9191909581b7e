"""An unlabelled bucket: every object that looks like a video, or every folder that holds images."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import PurePosixPath

from pipeline.contract import MicaclError, Video
from pipeline.image_folders import image_folders, is_litter
from pipeline.sources.base import Source, SourceOptions
from pipeline.storage import Store

EXTENSIONS = frozenset(
    {".3gp", ".asf", ".avi", ".flv", ".m2ts", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".mts", ".mxf"}
    | {".ogv", ".ts", ".webm", ".wmv"}
)


def is_video(key: str) -> bool:
    """Told by the extension; what is inside is found out when it is decoded."""
    return PurePosixPath(key).suffix.lower() in EXTENSIONS and not is_litter(key)


def list_clips(store: Store, options: SourceOptions, prefix: str = "") -> Iterator[Video]:
    """Every clip below `prefix`, unlabelled, as it is listed: videos, or with --frames folders of images."""
    if options.frames in ("auto", "original"):
        for e in store.list(prefix):
            if is_video(e.key):
                yield Video(url=store.url(e.key), name=e.key, fingerprint=e.fingerprint)
        return
    for folder, fingerprint in image_folders(store.list(prefix)):
        cropped = options.frames == "aligned"
        yield Video(url=store.url(folder), name=folder, fingerprint=fingerprint, kind="frames", cropped=cropped)


def require_plain_frames(options: SourceOptions) -> str:
    """What the clips are, in words. Raises MicaclError for DFEW's own word."""
    if options.frames == "16f":
        raise MicaclError(
            "--frames 16f is a folder of DFEW alone.",
            "Nothing was read.",
            "Use images for folders of whole frames, aligned for folders of face crops.",
        )
    frames = {"images": "folders of frames", "aligned": "folders of face crops"}
    return frames.get(options.frames, "videos, told by their extensions")


def find_bucket(store: Store, options: SourceOptions) -> Source:
    """Clips without labels."""
    what = require_plain_frames(options)
    return Source(
        kind="bucket",
        layout=f"An unlabelled bucket: {what}, anywhere below {store.root}.",
        videos=lambda: list_clips(store, options),
    )
