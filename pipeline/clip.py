"""One clip -> its bags as tar blocks, or the reason why there are none. Pure: what the sandbox does in its process."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.bags import Bag, video_to_bags
from pipeline.codec import encode_jpeg
from pipeline.contract import CropConfig, Quarantined, Reason
from pipeline.raw import RawClip
from pipeline.shards import bag_members, write_members
from pipeline.video import Decode

_THUMB_QUALITY = 80


@dataclass(frozen=True, kw_only=True, slots=True)
class Cropped:
    """What became of one clip."""

    tar: bytes = b""
    """Tar blocks of its bags as in a shard, largest face first; empty if it is quarantined."""
    thumb: bytes = b""
    """JPEG of a frame of a clip that is quarantined though some frame decoded; else empty."""
    frames: int = 0
    bad_packets: int = 0
    corrupt_frames: int = 0
    expected_frames: int | None = None
    reason: str | None = None
    """A pipeline.contract.Reason."""
    detail: str = ""

    def require(self) -> bytes:
        """The tar blocks. Raises Quarantined if there are none."""
        if self.reason is not None:
            raise Quarantined(Reason(self.reason), self.detail)
        return self.tar


def crop_clip(raw: RawClip, *, name: str, video_id: str, config: CropConfig) -> Cropped:
    """The whole preprocessing of one clip, in this process."""
    report = Decode()
    try:
        bags, _ = video_to_bags(raw, name=name, video_id=video_id, config=config, report=report)
    except Quarantined as why:
        return _cropped(report, (), why)
    return _cropped(report, bags, None)


def quarantined(why: Quarantined) -> Cropped:
    """Of a clip that was not decoded at all."""
    return Cropped(reason=why.reason.value, detail=why.detail)


def _cropped(report: Decode, bags: Sequence[Bag], why: Quarantined | None) -> Cropped:
    thumb_HWC = report.thumb_HWC if why else None
    return Cropped(
        tar=write_members(member for bag in bags for member in bag_members(bag)),
        thumb=b"" if thumb_HWC is None else encode_jpeg(thumb_HWC, _THUMB_QUALITY),
        frames=report.frames,
        bad_packets=report.bad_packets,
        corrupt_frames=report.corrupt_frames,
        expected_frames=report.expected_frames,
        reason=why.reason.value if why else None,
        detail=why.detail if why else _damage(report),
    )


def _damage(report: Decode) -> str:
    """What is not whole in a clip that can be used; empty if it is whole."""
    if not report.bad_packets and not report.corrupt_frames:
        return ""
    of = f" of {report.expected_frames}" if report.expected_frames else ""
    counts = f"{report.frames}{of} frames decode, {report.corrupt_frames} damaged"
    return "; ".join([counts, *report.notes])
