"""What tells two pictures apart: hard cuts between frames, and whether two faces may be one person a moment later.

The limits were measured on real clips (docs/decisions/0015): patches of one person 3 frames apart correlate at
0.69 or more, of two persons at 0.41 in the median.
"""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray

from pipeline.detector import Face
from pipeline.video import RGB

Patch = NDArray[np.float32]
"""(16, 16) grey, mean 0, norm 1: brightness and contrast do not count."""

ALIKE = 0.5
"""Least correlation of a face with the one that it is said to be, some frames later."""
_CUT_LEVEL = 20.0
"""Mean absolute difference of two neighbouring 32x18 grey thumbnails, of 255, that counts as a cut."""
_SIDE = 16


def thumbnail(rgb_HWC: RGB) -> RGB:
    """(18, 32) grey, by which cuts are told."""
    small = cv2.resize(rgb_HWC, (32, 18), interpolation=cv2.INTER_NEAREST)
    return np.asarray(cv2.cvtColor(small, cv2.COLOR_RGB2GRAY), np.uint8)


def is_cut(a: RGB, b: RGB) -> bool:
    """Whether the picture changed as a whole between two neighbouring frames."""
    return float(np.abs(a.astype(np.int16) - b.astype(np.int16)).mean()) > _CUT_LEVEL


def face_patch(rgb_HWC: RGB, face: Face) -> Patch:
    """The part of the face's box that lies in the frame."""
    height, width = rgb_HWC.shape[:2]
    left, top = min(max(0, int(face.x)), width - 1), min(max(0, int(face.y)), height - 1)
    right, bottom = max(left + 1, int(face.x + face.w)), max(top + 1, int(face.y + face.h))
    step = max(1, min(right - left, bottom - top) // (4 * _SIDE))  # every pixel of a large face would tell no more
    grey = cv2.cvtColor(rgb_HWC[top:bottom:step, left:right:step], cv2.COLOR_RGB2GRAY)
    patch = cv2.resize(grey, (_SIDE, _SIDE), interpolation=cv2.INTER_AREA).astype(np.float32)
    patch -= patch.mean()
    return np.asarray(patch / (np.linalg.norm(patch) + 1e-6), np.float32)


def alike(a: Patch, b: Patch) -> bool:
    """Whether two patches may show one person; of patches without any contrast that is not known, so they may."""
    if not a.any() or not b.any():
        return True
    return float((a * b).sum()) >= ALIKE
