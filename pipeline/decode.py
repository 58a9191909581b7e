"""A bag -> the pixels that a step uses, straight into the place where the step wants them.

Training, evaluation, prediction and serving all decode here. Each stored frame is decoded at most once, and of JPEG
only what the sampler picked. The decoders work without the GIL.

Legend: N instances, T frames per instance, H W height and width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipeline.bags import Bag
from pipeline.codec import Buffer, StoredFrames, decode_frame, decode_stream
from pipeline.contract import MicaclError, require_between
from pipeline.samplers import SAMPLERS, pick_segments

Pixels = NDArray[np.uint8]


@dataclass(frozen=True, kw_only=True, slots=True)
class StreamConfig:
    """How clips are read."""

    frames: int = 4
    """Frames per instance that a step uses."""
    sampler: str = "segments"
    """Which of the stored frames: `segments` (evenly in each instance) or `m3dfel` (pipeline/samplers.py)."""
    slowest: float = 1.0
    """Least speed in training, of the clip's own: frames of a random stretch of each instance. For `segments`."""
    lookahead: int = 64
    """Clips decoded or being decoded ahead of the one that is used, per rank."""
    prefetch: int = 512
    """Clips ahead whose bytes are fetched, per rank; of storage far away."""
    threads: int = 2
    """That decode, per rank."""
    processes: int = 0
    """That decode instead of threads, per rank: faster with more than one, and the training loop keeps its GIL."""
    io_threads: int = 8
    """That fetch from storage far away, per rank."""
    reads: str = "auto"
    """Of storage far away: `whole` shards, `range` (bags alone), or `auto`: whichever fits the plan."""
    range_mb: int = 256
    """Bags kept in memory, per rank, of those that are read alone."""
    cache_mb: int = 4096
    """Shards kept on the local disk of a node, for all its ranks."""
    cache_dir: str = ""
    """Folder of that cache, kept between runs; default one of its own that goes with its last user."""

    def __post_init__(self) -> None:
        read = (self.prefetch, self.threads, self.io_threads, self.range_mb, self.cache_mb)
        if min(self.frames, self.lookahead, self.processes + 1, *read) < 1:
            raise MicaclError(
                "A field of --stream is below 1.", "No clip could be read.", "Give 1 or more for each of them."
            )
        require_between(0.05, 1, "--stream.slowest", self.slowest)
        if self.slowest < 1 and self.sampler != "segments":
            raise MicaclError(
                f"--stream.slowest is {self.slowest} with the sampler {self.sampler}.",
                "That sampler has one speed.",
                "Leave it at 1, or use --stream.sampler segments.",
            )
        for name, value, known in (
            ("sampler", self.sampler, tuple(SAMPLERS)),
            ("reads", self.reads, ("auto", "whole", "range")),
        ):
            if value not in known:
                raise MicaclError(
                    f"--stream.{name} is {value!r}.", "No clip could be read.", f"Use {' or '.join(known)}."
                )


MakePlace = Callable[[tuple[int, ...], type[np.uint8]], Pixels]
"""(shape, uint8) -> the array that is filled and returned, C-contiguous."""


def decode_bag(bag: Bag, config: StreamConfig, rng: np.random.Generator | None, place: MakePlace = np.empty) -> Pixels:
    """(instances, frames, H, W, 3) uint8: the frames of each instance that the sampler picks. Raises MicaclError."""
    members = [data for instance in bag.encoded for data in instance]
    return decode_frames(bag.meta, members.__getitem__, config, rng, place)


def decode_frames(
    meta: StoredFrames,
    member: Callable[[int], Buffer],
    config: StreamConfig,
    rng: np.random.Generator | None,
    place: MakePlace,
) -> Pixels:
    """The same of any bag whose members can be asked for by their number in tar order."""
    picked_NT = _pick(meta.instance_frames, config, rng)
    out_NTHWC = place((len(picked_NT), config.frames, meta.size, meta.size, 3), np.uint8)
    slots_FHWC = out_NTHWC.reshape(-1, *out_NTHWC.shape[2:])
    picked = [frame for row in picked_NT for frame in row]
    if meta.codec == "h264":
        _fill_from_streams(slots_FHWC, picked, meta, member)
        return out_NTHWC
    first: dict[int, int] = {}
    for slot, frame in enumerate(picked):
        if first.setdefault(frame, slot) == slot:
            decode_frame(member(frame), slots_FHWC[slot], meta, frame)
        else:
            slots_FHWC[slot] = slots_FHWC[first[frame]]
    return out_NTHWC


def _pick(instance_frames: Sequence[int], config: StreamConfig, rng: np.random.Generator | None) -> list[list[int]]:
    if config.slowest < 1:
        return pick_segments(instance_frames, config.frames, rng, config.slowest)
    return SAMPLERS[config.sampler](instance_frames, config.frames, rng)


def _fill_from_streams(
    slots_FHWC: Pixels, picked: Sequence[int], meta: StoredFrames, member: Callable[[int], Buffer]
) -> None:
    start = 0
    for instance, stored in enumerate(meta.instance_frames):
        wanted = sorted({frame - start for frame in picked if start <= frame < start + stored})
        if wanted:
            frames = dict(zip(wanted, decode_stream(member(instance), meta, instance, wanted), strict=True))
            for slot, frame in enumerate(picked):
                if start <= frame < start + stored:
                    slots_FHWC[slot] = frames[frame - start]
        start += stored
