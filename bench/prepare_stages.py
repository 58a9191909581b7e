"""Where the time of `crop_clip` goes: CPU seconds of each stage, without what it calls of other stages.

The functions of the table are replaced where they are looked up by ones that keep time; a name that is not there any
more is told, and its time then counts for the stage that calls it.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
import time
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

from prepare_clip import CONFIG, Clip, hold_to_one_thread

from pipeline.clip import crop_clip
from pipeline.raw import RawClip

REST = "the rest"
LIMIT = ("decode", "colour conversion", "detect: net input", "detect: net", "detect: boxes", "pose", "encode")
"""Stages that the limit of bench/prepare_clip.py has too."""
STAGES = (
    ("decode", "pipeline.raw", "read_frames"),
    ("colour conversion", "pipeline.video", "_upright"),
    ("detect: net input", "pipeline.detector", "net_input"),
    ("detect: net", "pipeline.detector", "_session"),
    ("detect: boxes", "pipeline.faces", "detect"),
    ("look for cuts", "pipeline.faces", "thumbnail"),
    ("look for cuts", "pipeline.faces", "is_cut"),
    ("tell faces apart", "pipeline.faces", "face_patch"),
    ("tell faces apart", "pipeline.faces", "alike"),
    ("tracks", "pipeline.bags", "follow_faces"),
    ("copies of regions", "pipeline.faces", "cut_region"),
    ("pose", "pipeline.bags", "median_pose"),
    ("crop, turn, resize", "pipeline.bags", "_crop"),
    ("crop, turn, resize", "pipeline.bags", "_square"),
    ("sharpness", "pipeline.bags", "_sharpness"),
    ("perceptual hash", "pipeline.bags", "bag_phash"),
    ("encode", "pipeline.bags", "encode_instance"),
    ("JSON and tar", "pipeline.clip", "bag_members"),
    ("JSON and tar", "pipeline.clip", "write_members"),
)


class Clock:
    """Which stage is running, and what each took."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys([*(stage for stage, *_ in STAGES), REST], 0.0)
        self._stack = [REST]
        self._since = time.thread_time()

    def start(self) -> None:
        """The time until here is nobody's."""
        self._since = time.thread_time()

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        self._book()
        self._stack.append(name)
        try:
            yield
        finally:
            self._book()
            self._stack.pop()

    def stop(self) -> None:
        """Book what has passed."""
        self._book()

    def _book(self) -> None:
        now = time.thread_time()
        self.seconds[self._stack[-1]] += now - self._since
        self._since = now


def profile(clips: list[Clip], rounds: int) -> tuple[dict[str, float], list[str]]:
    """CPU seconds a clip by stage, the least of the rounds each; and the names that were not found."""
    hold_to_one_thread()
    least: dict[str, float] = {}
    for _ in range(rounds):
        seconds, missing = _once(clips)
        least = {stage: min(s, least.get(stage, s)) for stage, s in seconds.items()}
    return {stage: s / len(clips) for stage, s in least.items()}, missing


def _once(clips: list[Clip]) -> tuple[dict[str, float], list[str]]:
    missing = []
    with contextlib.ExitStack() as stack:
        clock = Clock()
        for stage, module, name in STAGES:
            room = importlib.import_module(module)
            if hasattr(room, name):
                stack.enter_context(mock.patch.object(room, name, _kept(clock, stage, name, getattr(room, name))))
            else:
                missing.append(f"{module}.{name}")
        clock.start()
        for clip in clips:
            crop_clip(RawClip(clip.data), name="clip", video_id="0" * 16, config=CONFIG)
        clock.stop()
    return clock.seconds, missing


def _kept(clock: Clock, stage: str, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, with its time kept."""
    if name == "_session":
        return functools.cache(lambda: _Session(clock, stage, function()))

    @functools.wraps(function)
    def kept(*args: Any, **more: Any) -> Any:
        with clock.stage(stage):
            made = function(*args, **more)
        return _steps(clock, stage, made) if inspect.isgenerator(made) else made

    return kept


def _steps(clock: Clock, stage: str, items: Iterator[Any]) -> Iterator[Any]:
    """A generator works while it is asked."""
    while True:
        with clock.stage(stage):
            item = next(items, None)
        if item is None:
            return
        yield item


class _Session:
    """An onnxruntime session whose `run` is timed."""

    def __init__(self, clock: Clock, stage: str, session: Any) -> None:
        self._clock, self._stage, self._session = clock, stage, session

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)

    def run(self, *args: Any) -> Any:
        with self._clock.stage(self._stage):
            return self._session.run(*args)
