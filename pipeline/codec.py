"""Frames of an instance <-> the bytes that a shard holds of them. Two codecs, chosen by `CropConfig.codec`.

    jpeg   one baseline JPEG a frame, 4:2:0        any frame is decoded alone; the default
    h264   one H.264 stream an instance, annex B   5 to 7 times smaller, decoded from its first frame on

Encoding is a function of the frames alone: one thread, no clock, x264's `cpu-independent`, and its settings message (an
SEI of 600 bytes, a tenth of a stream) is left out. Whatever comes from a shard is capped before it is decoded, counted
while it is decoded, and an error in words if it is not what the bag's meta says.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import Protocol

import av
import cv2
import numpy as np
import simplejpeg
from av.bitstream import BitStreamFilterContext
from av.error import FFmpegError
from av.video.reformatter import Colorspace, Interpolation, VideoReformatter
from numpy.typing import NDArray

from pipeline.contract import BagMeta, MicaclError
from pipeline.video import RGB

MAX_FRAME_BYTES = 4 * 2**20
"""Of a JPEG."""
MAX_STREAM_BYTES = 16 * 2**20
"""Of an instance in H.264."""
MAX_SIDE = 1024
SUFFIX = {"jpeg": "jpg", "h264": "h264"}
"""Of member names, by codec."""

Buffer = bytes | memoryview

_PARSE_BYTES = 2**16
_BT601 = 6
"""Matrix coefficients of the stream's colour description: SMPTE 170M, the matrix of JPEG files too."""
_LIMITED = 1
_X264 = {
    "crf": "16",
    "tune": "fastdecode",
    "x264-params": "keyint=infinite:open-gop=0:repeat-headers=1:annexb=1:threads=1:cpu-independent=1",
}
_ROUNDING = Interpolation.BILINEAR | Interpolation.FULL_CHR_H_INT | Interpolation.ACCURATE_RND | Interpolation.BITEXACT


def member_count(codec: str, frames: int) -> int:
    """How many members hold an instance of so many frames."""
    return 1 if codec == "h264" else frames


def encode_instance(frames_HWC: Sequence[RGB], codec: str, quality: int) -> tuple[bytes, ...]:
    """The members that hold the frames of one instance, all of one size. Same frames, same bytes.

    Args:
        quality: of JPEG, 1 to 100; H.264 has constant quality (crf 16).
    """
    if codec == "h264":
        return (_encode_h264(frames_HWC),)
    return tuple(encode_jpeg(frame_HWC, quality) for frame_HWC in frames_HWC)


class StoredFrames(Protocol):
    """What decoding needs to know of a bag; BagMeta has it."""

    @property
    def key(self) -> str: ...
    @property
    def codec(self) -> str: ...
    @property
    def size(self) -> int: ...
    @property
    def instance_frames(self) -> tuple[int, ...]: ...


def decode_stream(member: Buffer, meta: StoredFrames, instance: int, wanted: Sequence[int]) -> list[RGB]:
    """The `wanted` frames of an instance in H.264, which is decoded whole and counted. Raises MicaclError."""
    found = _decode_h264(bytes(member), meta, instance, set(wanted), f"{meta.key} instance {instance:02d}")
    return [found[i] for i in wanted]


def decode_frame(member: Buffer, out_HWC: RGB, meta: StoredFrames, frame: int) -> None:
    """A JPEG into its place, (size, size, 3) uint8 RGB. `frame` of the bag, for the message. Raises MicaclError.

    A picture of another size than its bag's is refused by its header, before anything is decoded.
    """
    try:
        if len(member) > MAX_FRAME_BYTES:
            raise ValueError(f"{len(member)} bytes")
        got = simplejpeg.decode_jpeg(member, colorspace="RGB", buffer=out_HWC)
        if got.shape != out_HWC.shape:
            raise ValueError("another size")
    except ValueError as error:
        raise _bad_frame(bytes(member), meta, frame) from error


