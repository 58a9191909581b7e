"""Cost of one clip, product and others, in one process: each clip goes through every variant before the next clip.

The machine may be shared, so a variant's cost on a clip is the least of several rounds, and CPU time decides. All that
runs here is held to one thread, and has the memory settings that the sandbox gives its child: else the steps alone
would be slower than the product that does all of them.
"""

from __future__ import annotations

import ctypes
import os
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import cv2
from codec import keep_crops
from processes import below, cpu_s

from pipeline.bags import stored_runs
from pipeline.clip import Cropped, crop_clip
from pipeline.codec import encode_instance
from pipeline.contract import CropConfig, Quarantined
from pipeline.detector import detect, yunet_weights
from pipeline.faces import follow_faces
from pipeline.pose import median_pose
from pipeline.raw import RawClip
from pipeline.sandbox import ALLOCATOR, Sandbox
from pipeline.video import RGB, read_frames

CONFIG = CropConfig()
LIMIT = ("decode", "detect", "pose", "encode")
"""Their sum is the limit. `pose` is the second detector on a region of each instance."""
_MALLOPT = {"MALLOC_TRIM_THRESHOLD_": -1, "MALLOC_MMAP_THRESHOLD_": -3}
"""Numbers of glibc's mallopt(3)."""
_SHARED = {"name": "clip", "video_id": "0" * 16, "config": CONFIG}

Work = Callable[[], object]


@dataclass(slots=True)
class Cost:
    """Seconds of one variant: by clip, in each round."""

    cpu_s: dict[str, list[float]] = field(default_factory=dict)
    wall_s: dict[str, list[float]] = field(default_factory=dict)

    def add(self, clip: str, cpu_s: float, wall_s: float) -> None:
        self.cpu_s.setdefault(clip, []).append(cpu_s)
        self.wall_s.setdefault(clip, []).append(wall_s)

    def least_s(self, clock: str = "cpu_s") -> float:
        """Mean over the clips of the least of the rounds."""
        rounds = list(getattr(self, clock).values())
        return sum(map(min, rounds)) / len(rounds)

    def round_s(self, number: int) -> float:
        """Mean CPU seconds over the clips in one round."""
        return sum(of_clip[number] for of_clip in self.cpu_s.values()) / len(self.cpu_s)


@dataclass(frozen=True, slots=True)
class Clip:
    """A clip in memory, and its crops as they are before they are encoded."""

    path: Path
    data: bytes
    crops: list[list[RGB]]


def load(paths: list[Path]) -> tuple[list[Clip], list[str]]:
    """The clips that give a bag, and the names of those that do not."""
    clips, without = [], []
    for path in paths:
        try:
            clips.append(Clip(path, path.read_bytes(), keep_crops(path)[1]))
        except Quarantined:
            without.append(path.name)
    return clips, without


def measure(clips: list[Clip], rounds: int) -> dict[str, Cost]:
    """Cost of every variant, in the order of `variants`."""
    hold_to_one_thread()
    costs: dict[str, Cost] = {}
    with tempfile.TemporaryDirectory() as folder:
        sandbox, naive = Sandbox(), Naive(Path(folder))
        sandbox.start()
        sandbox.crop(RawClip(clips[0].data), **_SHARED)  # it is warm, as after the first clip of a run
        pids = [process.pid for process in below(os.getpid())]
        for _ in range(rounds):
            for clip in clips:
                for name, work in variants(clip, sandbox, naive):
                    costs.setdefault(name, Cost()).add(clip.path.name, *timed(work, pids))
        sandbox.close()
    return costs


def hold_to_one_thread() -> None:
    """And set memory as in the sandbox."""
    cv2.setNumThreads(1)
    for name, value in ALLOCATOR.items():
        assert ctypes.CDLL(None).mallopt(_MALLOPT[name], int(value)) == 1, f"{name} was not taken"


