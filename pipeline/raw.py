"""What is handed to preprocessing: one clip, fetched and not yet decoded.

Video ──fetch_clip──> RawClip ──read_clip──> frames
"""

from __future__ import annotations

import contextlib
import errno
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from pipeline.contract import CropConfig, Quarantined, Reason, Video
from pipeline.image_folders import IMAGES, is_image
from pipeline.images import check_images, read_images
from pipeline.storage import Entry, Store, open_store, split_url
from pipeline.video import Decode, Frame, begun, ended, read_frames

_MOST_LISTED = 100_000
"""Objects in a folder of images."""
_FETCHES = 8
"""Images that are fetched at the same time."""
_NUMBERS = re.compile(r"([0-9]+)")


@dataclass(frozen=True, slots=True)
class RawClip:
    """One clip as it came: an encoded video, or encoded images in order; and which part of it is meant."""

    data: bytes | tuple[bytes, ...]
    start_s: float | None = None
    end_s: float | None = None
    """Seconds from the first frame of `data`; a frame at `end_s` is outside."""
    box: tuple[float, float, float, float] | None = None
    """Given face box x, y, w, h, pixels of the upright frame, the same in every frame. Goes before `cropped`."""
    cropped: bool = False
    """The whole frame is the face."""


def read_clip(raw: RawClip, config: CropConfig, report: Decode) -> Iterator[Frame]:
    """The frames of the clip in presentation order. Raises Quarantined."""
    if isinstance(raw.data, bytes):
        return read_frames(raw.data, config, report, start_s=raw.start_s, end_s=raw.end_s)
    return read_images(raw.data, config, report, start_s=raw.start_s, end_s=raw.end_s)


def fetch_clip(video: Video, config: CropConfig) -> RawClip:
    """Get what a row of a source names; of a folder of images only the part that is meant.

    Raises Quarantined(MISSING | NO_FRAMES | TOO_LONG | TOO_MANY_BYTES), MicaclError if the storage refuses.
    """
    box = (video.box[0], video.box[1], video.box[2], video.box[3]) if video.box else None
    if video.kind == "frames":
        return RawClip(_fetch_images(video, config), box=box, cropped=video.cropped)
    return RawClip(_fetch_file(video, config), video.start_s, video.end_s, box, video.cropped)


def _fetch_file(video: Video, config: CropConfig) -> bytes:
    root, key = split_url(video.url)
    source = open_store(root)
    found = source.stat(key)
    if found is None:
        raise _missing(video.url)
    if found.size > config.max_bytes:
        raise Quarantined(Reason.TOO_MANY_BYTES, f"{found.size} bytes, the cap is {config.max_bytes}")
    with _refusals(video.url):
        return source.get(key)


def _fetch_images(video: Video, config: CropConfig) -> tuple[bytes, ...]:
    source = open_store(video.url)
    images = list_images(source)
    times_s = [i / config.image_fps for i in range(len(images))]
    inside = [begun(t_s, video.start_s) and not ended(t_s, video.end_s) for t_s in times_s]
    chosen = [image for image, it_is in zip(images, inside, strict=True) if it_is]
    if not chosen:
        part = f"from {video.start_s or 0:g} s to {'the end' if video.end_s is None else f'{video.end_s:g} s'}"
        raise Quarantined(Reason.TOO_SHORT, f"no image lies {part}; the folder has {len(images)} images")
    check_images(len(chosen), sum(image.size for image in chosen), config)
    with _refusals(video.url), ThreadPoolExecutor(_FETCHES) as pool:
        return tuple(pool.map(source.get, [image.key for image in chosen]))


@contextlib.contextmanager
def _refusals(url: str) -> Iterator[None]:
    """One file that is gone, leads nowhere or is locked is no reason to stop. Raises Quarantined."""
    try:
        yield
    except FileNotFoundError as error:  # deleted since, or a link that leads nowhere
        raise _missing(url) from error
    except PermissionError as error:
        raise Quarantined(Reason.UNREADABLE, f"{url} may not be read by this user") from error
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        raise _missing(url) from error


def list_images(folder: Store) -> list[Entry]:
    """The images that lie in a folder itself, in the order of the numbers in their names: 2.jpg before 10.jpg.

    Raises Quarantined(MISSING | NO_FRAMES | TOO_LONG).
    """
    images, listed = [], 0
    for entry in folder.list():
        listed += 1
        if listed > _MOST_LISTED:
            raise Quarantined(Reason.TOO_LONG, f"{folder.root} holds more than {_MOST_LISTED} objects")
        if "/" not in entry.key and is_image(entry.key):
            images.append(entry)
    if not listed:
        raise _missing(folder.root)
    if not images:
        raise Quarantined(Reason.NO_FRAMES, f"{folder.root} holds no image ({', '.join(sorted(IMAGES))})")
    return sorted(images, key=lambda image: natural_order(image.key))


def natural_order(name: str) -> tuple[list[str | int], str]:
    """Sort key by which numbers count as numbers."""
    parts = _NUMBERS.split(name)
    return [int(part) if n % 2 else part for n, part in enumerate(parts)], name


def _missing(url: str) -> Quarantined:
    return Quarantined(Reason.MISSING, f"{url} is not there")
