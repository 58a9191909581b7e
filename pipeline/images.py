"""Encoded images in order -> frames with timestamps: a clip that comes as a folder of numbered pictures.

An image that does not decode costs that frame and is counted; its place in time stays empty. The size in its header is
checked before it is decoded, and only the four formats below are tried.
"""

from __future__ import annotations

import io
import re
import time
from collections.abc import Iterator, Sequence

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from pipeline.contract import CropConfig, Quarantined, Reason
from pipeline.video import RGB, Decode, Frame, begun, check_time, ended, no_frames

_FORMATS = ("BMP", "JPEG", "PNG", "WEBP")
_ADDRESS = re.compile(r" at 0x[0-9a-f]+")
"""In some of Pillow's messages; a record must not change from run to run."""


def read_images(
    encoded: Sequence[bytes],
    config: CropConfig,
    report: Decode | None = None,
    *,
    start_s: float | None = None,
    end_s: float | None = None,
) -> Iterator[Frame]:
    """Yield the images as frames, `config.image_fps` a second, or those from start_s to before end_s.

    Raises Quarantined(EMPTY | TOO_MANY_BYTES | TOO_MANY_PIXELS | TOO_LONG | TOO_SLOW | NO_FRAMES | TOO_SHORT).
    """
    report = report if report is not None else Decode()
    chosen = [i for i in range(len(encoded)) if begun(i / config.image_fps, start_s)]
    chosen = [i for i in chosen if not ended(i / config.image_fps, end_s)]
    check_images(len(chosen), sum(len(encoded[i]) for i in chosen), config)
    if encoded and not any(encoded):
        raise Quarantined(Reason.EMPTY, "every image has zero bytes")
    deadline_s = time.thread_time() + config.max_decode_s
    if start_s is None and end_s is None:
        report.expected_frames = len(encoded)
    for i in chosen:
        check_time(deadline_s, config, report)
        rgb_HWC = _decode(encoded[i], i, config, report)
        if rgb_HWC is not None:
            yield report.take(i / config.image_fps, rgb_HWC)
    if not report.frames:
        raise no_frames(report, max(0, len(encoded) - 1) / config.image_fps, start_s, end_s)


def check_images(count: int, size: int, config: CropConfig) -> None:
    """Refuse too many images or bytes. Raises Quarantined(TOO_LONG | TOO_MANY_BYTES)."""
    if count / config.image_fps > config.max_seconds:
        why = f"{count} images, {config.image_fps:g} a second, are longer than the cap of {config.max_seconds:g} s"
        raise Quarantined(Reason.TOO_LONG, why)
    if size > config.max_bytes:
        raise Quarantined(Reason.TOO_MANY_BYTES, f"{size} bytes in {count} images, the cap is {config.max_bytes}")


def _decode(data: bytes, number: int, config: CropConfig, report: Decode) -> RGB | None:
    """(H, W, 3) upright RGB, or None with a note. Raises Quarantined(TOO_MANY_PIXELS)."""
    try:
        with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
            _check_size(image.size, number, config)
            return _rgb(image)
    except (Quarantined, MemoryError):
        raise
    except Image.DecompressionBombError as error:  # Pillow's own cap, many times ours
        raise Quarantined(Reason.TOO_MANY_PIXELS, f"image {number}: {error}") from error
    except UnidentifiedImageError:
        report.lose(f"image {number} is none of {', '.join(_FORMATS)}")
    except Exception as error:  # noqa: BLE001  (each format's decoder has errors of its own; the record says which)
        report.lose(f"image {number}: {type(error).__name__}: {_ADDRESS.sub('', str(error))}")
    return None


def _check_size(size_WH: tuple[int, int], number: int, config: CropConfig) -> None:
    width, height = size_WH
    if width * height > config.max_pixels:
        why = f"image {number} has {width}x{height} px, the cap is {config.max_pixels} px a frame"
        raise Quarantined(Reason.TOO_MANY_PIXELS, why)


def _rgb(image: Image.Image) -> RGB:
    """8-bit RGB without alpha, turned as its EXIF says."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16"):  # else cut off at 255
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    return np.ascontiguousarray(image.convert("RGB"), np.uint8)
