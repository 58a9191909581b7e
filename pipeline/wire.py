"""What goes through the pipes between a process and its sandbox: JSON headers, and bytes of the sizes they name.

    4 bytes, big endian: size of the header | header, canonical JSON | the blobs, end to end

No pickle: a process that a hostile video has taken over can answer with wrong bags, but runs no code here.
"""

from __future__ import annotations

import dataclasses
import os
import struct
from collections.abc import Sequence
from typing import Any

from pipeline.clip import Cropped
from pipeline.contract import CropConfig, MicaclError, canonical_json, json_object
from pipeline.raw import RawClip

Header = dict[str, Any]

_SIZE = struct.Struct(">I")
_MAX_HEADER = 2**22
_MAX_ANSWER = 2**30


class WireError(Exception):
    """The other side is gone, or says something that is no message."""


def send(fd: int, header: Header, blobs: Sequence[bytes] = ()) -> None:
    """Write one message. Raises OSError if nobody reads."""
    text = canonical_json(header).encode()
    for part in (_SIZE.pack(len(text)), text, *blobs):
        rest = memoryview(part)
        while rest:
            rest = rest[os.write(fd, rest) :]


def receive_header(fd: int) -> Header | None:
    """The header of the next message; None if there is no other. Raises WireError."""
    first = _read(fd, _SIZE.size, may_end=True)
    if not first:
        return None
    (size,) = _SIZE.unpack(first)
    if size > _MAX_HEADER:
        raise WireError(f"a header of {size} bytes")
    try:
        return json_object(bytes(_read(fd, size)), "a message of the sandbox")
    except MicaclError as error:
        raise WireError(str(error)) from error


def receive_blobs(fd: int, sizes: Sequence[int]) -> list[bytes]:
    """The blobs that a header names. Raises WireError."""
    return [bytes(_read(fd, size)) for size in sizes]


def _read(fd: int, size: int, *, may_end: bool = False) -> bytearray:
    data = bytearray(size)
    view, at = memoryview(data), 0
    while at < size:
        got = os.readv(fd, [view[at:]])
        if not got:
            if may_end and not at:
                return bytearray()
            raise WireError(f"the pipe ended after {at} of {size} bytes")
        at += got
    return data


def request_header(raw: RawClip, name: str, video_id: str, config: CropConfig) -> Header:
    """Of the message that asks for the bags of a clip; its blobs are `clip_blobs(raw)`."""
    return {
        "name": name,
        "video_id": video_id,
        "config": dataclasses.asdict(config),
        "images": not isinstance(raw.data, bytes),
        "sizes": [len(blob) for blob in clip_blobs(raw)],
        "clip": {name: getattr(raw, name) for name in ("start_s", "end_s", "box", "cropped")},
    }


def clip_blobs(raw: RawClip) -> tuple[bytes, ...]:
    """The encoded video, or the encoded images."""
    return (raw.data,) if isinstance(raw.data, bytes) else raw.data


def read_request(header: Header, blobs: Sequence[bytes]) -> tuple[RawClip, str, str, CropConfig]:
    """(clip, name, video id, config) of a message that asks for bags."""
    said = header["clip"]
    box = tuple(said["box"]) if said["box"] else None
    data = tuple(blobs) if header["images"] else blobs[0]
    return RawClip(data, **{**said, "box": box}), header["name"], header["video_id"], CropConfig(**header["config"])


def answer_message(cropped: Cropped) -> tuple[Header, tuple[bytes, bytes]]:
    """(header, blobs) that bring back what became of a clip."""
    said = {f.name: getattr(cropped, f.name) for f in dataclasses.fields(cropped) if f.name not in ("tar", "thumb")}
    return {"cropped": said, "sizes": [len(cropped.tar), len(cropped.thumb)]}, (cropped.tar, cropped.thumb)


def read_answer(fd: int) -> Cropped:
    """What became of a clip.

    Raises WireError if the pipe ends or brings nonsense; MicaclError and SandboxFailure if they are the answer.
    """
    header = receive_header(fd)
    if header is None:
        raise WireError("the pipe ended")
    try:
        if "micacl" in header:
            raise MicaclError(*header["micacl"])
        if "failure" in header:
            raise SandboxFailure(str(header["failure"]))
        sizes = [int(size) for size in header["sizes"]]
        if len(sizes) != 2 or not all(0 <= size <= _MAX_ANSWER for size in sizes):
            raise WireError(f"an answer of {sizes} bytes")
        tar, thumb = receive_blobs(fd, sizes)
        return Cropped(**header["cropped"], tar=tar, thumb=thumb)
    except (KeyError, TypeError, ValueError) as error:
        raise WireError(f"an answer that is none: {error}") from error


class SandboxFailure(RuntimeError):
    """An exception inside the sandbox that is a fault of code and not of a video; its text is the traceback."""
