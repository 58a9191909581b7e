"""Units: the smooth pushes that the demo's faces move by. Numbers only; pipeline/demo_faces.py draws.

A unit is a few Gaussian bumps set at landmarks of the portrait (inner brow, mouth corner, ...), loosely named after
facial actions.

Shapes: H rows, W columns, U units; 2 is (x, y). All in pixels of the portrait.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from types import MappingProxyType
from typing import Final

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]

PORTRAIT_SIDE: Final = 256
"""Side of the head and shoulders that are cut from the photograph, pixels."""
FACE: Final = (64, 60, 196, 204)
"""Left, top, right, bottom of the part of the portrait that units may move, pixels."""
MIDDLE_X: Final = 128.0
"""Column of the nose, pixels."""
MOUTH: Final = (127.0, 145.0, 17.5)
"""Centre x, centre y and half width of the closed mouth at rest, pixels."""

# x, y, dx, dy, sigma x, sigma y of a push; the bump of `PAIRED` units is mirrored about the nose.
Bump = tuple[float, float, float, float, float, float]
PAIRED: Final[Mapping[str, tuple[Bump, ...]]] = MappingProxyType(
    {
        "inner_brow_up": ((114, 90, 0.5, -6, 7, 6.5),),
        "outer_brow_up": ((99, 88, 0, -5, 9, 6.5),),
        "brow_knit": ((114, 91, 5, 5, 9, 7), (99, 89, 3, 1.5, 9, 7)),
        "cheek_up": ((100, 121, 0, -4, 12, 8), (106, 107, 0, -2.5, 10, 4)),
        "nose_wrinkle": ((117, 124, 1, -6, 7, 9), (116, 106, 2, 3, 7, 6)),
        "upper_lip_up": ((118, 138, -1, -5, 8, 5),),
        "corner_up": ((108, 144, -8, -6, 9, 9), (98, 134, -2, -3, 10, 9)),
        "corner_down": ((109, 146, -1, 8, 8, 9),),
        "lip_stretch": ((109, 146, -9, 2, 9, 7), (98, 150, -3, 1, 10, 12)),
        "lip_press": ((111, 145, 6, 0, 9, 7),),
    }
)
SINGLE: Final[Mapping[str, tuple[Bump, ...]]] = MappingProxyType(
    {
        "chin_up": ((128, 155, 0, -5, 16, 8), (128, 168, 0, -3, 18, 9)),
        "jaw_drop": ((128, 174, 0, 8, 30, 18),),
    }
)
EYES: Final = ((107.0, 101.5), (150.0, 103.5))
UNITS: Final = (*PAIRED, *SINGLE, "lids_close", "lips_thin")


@cache
def unit_fields() -> Floats:
    """(U, H, W, 2): how far each unit at weight 1 pushes each pixel of FACE."""
    left, top, right, bottom = FACE
    grid_HW2 = pixel_grid()[top:bottom, left:right]
    pushes = [[b for bump in bumps for b in (bump, mirrored(bump))] for bumps in PAIRED.values()]
    pushes += [list(bumps) for bumps in SINGLE.values()]
    fields = [np.sum([bump_field(grid_HW2, bump) for bump in bumps], axis=0) for bumps in pushes]
    fields.append(np.sum([squash_field(grid_HW2, x, y, 11, 6) for x, y in EYES], axis=0))
    fields.append(squash_field(grid_HW2, MOUTH[0], MOUTH[1], 20, 7))
    return np.stack(fields).astype(np.float32)


def bump_field(grid_HW2: Floats, bump: Bump) -> Floats:
    """(H, W, 2): a push of (dx, dy) that fades like a Gaussian."""
    x, y, dx, dy, sigma_x, sigma_y = bump
    z_HW2 = (grid_HW2 - np.array([x, y], np.float32)) / np.array([sigma_x, sigma_y], np.float32)
    return np.asarray(np.exp(-0.5 * (z_HW2**2).sum(-1, keepdims=True)) * (dx, dy), np.float32)


def squash_field(grid_HW2: Floats, x: float, y: float, sigma_x: float, sigma_y: float) -> Floats:
    """(H, W, 2): a pull of rows towards row y. The picture folds over at a weight of 2.24."""
    pull_HW2 = bump_field(grid_HW2, (x, y, 0, -1, sigma_x, sigma_y))
    return np.asarray(pull_HW2 * (grid_HW2[..., 1:] - y), np.float32)


def mirrored(bump: Bump) -> Bump:
    """The same push on the other side of the nose. The head leans a little: that side lies two pixels lower."""
    x, y, dx, dy, sigma_x, sigma_y = bump
    return 2 * MIDDLE_X - x, y + 2 * abs(x - MIDDLE_X) / 21, -dx, dy, sigma_x, sigma_y


@cache
def pixel_grid() -> Floats:
    """(256, 256, 2): x and y of every pixel of the portrait."""
    y_HW, x_HW = np.mgrid[:PORTRAIT_SIDE, :PORTRAIT_SIDE].astype(np.float32)
    return np.stack([x_HW, y_HW], -1)
