"""Bytes of a video -> frames with timestamps (PyAV), one at a time.

Decoded packet by packet: a corrupted middle costs the frames that do not decode, and `Decode` says how many packets
were bad and how many frames the decoder had to patch up. Display rotation and non-square pixels are honoured; variable
frame rate is kept as timestamps; 10-bit video is scaled to 8. Memory holds one frame, the few that are decoded ahead,
and one for the picture of a clip that cannot be used. Caps are checked before the bytes they bound. The number of
frames has no cap of its own: seconds and CPU seconds bound it.
"""

from __future__ import annotations

import io
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

import av
import cv2
import numpy as np
from av.error import FFmpegError
from av.video.reformatter import VideoReformatter
from numpy.typing import NDArray

from pipeline.contract import CropConfig, Quarantined, Reason

RGB = NDArray[np.uint8]

THUMB_SIDE = 160
"""Long side of the picture that is kept of a video, pixels."""
_FORMATS = "mov,matroska,avi,mpegts,mpeg,mpegvideo,flv,asf,ogg,mxf,h264,hevc"
"""Containers of videos and nothing else: FFmpeg's playlists and SDP would open other files and network ports."""
_INDEXED = ("mov", "matroska")
"""Containers whose index marks the frames at which decoding can start."""
_RUN_UP_S = 10.0
"""A part is decoded from the last such frame that lies this long before it: by then every picture is whole."""
_AHEAD_PIXELS = 6 * 2**20
"""Decoded before the first of them is handed on: the decoder and the detector push each other out of the processor's
cache, so they take turns less often. Some 21 frames of 640x480; of more than 6 megapixels one."""
_HALF_MS = 0.0005
_MAX_NOTES = 5


@dataclass(frozen=True, slots=True)
class Frame:
    """One decoded frame, upright and with square pixels."""

    index: int
    """Position among the frames that were handed on."""
    t_s: float
    """Presentation time, seconds from the first frame of the file."""
    rgb_HWC: RGB


@dataclass(slots=True)
class Decode:
    """What happened while a clip was decoded; complete once its frames are exhausted."""

    frames: int = 0
    """Handed on: they decode, and lie in the part that is asked for."""
    bad_packets: int = 0
    """Packets (of a folder: images) that do not decode."""
    corrupt_frames: int = 0
    """Of `frames`, those that the decoder marks as damaged."""
    expected_frames: int | None = None
    """As the container says; None if it does not say, or a part is asked for."""
    notes: list[str] = field(default_factory=list)
    picture_HWC: RGB | None = None
    """Frame 0, 1, 2, 4, 8, ..., the last that came: never before the middle of what was seen."""
    shape_HW: tuple[int, int] = (0, 0)
    """Of the first frame."""

    def take(self, t_s: float, rgb_HWC: RGB, *, corrupt: bool = False) -> Frame:
        """Count a frame that is handed on."""
        if self.frames & (self.frames - 1) == 0:
            self.picture_HWC = rgb_HWC
        if not self.frames:
            self.shape_HW = rgb_HWC.shape[0], rgb_HWC.shape[1]
        self.frames += 1
        self.corrupt_frames += corrupt
        return Frame(self.frames - 1, t_s, rgb_HWC)

    @property
    def thumb_HWC(self) -> RGB | None:
        """The picture, small. Made when it is asked for: of most clips nobody asks."""
        return None if self.picture_HWC is None else _shrink(self.picture_HWC)

    def lose(self, why: str) -> None:
        """Count a packet or image that does not decode."""
        self.bad_packets += 1
        if len(self.notes) < _MAX_NOTES:
            self.notes.append(why)


