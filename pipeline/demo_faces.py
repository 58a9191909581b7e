"""One portrait in, moving faces out: pure functions that draw the clips of the demo.

    portrait -> resting face (smile undone) -> subject (look and shape) -> clip (expression over time) -> frames

The portrait is `astronaut.png` of scikit-image: Eileen Collins, photographed by NASA, public domain. The photograph
smiles, so the lips are closed and the mouth relaxed once; every clip starts from there. A face moves by a dense smooth
displacement: a weighted sum of *units* (pipeline/demo_units.py), drawn to look different, not to be anatomy. Only the
movement carries the class: subject, light, head motion, blink, speed, length and noise are drawn without looking at it.

The data shows that the software works. It says nothing about real faces.

Shapes: T frames, H rows, W columns, U units; 2 is (x, y) in pixels; 3 is RGB. Landmarks are in portrait pixels.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from types import MappingProxyType
from typing import Final

import cv2
import numpy as np
import numpy.typing as npt

from pipeline.contract import DFEW_LABELS, MicaclError, require_label
from pipeline.demo_units import (
    EYES,
    FACE,
    MIDDLE_X,
    MOUTH,
    PORTRAIT_SIDE,
    UNITS,
    Bump,
    Floats,
    bump_field,
    mirrored,
    pixel_grid,
    unit_fields,
)

Bytes = npt.NDArray[np.uint8]

# At the apex: weight of each unit, and `open`: height of the mouth opening, pixels.
EXPRESSIONS: Final[Mapping[str, Mapping[str, float]]] = MappingProxyType(
    {
        "happy": {"corner_up": 1.1, "cheek_up": 1.1, "lids_close": 0.4, "open": 7},
        "sad": {"inner_brow_up": 0.9, "corner_down": 1.3, "chin_up": 0.9, "lids_close": 0.8},
        "neutral": {},
        "angry": {"brow_knit": 1.3, "lip_press": 1.0, "lips_thin": 0.9, "lids_close": 0.3, "chin_up": 0.3},
        "surprise": {"inner_brow_up": 1.0, "outer_brow_up": 1.1, "lids_close": -0.2, "jaw_drop": 1.2, "open": 18},
        "disgust": {"nose_wrinkle": 1.2, "upper_lip_up": 1.2, "lids_close": 1.0, "brow_knit": 0.5, "open": 4},
        "fear": {"inner_brow_up": 1.1, "brow_knit": 0.5, "lids_close": -0.2, "lip_stretch": 1.1, "open": 9},
    }
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Subject:
    """One look of the resting face; everything that stays the same from clip to clip of a person."""

    portrait_HW3: Bytes
    """Resting face in this subject's colours, before its shape is applied."""
    shape_HW2: Floats
    """For each pixel of the subject the pixel of the portrait that it shows."""
    light: float
    """Brightness of the skin, and so of what shows between open lips; 1 is the photograph."""
    mirrored: bool
    """Left and right of the portrait are swapped."""


def load_portrait() -> Bytes:
    """Head and shoulders of the photograph, (256, 256, 3) RGB. Raises MicaclError where scikit-image is missing."""
    remedy = "Install it: pip install 'micacl[demo]'."
    nothing = "The demo has no face to draw."
    try:
        package = importlib.metadata.distribution("scikit-image")
    except importlib.metadata.PackageNotFoundError as error:
        raise MicaclError("The package scikit-image is not installed.", nothing, remedy) from error
    path = str(package.locate_file("skimage/data/astronaut.png"))
    image_HW3 = cv2.imread(path, cv2.IMREAD_COLOR)
    if image_HW3 is None:
        raise MicaclError(f"{path} is missing or is no image.", nothing, remedy)
    return np.ascontiguousarray(image_HW3[:PORTRAIT_SIDE, 96 : 96 + PORTRAIT_SIDE, ::-1])


