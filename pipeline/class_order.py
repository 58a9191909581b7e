"""Which clip of a class comes when: without replacement, cycle after cycle, some shards at a time.

    items of a class, by shard     aaaa bbbb cccc dddd eeee          (shard_window 2)
    one cycle of an epoch          [dbbdbddb] [eaaeaeae] [cccc]      shards permuted, cut into windows, mixed inside

Within an epoch every cycle but the last is whole and has a fresh order. The last one is partial, with r items: the next
r of a *master* order, the same in all epochs, that is gone through like a circle. So in every epoch, and after any
number of epochs, two items of a class differ by at most one use. The r items too come in a fresh order, in fresh
windows; the master only says who is in.

    master, a circle of all items   ( dbca… )      epoch 0: |----|   epoch 1:      |----|   epoch 2: --|         |--

Nothing is computed before it is asked for: a cycle is an order of shards, a window is made when it is entered.

`GroupedOrder` is the same twice over, for a second key: the subjects (or scenes) of a class take turns in such cycles,
and each goes through its own clips in such cycles.

Legend: S shards of a class, P parts of shards in a cycle.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import numpy as np
import numpy.typing as npt

from pipeline.runs import ClassRows, Ints

_MASTER, _IN_SHARD, _CYCLE, _WINDOW = range(4)  # the first word of each key: no two uses share their bits

_GROUPS = 4096
"""Groups of a class whose orders are in memory; one is some 2 kB, and any can be made again."""


def random_words(count: int, seed: int, *key: int) -> npt.NDArray[np.uint64]:
    """`count` random 64-bit words that are a function of the key: raw Philox keyed by SeedSequence.

    numpy promises both to be the same in every release; it does not promise that of `Generator.permutation`.
    """
    return np.random.Philox(np.random.SeedSequence(seed, spawn_key=key)).random_raw(count)


def shuffled(count: int, seed: int, *key: int) -> Ints:
    """A permutation of 0..count that is a function of the key."""
    if count < 2:  # most groups of a second key have one shard, and many one clip
        return np.arange(count)
    return np.argsort(random_words(count, seed, *key), kind="stable")


class Order(Protocol):
    """The draws of one class in one epoch."""

    def rows(self, start: int, stop: int) -> Ints:
        """Rows of the draws start..stop."""


class Cycles:
    """Items 0..n, in shards of the given sizes, drawn `draws` times in an epoch that follows on `before` draws."""

    def __init__(
        self, sizes_S: Ints, *, before: int, draws: int, window: int, seed: int, key: tuple[int, ...], epoch: int
    ) -> None:
        """`window`: shards that are mixed. `key`: of what is ordered; no two things of a seed may share it."""
        self.sizes_S, self.window, self.seed, self.key, self.epoch = sizes_S, window, seed, key, epoch
        self.items = int(sizes_S.sum())
        self._first_S = np.cumsum(sizes_S) - sizes_S
        self.whole_cycles, self.rest = divmod(draws, self.items)
        self.offset = before % self.items
        self._cycle: tuple[int, Ints, Ints, Ints] = (-1, sizes_S, sizes_S, sizes_S)
        self._window: tuple[tuple[int, int], Ints] = ((-1, -1), sizes_S)

    def draws(self, start: int, stop: int) -> Ints:
        """Items of the draws start..stop of this epoch."""
        parts = []
        while start < stop:
            cycle, at = divmod(start, self.items)
            shards_P, low_P, end_P = self._parts(cycle)
            place = int(np.searchsorted(end_P, at, "right")) // self.window
            first = int(end_P[place * self.window - 1]) if place else 0
            part = self._mixed(cycle, place, shards_P, low_P, end_P)[at - first : at - first + stop - start]
            parts.append(part)
            start += len(part)
        return np.concatenate(parts) if parts else np.empty(0, np.int64)

    def _parts(self, cycle: int) -> tuple[Ints, Ints, Ints]:
        """A cycle as parts of shards in order: (shard, first place in it, items up to and with it), shape (P,)."""
        last = self._cycle  # read once: reader threads share a plan
        if last[0] != cycle:
            if cycle < self.whole_cycles:
                shards_P, low_P, high_P = np.arange(len(self.sizes_S)), np.zeros_like(self.sizes_S), self.sizes_S
            else:
                shards_P, low_P, high_P = self._arc()
            order = shuffled(len(shards_P), self.seed, _CYCLE, *self.key, self.epoch, cycle)
            sizes_P = (high_P - low_P)[order]
            self._cycle = last = (cycle, shards_P[order], low_P[order], np.cumsum(sizes_P))
        return last[1:]

    def _arc(self) -> tuple[Ints, Ints, Ints]:
        """The items of the partial cycle as parts of shards: (shard, first place, end place) in the master order."""
        order = shuffled(len(self.sizes_S), self.seed, _MASTER, *self.key)
        twice = np.concatenate([order, order])  # the circle, cut open and laid out two times
        end = np.cumsum(self.sizes_S[twice])
        first = end - self.sizes_S[twice]
        low = np.maximum(self.offset, first) - first
        high = np.minimum(self.offset + self.rest, end) - first
        there = low < high
        return twice[there], low[there], high[there]

    def _mixed(self, cycle: int, place: int, shards_P: Ints, low_P: Ints, end_P: Ints) -> Ints:
        """The items of one window in the order of its draws."""
        last = self._window
        if last[0] != (cycle, place):
            members = []
            for p in range(place * self.window, min((place + 1) * self.window, len(shards_P))):
                size = int(end_P[p] - (end_P[p - 1] if p else 0))
                members.append(self._members(int(shards_P[p]), int(low_P[p]), size))
            items = np.concatenate(members)
            key = (_WINDOW, *self.key, self.epoch, cycle, place)
            self._window = last = ((cycle, place), items[shuffled(len(items), self.seed, *key)])
        return last[1]

    def _members(self, shard: int, low: int, size: int) -> Ints:
        """`size` items of a shard from place `low` of its master order on."""
        first, whole = int(self._first_S[shard]), int(self.sizes_S[shard])
        if size == whole:
            return np.arange(first, first + whole)
        return first + shuffled(whole, self.seed, _IN_SHARD, *self.key, shard)[low : low + size]

    def places(self) -> Ints:
        """Where in the master order each item is, shape (items,)."""
        order = shuffled(len(self.sizes_S), self.seed, _MASTER, *self.key)
        parts = [(s, shuffled(int(self.sizes_S[s]), self.seed, _IN_SHARD, *self.key, s)) for s in order.tolist()]
        return np.argsort(np.concatenate([self._first_S[s] + part for s, part in parts]), kind="stable")


class ClassOrder:
    """Draws of a class: its clips in cycles."""

    def __init__(self, members: ClassRows, cycles_of: CyclesOf, before: int, draws: int) -> None:
        """`before`, `draws`: of the class, in the epochs before and in this one."""
        self._members = members
        self._cycles = cycles_of(members.sizes_S, before, draws, ())

    def rows(self, start: int, stop: int) -> Ints:
        return self._members.rows(self._cycles.draws(start, stop))


class GroupedOrder:
    """Draws of a class: its groups in cycles, and the clips of each group in cycles of their own."""

    def __init__(self, rows_N: Ints, groups_N: Ints, cycles_of: CyclesOf, before: int, draws: int) -> None:
        """`rows_N`: rows of the class; `groups_N`: the group of each, any whole numbers."""
        order = np.argsort(groups_N, kind="stable")
        edges = np.flatnonzero(np.diff(groups_N[order])) + 1
        self._rows_G = np.split(rows_N[order], edges)
        self._cycles_of, self._before = cycles_of, before
        self._turns = cycles_of(np.array([len(self._rows_G)]), before, draws, ())
        self._place_G = self._turns.places()
        self._inner: dict[int, Cycles] = {}

    def rows(self, start: int, stop: int) -> Ints:
        groups = self._turns.draws(start, stop).tolist()
        use = [draw // self._turns.items for draw in range(start, stop)]  # a group comes once a cycle
        items = [int(self._of_group(g).draws(n, n + 1)[0]) for g, n in zip(groups, use, strict=True)]
        return np.array([self._rows_G[g][i] for g, i in zip(groups, items, strict=True)], np.int64)

    def _of_group(self, group: int) -> Cycles:
        cycles = self._inner.get(group)
        if cycles is None:
            turns, place = self._turns, int(self._place_G[group])
            before = max(0, -(-(self._before - place) // turns.items))  # times the circle has passed this place
            draws = turns.whole_cycles + int((place - turns.offset) % turns.items < turns.rest)
            sizes = np.array([len(self._rows_G[group])])
            cycles = self._cycles_of(sizes, before, draws, (1, group))
            self._inner = self._inner if len(self._inner) < _GROUPS else {}
            self._inner[group] = cycles
        return cycles


CyclesOf = Callable[[Ints, int, int, tuple[int, ...]], Cycles]
"""(shard sizes, draws before the epoch, draws in it, key within the class) -> Cycles."""
