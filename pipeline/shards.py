"""One tar: write it reproducibly, index it, read one bag by (offset, size).

A shard is a plain WebDataset tar; `webdataset`, `ray.data.read_webdataset` and `tar` read it.

    <key>.<instance>.<frame>.jpg     e.g. 5f0c9a1b2c3d4e5f_0.02.007.jpg      codec jpeg
    <key>.<instance>.h264            e.g. 5f0c9a1b2c3d4e5f_0.02.h264         codec h264
    <key>.json                       BagMeta

Members are sorted, owner, mode and time are fixed: the same bags give the same bytes. A bag is a contiguous span
of the tar, so one range read fetches it. Readers never extract to disk, never unpickle, and cap what they read.
"""

from __future__ import annotations

import io
import tarfile
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from pipeline.bags import Bag
from pipeline.codec import MAX_SIDE, SUFFIX, member_count
from pipeline.contract import BagMeta, MicaclError, digest

_BLOCK = 512
_FRAMES = tuple(f".{suffix}" for suffix in SUFFIX.values())
MAX_FRAMES = 4096
"""Of one bag; it has no more members than frames, besides its json."""
MAX_KEY_BYTES = 80
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
    encoded = [data for members in bag.encoded for data in members]
    frames = list(zip(frame_names(bag.meta), encoded, strict=True))
    return [*frames, (f"{bag.meta.key}.json", bag.meta.to_json().encode())]


def frame_names(meta: BagMeta) -> list[str]:
    """Names of the members that hold the frames of a bag, in tar order."""
    key, suffix = meta.key, SUFFIX[meta.codec]
    if meta.codec == "h264":
        return [f"{key}.{i:02d}.{suffix}" for i in range(len(meta.instance_frames))]
    return [f"{key}.{i:02d}.{f:03d}.{suffix}" for i, n in enumerate(meta.instance_frames) for f in range(n)]


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


def read_members(data: bytes | memoryview, where: str) -> Iterator[tuple[str, bytes]]:
    """(name, bytes) of the regular files in tar blocks. Raises MicaclError on anything but plain, capped members."""
    for name, start, end in find_members(data, where):
        yield name, bytes(data[start:end])


