"""Frames of which the face is known -> one track, without a search.

* A given box is the face box of every frame: it gets the margin that a found face would get.
* Frames that came cropped are the crop: no margin. A frame that is not square is filled up to one on its shorter
  side by repeating its edge (cutting the longer side would lose a chin or a forehead), and scaled at once to the size
  that is stored.

Nobody searched, so the bags say detector `given` or `none` with score 1: filters on the score let them pass.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable

import cv2
import numpy as np

from pipeline.contract import BagMeta, CropConfig, Quarantined, Reason
from pipeline.faces import Box, Track, cut_region
from pipeline.raw import RawClip
from pipeline.video import RGB, Decode, Frame

GIVEN, CROPPED = "given", "none"
"""BagMeta.detector of a face whose box was given, and of one that fills its frames."""
_LARGEST = 4.0
"""Longer side of a given box over that of the frame; beyond it the numbers are not pixels of this video."""


def given_track(frames: Iterable[Frame], raw: RawClip, config: CropConfig) -> list[Track]:
    """The one track, or none if there are fewer than `config.min_frames` frames.

    Raises Quarantined(NO_FACE) if the given box is no part of the frame.
    """
    track = Track(config.instances * config.frames_per_instance)
    track.scores.append(1.0)
    for frame in frames:
        if raw.box is not None:
            track.add(cut_region(frame, _inside(raw.box, frame.rgb_HWC), config))
        else:
            whole = Frame(frame.index, frame.t_s, _square(frame.rgb_HWC, config.size))
            half = config.size / 2
            track.add(cut_region(whole, Box(half, half, config.size / config.margin), config))
    return [track] if track.seen >= config.min_frames else []


def given_meta(meta: BagMeta, raw: RawClip, report: Decode) -> BagMeta:
    """What a bag of a given track says of itself."""
    if raw.box is not None:
        return dataclasses.replace(meta, detector=GIVEN)
    height, width = report.shape_HW
    whole = width / 2, height / 2, float(max(height, width))
    return dataclasses.replace(meta, detector=CROPPED, boxes=(whole,) * len(meta.boxes), face_px=0.0)


def _inside(box: tuple[float, float, float, float], rgb_HWC: RGB) -> Box:
    x, y, w, h = box
    height, width = rgb_HWC.shape[:2]
    side = max(w, h)
    meets = x < width and y < height and x + w > 0 and y + h > 0
    if not (all(map(math.isfinite, box)) and min(w, h) > 0 and meets and side <= _LARGEST * max(height, width)):
        raise Quarantined(Reason.NO_FACE, f"the given box {list(box)} is no part of the {width}x{height} frame")
    return Box(x + w / 2, y + h / 2, max(side, 1.0))


def _square(rgb_HWC: RGB, size: int) -> RGB:
    """(size, size, 3): the frame in the middle, its edge repeated on the shorter side."""
    height, width = rgb_HWC.shape[:2]
    scale = size / max(height, width)
    h, w = max(1, round(height * scale)), max(1, round(width * scale))
    how = cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR
    scaled = cv2.resize(rgb_HWC, (w, h), interpolation=how)
    top, left = (size - h) // 2, (size - w) // 2
    square = cv2.copyMakeBorder(scaled, top, size - h - top, left, size - w - left, borderType=cv2.BORDER_REPLICATE)
    return np.asarray(square, np.uint8)
