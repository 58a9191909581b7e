"""One tar: write it reproducibly, index it, read one bag by (offset, size).

A shard is a plain WebDataset tar; `webdataset`, `ray.data.read_webdataset` and `tar` read it.

    <key>.<instance>.<frame>.jpg     e.g. 5f0c9a1b2c3d4e5f_0.02.007.jpg
    <key>.json                       BagMeta

Members are sorted, owner, mode and time are fixed: the same bags give the same bytes. A bag is a contiguous span
of the tar, so one range read fetches it. Readers never extract to disk, never unpickle, and cap what they read.
"""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from pipeline.bags import Bag
from pipeline.contract import BagMeta, MicaclError, digest

_BLOCK = 512
MAX_MEMBERS = 4096
"""Of one bag."""
MAX_MEMBER_BYTES = 16 * 2**20


@dataclass(frozen=True, slots=True)
class Span:
    """Where a bag lies in its shard."""

    key: str
    offset: int
    size: int
    sha256: str


def bag_members(bag: Bag) -> list[tuple[str, bytes]]:
    """(name, bytes) of a bag in tar order."""
    key = bag.meta.key
    frames = [
        (f"{key}.{i:02d}.{f:03d}.jpg", jpeg) for i, instance in enumerate(bag.jpegs) for f, jpeg in enumerate(instance)
    ]
    return [*frames, (f"{key}.json", bag.meta.to_json().encode())]


def write_members(members: Iterable[tuple[str, bytes]]) -> bytes:
    """USTAR blocks of the members without the end-of-archive mark."""
    out = io.BytesIO()
    for name, data in members:
        info = tarfile.TarInfo(name)
        info.size, info.mode, info.mtime = len(data), 0o644, 0
        out.write(info.tobuf(tarfile.USTAR_FORMAT))
        out.write(data)
        out.write(b"\0" * (-len(data) % _BLOCK))
    return out.getvalue()


def write_shard(bags: Sequence[Bag]) -> tuple[bytes, list[Span]]:
    """The tar of the bags, sorted by key, and the span of each. Same bags, same bytes."""
    out, spans = bytearray(), []
    for bag in sorted(bags, key=lambda b: b.meta.key):
        block = write_members(bag_members(bag))
        spans.append(Span(bag.meta.key, len(out), len(block), digest(block)))
        out += block
    return bytes(out) + b"\0" * (2 * _BLOCK), spans


def read_members(data: bytes, where: str) -> Iterator[tuple[str, bytes]]:
    """(name, bytes) of the regular files in tar blocks. Raises MicaclError on anything but plain, capped members."""
    at = 0
    while at + _BLOCK <= len(data) and data[at] != 0:
        try:
            info = tarfile.TarInfo.frombuf(data[at : at + _BLOCK], "utf-8", "strict")
        except (tarfile.HeaderError, UnicodeDecodeError) as error:
            raise _damaged(where, f"no tar header at byte {at}: {error}") from error
        start, end = at + _BLOCK, at + _BLOCK + info.size
        if not info.isreg() or not 0 <= info.size <= MAX_MEMBER_BYTES:
            raise _damaged(where, f"member {info.name!r} is no plain file of at most {MAX_MEMBER_BYTES} bytes")
        if end > len(data):
            raise _damaged(where, f"member {info.name!r} is cut off")
        yield info.name, data[start:end]
        at = start + -(-info.size // _BLOCK) * _BLOCK
    if 0 < len(data) - at < _BLOCK:
        raise _damaged(where, f"less than a header is left at byte {at}")


def read_bag(data: bytes, where: str) -> Bag:
    """The bag in one span of a shard. Raises MicaclError if it is not exactly one whole bag."""
    bags = list(read_bags(data, where))
    if len(bags) != 1:
        raise _damaged(where, f"holds {len(bags)} bags instead of one")
    return bags[0]


def read_bags(data: bytes, where: str) -> Iterator[Bag]:
    """All bags of a tar in order. Raises MicaclError if members are missing, foreign or out of order."""
    frames: list[tuple[str, bytes]] = []
    for name, member in read_members(data, where):
        if name.endswith(".jpg") and len(frames) < MAX_MEMBERS:
            frames.append((name, member))
        elif name.endswith(".json") and frames:
            yield _assemble(BagMeta.from_json(member, where), frames, where)
            frames = []
        else:
            raise _damaged(where, f"unexpected member {name!r}")
    if frames:
        raise _damaged(where, f"the json of {frames[0][0]!r} is missing")


def _assemble(meta: BagMeta, frames: list[tuple[str, bytes]], where: str) -> Bag:
    counts = meta.instance_frames
    if not all(isinstance(n, int) and n > 0 for n in counts) or sum(counts) != len(frames):
        raise _damaged(where, f"the frames of {meta.key!r} are {len(frames)}, its json lists {counts}")
    names = [f"{meta.key}.{i:02d}.{f:03d}.jpg" for i, n in enumerate(meta.instance_frames) for f in range(n)]
    if [name for name, _ in frames] != names:
        raise _damaged(where, f"the frames of {meta.key!r} are not the {len(names)} that its json lists")
    rest = iter(data for _, data in frames)
    return Bag(meta, tuple(tuple(next(rest) for _ in range(n)) for n in meta.instance_frames))


def _damaged(where: str, what: str) -> MicaclError:
    return MicaclError(
        f"{where}: {what}.",
        "Nothing was read from it.",
        "Run `micacl verify URL`; `micacl prepare` makes a missing or deleted shard again.",
    )
