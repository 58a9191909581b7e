"""A face track -> a bag of instance clips -> bytes, and back.

    track frames      0 1 2 3 4 5 6 7 8 9 ...              thinned evenly to instances * frames_per_instance
    instances         |--- 0 ---|--- 1 ---|--- 2 ---|      contiguous, lengths differ by at most one
    crop              one square for each instance: the median centre and side of its frames, turned by the
                      roll of the track (pipeline/pose.py)

One transform for a whole instance: aligning every frame by its own detection makes the crop tremble with the
detector's noise, and a model takes that trembling for motion. One angle for the whole bag: a head that tilts is an
expression, a head that always leans is not. Frames are stored encoded (pipeline/codec.py); whoever
reads them (training, batch, online) reads the same bytes, so the three see the same pixels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np

from pipeline.codec import encode_instance, member_count
from pipeline.contract import DETECTOR, FALLBACK_DETECTOR, BagMeta, CropConfig, Quarantined, Reason
from pipeline.faces import Cut, Track, follow_faces, iter_instances
from pipeline.given import given_meta, given_track
from pipeline.phash import bag_phash
from pipeline.pose import Pose, median_pose
from pipeline.raw import RawClip, read_clip
from pipeline.video import RGB, Decode

_FOLLOWED = 0.25
"""Share of the frames: if nobody is followed for as many, the fallback detector searches too."""


@dataclass(frozen=True, slots=True)
class Bag:
    """A bag as it is stored: the encoded frames of each instance, and what is known of it."""

    meta: BagMeta
    encoded: tuple[tuple[bytes, ...], ...]
    """The members of each instance in time order: one a frame for jpeg, one in all for h264 (pipeline/codec.py)."""

    def __post_init__(self) -> None:
        counts = [member_count(self.meta.codec, frames) for frames in self.meta.instance_frames]
        assert [len(members) for members in self.encoded] == counts, "the frame counts of a bag are its own"


def video_to_bags(
    raw: bytes | RawClip, *, name: str, video_id: str, config: CropConfig, report: Decode | None = None
) -> tuple[list[Bag], Decode]:
    """The whole preprocessing of one clip, the same for prepare, predict and serve.

    Args:
        raw: the clip; plain bytes are a whole encoded video.
        report: filled in while the clip is decoded, so that it says something of a clip that is quarantined too.

    Returns the bags, largest face first (`config.faces` says one or all), and what decoding met.
    Raises Quarantined with the Reason.
    """
    raw = RawClip(raw) if isinstance(raw, bytes) else raw
    report = report if report is not None else Decode()
    given = raw.cropped or raw.box is not None
    tracks, detector = _tracks(raw, config, report)
    if not tracks and report.frames < config.min_frames:
        raise Quarantined(Reason.TOO_SHORT, f"{report.frames} frames decode, a bag needs {config.min_frames}")
    if not tracks:
        raise Quarantined(
            Reason.NO_FACE, f"no face is followed for at least {config.min_frames} frames ({report.frames} decode)"
        )
    kept = tracks[:1] if config.faces == "largest" else tracks
    bags = [_bag(track, f"{video_id}_{n}", n, name, config, detector) for n, track in enumerate(kept)]
    if given:
        bags = [Bag(given_meta(bag.meta, raw, report), bag.encoded) for bag in bags]
    return bags, report


def _tracks(raw: RawClip, config: CropConfig, report: Decode) -> tuple[list[Track], str]:
    """The tracks, largest first, and the detector that found them."""
    frames = read_clip(raw, config, report)
    if raw.cropped or raw.box is not None:
        return given_track(frames, raw, config), config.detector
    tracks = follow_faces(frames, config)
    followed = max((track.seen for track in tracks), default=0)
    enough = followed >= _FOLLOWED * report.frames or report.frames < config.min_frames
    if enough or config.fallback == "none":
        return tracks, DETECTOR
    other = follow_faces(read_clip(raw, config, Decode()), config, FALLBACK_DETECTOR)
    better = max((track.seen for track in other), default=0) > followed
    return (other, FALLBACK_DETECTOR) if better else (tracks, DETECTOR)


def _bag(track: Track, key: str, number: int, name: str, config: CropConfig, detector: str = DETECTOR) -> Bag:
    runs = stored_runs(track, config)
    chosen = [cut for run in runs for cut in run]
    squares = [_square(run, config) for run in runs]
    searched = bool(track.searches)
    middles = [run[len(run) // 2].region_HWC for run in runs]
    pose = median_pose(middles, config, lying=detector == FALLBACK_DETECTOR) if searched else Pose()
    roll = round(pose.roll, 1) if config.align == "roll" else 0.0
    crops = [[_crop(cut, square, config.size, roll) for cut in run] for run, square in zip(runs, squares, strict=True)]
    frames = [rgb_HWC for run in crops for rgb_HWC in run]
    seconds = track.last_t_s - track.cuts[0].t_s
    meta = BagMeta(
        key=key,
        video=name,
        track=number,
        instance_frames=tuple(len(run) for run in runs),
        seconds=round(seconds, 3),
        fps=round((len(chosen) - 1) / seconds, 3) if seconds > 0 else 0.0,
        size=config.size,
        detector=detector,
        detector_score=round(track.score, 4),
        crop=config.hash,
        codec=config.codec,
        boxes=tuple((round(cx, 1), round(cy, 1), round(side, 1)) for cx, cy, side in squares),
        roll=roll,
        face_px=round(float(np.median([cut.box.side for cut in chosen])), 1),
        face_share=round(len(track.scores) / track.searches, 4) if searched else 1.0,
        blur=round(float(np.median([_sharpness(rgb_HWC) for rgb_HWC in frames])), 1),
        yaw=None if pose.yaw is None else round(pose.yaw, 3),
        phash=bag_phash(frames),
    )
    encoded = tuple(encode_instance(run, config.codec, config.jpeg_quality) for run in crops)
    return Bag(meta, encoded)


def stored_runs(track: Track, config: CropConfig) -> list[list[Cut]]:
    """The frames of a track that a bag stores, thinned evenly, by instance."""
    count = min(len(track.cuts), config.instances * config.frames_per_instance)
    chosen = [track.cuts[i * len(track.cuts) // count] for i in range(count)]
    return [[chosen[i] for i in run] for run in iter_instances(count, config.instances)]


def _square(run: Sequence[Cut], config: CropConfig) -> tuple[float, float, float]:
    """Centre and side of the crop of an instance, source pixels."""
    cx, cy, side = np.median([(c.box.cx, c.box.cy, c.box.side) for c in run], axis=0)
    return float(cx), float(cy), max(2.0, float(side) * config.margin)


def _sharpness(rgb_HWC: RGB) -> float:
    """Variance of the Laplacian of the grey picture."""
    grey = cv2.cvtColor(rgb_HWC, cv2.COLOR_RGB2GRAY)
    _, deviation = cv2.meanStdDev(cv2.Laplacian(grey, cv2.CV_16S))
    return float(deviation[0, 0]) ** 2


def _crop(cut: Cut, square: tuple[float, float, float], size: int, roll: float = 0.0) -> RGB:
    """Cut the square out of the kept region and scale it; what lies outside repeats the edge of what was kept."""
    patch = _turned(cut, square, size, roll) if roll else _straight(cut, square)
    if patch.shape[0] == size:
        return patch
    how = cv2.INTER_AREA if patch.shape[0] > size else cv2.INTER_LINEAR
    return np.asarray(cv2.resize(patch, (size, size), interpolation=how), np.uint8)


def _straight(cut: Cut, square: tuple[float, float, float]) -> RGB:
    """The square in whole source pixels."""
    cx, cy, side = square
    left, top, edge = round(cx - side / 2) - cut.left, round(cy - side / 2) - cut.top, max(1, round(side))
    height, width = cut.region_HWC.shape[:2]
    if top >= 0 and left >= 0 and top + edge <= height and left + edge <= width:
        return cut.region_HWC[top : top + edge, left : left + edge]
    rows = np.clip(np.arange(top, top + edge), 0, height - 1)
    columns = np.clip(np.arange(left, left + edge), 0, width - 1)
    return cut.region_HWC[rows[:, None], columns[None]]


def _turned(cut: Cut, square: tuple[float, float, float], size: int, roll: float) -> RGB:
    """The turned square, sampled as finely as the source, at least as finely as the crop."""
    cx, cy, side = square
    edge = max(size, round(side))
    cos, sin = (f(math.radians(roll)) * side / edge for f in (math.cos, math.sin))
    first = (1 - edge) / 2  # pixel 0 of the patch, from its centre
    x, y = cx - cut.left - 0.5, cy - cut.top - 0.5
    to_region = np.array([[cos, -sin, x + (cos - sin) * first], [sin, cos, y + (sin + cos) * first]])
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    return np.asarray(
        cv2.warpAffine(cut.region_HWC, to_region, (edge, edge), flags=flags, borderMode=cv2.BORDER_REPLICATE), np.uint8
    )
