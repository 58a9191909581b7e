"""A face track -> a bag of instance clips -> bytes, and back.

    track frames      0 1 2 3 4 5 6 7 8 9 ...              thinned evenly to instances * frames_per_instance
    instances         |--- 0 ---|--- 1 ---|--- 2 ---|      contiguous, lengths differ by at most one
    crop              one square for each instance: the median centre and side of its frames

One square for a whole instance: aligning every frame by its own detection makes the crop tremble with the
detector's noise, and a model takes that trembling for motion. Frames are stored encoded (pipeline/codec.py); whoever
reads them (training, batch, online) reads the same bytes, so the three see the same pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np

from pipeline.codec import encode_instance, member_count
from pipeline.contract import BagMeta, CropConfig, Quarantined, Reason
from pipeline.faces import Cut, Track, follow_faces, iter_instances
from pipeline.given import given_meta, given_track
from pipeline.phash import bag_phash
from pipeline.raw import RawClip, read_clip
from pipeline.video import RGB, Decode


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
    frames = read_clip(raw, config, report)
    given = raw.cropped or raw.box is not None
    tracks = given_track(frames, raw, config) if given else follow_faces(frames, config)
    if not tracks and report.frames < config.min_frames:
        raise Quarantined(Reason.TOO_SHORT, f"{report.frames} frames decode, a bag needs {config.min_frames}")
    if not tracks:
        raise Quarantined(Reason.NO_FACE, f"no face is followed for {config.min_frames} of {report.frames} frames")
    kept = tracks[:1] if config.faces == "largest" else tracks
    bags = [_bag(track, f"{video_id}_{n}", n, name, config) for n, track in enumerate(kept)]
    if given:
        bags = [Bag(given_meta(bag.meta, raw, report), bag.encoded) for bag in bags]
    return bags, report


def _bag(track: Track, key: str, number: int, name: str, config: CropConfig) -> Bag:
    count = min(len(track.cuts), config.instances * config.frames_per_instance)
    chosen = [track.cuts[i * len(track.cuts) // count] for i in range(count)]
    runs = [[chosen[i] for i in run] for run in iter_instances(count, config.instances)]
    squares = [_square(run, config) for run in runs]
    crops = [[_crop(cut, square, config.size) for cut in run] for run, square in zip(runs, squares, strict=True)]
    seconds = track.last_t_s - track.cuts[0].t_s
    meta = BagMeta(
        key=key,
        video=name,
        track=number,
        instance_frames=tuple(len(run) for run in runs),
        seconds=round(seconds, 3),
        fps=round((count - 1) / seconds, 3) if seconds > 0 else 0.0,
        size=config.size,
        detector=config.detector,
        detector_score=round(track.score, 4),
        crop=config.hash,
        codec=config.codec,
        boxes=tuple((round(cx, 1), round(cy, 1), round(side, 1)) for cx, cy, side in squares),
        phash=bag_phash([rgb_HWC for run in crops for rgb_HWC in run]),
    )
    encoded = tuple(encode_instance(run, config.codec, config.jpeg_quality) for run in crops)
    return Bag(meta, encoded)


def _square(run: Sequence[Cut], config: CropConfig) -> tuple[float, float, float]:
    """Centre and side of the crop of an instance, source pixels."""
    cx, cy, side = np.median([(c.box.cx, c.box.cy, c.box.side) for c in run], axis=0)
    return float(cx), float(cy), max(2.0, float(side) * config.margin)


def _crop(cut: Cut, square: tuple[float, float, float], size: int) -> RGB:
    """Cut the square out of the kept region and scale it; what lies outside the frame repeats its edge."""
    cx, cy, side = square
    left, top, edge = round(cx - side / 2) - cut.left, round(cy - side / 2) - cut.top, max(1, round(side))
    height, width = cut.region_HWC.shape[:2]
    rows = np.clip(np.arange(top, top + edge), 0, height - 1)
    columns = np.clip(np.arange(left, left + edge), 0, width - 1)
    inside = top >= 0 and left >= 0 and top + edge <= height and left + edge <= width
    patch = (
        cut.region_HWC[top : top + edge, left : left + edge] if inside else cut.region_HWC[rows[:, None], columns[None]]
    )
    how = cv2.INTER_AREA if edge > size else cv2.INTER_LINEAR
    return np.asarray(cv2.resize(patch, (size, size), interpolation=how), np.uint8)
