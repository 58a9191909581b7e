"""The other side of pipeline.sandbox: a process that crops one clip after another until its stdin ends.

    request on stdin ──> "taken" ──> crop_clip ──> answer on stdout

It gives up what it does not need before it touches a clip: no core dump, no writing of files, a cap on memory and on
CPU time; and it ends when its parent does.
"""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence

import cv2

from pipeline import wire
from pipeline.clip import Cropped, crop_clip
from pipeline.contract import CropConfig, MicaclError, Reason

MEMORY_BYTES = 4 * 2**30
"""Beside twice the bytes of the clip. The libraries and a 540p video take 0.35 GiB; the 96 regions that are kept for
the largest bag of the default settings take 2.7 GB if every one is a whole frame of the default `max_pixels`."""
_CPU_SLACK_S = 2
_WATCH_S = 0.5


def main(argv: Sequence[str] | None = None) -> None:
    """Serve the parent whose process id is the one argument."""
    (parent,) = map(int, argv if argv is not None else sys.argv[1:])
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which then closes the pipe
    requests, answers = _take_pipes()
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    cv2.setNumThreads(1)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    with contextlib.suppress(OSError, wire.WireError):  # the parent is gone
        serve(requests, answers, crop_clip)
    os._exit(0)


def serve(requests: int, answers: int, crop: Callable[..., Cropped]) -> None:
    """Answer requests until the pipe ends. Raises OSError and WireError if the parent is gone."""
    while (header := wire.receive_header(requests)) is not None:
        _limit_memory(sum(header["sizes"]))
        blobs = wire.receive_blobs(requests, header["sizes"])
        wire.send(answers, {"taken": True})
        message: tuple[wire.Header, Sequence[bytes]]
        try:
            raw, name, video_id, config = wire.read_request(header, blobs)
            _limit_cpu(config)
            message = wire.answer_message(crop(raw, name=name, video_id=video_id, config=config))
        except MicaclError as error:
            message = {"micacl": list(error.args)}, ()
        except Exception as error:  # noqa: BLE001  (told to the parent, which raises it)
            if not _out_of_memory(error):
                message = {"failure": traceback.format_exc()}, ()
            else:
                message = wire.answer_message(_too_much_memory())
        wire.send(answers, *message)


def _take_pipes() -> tuple[int, int]:
    """(requests, answers): stdin and stdout are moved away, so that no library reads the one or prints into the other.

    What libraries print from here on is dropped: libjpeg and FFmpeg write about every damaged frame.
    """
    requests, answers = os.dup(0), os.dup(1)
    nothing = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(nothing, fd)
    return requests, answers


def _end_with(parent: int) -> None:
    """PR_SET_PDEATHSIG would also fire when only the thread ends that started this process."""
    while os.getppid() == parent:
        time.sleep(_WATCH_S)
    os._exit(1)


def _limit_memory(clip_bytes: int) -> None:
    """RLIMIT_DATA and not RLIMIT_AS: address space that is only reserved costs nothing, and libraries reserve a lot."""
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY_BYTES + 2 * clip_bytes, resource.RLIM_INFINITY))


def _limit_cpu(config: CropConfig) -> None:
    """SIGXCPU ends a decoder that loops inside one frame, where `max_decode_s` is not looked at."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    seconds = used.ru_utime + used.ru_stime + 1.25 * config.max_decode_s + _CPU_SLACK_S
    resource.setrlimit(resource.RLIMIT_CPU, (int(seconds) + 1, resource.RLIM_INFINITY))


def _out_of_memory(error: BaseException) -> bool:
    """numpy and Python raise MemoryError, OpenCV an error of its own, onnxruntime passes on C++'s bad_alloc."""
    return (
        isinstance(error, MemoryError)
        or (isinstance(error, cv2.error) and error.code == cv2.Error.STS_NO_MEM)
        or "bad_alloc" in str(error)
        or "bad allocation" in str(error)
    )


def _too_much_memory() -> Cropped:
    why = f"the work on it needs more than the cap of {MEMORY_BYTES >> 30} GiB of memory"
    return Cropped(reason=Reason.CRASHED.value, detail=why)


if __name__ == "__main__":
    main()
