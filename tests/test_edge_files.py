"""Every odd or broken real file through the sandbox, with what must come of it."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.contract import CropConfig, Reason
from pipeline.raw import RawClip
from pipeline.sandbox import crop_in_sandbox
from pipeline.shards import read_bags

CONFIG = CropConfig(faces="all")


@dataclass(frozen=True, kw_only=True)
class Usable:
    """A file that gives bags."""

    bags: tuple[int, ...]
    """Stored frames of each, largest face first."""
    frames: int
    """That decode."""
    bad: int = 0
    corrupt: int = 0
    expected: int | None = None
    """If the container says another number than `frames`, or 0 for none at all."""


@dataclass(frozen=True, kw_only=True)
class Unusable:
    """A file that is quarantined."""

    reason: Reason
    frames: int = 0


EDGE: dict[str, Usable | Unusable] = {
    "audio_only.mp4": Unusable(reason=Reason.NO_VIDEO_STREAM),
    "av1.mp4": Usable(bags=(48,), frames=109),
    "corrupt_middle.mp4": Usable(bags=(48,), frames=108, bad=1, corrupt=13, expected=109),
    "face_noface.mov": Usable(bags=(48,), frames=169),
    "faststart.mp4": Usable(bags=(48,), frames=109),
    "h264_audio.mp4": Usable(bags=(48,), frames=109),
    "hard_cut_two_people.mp4": Usable(bags=(48, 48), frames=174),
    "hevc_10bit.mp4": Usable(bags=(48,), frames=109),
    "mpeg4.avi": Usable(bags=(48,), frames=60),
    "no_face_gray.mp4": Unusable(reason=Reason.NO_FACE, frames=25),
    "odd_223x167_444.mp4": Usable(bags=(48,), frames=109),
    "rotation_flag_90.mp4": Usable(bags=(22, 13), frames=109),  # upright once turned as told: the people then lie down
    "sar_4_3.mp4": Usable(bags=(30,), frames=30),
    "text.mp4": Unusable(reason=Reason.UNREADABLE),
    "truncated_faststart.mp4": Usable(bags=(47,), frames=47, bad=1, expected=109),
    "truncated_moov_at_end.mp4": Unusable(reason=Reason.UNREADABLE),
    "two_people_hstack.mp4": Usable(bags=(48, 48), frames=67),
    "vfr.mp4": Usable(bags=(48,), frames=57),
    "vp9.webm": Usable(bags=(48,), frames=109, expected=0),
    "zero_byte.mp4": Unusable(reason=Reason.EMPTY),
}


def test_every_file_has_its_line(media: Path) -> None:
    assert {path.name for path in (media / "edge").iterdir()} == set(EDGE)


@pytest.mark.parametrize("name", EDGE)
def test_a_file_ends_as_written_here(media: Path, name: str) -> None:
    expected, data = EDGE[name], (media / "edge" / name).read_bytes()
    made = crop_in_sandbox(RawClip(data), name=name, video_id="v", config=CONFIG)
    assert made.frames == expected.frames
    if isinstance(expected, Unusable):
        assert made.reason == expected.reason.value
        assert made.detail
        assert made.tar == b""
        assert bool(made.thumb) == bool(expected.frames)
        return
    assert (made.reason, made.thumb) == (None, b"")
    assert tuple(bag.meta.frames for bag in read_bags(made.tar, name)) == expected.bags
    assert (made.bad_packets, made.corrupt_frames) == (expected.bad, expected.corrupt)
    said = made.frames if expected.expected is None else expected.expected
    assert made.expected_frames == (said or None)
    assert bool(made.detail) == bool(expected.bad)
    if expected.bad:
        assert f"{expected.frames} of {expected.expected} frames decode" in made.detail


def test_the_picture_of_a_quarantined_file(media: Path) -> None:
    data = (media / "edge" / "no_face_gray.mp4").read_bytes()
    made = crop_in_sandbox(RawClip(data), name="x", video_id="v", config=CONFIG)
    with Image.open(io.BytesIO(made.thumb)) as thumb:
        assert (thumb.format, thumb.size) == ("JPEG", (160, 120))
        assert np.asarray(thumb).std() < 10  # the file shows one grey