def make_subject(rng: np.random.Generator) -> Subject:
    """A person: skin, hair, background, light, shape of the face, mirrored or not. Never touches motion."""
    face_HW3: Floats = resting_portrait().astype(np.float32) / np.float32(255)
    skin_HW1, hair_HW1, back_HW1 = portrait_masks()
    tone_3 = np.array([1.0, 0.96, 0.92]) ** rng.uniform(-1, 4) * rng.uniform(0.62, 1.04)
    hair_3 = rng.uniform(0.25, 1.05) * np.array([1, rng.uniform(0.85, 1.05), rng.uniform(0.7, 1.3)])
    face_HW3 *= (1 + skin_HW1 * (tone_3 - 1)) * (1 + hair_HW1 * (hair_3 - 1))
    face_HW3 += back_HW1 * (backdrop(rng) - face_HW3)
    contrast, brightness = rng.uniform(0.82, 1.12), rng.uniform(-0.05, 0.05)
    face_HW3 = blur((face_HW3 - 0.5) * np.float32(contrast) + np.float32(0.5 + brightness), rng.uniform(0.1, 0.8))
    portrait_HW3 = (np.clip(face_HW3, 0, 1) * 255).round().astype(np.uint8)
    shape_HW2, swapped = face_shape(rng)
    return Subject(portrait_HW3=portrait_HW3, shape_HW2=shape_HW2, light=float(tone_3.mean()), mirrored=swapped)


def render_clip(
    subject: Subject, label: str, frames: int, side: int, rng: np.random.Generator, ambiguity: float = 0.0
) -> Bytes:
    """Draw one clip that starts at rest: (T, side, side, 3) RGB. Raises MicaclError for an unknown label.

    `ambiguity`: most share of another expression that is mixed in; above 0.5 some clips look more like that one.
    """
    require_label(label, DFEW_LABELS, "a demo clip")
    apex = mixed_expression(label, ambiguity, rng) if ambiguity else EXPRESSIONS[label]
    weights_TU, open_T = expression_course(apex, frames, rng)
    return render_course(subject, weights_TU, unit_fields(), open_T, side, rng)


def render_course(
    subject: Subject, weights_TU: Floats, fields_UHW2: Floats, open_T: Floats, side: int, rng: np.random.Generator
) -> Bytes:
    """(T, side, side, 3) RGB of a face that moves by these weights of these fields; head, light and grain by `rng`."""
    frames = len(weights_TU)
    head_T23 = head_motion(frames, side, rng)
    light_T = 1 + drift(frames, rng) * 0.08
    grain_HW = rng.normal(0, rng.uniform(1.0, 2.5), (2 * side, 2 * side)).astype(np.float32)
    out_THW3 = np.empty((frames, side, side, 3), np.uint8)
    for t in range(frames):
        posed_HW3 = pose_face(subject, weights_TU[t], fields_UHW2, float(open_T[t]))
        seen_HW3 = warp(posed_HW3, turned(subject.shape_HW2, head_T23[t], side), cv2.INTER_LINEAR)
        y, x = rng.integers(0, side, 2)
        noisy_HW3 = seen_HW3 * np.float32(light_T[t]) + grain_HW[y : y + side, x : x + side, None]
        out_THW3[t] = np.clip(noisy_HW3, 0, 255)
    return out_THW3


def mixed_expression(label: str, ambiguity: float, rng: np.random.Generator) -> dict[str, float]:
    """An apex between this expression and another one, drawn at random."""
    others = [word for word in DFEW_LABELS if word != label]
    own, other = EXPRESSIONS[label], EXPRESSIONS[others[rng.integers(len(others))]]
    share = rng.uniform(0, ambiguity)
    return {unit: (1 - share) * own.get(unit, 0.0) + share * other.get(unit, 0.0) for unit in sorted({*own, *other})}