def read_frames(
    data: bytes,
    config: CropConfig,
    report: Decode | None = None,
    *,
    start_s: float | None = None,
    end_s: float | None = None,
) -> Iterator[Frame]:
    """Yield the frames of an encoded video in presentation order, or of its part from start_s to before end_s.

    Seconds count from the first frame of the file. Of a part far inside a file with an index, what lies before it is
    not decoded, and its bad packets are not counted.

    Raises Quarantined(EMPTY | TOO_MANY_BYTES | UNREADABLE | NO_VIDEO_STREAM | TOO_MANY_PIXELS | TOO_LONG | TOO_SLOW |
    NO_FRAMES | TOO_SHORT).
    """
    report = report if report is not None else Decode()
    if not data:
        raise Quarantined(Reason.EMPTY, "the file has zero bytes")
    if len(data) > config.max_bytes:
        raise Quarantined(Reason.TOO_MANY_BYTES, f"{len(data)} bytes, the cap is {config.max_bytes}")
    deadline_s = time.thread_time() + config.max_decode_s
    entry = _entry(data, config, start_s) if start_s is not None and start_s > _RUN_UP_S else None
    container, stream = _open(data, config)
    if start_s is None and end_s is None:
        report.expected_frames = stream.frames if 0 < stream.frames < 2**31 else None
    with container:
        if entry:
            container.seek(entry.pts, stream=stream)
        last_s, reformatter = 0.0, VideoReformatter()
        for raw, t_s in _timed(_kept(_ahead(_decode(container, stream)), report), entry):
            _check_size(raw.width, raw.height, config)
            check_time(deadline_s, config, report)
            last_s = max(last_s, t_s)
            if not begun(t_s, start_s):
                continue
            if ended(t_s, end_s):
                break
            if t_s - (start_s or 0.0) > config.max_seconds:
                raise Quarantined(Reason.TOO_LONG, f"longer than the cap of {config.max_seconds:g} s")
            yield report.take(t_s, _upright(raw, stream, config, reformatter), corrupt=raw.is_corrupt)
    if not report.frames:
        raise no_frames(report, last_s, start_s, end_s)


def begun(t_s: float, start_s: float | None) -> bool:
    """Whether a frame lies at or after the start of a part; timestamps are often rounded to milliseconds."""
    return start_s is None or t_s >= start_s - _HALF_MS


def ended(t_s: float, end_s: float | None) -> bool:
    """Whether a frame lies at or after the end of a part, and so outside it."""
    return end_s is not None and t_s >= end_s - _HALF_MS


def check_time(deadline_s: float, config: CropConfig, report: Decode) -> None:
    """Raises Quarantined(TOO_SLOW) once the thread's CPU clock is past the deadline."""
    if time.thread_time() > deadline_s:
        raise Quarantined(Reason.TOO_SLOW, f"more than {config.max_decode_s:g} CPU seconds at frame {report.frames}")


def no_frames(report: Decode, last_s: float, start_s: float | None, end_s: float | None) -> Quarantined:
    """Why a clip has no frame: nothing decodes, or nothing lies in the part."""
    if start_s is None and end_s is None:
        return Quarantined(Reason.NO_FRAMES, f"no frame decodes, {report.bad_packets} packets are bad")
    part = f"from {start_s or 0:g} s to {'the end' if end_s is None else f'{end_s:g} s'}"
    return Quarantined(Reason.TOO_SHORT, f"no frame lies {part}; the last one that decodes is at {last_s:g} s")


def _open(data: bytes, config: CropConfig) -> tuple[av.container.InputContainer, av.VideoStream]:
    try:
        container = av.open(io.BytesIO(data), mode="r", options={"format_whitelist": _FORMATS})
    except (FFmpegError, ValueError) as error:
        raise Quarantined(Reason.UNREADABLE, f"FFmpeg cannot open it: {_text(error)}") from error
    stream = container.streams.best("video")  # not the first one: that may be a cover picture
    if not isinstance(stream, av.VideoStream):
        raise Quarantined(Reason.NO_VIDEO_STREAM, "the container has no video stream")
    if stream.codec_context is None:
        raise Quarantined(Reason.NO_FRAMES, "FFmpeg knows no decoder for the video stream")
    stream.thread_count = 1  # workers are the parallelism; and one thread decodes the same everywhere
    _check_size(stream.codec_context.width, stream.codec_context.height, config)
    return container, stream


@dataclass(frozen=True, slots=True)
class _Entry:
    """Where decoding can start before a part, so that the part's frames are those of a decode from the start."""

    pts: int
    origin_s: float
    """Presentation time of the first frame of the file."""