def find_members(data: bytes | memoryview, where: str, *, trusted: bool = False) -> Iterator[tuple[str, int, int]]:
    """(name, start, end) of the regular files in tar blocks. Raises MicaclError as `read_members`.

    Args:
        trusted: the bytes have the sha256 that was listed of them, so the headers' own sums are not made again.
    """
    at = 0
    while at + _BLOCK <= len(data) and data[at] != 0:
        header = bytes(data[at : at + _BLOCK])
        name, size = _plain_header(header, trusted=trusted) or _any_header(header, where, at)
        start, end = at + _BLOCK, at + _BLOCK + size
        if end > len(data):
            raise _damaged(where, f"member {name!r} is cut off")
        yield name, start, end
        at = start + -(-size // _BLOCK) * _BLOCK
    if 0 < len(data) - at < _BLOCK:
        raise _damaged(where, f"less than a header is left at byte {at}")
    if at < len(data) and bytes(data[at:]).count(0) != len(data) - at:
        raise _damaged(where, f"something lies behind the end of the tar at byte {at}")


def _plain_header(header: bytes, *, trusted: bool) -> tuple[str, int] | None:
    """(name, size) of a header as `write_members` makes it; None for any other, which tarfile has to judge."""
    if header[257:265] != b"ustar\x0000" or header[156] != ord("0") or header[345] != 0:
        return None
    try:
        name, size = header[: header.index(0)].decode("ascii"), int(header[124:135], 8)
        same = trusted or int(header[148:154], 8) == sum(header) - sum(header[148:156]) + 8 * ord(" ")
    except ValueError:
        return None
    return (name, size) if same and name and 0 <= size <= MAX_MEMBER_BYTES else None


def _any_header(header: bytes, where: str, at: int) -> tuple[str, int]:
    try:
        info = tarfile.TarInfo.frombuf(header, "utf-8", "strict")
    except (tarfile.HeaderError, UnicodeDecodeError) as error:
        raise _damaged(where, f"no tar header at byte {at}: {error}") from error
    # Not isreg(): that is true of sparse files and of other kinds whose bytes mean something else.
    if info.type != tarfile.REGTYPE or not 0 <= info.size <= MAX_MEMBER_BYTES:
        raise _damaged(where, f"member {info.name!r} is no plain file of at most {MAX_MEMBER_BYTES} bytes")
    return info.name, info.size


@dataclass(frozen=True, slots=True)
class BagTable:
    """Where the frames of a bag lie in its span: what a reader that comes again needs of it."""

    key: str
    codec: str
    size: int
    instance_frames: tuple[int, ...]
    spans: array[int]
    """Start and end of each member, in tar order."""


def find_bag(data: bytes | memoryview, where: str) -> BagTable:
    """The members of the one bag in a span whose sha256 was checked. Raises MicaclError as `read_bag`."""
    members = list(find_members(data, where, trusted=True))
    if not members or len(members) > MAX_FRAMES + 1 or not members[-1][0].endswith(".json"):
        raise _damaged(where, f"holds {len(members)} members that are not the frames of one bag and its json")
    name, start, end = members.pop()
    meta = BagMeta.from_json(bytes(data[start:end]), where)
    _require_frames(meta, [member[0] for member in members], name, where)
    spans = array("I", [edge for member in members for edge in member[1:]])
    return BagTable(meta.key, meta.codec, meta.size, meta.instance_frames, spans)


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
        if name.endswith(_FRAMES) and len(frames) < MAX_FRAMES:
            frames.append((name, member))
        elif name.endswith(".json") and frames:
            yield _assemble(BagMeta.from_json(member, where), frames, name, where)
            frames = []
        else:
            raise _damaged(where, f"unexpected member {name!r}")
    if frames:
        raise _damaged(where, f"the json of {frames[0][0]!r} is missing")


def _assemble(meta: BagMeta, frames: list[tuple[str, bytes]], json_name: str, where: str) -> Bag:
    _require_frames(meta, [name for name, _ in frames], json_name, where)
    rest = iter(data for _, data in frames)
    counts = [member_count(meta.codec, n) for n in meta.instance_frames]
    return Bag(meta, tuple(tuple(next(rest) for _ in range(n)) for n in counts))


def _require_frames(meta: BagMeta, found: list[str], json_name: str, where: str) -> None:
    """The members are the frames that the json lists, in order, and the json is named after the bag."""
    _check_meta(meta, where)
    names = frame_names(meta)
    if found != names:
        raise _damaged(where, f"the frames of {meta.key!r} are not the {len(names)} members that its json lists")
    if json_name != f"{meta.key}.json":
        raise _damaged(where, f"the json of {meta.key!r} is named {json_name!r}")


def _check_meta(meta: BagMeta, where: str) -> None:
    """What the reader itself goes by is of the right type and within the caps, before anything is made of it."""
    key, counts, size = meta.key, meta.instance_frames, meta.size
    if not isinstance(key, str) or not set(key).isdisjoint("./") or not 0 < len(key.encode()) <= MAX_KEY_BYTES:
        raise _damaged(where, f"its json has the key {key!r}")
    if not isinstance(meta.codec, str) or meta.codec not in SUFFIX:
        raise _damaged(where, f"the frames of {key!r} are of codec {meta.codec!r}, known are {', '.join(SUFFIX)}")
    if type(size) is not int or not 0 < size <= MAX_SIDE:
        raise _damaged(where, f"the frames of {key!r} are {size!r} px, the cap is {MAX_SIDE}")
    if not all(type(n) is int and n > 0 for n in counts) or not 0 < sum(counts) <= MAX_FRAMES:
        raise _damaged(where, f"the frames of {key!r} are not 1 to {MAX_FRAMES}, its json lists {counts}")


def _damaged(where: str, what: str) -> MicaclError:
    return MicaclError(
        f"{where}: {what}.",
        "Nothing was read from it.",
        "Run `micacl verify URL`; `micacl prepare` makes a missing or deleted shard again.",
    )
