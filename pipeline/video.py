"""Bytes of a video -> frames with timestamps (PyAV), one at a time.

Decoded packet by packet: a corrupted middle costs the frames that do not decode (those after them may show traces of
it), and `Decode.bad_packets` says how many packets were bad. Display rotation and non-square pixels are honoured;
variable frame rate is kept as timestamps. Memory holds one frame. Caps are checked before the bytes they bound.
"""

from __future__ import annotations

import io
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import av
import numpy as np
from av.error import FFmpegError
from av.video.reformatter import VideoReformatter
from numpy.typing import NDArray

from pipeline.contract import CropConfig, Quarantined, Reason

RGB = NDArray[np.uint8]

_FORMATS = "mov,matroska,avi,mpegts,mpeg,mpegvideo,flv,asf,ogg,mxf,h264,hevc"
"""Containers of videos and nothing else: FFmpeg's playlists and SDP would open other files and network ports."""


@dataclass(frozen=True, slots=True)
class Frame:
    """One decoded frame, upright and with square pixels."""

    index: int
    """Position among the frames that decoded."""
    t_s: float
    """Presentation time, seconds from the first frame."""
    rgb_HWC: RGB


@dataclass(slots=True)
class Decode:
    """What happened while a video was decoded; complete once its frames are exhausted."""

    frames: int = 0
    bad_packets: int = 0
    notes: list[str] = field(default_factory=list)


def read_frames(data: bytes, config: CropConfig, report: Decode | None = None) -> Iterator[Frame]:
    """Yield the frames of an encoded video in presentation order.

    Raises Quarantined(EMPTY | TOO_MANY_BYTES | UNREADABLE | NO_VIDEO_STREAM | TOO_MANY_PIXELS | TOO_LONG | TOO_SLOW |
    NO_FRAMES).
    """
    report = report if report is not None else Decode()
    if not data:
        raise Quarantined(Reason.EMPTY, "the file has zero bytes")
    if len(data) > config.max_bytes:
        raise Quarantined(Reason.TOO_MANY_BYTES, f"{len(data)} bytes, the cap is {config.max_bytes}")
    try:
        container = av.open(io.BytesIO(data), mode="r", options={"format_whitelist": _FORMATS})
    except (FFmpegError, ValueError) as error:
        raise Quarantined(Reason.UNREADABLE, f"FFmpeg cannot open it: {_text(error)}") from error
    with container:
        yield from _frames(container, config, report)
    if not report.frames:
        raise Quarantined(Reason.NO_FRAMES, f"no frame decodes, {report.bad_packets} packets are bad")


def _frames(container: av.container.InputContainer, config: CropConfig, report: Decode) -> Iterator[Frame]:
    if not container.streams.video:
        raise Quarantined(Reason.NO_VIDEO_STREAM, "the container has no video stream")
    stream = container.streams.video[0]
    if stream.codec_context is None:
        raise Quarantined(Reason.NO_FRAMES, "FFmpeg knows no decoder for the video stream")
    stream.thread_count = 1  # workers are the parallelism; and one thread decodes the same everywhere
    _check_size(stream.codec_context.width, stream.codec_context.height, config)
    reformatter, start_s = VideoReformatter(), None
    deadline_s = time.thread_time() + config.max_decode_s
    for raw in _decode(container, stream, report):
        _check_size(raw.width, raw.height, config)
        t_s = float(raw.time) if raw.time is not None else report.frames / 25.0
        start_s = t_s if start_s is None else start_s
        if t_s - start_s > config.max_seconds:
            raise Quarantined(Reason.TOO_LONG, f"longer than the cap of {config.max_seconds:g} s")
        if time.thread_time() > deadline_s:
            raise Quarantined(
                Reason.TOO_SLOW, f"more than {config.max_decode_s:g} CPU seconds at frame {report.frames}"
            )
        yield Frame(report.frames, t_s - start_s, _upright(raw, stream, reformatter, config))
        report.frames += 1


def _decode(container: av.container.InputContainer, stream: av.VideoStream, report: Decode) -> Iterator[av.VideoFrame]:
    """Frames of every packet that decodes; a bad one is counted and passed over."""
    packets = container.demux(stream)
    while True:
        try:
            packet = next(packets)
        except StopIteration:
            return
        except FFmpegError as error:  # the demuxer itself gave up: what follows is lost
            report.bad_packets += 1
            report.notes.append(f"demux stopped: {_text(error)}")
            return
        try:
            yield from packet.decode()
        except FFmpegError as error:
            report.bad_packets += 1
            if len(report.notes) < 5:
                report.notes.append(_text(error))


def _check_size(width: int, height: int, config: CropConfig) -> None:
    if width * height > config.max_pixels:
        raise Quarantined(Reason.TOO_MANY_PIXELS, f"{width}x{height} px, the cap is {config.max_pixels} px a frame")


def _upright(raw: av.VideoFrame, stream: av.VideoStream, reformatter: VideoReformatter, config: CropConfig) -> RGB:
    """RGB with square pixels, rotated as the file says."""
    ratio = stream.sample_aspect_ratio or stream.codec_context.sample_aspect_ratio
    width = round(raw.width * float(ratio)) if ratio else raw.width
    _check_size(width, raw.height, config)
    rgb = reformatter.reformat(raw, width=width, height=raw.height, format="rgb24", threads=1).to_ndarray()
    rgb_HWC: RGB = np.asarray(rgb, np.uint8)
    quarter_turns = round(raw.rotation / 90) % 4
    return np.ascontiguousarray(np.rot90(rgb_HWC, quarter_turns)) if quarter_turns else rgb_HWC


def _text(error: BaseException) -> str:
    return f"{type(error).__name__}: {getattr(error, 'strerror', None) or error}"
