"""A perceptual hash of a bag, and the pairs of bags that show the same clip.

    frames ──> grid 16 x 16 x 16 (time, rows, columns) ──3-D DCT──> signs of the low frequencies
                     look:   64 bits of the mean frame: who and where
                     motion: 256 bits of what changes in time, 4 frequencies of time x 8 x 8 of space

Two clips of one person look alike, so a hash of frames alone cannot tell a copy from a second take (measured in
docs/decisions/0012): how the face moves can. Everything is whole numbers, so the same frames give the same hash on
every machine.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import cv2
import numpy as np
from numpy.typing import NDArray

from pipeline.video import RGB

GRID = 16
MOTION = (4, 8, 8)
"""Frequencies kept in time (from the first), rows and columns (from zero)."""
LOOK_BITS, MOTION_BITS = 64, 256
HEX_DIGITS = (LOOK_BITS + MOTION_BITS) // 4
MAX_LOOK, LOOK_WEIGHT, MAX_DISTANCE = 12, 3, 80
"""A copy: at most so many bits of look, and so many of motion plus three times look, differ (docs/decisions/0012)."""

_TABLES, _LOOK_SHARE, _CROWD = 128, 3, 32
_COSINE = 1024
_PLACE_BITS = 32
_NOBODY = np.int64(2**62)

Ints = NDArray[np.int64]


def bag_phash(frames_THWC: RGB | Sequence[RGB]) -> str:
    """80 hex digits of uint8 frames of one size in time order, T from 1: look, then motion."""
    grid_TYX = _grid(frames_THWC)
    mean_YX = grid_TYX.sum(0) // GRID
    basis_KN = _cosines(8, GRID)
    look_KK = basis_KN @ (mean_YX - mean_YX.sum() // GRID**2) @ basis_KN.T
    moved_TKK = basis_KN @ (grid_TYX - mean_YX) @ basis_KN.T  # of a still clip exactly zero
    motion_FKK = np.tensordot(_cosines(MOTION[0] + 1, GRID)[1:], moved_TKK, 1)
    bits = np.concatenate([look_KK.ravel() > 0, motion_FKK.ravel() > 0])
    return np.packbits(bits).tobytes().hex()


def distance(a: str, b: str) -> tuple[int, int]:
    """Bits of look and of motion that differ."""
    look, motion = _differ(_words([a]), _words([b]))
    return int(look[0]), int(motion[0])


def near_duplicates(hashes: Sequence[str], splits: Sequence[str]) -> list[tuple[int, int, int]]:
    """(i, j, distance) of rows in different splits that show the same clip, i < j, in order.

    Locality-sensitive hashing with random bits: in each of 128 tables, rows that agree in about log2(N) + 2 bits meet,
    each at most 32 others. So time is about N log N and memory some 100 bytes a row, whatever the rows are. Of a row
    its nearest copy is told, not every one; of rows of a split that are equal, the first stands for all. Rows without a
    hash are passed over.
    """
    rows = [i for i, text in enumerate(hashes) if len(text) == HEX_DIGITS]
    if not rows:
        return []
    split_N = np.unique(np.asarray([splits[i] for i in rows]), return_inverse=True)[1].astype(np.int64)
    row_N, words_NW, split_N = _firsts(np.asarray(rows, np.int64), _words([hashes[i] for i in rows]), split_N)
    nearest_N = np.full(len(row_N), _NOBODY)  # distance and place of the nearest row, in one number
    for table in range(_TABLES):
        for a, b in _meetings(words_NW, split_N, table):
            look, motion = _differ(words_NW[a], words_NW[b])
            far = motion + LOOK_WEIGHT * look
            near = (look <= MAX_LOOK) & (far <= MAX_DISTANCE)
            for one, other in ((a[near], b[near]), (b[near], a[near])):
                np.minimum.at(nearest_N, one, far[near] << _PLACE_BITS | other)
    one = np.flatnonzero(nearest_N != _NOBODY)
    other, far = nearest_N[one] & ((1 << _PLACE_BITS) - 1), nearest_N[one] >> _PLACE_BITS
    pairs = np.stack([*np.sort(np.stack([row_N[one], row_N[other]]), axis=0), far], 1)
    return [(i, j, d) for i, j, d in np.unique(pairs, axis=0).tolist()]


def _grid(frames_THWC: RGB | Sequence[RGB]) -> Ints:
    """(16, 16, 16) means of grey, 1/256 of a level; exact, because sums of whole numbers below 2^53 are."""
    frames = len(frames_THWC)
    height, width, _ = frames_THWC[0].shape
    rows_NH, columns_NW = _shares(GRID, height), _shares(GRID, width)
    weights = np.array([[77, 150, 29]], np.float32)  # grey is then below 2^24, so float32 is exact
    greys = (cv2.transform(frame_HWC.astype(np.float32), weights) for frame_HWC in frames_THWC)
    small = [(rows_NH @ grey_HW @ columns_NW.T) // (height * width) for grey_HW in greys]
    cells = _shares(GRID, frames) @ np.stack(small).reshape(frames, GRID * GRID) // frames
    return np.asarray(cells.reshape(GRID, GRID, GRID), np.int64)


def _shares(bins: int, length: int) -> NDArray[np.float64]:
    """(bins, length) overlap of each bin with each pixel, in 1/bins pixel: rows sum to length."""
    bin_edges, pixel_edges = np.arange(bins + 1)[:, None] * length, np.arange(length + 1)[None] * bins
    overlap = np.minimum(bin_edges[1:], pixel_edges[:, 1:]) - np.maximum(bin_edges[:-1], pixel_edges[:, :-1])
    return np.asarray(np.maximum(overlap, 0), np.float64)


def _cosines(count: int, length: int) -> Ints:
    """(count, length) first rows of the DCT, rounded to 1/1024."""
    angle = np.pi * np.outer(np.arange(count), 2 * np.arange(length) + 1) / (2 * length)
    return np.asarray(np.rint(_COSINE * np.cos(angle)), np.int64)


def _words(hashes: Sequence[str]) -> NDArray[np.uint64]:
    """(N, 5): one word of look and four of motion."""
    return np.frombuffer(bytes.fromhex("".join(hashes)), ">u8").astype(np.uint64).reshape(len(hashes), -1)


def _differ(a_NW: NDArray[np.uint64], b_NW: NDArray[np.uint64]) -> tuple[Ints, Ints]:
    differ_NW = np.bitwise_count(a_NW ^ b_NW).astype(np.int64)
    return differ_NW[:, 0], differ_NW[:, 1:].sum(1)


def _firsts(row_N: Ints, words_NW: NDArray[np.uint64], split_N: Ints) -> tuple[Ints, NDArray[np.uint64], Ints]:
    """The first row of each (hash, split): a cluster of equal bags is compared once."""
    keys = np.concatenate([words_NW, split_N[:, None].astype(np.uint64)], 1)
    first = np.sort(np.unique(keys, axis=0, return_index=True)[1])
    return row_N[first], words_NW[first], split_N[first]


def _meetings(words_NW: NDArray[np.uint64], split_N: Ints, table: int) -> Iterator[tuple[Ints, Ints]]:
    """Rows of different splits that agree in the bits of this table."""
    rows = len(words_NW)
    count = min(31, rows.bit_length() + 2)
    salt_N = np.random.Philox(np.random.SeedSequence([table, 0])).random_raw(rows) >> np.uint64(32)
    key_N = np.zeros(rows, np.uint64)
    for bit in _random_bits(count, table):
        value_N = words_NW[:, bit // 64] >> np.uint64(63 - bit % 64) & np.uint64(1)
        key_N = key_N << np.uint64(1) | value_N
    order_N = np.argsort(key_N << np.uint64(32) | salt_N, kind="stable")  # a crowd meets in another order in each table
    key_N, split_N = key_N[order_N], split_N[order_N]
    for step in range(1, min(_CROWD, rows - 1) + 1):
        same = key_N[step:] == key_N[:-step]
        if not same.any():
            return
        at = np.flatnonzero(same & (split_N[step:] != split_N[:-step]))
        yield order_N[at], order_N[at + step]


def _random_bits(count: int, table: int) -> list[int]:
    """A third of look, which tells people apart and differs little in copies; the rest of motion."""
    dice = np.random.Philox(np.random.SeedSequence([table, 1])).random_raw(LOOK_BITS + MOTION_BITS)
    look, motion = np.argsort(dice[:LOOK_BITS]), LOOK_BITS + np.argsort(dice[LOOK_BITS:])
    of_look = count // _LOOK_SHARE
    return [*look[:of_look].tolist(), *motion[: count - of_look].tolist()]