def variants(clip: Clip, sandbox: Sandbox, naive: Naive) -> Iterator[tuple[str, Work]]:
    """What is measured on a clip; what a variant needs is made before it, untimed."""
    raw, made = RawClip(clip.data), deque[Cropped](maxlen=1)
    yield "decode", lambda: sum(1 for _ in read_frames(clip.data, CONFIG))
    yield "crop_clip", lambda: made.append(crop_clip(raw, **_SHARED))
    searched = [f.rgb_HWC for f in read_frames(clip.data, CONFIG) if f.index % CONFIG.detect_every == 0]
    yield "detect", lambda: [detect(rgb_HWC, CONFIG) for rgb_HWC in searched]
    (track, *_) = follow_faces(read_frames(clip.data, CONFIG), CONFIG)
    regions = [run[len(run) // 2].region_HWC for run in stored_runs(track, CONFIG)]
    yield "pose", lambda: median_pose(regions, CONFIG)
    yield "crop_in_sandbox", lambda: sandbox.crop(raw, **_SHARED)
    yield "encode", lambda: [encode_instance(run, CONFIG.codec, CONFIG.jpeg_quality) for run in clip.crops]
    yield "write the tar", lambda: (naive.folder / "crop.tar").write_bytes(made[0].tar)
    yield "naive loop", lambda: naive.run(clip.path, naive.detect_opencv)
    yield "naive loop, our detector", lambda: naive.run(clip.path, naive.detect_ours)


def timed(work: Work, pids: list[int]) -> tuple[float, float]:
    """(CPU seconds of this process and of `pids`, wall seconds)."""
    cpu, wall = time.process_time() + sum(map(cpu_s, pids)), time.monotonic()
    work()
    return time.process_time() + sum(map(cpu_s, pids)) - cpu, time.monotonic() - wall


class Naive:
    """The loop that most people write. Of each frame: read it with cv2.VideoCapture, find faces in it at its full size,
    take the best, cut a square of `margin` times the longer side of its box, scale it to `size`, write a JPEG file.

    No track, no smoothing, no thinning, no quality columns, no check of what comes in. The detector is made once,
    outside the time; JPEGs have the product's quality.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        weights = folder / "yunet.onnx"
        weights.write_bytes(yunet_weights())
        self._net = cv2.FaceDetectorYN.create(str(weights), "", (320, 320), CONFIG.detect_score, 0.3, 5000)

    def run(self, path: Path, find: Callable[[RGB], tuple[float, float, float, float] | None]) -> int:
        """Returns how many crops were written."""
        video = cv2.VideoCapture(str(path), cv2.CAP_FFMPEG, [cv2.CAP_PROP_N_THREADS, 1])
        written = 0
        while True:
            there, bgr_HWC = video.read()
            if not there:
                break
            box = find(bgr_HWC)
            if box is not None:
                x, y, w, h = box
                half = max(w, h) * CONFIG.margin / 2
                top, left = max(0, int(y + h / 2 - half)), max(0, int(x + w / 2 - half))
                patch = bgr_HWC[top : int(y + h / 2 + half), left : int(x + w / 2 + half)]
                crop = cv2.resize(patch, (CONFIG.size, CONFIG.size), interpolation=cv2.INTER_AREA)
                name = str(self.folder / f"{path.stem}_{written:04d}.jpg")
                cv2.imwrite(name, crop, [cv2.IMWRITE_JPEG_QUALITY, CONFIG.jpeg_quality])
                written += 1
        video.release()
        return written

    def detect_opencv(self, bgr_HWC: RGB) -> tuple[float, float, float, float] | None:
        """cv2.FaceDetectorYN, the same weights, at full resolution."""
        self._net.setInputSize((bgr_HWC.shape[1], bgr_HWC.shape[0]))
        _, faces = self._net.detect(bgr_HWC)
        return None if faces is None else tuple(map(float, faces[0][:4]))

    def detect_ours(self, bgr_HWC: RGB) -> tuple[float, float, float, float] | None:
        """pipeline.detector.detect: onnxruntime, long side 640 at most."""
        faces = detect(cv2.cvtColor(bgr_HWC, cv2.COLOR_BGR2RGB), CONFIG)
        return (faces[0].x, faces[0].y, faces[0].w, faces[0].h) if faces else None
