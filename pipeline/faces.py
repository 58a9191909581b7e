"""Frames -> face tracks. One pass over the video, memory bounded by the frames that a bag can store.

    frames ──every n-th──> detect ──overlap, looks──> tracks ──box per frame (interpolated)──> regions ──thin──> Track

* Faces are searched in every n-th frame (`detect_every`), and at once at the start and after a hard cut; between two
  searches the box is interpolated.
* A face joins the track that it overlaps most (IoU >= 0.3) and looks like (pipeline/looks.py), the best pair first. A
  track ends rather than jump to another person: at a hard cut, and where it is not found twice in a row; the frames
  since it was last seen are then not part of it.
* Of each frame only the region around the face is kept, and of a long track only every 2nd, 4th, ... frame, so that
  at most twice the frames that a bag stores are in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np

from pipeline import retinaface
from pipeline.contract import DETECTOR, FALLBACK_DETECTOR, CropConfig
from pipeline.detector import Face, detect
from pipeline.looks import Patch, alike, face_patch, is_cut, thumbnail
from pipeline.video import RGB, Frame

_JOIN_OVERLAP = 0.3
_MISSES = 2
"""A track ends when this many searches in a row do not find it."""
_SLACK = 1.5
"""Side of the kept region over the side of the crop: room for the face to move and the crop to turn."""


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
    """Of the searches that found it."""
    searches: int = 0
    """While it was followed, up to the last that found it."""
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
    patch: Patch
    misses: int = 0
    held: list[Cut] = field(default_factory=list)
    """Frames since the face was last found: part of the track only if it is found again."""


def follow_faces(frames: Iterable[Frame], config: CropConfig, detector: str = DETECTOR) -> list[Track]:
    """All face tracks of a video with at least `config.min_frames` frames, largest first.

    Args:
        frames: in time order, as pipeline.raw.read_clip yields them.
        detector: DETECTOR or FALLBACK_DETECTOR.
    """
    search = {DETECTOR: detect, FALLBACK_DETECTOR: retinaface.detect}[detector]
    finished: list[Track] = []
    alive: list[_Open] = []
    pending: list[Frame] = []
    previous: RGB | None = None
    at_once = True  # at the start and after a cut
    for frame in frames:
        now = thumbnail(frame.rgb_HWC)
        if previous is not None and is_cut(previous, now):
            _hold(alive, pending, config)
            finished += [o.track for o in alive]
            alive, pending, at_once = [], [], True
        previous = now
        pending.append(frame)
        if len(pending) >= config.detect_every or at_once:
            alive, ended = _search(alive, pending, config, search)
            finished += ended
            pending, at_once = [], False
    _hold(alive, pending, config)
    finished += [o.track for o in alive]
    kept = [t for t in finished if len(t.cuts) >= config.min_frames]
    return sorted(kept, key=lambda t: (-t.area_seconds, t.cuts[0].t_s, t.cuts[0].left, t.cuts[0].top))


def _search(
    alive: list[_Open], pending: list[Frame], config: CropConfig, search: Callable[..., list[Face]]
) -> tuple[list[_Open], list[Track]]:
    """Look for faces in the last pending frame, extend the tracks over all of them. Returns (alive, ended)."""
    rgb_HWC = pending[-1].rgb_HWC
    found = search(rgb_HWC, config)
    patches = [face_patch(rgb_HWC, face) for face in found]
    joined = _pairs(alive, found, patches)
    still, ended = [], []
    for number, one in enumerate(alive):
        if number in joined:
            at = joined[number]
            _extend(one, pending, found[at], patches[at], config)
            still.append(one)
        elif one.misses + 1 >= _MISSES:
            ended.append(one.track)
        else:
            one.misses += 1
            one.held += [cut_region(frame, one.box, config) for frame in pending]
            still.append(one)
    taken = set(joined.values())
    for at, (face, patch) in enumerate(zip(found, patches, strict=True)):
        if at not in taken:
            new = _Open(Track(config.instances * config.frames_per_instance), _box(face), face, patch)
            _extend(new, pending[-1:], face, patch, config)
            still.append(new)
    return still, ended


def _pairs(alive: list[_Open], found: list[Face], patches: list[Patch]) -> dict[int, int]:
    """Which track is which face, by number: the pair that overlaps most first, each once."""
    pairs = [
        (overlap, n, at)
        for n, one in enumerate(alive)
        for at, face in enumerate(found)
        if (overlap := _overlap(one.face, face)) >= _JOIN_OVERLAP and alike(one.patch, patches[at])
    ]
    joined: dict[int, int] = {}
    for _, n, at in sorted(pairs, key=lambda pair: (-pair[0], pair[1], pair[2])):
        if n not in joined and at not in joined.values():
            joined[n] = at
    return joined


def _extend(one: _Open, pending: list[Frame], face: Face, patch: Patch, config: CropConfig) -> None:
    """The face was found in the last pending frame: it was there in those before it too."""
    for cut in one.held:
        one.track.add(cut)
    new = _box(face)
    for step, frame in enumerate(pending, 1):
        one.track.add(cut_region(frame, _between(one.box, new, step / len(pending)), config))
    one.track.searches += one.misses + 1
    one.track.scores.append(face.score)
    one.box, one.face, one.patch, one.misses, one.held = new, face, patch, 0, []


def _hold(alive: list[_Open], pending: list[Frame], config: CropConfig) -> None:
    """The last frames before an end have no search behind them: the box stays where it was, if it was there."""
    for one in alive:
        if not one.misses:
            for frame in pending:
                one.track.add(cut_region(frame, one.box, config))


def cut_region(frame: Frame, box: Box, config: CropConfig) -> Cut:
    """What is kept of a frame: the face, with room for it to move and for the crop to turn."""
    height, width = frame.rgb_HWC.shape[:2]
    half = box.side * config.margin * _SLACK / 2
    left, top = max(0, int(box.cx - half)), max(0, int(box.cy - half))
    right, bottom = min(width, int(box.cx + half) + 1), min(height, int(box.cy + half) + 1)
    left, top = min(left, width - 1), min(top, height - 1)
    region = frame.rgb_HWC[top : max(bottom, top + 1), left : max(right, left + 1)].copy()
    return Cut(frame.t_s, box, region, left, top)


def _box(face: Face) -> Box:
    return Box(face.x + face.w / 2, face.y + face.h / 2, max(face.w, face.h, 1.0))


def _between(a: Box, b: Box, share: float) -> Box:
    return Box(a.cx + (b.cx - a.cx) * share, a.cy + (b.cy - a.cy) * share, a.side + (b.side - a.side) * share)


def _overlap(a: Face, b: Face) -> float:
    w = min(a.x + a.w, b.x + b.w) - max(a.x, b.x)
    h = min(a.y + a.h, b.y + b.h) - max(a.y, b.y)
    both = max(w, 0.0) * max(h, 0.0)
    return both / (a.w * a.h + b.w * b.h - both + 1e-9)


def iter_instances(count: int, instances: int) -> Iterator[range]:
    """Cut `count` frames into `instances` contiguous runs whose lengths differ by at most one.

    count 10, instances 4:   0 1 | 2 3 4 | 5 6 | 7 8 9
    """
    edges = [count * i // instances for i in range(instances + 1)]
    yield from (range(a, b) for a, b in zip(edges, edges[1:], strict=False))
