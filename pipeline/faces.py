"""Frames -> face tracks. One pass over the video, memory bounded by the frames that a bag can store.

    frames ──every n-th──> detect ──overlap──> tracks ──box per frame (interpolated)──> regions ──thin out──> Track

* Faces are searched in every n-th frame (`detect_every`); between two searches the box is interpolated.
* A face joins the track it overlaps most (IoU >= 0.3). A track that is not found twice in a row ends, and so do all
  tracks at a hard cut: a track never jumps to another person across a cut.
* Of each frame only the region around the face is kept, and of a long track only every 2nd, 4th, ... frame, so that
  at most twice the frames that a bag stores are in memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import cv2
import numpy as np

from pipeline.contract import CropConfig
from pipeline.detector import Face, detect
from pipeline.video import RGB, Frame

_JOIN_OVERLAP = 0.3
_MISSES = 2
"""A track ends when this many searches in a row do not find it."""
_SLACK = 1.5
"""Side of the kept region over the side of the crop: room for the face to move within an instance."""
_CUT_LEVEL = 20.0
"""Mean absolute difference of two neighbouring 32x18 grey thumbnails, of 255, that counts as a cut."""


@dataclass(frozen=True, slots=True)
class Box:
    """A square around a face: centre and face size in source pixels (longer side of the detected box)."""

    cx: float
    cy: float
    side: float


@dataclass(frozen=True, slots=True)
class Cut:
    """What is kept of one frame: the region around the face and where it lay."""

    t_s: float
    box: Box
    region_HWC: RGB
    left: int
    top: int


@dataclass(slots=True)
class Track:
    """One face followed through a video."""

    limit: int
    cuts: list[Cut] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    seen: int = 0
    """Frames the face was followed for, kept or thinned out."""
    stride: int = 1
    last_t_s: float = 0.0

    def add(self, cut: Cut) -> None:
        """Keep the frame if the stride says so; double the stride when the track is full."""
        if self.seen % self.stride == 0:
            self.cuts.append(cut)
            if len(self.cuts) > 2 * self.limit:
                self.cuts = self.cuts[::2]
                self.stride *= 2
        self.seen += 1
        self.last_t_s = cut.t_s

    @property
    def score(self) -> float:
        return float(np.mean(self.scores)) if self.scores else 0.0

    @property
    def area_seconds(self) -> float:
        """Rank of a track in its video: how large, for how long."""
        return float(np.median([c.box.side for c in self.cuts])) ** 2 * self.seen if self.cuts else 0.0


@dataclass(slots=True)
class _Open:
    """A track that is still being followed."""

    track: Track
    box: Box
    face: Face
    misses: int = 0


def follow_faces(frames: Iterable[Frame], config: CropConfig) -> list[Track]:
    """All face tracks of a video with at least `config.min_frames` frames, largest first.

    Args:
        frames: in time order, as pipeline.video.read_frames yields them.
    """
    finished: list[Track] = []
    alive: list[_Open] = []
    pending: list[Frame] = []
    previous: RGB | None = None
    at_once = True  # at the start and after a cut
    for frame in frames:
        thumbnail = _thumbnail(frame.rgb_HWC)
        if previous is not None and _is_cut(previous, thumbnail):
            _hold(alive, pending, config)
            finished += [o.track for o in alive]
            alive, pending, at_once = [], [], True
        previous = thumbnail
        pending.append(frame)
        if len(pending) >= config.detect_every or at_once:
            alive, ended = _search(alive, pending, config)
            finished += ended
            pending, at_once = [], False
    _hold(alive, pending, config)
    finished += [o.track for o in alive]
    kept = [t for t in finished if len(t.cuts) >= config.min_frames]
    return sorted(kept, key=lambda t: (-t.area_seconds, t.cuts[0].t_s, t.cuts[0].left, t.cuts[0].top))


def _search(alive: list[_Open], pending: list[Frame], config: CropConfig) -> tuple[list[_Open], list[Track]]:
    """Look for faces in the last pending frame, extend the tracks over all of them. Returns (alive, ended)."""
    free = detect(pending[-1].rgb_HWC, config)
    still, ended = [], []
    for one in alive:
        best = max(free, key=lambda face: _overlap(one.face, face), default=None)
        if best is not None and _overlap(one.face, best) >= _JOIN_OVERLAP:
            free.remove(best)
            _extend(one, pending, best, config)
            still.append(one)
        elif one.misses + 1 >= _MISSES:
            ended.append(one.track)
        else:
            one.misses += 1
            _cut_all(one, pending, [one.box] * len(pending), config)
            still.append(one)
    for face in free:
        track = Track(config.instances * config.frames_per_instance)
        new = _Open(track, _box(face), face)
        _extend(new, pending[-1:], face, config)
        still.append(new)
    return still, ended


def _extend(one: _Open, pending: list[Frame], face: Face, config: CropConfig) -> None:
    new = _box(face)
    steps = np.arange(1, len(pending) + 1) / len(pending)
    boxes = [Box(*(float(a + (b - a) * s) for a, b in zip(_values(one.box), _values(new), strict=True))) for s in steps]
    _cut_all(one, pending, boxes, config)
    one.box, one.face, one.misses = new, face, 0
    one.track.scores.append(face.score)


def _hold(alive: list[_Open], pending: list[Frame], config: CropConfig) -> None:
    """The last frames before an end have no search behind them: the box stays where it was."""
    for one in alive:
        _cut_all(one, pending, [one.box] * len(pending), config)


def _cut_all(one: _Open, frames: list[Frame], boxes: list[Box], config: CropConfig) -> None:
    for frame, box in zip(frames, boxes, strict=True):
        one.track.add(_cut(frame, box, config))


def _cut(frame: Frame, box: Box, config: CropConfig) -> Cut:
    height, width = frame.rgb_HWC.shape[:2]
    half = box.side * config.margin * _SLACK / 2
    left, top = max(0, int(box.cx - half)), max(0, int(box.cy - half))
    right, bottom = min(width, int(box.cx + half) + 1), min(height, int(box.cy + half) + 1)
    left, top = min(left, width - 1), min(top, height - 1)
    region = frame.rgb_HWC[top : max(bottom, top + 1), left : max(right, left + 1)].copy()
    return Cut(frame.t_s, box, region, left, top)


def _box(face: Face) -> Box:
    return Box(face.x + face.w / 2, face.y + face.h / 2, max(face.w, face.h, 1.0))


def _values(box: Box) -> tuple[float, float, float]:
    return box.cx, box.cy, box.side


def _overlap(a: Face, b: Face) -> float:
    w = min(a.x + a.w, b.x + b.w) - max(a.x, b.x)
    h = min(a.y + a.h, b.y + b.h) - max(a.y, b.y)
    both = max(w, 0.0) * max(h, 0.0)
    return both / (a.w * a.h + b.w * b.h - both + 1e-9)


def _thumbnail(rgb_HWC: RGB) -> RGB:
    small = cv2.resize(rgb_HWC, (32, 18), interpolation=cv2.INTER_NEAREST)
    return np.asarray(cv2.cvtColor(small, cv2.COLOR_RGB2GRAY), np.uint8)


def _is_cut(a: RGB, b: RGB) -> bool:
    return float(np.abs(a.astype(np.int16) - b.astype(np.int16)).mean()) > _CUT_LEVEL


def iter_instances(count: int, instances: int) -> Iterator[range]:
    """Cut `count` frames into `instances` contiguous runs whose lengths differ by at most one.

    count 10, instances 4:   0 1 | 2 3 4 | 5 6 | 7 8 9
    """
    edges = [count * i // instances for i in range(instances + 1)]
    yield from (range(a, b) for a, b in zip(edges, edges[1:], strict=False))