def expression_course(apex: Mapping[str, float], frames: int, rng: np.random.Generator) -> tuple[Floats, Floats]:
    """Weights of the units (T, U) and mouth opening in pixels (T,): rest, onset, apex, often an offset; and a blink."""
    strength = rng.uniform(0.9, 1.15)
    onset, rise = rng.uniform(0.08, 0.25), rng.uniform(0.15, 0.35)
    fade, fall = rng.uniform(0.7, 0.95), rng.uniform(0.15, 0.3)
    back = rng.uniform(0.0, 1.0)  # how much of the way back to rest, were the clip long enough
    time_T = np.arange(frames) / max(frames - 1, 1)

    def course(lag: float) -> Floats:
        up_T = smooth_step((time_T - onset - lag) / rise)
        down_T = smooth_step((time_T - fade - lag) / fall)
        return (strength * up_T * (1 - back * down_T)).astype(np.float32)

    weights_TU = np.zeros((frames, len(UNITS)), np.float32)
    for u, unit in enumerate(UNITS):
        jitter, lag, idle = rng.uniform(0.85, 1.15), rng.uniform(0, 0.06), rng.uniform(0, 0.12)
        weights_TU[:, u] = apex.get(unit, 0.0) * jitter * course(lag) + idle * drift(frames, rng)
    blink_T = rng.uniform(0, 1.6) * np.exp(-(((time_T - rng.uniform(0.05, 1.2)) / 0.05) ** 2))
    lids = UNITS.index("lids_close")
    weights_TU[:, lids] = np.clip(weights_TU[:, lids] + blink_T, -0.6, 2.1)
    idle_open_T = np.maximum(drift(frames, rng) - 0.3, 0)
    return weights_TU, apex.get("open", 0.0) * rng.uniform(0.85, 1.15) * course(0.03) + idle_open_T


def pose_face(subject: Subject, weights_U: Floats, fields_UHW2: Floats, mouth_open: float) -> Bytes:
    """The portrait with its face moved, before shape and head motion, (256, 256, 3) RGB."""
    left, top, right, bottom = FACE
    grid_HW2 = pixel_grid()[top:bottom, left:right]
    source_HW2 = grid_HW2 - np.einsum("u,uhwc->hwc", weights_U, fields_UHW2)
    depth_HW, under_HW = part_lips(source_HW2, mouth_open)
    moved_HW3 = warp(subject.portrait_HW3, source_HW2, cv2.INTER_CUBIC)
    if mouth_open > 0.2:
        moved_HW3 = paint_mouth(moved_HW3, depth_HW, under_HW, subject.light)
    posed_HW3 = subject.portrait_HW3.copy()
    posed_HW3[top:bottom, left:right] = moved_HW3
    return posed_HW3


def part_lips(source_HW2: Floats, mouth_open: float) -> tuple[Floats, Floats]:
    """Move what lies above and below the closed mouth apart, in place.

    Returns for each pixel how deep it lies in the opening and how far under the upper lip, both in pixels.
    """
    centre_x, centre_y, half_width = MOUTH
    u_HW = np.abs(source_HW2[..., 0] - centre_x) / half_width
    gap_HW = mouth_open * np.sqrt(np.clip(1 - u_HW**2, 0, 1))
    up_HW, down_HW = 0.25 * gap_HW, 0.75 * gap_HW
    y_HW = source_HW2[..., 1] - centre_y
    lift_HW = up_HW * np.exp(-(((y_HW + up_HW) / 9) ** 2))
    drop_HW = down_HW * np.exp(-(((y_HW - down_HW) / 16) ** 2))
    source_HW2[..., 1] += np.where(y_HW < 0.25 * gap_HW, lift_HW, -drop_HW)
    height_HW = np.where(y_HW < 0, 0.25, 0.75) * (mouth_open + 0.01)
    depth_HW = (1 - np.hypot(u_HW, y_HW / height_HW)) * np.minimum(height_HW, half_width)
    depth_HW = np.minimum(depth_HW, (1 - u_HW) * half_width)
    return depth_HW.astype(np.float32), y_HW + up_HW


def paint_mouth(face_HW3: Bytes, depth_HW: Floats, under_HW: Floats, light: float) -> Bytes:
    """Fill the opening between the lips: dark, with the upper teeth in it; edges are soft."""
    inside_3, teeth_3 = light * np.array([[72, 26, 28], [216, 208, 190]], np.float32)
    tooth_HW1 = (np.clip((4.5 - under_HW) / 1.5, 0, 1) * np.clip(under_HW, 0, 1))[..., None]
    alpha_HW1 = np.clip(depth_HW + 0.5, 0, 1)[..., None]
    mouth_HW3 = inside_3 + tooth_HW1 * (teeth_3 - inside_3)
    return np.asarray(face_HW3 + alpha_HW1 * (mouth_HW3 - face_HW3), np.uint8)