def _bad_frame(member: bytes, meta: StoredFrames, frame: int) -> MicaclError:
    instance = int(np.searchsorted(np.cumsum(meta.instance_frames), frame, "right"))
    where = f"{meta.key} instance {instance:02d} frame {frame - sum(meta.instance_frames[:instance]):03d}"
    try:
        height, width = _jpeg_size(member)
        if (height, width) != (meta.size, meta.size):
            return _unusable(f"{where} is {width}x{height} px, its json says {meta.size} px.")
        simplejpeg.decode_jpeg(member, colorspace="RGB")
    except ValueError as error:
        return _unusable(f"{where} is not a JPEG within the caps ({error}).")
    return _unusable(f"{where} could not be decoded.")


def decode_instance(members: Sequence[bytes], meta: BagMeta, instance: int, wanted: Sequence[int]) -> list[RGB]:
    """The `wanted` frames of one instance in that order, (size, size, 3) uint8 RGB each. Raises MicaclError.

    JPEGs that are not wanted are not touched; an H.264 stream is decoded whole and its frames are counted.
    """
    if meta.codec == "h264":
        return decode_stream(members[0], meta, instance, wanted)
    first = sum(meta.instance_frames[:instance])
    out_THWC = np.empty((len(wanted), meta.size, meta.size, 3), np.uint8)
    for out_HWC, i in zip(out_THWC, wanted, strict=True):
        decode_frame(members[i], out_HWC, meta, first + i)
    return list(out_THWC)


def find_fault(members: Sequence[bytes], meta: BagMeta, instance: int) -> str:
    """What is wrong with the members of one instance, in words; empty if nothing is.

    Of JPEGs the headers are read, H.264 is decoded. The first bad frame is named.
    """
    if meta.codec == "h264":
        try:
            _decode_h264(members[0], meta, instance, set(), f"Instance {instance:02d}")
        except MicaclError as error:
            return error.cause
        return ""
    for f, jpeg in enumerate(members):
        try:
            height, width = _jpeg_size(jpeg)
        except ValueError as error:
            return f"Frame {instance:02d}.{f:03d} is no JPEG within the caps ({error})."
        if (height, width) != (meta.size, meta.size):
            return f"Frame {instance:02d}.{f:03d} is {width}x{height} px, its json says {meta.size} px."
    return ""


def encode_jpeg(rgb_HWC: RGB, quality: int) -> bytes:
    """4:2:0 baseline JPEG. cv2 encodes it better than simplejpeg at the same size (docs/decisions)."""
    bgr_HWC = cv2.cvtColor(rgb_HWC, cv2.COLOR_RGB2BGR)  # half the time of handing over a reversed view
    done, data = cv2.imencode(".jpg", bgr_HWC, [cv2.IMWRITE_JPEG_QUALITY, quality])
    assert done, "encoding a uint8 image in memory cannot fail"
    return data.tobytes()


def decode_jpeg(data: bytes, where: str = "a frame") -> NDArray[np.uint8]:
    """(H, W, 3) uint8 RGB. Size is checked before decoding. Raises MicaclError."""
    try:
        _jpeg_size(data)
        return np.asarray(simplejpeg.decode_jpeg(data, colorspace="RGB"), np.uint8)
    except ValueError as error:
        raise _unusable(f"{where} is not a JPEG within the caps ({error}).") from error


def _jpeg_size(data: bytes) -> tuple[int, int]:
    """(height, width) of the header. Raises ValueError if it is no JPEG within the caps."""
    height, width, _, _ = simplejpeg.decode_jpeg_header(data)
    if len(data) > MAX_FRAME_BYTES or max(height, width) > MAX_SIDE:
        raise ValueError(f"{len(data)} bytes, {width}x{height} px")
    return height, width


