"""Decode hostile bytes in a process that can die: a child that crops one clip after another.

A decoder written in C meets bytes that nobody has looked at. Where it crashes, loops or eats memory, the child pays: it
is killed, the clip is quarantined, and the next clip gets a new child. Nothing is tried twice.

    thread ── request ──> child ── "taken" ──> thread waits, at most wall_s(config) ── answer ──> Cropped

Children are started by `subprocess` with an environment of their own: no credentials of the parent are in it. The first
clip of a thread pays the start (about half a second), the others a few milliseconds.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence

from pipeline import wire
from pipeline.clip import Cropped, quarantined
from pipeline.contract import CropConfig, MicaclError, Quarantined, Reason
from pipeline.raw import RawClip

_CHILD = (sys.executable, "-m", "pipeline.sandbox_child")
_START_S = 120.0
"""Until a child has taken a clip; covers its start on a slow disk."""
_STARTS = 2
_TAIL = 2000
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": str(32 * 2**20), "MALLOC_TRIM_THRESHOLD_": str(64 * 2**20)}
"""glibc keeps up to 64 MiB of freed memory for the next frames. Left alone it gives it back and fetches it again, with
39,000 page faults in a clip of 66 frames of 640x480: nearly a quarter of its CPU time."""


def wall_s(config: CropConfig) -> float:
    """Wall seconds after which a child is killed. The child itself counts CPU seconds and is right on a busy machine;
    this is for one that waits for something, or computes on several times its share of time.
    """
    return 30.0 + 4.0 * config.max_decode_s


class Sandbox:
    """One child at a time. Not for two threads at once.

    Args:
        command: what to start; the parent's process id is added. Tests give other programs.
        limit_s: wall seconds that a clip may take.
    """

    def __init__(self, command: Sequence[str] = _CHILD, limit_s: Callable[[CropConfig], float] = wall_s) -> None:
        self._command, self._limit_s = tuple(command), limit_s
        self._child: subprocess.Popen[bytes] | None = None
        self._end: Callable[[], object] = lambda: None

    def crop(self, raw: RawClip, *, name: str, video_id: str, config: CropConfig) -> Cropped:
        """What `pipeline.clip.crop_clip` makes of the clip, or why the child died of it: TOO_SLOW or CRASHED.

        Raises MicaclError as itself, also if no child starts in time, and SandboxFailure for a fault of code in it.
        """
        header = wire.request_header(raw, name, video_id, config)
        try:
            child = self._give(header, wire.clip_blobs(raw))
            seconds = self._limit_s(config)
            with _killed_after(child, seconds) as expired:
                try:
                    return wire.read_answer(_fd(child.stdout))
                except wire.WireError:
                    code = _wait(child)
        except BaseException:
            self.close()
            raise
        self.close()
        return quarantined(_died(code, seconds if expired.is_set() else None, config))

    def start(self) -> None:
        """Start the child now instead of with the first clip."""
        self._running()

    def close(self) -> None:
        """End the child; the next clip starts another."""
        self._end()
        self._child = None

    def _give(self, header: wire.Header, blobs: Sequence[bytes]) -> subprocess.Popen[bytes]:
        """Hand the clip to a child. One that dies before it has taken it is not the clip's fault: start another."""
        said, code = "", 0
        for _ in range(_STARTS):
            child = self._running()
            with _killed_after(child, _START_S):
                try:
                    wire.send(_fd(child.stdin), header, blobs)
                    if wire.receive_header(_fd(child.stdout)):
                        return child
                except (BrokenPipeError, wire.WireError):
                    pass
            code = _wait(child)
            said = f"{_ending(code)}. {_last_words(child)}"
            self.close()
        if code != -signal.SIGKILL:
            raise wire.SandboxFailure(f"The process for decoding does not start: {said}")
        raise MicaclError(
            f"The process for decoding does not start: {said}",
            "The command stopped; what was finished is kept.",
            "The machine may be short of memory or of time: give it fewer --workers, and run the same command again.",
        )

    def _running(self) -> subprocess.Popen[bytes]:
        if self._child is None or self._child.poll() is not None:
            self.close()
            self._child = _start(self._command)
            self._end = weakref.finalize(self, _stop, self._child)
        return self._child


_OF_THREAD = threading.local()


def crop_in_sandbox(raw: RawClip, *, name: str, video_id: str, config: CropConfig) -> Cropped:
    """`pipeline.clip.crop_clip` in a child of this thread that lives on for its next clip. Raises as Sandbox.crop."""
    return thread_sandbox().crop(raw, name=name, video_id=video_id, config=config)


def thread_sandbox() -> Sandbox:
    """This thread's own; a process that was forked gets a new one."""
    if getattr(_OF_THREAD, "pid", None) != os.getpid():
        _OF_THREAD.pid, _OF_THREAD.sandbox = os.getpid(), Sandbox()
    sandbox: Sandbox = _OF_THREAD.sandbox
    return sandbox


def _start(command: Sequence[str]) -> subprocess.Popen[bytes]:
    environment = {
        "PYTHONPATH": os.pathsep.join(os.path.abspath(place) for place in sys.path),
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
        **ALLOCATOR,
    }
    pipe = subprocess.PIPE
    return subprocess.Popen(
        [*command, str(os.getpid())], stdin=pipe, stdout=pipe, stderr=pipe, bufsize=0, env=environment
    )


def _stop(child: subprocess.Popen[bytes]) -> None:
    child.kill()
    child.wait()
    for pipe in (child.stdin, child.stdout, child.stderr):
        if pipe is not None:
            pipe.close()


@contextlib.contextmanager
def _killed_after(child: subprocess.Popen[bytes], seconds: float) -> Iterator[threading.Event]:
    """Kill the child unless the block ends in time; the event says that it happened."""
    expired = threading.Event()

    def kill() -> None:
        expired.set()
        child.kill()

    timer = threading.Timer(seconds, kill)
    timer.daemon = True
    timer.start()
    try:
        yield expired
    finally:
        timer.cancel()


def _fd(pipe: object) -> int:
    assert pipe is not None, "the three pipes were asked for"
    return int(pipe.fileno())  # type: ignore[attr-defined]


def _wait(child: subprocess.Popen[bytes]) -> int:
    """The exit code of a child whose pipe has ended."""
    try:
        return child.wait(10)
    except subprocess.TimeoutExpired:
        child.kill()
        return child.wait()


def _died(code: int, killed_after_s: float | None, config: CropConfig) -> Quarantined:
    if killed_after_s is not None:
        return Quarantined(Reason.TOO_SLOW, f"the process that decoded it was ended after {killed_after_s:g} s")
    if code == -signal.SIGXCPU:
        return Quarantined(Reason.TOO_SLOW, f"more than {config.max_decode_s:g} CPU seconds inside one step")
    return Quarantined(Reason.CRASHED, f"the process that decoded it {_ending(code)}")


def _ending(code: int) -> str:
    if code >= 0:
        return f"ended with exit code {code}"
    with contextlib.suppress(ValueError):
        return f"was killed by {signal.Signals(-code).name}"
    return f"was killed by signal {-code}"


def _last_words(child: subprocess.Popen[bytes]) -> str:
    """What a child that did not start printed."""
    if child.stderr is None:
        return ""
    return (child.stderr.read() or b"").decode(errors="replace")[-_TAIL:].strip()