def _entry(data: bytes, config: CropConfig, start_s: float) -> _Entry | None:
    """None if the container has no index, or the place it gives does not lie well before the part."""
    container, stream = _open(data, config)
    with container:
        if container.format.name.split(",")[0] not in _INDEXED or stream.time_base is None:
            return None
        first = next(_kept(_decode(container, stream), Decode()), None)
        if first is None or first.time is None:
            return None
        pts = int((first.time + start_s - _RUN_UP_S) / stream.time_base)
        if pts >= 2**62:
            return None
        try:
            container.seek(pts, stream=stream)
            packet = next(iter(container.demux(stream)))
        except FFmpegError:
            return None
        at_s = float(packet.pts * stream.time_base) - first.time if packet.pts is not None else start_s
        suits = packet.is_keyframe and at_s <= start_s - _RUN_UP_S / 2
        return _Entry(pts, first.time) if suits else None


def _timed(raws: Iterator[av.VideoFrame], entry: _Entry | None) -> Iterator[tuple[av.VideoFrame, float]]:
    """With seconds from the first frame of the file; frames without a timestamp are 40 ms apart."""
    origin_s = entry.origin_s if entry else None
    for index, raw in enumerate(raws):
        t_s = float(raw.time) if raw.time is not None else index / 25.0
        origin_s = t_s if origin_s is None else origin_s
        yield raw, t_s - origin_s


def _decode(container: av.container.InputContainer, stream: av.VideoStream) -> Iterator[av.VideoFrame | str]:
    """Frames of every packet that decodes; of a bad one, which is passed over, what is wrong."""
    packets = container.demux(stream)
    while True:
        try:
            packet = next(packets)
        except StopIteration:
            return
        except FFmpegError as error:  # the demuxer itself gave up: what follows is lost
            yield f"demux stopped: {_text(error)}"
            return
        try:
            yield from packet.decode()
        except FFmpegError as error:
            yield _text(error)


def _ahead(decoded: Iterator[av.VideoFrame | str]) -> Iterator[av.VideoFrame | str]:
    """The same, several at a time."""
    waiting: deque[av.VideoFrame | str] = deque()
    pixels = 0
    for one in decoded:
        waiting.append(one)
        pixels += 0 if isinstance(one, str) else one.width * one.height
        if pixels >= _AHEAD_PIXELS:
            while waiting:
                yield waiting.popleft()
            pixels = 0
    yield from waiting


def _kept(decoded: Iterator[av.VideoFrame | str], report: Decode) -> Iterator[av.VideoFrame]:
    """The frames; what is lost is counted where it lay between them, however far ahead the decoder is."""
    for one in decoded:
        if isinstance(one, str):
            report.lose(one)
        else:
            yield one


def _check_size(width: int, height: int, config: CropConfig) -> None:
    if width * height > config.max_pixels:
        raise Quarantined(Reason.TOO_MANY_PIXELS, f"{width}x{height} px, the cap is {config.max_pixels} px a frame")


def _upright(raw: av.VideoFrame, stream: av.VideoStream, config: CropConfig, reformatter: VideoReformatter) -> RGB:
    """RGB with square pixels, rotated as the file says."""
    ratio = stream.sample_aspect_ratio or stream.codec_context.sample_aspect_ratio
    width = round(raw.width * float(ratio)) if ratio else raw.width
    _check_size(width, raw.height, config)
    rgb = reformatter.reformat(raw, width=width, height=raw.height, format="rgb24", threads=1).to_ndarray()
    rgb_HWC: RGB = np.asarray(rgb, np.uint8)
    quarter_turns = round(raw.rotation / 90) % 4
    return np.ascontiguousarray(np.rot90(rgb_HWC, quarter_turns)) if quarter_turns else rgb_HWC


def _shrink(rgb_HWC: RGB) -> RGB:
    height, width = rgb_HWC.shape[:2]
    scale = min(1.0, THUMB_SIDE / max(height, width))
    size = max(1, round(width * scale)), max(1, round(height * scale))
    return np.asarray(cv2.resize(rgb_HWC, size, interpolation=cv2.INTER_AREA), np.uint8)


def _text(error: BaseException) -> str:
    return f"{type(error).__name__}: {getattr(error, 'strerror', None) or error}"
