"""How large the crop must be: a table of margins, judged by another detector than the one that made the crops.

    python bench/crop_margin.py FOLDER

For every clip the product follows the faces with its defaults. RetinaFace then looks at every third frame of each
track's clip; where it sees the same face, its box is asked for: does the square of the instance hold all of it? A
larger margin holds more and shows the face smaller. The same looks say how far faces lean in the crops, turned or not;
and the first second of each clip is turned by known angles, to see which of them the track's roll finds.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime as dt
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from demo_steps import commit, machine

from pipeline import retinaface
from pipeline.bags import _square, stored_runs, video_to_bags
from pipeline.contract import CropConfig, Quarantined
from pipeline.detector import Face
from pipeline.faces import Cut, Track, follow_faces
from pipeline.pose import face_pose, median_pose
from pipeline.video import Frame, read_frames

MARGINS = (1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.7)
SIZES = (112, 128, 160)
TURNS = (-60, -40, -20, -10, 10, 20, 40, 60)
_EVERY = 3


@dataclass(frozen=True, kw_only=True)
class Look:
    """One face in one frame: the judge's box and what the product made of the instance around it."""

    face: Face
    cx: float
    cy: float
    side: float
    """Of the square at margin 1."""
    roll: float
    """Of the track."""

    @property
    def needed(self) -> float:
        """The least margin at which the turned square holds the judge's box whole."""
        x, y = self.face.x + self.face.w / 2 - self.cx, self.face.y + self.face.h / 2 - self.cy
        turned = complex(x, y) * np.exp(-1j * np.radians(self.roll))
        return 2 * max(abs(turned.real) + self.face.w / 2, abs(turned.imag) + self.face.h / 2) / self.side

    @property
    def lean(self) -> float:
        """Degrees, of the face in the picture."""
        return face_pose(self.face).roll


def looks(path: Path, config: CropConfig) -> Iterator[Look]:
    frames = list(read_frames(path.read_bytes(), config))
    for track in follow_faces(frames, config):
        yield from _looks_at(track, {frame.t_s: frame for frame in frames}, config)


def _looks_at(track: Track, frames: dict[float, Frame], config: CropConfig) -> Iterator[Look]:
    bare = dataclasses.replace(config, margin=1.0)
    runs = stored_runs(track, config)
    roll = _roll(runs, config)
    for cuts in runs:
        cx, cy, side = _square(cuts, bare)
        for cut in cuts[::_EVERY]:
            near = [
                face
                for face in retinaface.detect(frames[cut.t_s].rgb_HWC, config)
                if abs(face.x + face.w / 2 - cut.box.cx) < cut.box.side / 2
                and abs(face.y + face.h / 2 - cut.box.cy) < cut.box.side / 2
            ]
            if near:
                yield Look(face=near[0], cx=cx, cy=cy, side=side, roll=roll)


def _roll(runs: list[list[Cut]], config: CropConfig) -> float:
    return median_pose([run[len(run) // 2].region_HWC for run in runs], config).roll


def found_turns(path: Path, config: CropConfig) -> Iterator[tuple[int, float | None]]:
    """(turn of the picture, the roll that is found beyond that of the picture as it is, or None: no track), degrees."""
    frames = list(itertools.islice(read_frames(path.read_bytes(), config), 25))
    straight = follow_faces(frames, config)
    for turn in TURNS if straight else ():
        tracks = follow_faces([_turn(frame, turn) for frame in frames], config)
        yield turn, (_roll([tracks[0].cuts], config) - _roll([straight[0].cuts], config) if tracks else None)


def _turn(frame: Frame, degrees: float) -> Frame:
    """The picture turned clockwise about its middle, nothing cut off."""
    height, width = frame.rgb_HWC.shape[:2]
    side = int(np.hypot(height, width)) + 1
    matrix = cv2.getRotationMatrix2D((width / 2, height / 2), -degrees, 1.0)
    matrix[:, 2] += (side - width) / 2, (side - height) / 2
    return dataclasses.replace(frame, rgb_HWC=np.asarray(cv2.warpAffine(frame.rgb_HWC, matrix, (side, side)), np.uint8))


def _sharpness(paths: list[Path], config: CropConfig) -> float:
    bags = [b for p in paths for b in video_to_bags(p.read_bytes(), name=p.name, video_id="v", config=config)[0]]
    return float(np.median([bag.meta.blur for bag in bags]))


def _kilobytes(paths: list[Path], config: CropConfig) -> float:
    made = []
    for path in paths:
        bags, _ = video_to_bags(path.read_bytes(), name=path.name, video_id="v", config=config)
        made += [sum(len(jpeg) for members in bag.encoded for jpeg in members) for bag in bags]
    return float(np.mean(made)) / 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, nargs="+")
    paths = sorted(p for folder in parser.parse_args().folder for p in folder.iterdir() if p.suffix in {".mkv", ".mp4"})
    config, found, usable = CropConfig(faces="all"), [], []
    for path in paths:
        try:
            found += list(looks(path, config))
            usable.append(path)
        except Quarantined:
            continue
    print(f"{len(usable)} clips, {len(found)} looks; commit {commit()}, {machine()}, {dt.date.today()}\n")  # noqa: DTZ011
    _print_margins(found)
    _print_sizes(found, usable, config)
    _print_lean(found, usable, config)
    _print_turns(usable, config)


def _print_margins(found: list[Look]) -> None:
    needed = np.array([look.needed for look in found])
    share = np.array([max(look.face.w, look.face.h) / look.side for look in found])
    print("| margin | whole, % of looks | face in a crop of 128, px |\n| --- | ---: | ---: |")
    for margin in MARGINS:
        print(f"| {margin} | {100 * np.mean(needed <= margin):.1f} | {np.median(share / margin) * 128:.0f} |")


def _print_sizes(found: list[Look], usable: list[Path], config: CropConfig) -> None:
    sides = np.array([look.side for look in found]) * config.margin
    print("\n| size | magnified, % of looks | kB a bag |\n| --- | ---: | ---: |")
    for size in SIZES:
        kilobytes = _kilobytes(usable, dataclasses.replace(config, size=size))
        print(f"| {size} | {100 * np.mean(sides < size):.0f} | {kilobytes:.0f} |")


def _print_lean(found: list[Look], usable: list[Path], config: CropConfig) -> None:
    print("\n| align | lean in the crop, median degrees | 95 % | sharpness |\n| --- | ---: | ---: | ---: |")
    for align, share in (("box", 0), ("roll", 1)):
        lean = np.abs([look.lean - share * look.roll for look in found])
        sharp = _sharpness(usable, dataclasses.replace(config, align=align))
        print(f"| {align} | {np.median(lean):.1f} | {np.quantile(lean, 0.95):.1f} | {sharp:.1f} |")


def _print_turns(usable: list[Path], config: CropConfig) -> None:
    turns = [pair for path in usable for pair in found_turns(path, config)]
    print("\n| picture turned by | followed, % | error of the roll, median degrees | 95 % |")
    print("| --- | ---: | ---: | ---: |")
    for turn in TURNS:
        rolls = [roll for asked, roll in turns if asked == turn]
        errors = [abs(roll - turn) for roll in rolls if roll is not None]
        middle, most = np.quantile(errors, (0.5, 0.95))
        print(f"| {turn} | {100 * len(errors) / len(rolls):.0f} | {middle:.1f} | {most:.1f} |")


if __name__ == "__main__":
    main()