def head_motion(frames: int, side: int, rng: np.random.Generator) -> Floats:
    """(T, 2, 3): for each frame the affine map from the pixels of the frame to those of the subject."""
    start_4 = rng.uniform(-1, 1, 4) * (7.0, 5.0, 4.0, 0.05)  # pixels, pixels, degrees, ratio
    sway_4 = rng.uniform(0.2, 1, 4) * (4.0, 3.0, 3.0, 0.03)
    path_T4 = start_4 + sway_4 * np.stack([drift(frames, rng) for _ in range(4)], 1)
    out_T23 = np.empty((frames, 2, 3), np.float32)
    for t, (dx, dy, degrees, zoom) in enumerate(path_T4):
        out_T23[t] = cv2.getRotationMatrix2D((MIDDLE_X, 128.0), float(degrees), 1 + float(zoom))
        out_T23[t, :, 2] += dx, dy
        out_T23[t, :, :2] *= PORTRAIT_SIDE / side
    return out_T23


def face_shape(rng: np.random.Generator) -> tuple[Floats, bool]:
    """(256, 256, 2): wider or longer face, eyes apart, mouth height, jaw width; and whether it is mirrored."""
    grid_HW2 = pixel_grid()
    wide, tall = rng.uniform(0.9, 1.12), rng.uniform(0.93, 1.08)
    map_HW2 = (grid_HW2 - (MIDDLE_X, 128)) / (wide, tall) + (MIDDLE_X, 128)
    eyes, mouth, jaw = rng.uniform(-3, 3), rng.uniform(-3, 3), rng.uniform(-4, 4)
    bumps = [(x, y, eyes * np.sign(x - MIDDLE_X), 0.0, 14.0, 16.0) for x, y in EYES]
    bumps += [(MIDDLE_X, 146.0, 0.0, mouth, 24.0, 14.0)]
    bumps += [(128.0 + s * 40, 158.0, s * jaw, 0.0, 16.0, 24.0) for s in (-1, 1)]
    map_HW2 -= sum(bump_field(map_HW2.astype(np.float32), bump) for bump in bumps)
    swapped = bool(rng.random() < 0.5)
    if swapped:
        map_HW2 = map_HW2[:, ::-1]
    return np.ascontiguousarray(map_HW2, np.float32), swapped


def backdrop(rng: np.random.Generator) -> Floats:
    """(256, 256, 3): a colour that changes slowly over the background, 0 to 1."""
    ends_23 = rng.uniform(0.2, 0.9, (2, 1)) + rng.uniform(-0.12, 0.12, (2, 3))
    angle = rng.uniform(0, 2 * np.pi)
    slope_HW = pixel_grid() @ np.array([np.cos(angle), np.sin(angle)], np.float32)
    mix_HW1 = ((slope_HW - slope_HW.min()) / np.ptp(slope_HW))[..., None]
    return np.asarray(ends_23[0] * (1 - mix_HW1) + ends_23[1] * mix_HW1, np.float32)


