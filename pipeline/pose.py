"""How a face leans and where it looks: from RetinaFace's landmarks on a few frames of its track.

YuNet, which finds the faces, has landmarks too, but they stay upright when the head leans: of a picture turned by 20
degrees they show a quarter (docs/decisions/0015). RetinaFace on the small region around one face is cheap.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np

from pipeline import retinaface
from pipeline.contract import CropConfig
from pipeline.detector import Face
from pipeline.video import RGB

_SIDE = 160
"""Long side to which a region is scaled down, pixels: a face is then 80 or less, the net takes 2 ms."""
_LEAST_SCORE = 0.3
"""Low, because a face is known to be there."""
_RELIABLE = 60.0
"""Degrees; landmarks of faces that lean more are often those of another turn."""
_UPRIGHT = np.array([-0.5 - 0.55j, 0.5 - 0.55j, -0.4 + 0.55j, 0.4 + 0.55j])
"""Right eye, left eye and mouth corners of an upright face as x + iy; only their directions count."""


@dataclass(frozen=True, slots=True)
class Pose:
    """An estimate."""

    roll: float = 0.0
    """Degrees clockwise in the picture, -180 to 180."""
    yaw: float | None = None
    """-1 (turned to the person's right) to 1; None if no landmarks were found."""


def face_pose(face: Face) -> Pose:
    """Of one face with five landmarks.

    Roll is the rotation that fits eyes and mouth corners best (least squares). Yaw is where the nose lies between the
    eyes: -1 at the right eye, 1 at the left one.
    """
    right, left, nose, *mouth = (complex(x, y) for x, y in face.landmarks)
    marks = np.array([right, left, *mouth])
    turn = np.vdot(_UPRIGHT, marks - marks.mean())
    between = left - right
    place = ((nose - right) * between.conjugate()).real / max(abs(between) ** 2, 1e-9)
    return Pose(math.degrees(math.atan2(turn.imag, turn.real)), float(np.clip(2 * place - 1, -1, 1)))


def median_pose(regions: Sequence[RGB], config: CropConfig, *, lying: bool = False) -> Pose:
    """Over regions that each show one face around their middle; those in which it is not found do not count.

    Args:
        lying: the face may lean by any angle: the regions are looked at in all four quarter turns, and the turn in
            which its scores are best is taken. Else it leans by less than 60 degrees or is taken to be upright.
    """
    turns = range(4) if lying else range(1)
    looks = [[_middle_face(np.ascontiguousarray(np.rot90(r, k)), config) for r in regions] for k in turns]
    best = max(turns, key=lambda k: sum(face.score for face in looks[k] if face))
    poses = [pose for face in looks[best] if face and abs((pose := face_pose(face)).roll) < _RELIABLE]
    if not poses:
        return Pose()
    rolls, yaws = (float(np.median(values)) for values in zip(*((p.roll, p.yaw) for p in poses), strict=True))
    return Pose((rolls + 90 * best + 180) % 360 - 180, yaws)


def _middle_face(region_HWC: RGB, config: CropConfig) -> Face | None:
    height, width = region_HWC.shape[:2]
    scale = min(1.0, _SIDE / max(height, width))
    size = max(1, round(width * scale)), max(1, round(height * scale))
    small_HWC = np.asarray(cv2.resize(region_HWC, size, interpolation=cv2.INTER_AREA), np.uint8)

    def off(face: Face) -> float:
        return math.hypot(face.x + (face.w - size[0]) / 2, face.y + (face.h - size[1]) / 2)

    found = retinaface.detect(small_HWC, config, _LEAST_SCORE)
    return min((face for face in found if off(face) < max(face.w, face.h) / 2), key=off, default=None)