def _encode_h264(frames_HWC: Sequence[RGB]) -> bytes:
    """Annex B, one IDR picture first, 4:2:0 BT.601 limited range; odd sides repeat their last row and column."""
    height, width = (n + n % 2 for n in frames_HWC[0].shape[:2])
    context = _x264(width, height)
    bare = BitStreamFilterContext("filter_units=remove_types=6", "h264")
    reformatter = VideoReformatter()
    packets = []
    for i, rgb_HWC in enumerate(frames_HWC):
        even_HWC = np.pad(rgb_HWC, [(0, height - rgb_HWC.shape[0]), (0, width - rgb_HWC.shape[1]), (0, 0)], "edge")
        frame = reformatter.reformat(
            av.VideoFrame.from_ndarray(np.ascontiguousarray(even_HWC), format="rgb24"),
            format="yuv420p",
            dst_colorspace=Colorspace.ITU601,
            dst_color_range=_LIMITED,
            interpolation=_ROUNDING,
            threads=1,
        )
        frame.pts, frame.time_base = i, context.time_base
        packets += context.encode(frame)
    packets += context.encode(None)
    return b"".join(bytes(unit) for packet in [*packets, None] for unit in bare.filter(packet))


def _x264(width: int, height: int) -> av.VideoCodecContext:
    context = av.CodecContext.create("libx264", "w")
    context.width, context.height, context.pix_fmt = width, height, "yuv420p"
    # Frame times weigh in x264's choices and are no part of a bag's bytes: every bag is encoded as if at 25 a second.
    context.time_base, context.framerate = Fraction(1, 25), Fraction(25)
    context.colorspace, context.color_range = _BT601, _LIMITED
    context.thread_count = 1
    context.options = dict(_X264)
    return context


def _decode_h264(data: bytes, meta: StoredFrames, instance: int, wanted: set[int], where: str) -> dict[int, RGB]:
    """The wanted frames by number. Everything is decoded and counted, whatever is wanted. Raises MicaclError."""
    frames, side = meta.instance_frames[instance], meta.size + meta.size % 2
    found: dict[int, RGB] = {}
    n = 0
    try:
        for n, picture in enumerate(_pictures(data, frames), 1):
            if (picture.width, picture.height, picture.format.name) != (side, side, "yuv420p"):
                raise ValueError(f"a picture of {picture.width}x{picture.height} px, {picture.format.name}")
            if n - 1 in wanted:
                rgb_HWC = cv2.cvtColor(picture.to_ndarray(), cv2.COLOR_YUV2RGB_I420)
                found[n - 1] = np.ascontiguousarray(rgb_HWC[: meta.size, : meta.size])
        if n != frames:
            raise ValueError(f"{n} frames")
    except (FFmpegError, ValueError) as error:
        said = f"{frames} frames of {meta.size} px"
        raise _unusable(f"{where} is not the H.264 stream of {said} that its json says ({error}).") from error
    return found


def _pictures(data: bytes, frames: int) -> Iterator[av.VideoFrame]:
    """Pictures in the order of time. Raises ValueError past a cap or on a corrupt one, FFmpegError."""
    if len(data) > MAX_STREAM_BYTES:
        raise ValueError(f"{len(data)} bytes, the cap is {MAX_STREAM_BYTES}")
    context = av.CodecContext.create("h264", "r")
    context.thread_count = 1
    context.options = {"max_pixels": str(MAX_SIDE**2)}
    packets = 0
    for at in [*range(0, len(data), _PARSE_BYTES), None]:
        for packet in context.parse(None if at is None else data[at : at + _PARSE_BYTES]):
            packets += 1
            if packets > frames:
                raise ValueError(f"more than {frames} pictures")
            yield from map(_sound, context.decode(packet))
    yield from map(_sound, context.decode(None))


def _sound(picture: av.VideoFrame) -> av.VideoFrame:
    if picture.is_corrupt:
        raise ValueError("a picture is corrupt")
    return picture


def _unusable(cause: str) -> MicaclError:
    return MicaclError(
        cause,
        "The bag cannot be used.",
        "Run `micacl verify URL` to find out whether the shard was changed.",
    )