@cache
def portrait_masks() -> tuple[Floats, Floats, Floats]:
    """Where the portrait is skin, hair and background: three (256, 256, 1), 0 to 1, soft at the edges."""
    hair = [(58, 74), (64, 48), (92, 38), (94, 26), (130, 15), (168, 28), (196, 56), (206, 82), (200, 106), (190, 122)]
    hair += [(178, 130), (172, 112), (170, 90), (156, 86), (140, 81), (120, 79), (98, 79), (90, 74), (87, 98)]
    hair += [(84, 116), (74, 116), (60, 100)]
    skin = [(90, 74), (98, 79), (120, 79), (140, 81), (156, 86), (170, 90), (173, 112), (180, 130), (172, 136)]
    skin += [(166, 160), (157, 172), (157, 186), (140, 192), (116, 188), (92, 180), (89, 150), (85, 131), (76, 118)]
    skin += [(86, 112)]
    seeds = ((2, 2), (253, 2), (30, 120), (230, 120), (240, 200))
    flood_HW = np.zeros((PORTRAIT_SIDE + 2, PORTRAIT_SIDE + 2), np.uint8)
    smooth_HW3, step = cv2.GaussianBlur(load_portrait(), (0, 0), 1.0), (3, 3, 3)
    for seed in seeds:
        cv2.floodFill(smooth_HW3, flood_HW, seed, (0, 0, 0), step, step, 4 | cv2.FLOODFILL_MASK_ONLY)
    drawn = [cv2.fillPoly(np.zeros((256, 256), np.float32), [np.array(p, np.int32)], 1.0) for p in (skin, hair)]
    near_hair = np.ones((5, 5), np.uint8)  # the light fringe around the head belongs to the old background
    drawn.append(cv2.dilate(flood_HW[1:-1, 1:-1], near_hair).astype(np.float32))
    skin_HW1, hair_HW1, back_HW1 = (blur(np.asarray(mask, np.float32), 1.5)[..., None] for mask in drawn)
    return skin_HW1, hair_HW1, back_HW1


@cache
def resting_portrait() -> Bytes:
    """The photograph with its lips closed over the teeth and its smile undone, (256, 256, 3) RGB."""
    grid_HW2 = pixel_grid()
    # Two steps back from rest to the photograph: relax the corners, then skip the band of teeth.
    relax: tuple[Bump, ...] = ((107, 141, 7, 6, 9, 9), (98, 132, 1.5, 2, 8, 8))
    source_HW2 = grid_HW2 - sum(bump_field(grid_HW2, b) for bump in relax for b in (bump, mirrored(bump)))
    u_HW = (source_HW2[..., 0] - 128) / 22
    arch_HW = np.clip(1 - u_HW**2, 0, 1)
    y_HW = source_HW2[..., 1] - (140 + 5.5 * arch_HW)
    teeth_HW = 4.4 * arch_HW
    side_HW = np.clip(y_HW / 0.6, -1, 1)
    source_HW2[..., 1] += side_HW * teeth_HW * np.exp(-((y_HW / 12) ** 2))
    return warp(load_portrait(), source_HW2, cv2.INTER_CUBIC)


def warp(image_HW3: Bytes, source_HW2: Floats, interpolation: int) -> Bytes:
    """(H, W, 3): for each pixel of the map the colour of the image there; beyond its edge the image is mirrored."""
    edge = cv2.BORDER_REFLECT_101
    # The stub does not know that a map of two channels has no second map.
    out_HW3 = cv2.remap(image_HW3, source_HW2, None, interpolation, borderMode=edge)  # type: ignore[call-overload]
    return np.asarray(out_HW3, np.uint8)


def turned(map_HW2: Floats, head_23: Floats, side: int) -> Floats:
    """(side, side, 2): the map of a subject as seen after the head has moved."""
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    seen_HW2 = cv2.warpAffine(map_HW2, head_23, (side, side), flags=flags, borderMode=cv2.BORDER_REPLICATE)
    return np.asarray(seen_HW2, np.float32)


def blur(image: Floats, sigma: float) -> Floats:
    return np.asarray(cv2.GaussianBlur(image, (0, 0), sigma), np.float32)


def drift(frames: int, rng: np.random.Generator) -> Floats:
    """(T,): a slow wander that starts at 0 and stays within about -1 to 1."""
    time_T = np.arange(frames) / 25
    hertz_3, phase_3 = rng.uniform(0.2, 1.2, 3), rng.uniform(0, 2 * np.pi, 3)
    waves_T3 = np.sin(2 * np.pi * hertz_3 * time_T[:, None] + phase_3) - np.sin(phase_3)
    return np.asarray(waves_T3.mean(1), np.float32)


def smooth_step(x: npt.ArrayLike) -> Floats:
    """0 below 0, 1 above 1, smooth between."""
    z = np.clip(np.asarray(x, np.float32), 0, 1)
    return z * z * (3 - 2 * z)
