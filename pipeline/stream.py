"""A plan -> decoded bags: look-ahead, hash check, decode of the frames that are used, in the order of the plan.

    draws ──ask──> bytes on their way ──view──> sha256 (first read) ──> frames picked ──decode──> a place in the batch
            prefetch (I/O threads, pipeline/spans.py)                   lookahead (decode threads)

Training, evaluation and prediction over shards all read through here. Two distances ahead of the clip that is used:
`prefetch` clips have their bytes asked for, so that a slow store is not waited for, and `lookahead` clips are decoded.
Threads do the work where the GIL is released (network, hashing, decoding); batches come out in plan order whatever
thread was first, and a batch is decoded where it will lie: nothing is copied together afterwards.

Legend: B clips of a batch, N instances, T frames per instance, H W height and width.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, Self

import numpy as np
import pyarrow as pa

from pipeline.bags import Bag
from pipeline.buffers import Buffers
from pipeline.contract import MicaclError
from pipeline.dataset import Dataset
from pipeline.decode import Pixels, StreamConfig, decode_bag, decode_frames
from pipeline.node_cache import NodeCache
from pipeline.plan import Draw, EpochPlan
from pipeline.reads import open_bytes_in_order, open_bytes_of_plan, whole_shards
from pipeline.rows import Place, SplitRows, table_rows
from pipeline.shards import BagTable, find_bag, read_bag
from pipeline.spans import Checked, LocalSpans, RemoteSpans, Spans, require_sha256
from pipeline.storage import LocalStore

__all__ = ["BagStream", "Clip", "Decoded", "StreamConfig", "decode_bag"]

_CLIPS_PER_TASK = 4
_KNOWN = 32768
"""Bags of which is remembered where they and their members lie; one is some kilobyte."""


@dataclass(frozen=True, slots=True)
class Clip:
    """One decoded bag as a step uses it."""

    frames_NTHWC: Pixels
    """(instances, frames per instance, height, width, RGB)."""
    label: int
    """Place in the label set; -1 if the bag has none."""
    key: str
    row: int
    rng_key: tuple[int, int]
    """For augmentation: a function of the place in the plan, not of the worker."""


@dataclass(slots=True)
class Decoded:
    """The clips of some draws, decoded into one array."""

    draws: Sequence[Draw]
    keys: list[str]
    labels: list[int]
    take: Callable[[tuple[int, ...]], Pixels]
    """Shape -> the array."""
    _frames: Pixels | None = None
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def frames_BNTHWC(self) -> Pixels:
        """(clips, instances, frames per instance, height, width, RGB) uint8."""
        assert self._frames is not None, "asked for before a clip was decoded"
        return self._frames

    def place(self, i: int, shape: tuple[int, ...], key: str) -> Pixels:
        """The place of clip i. Raises MicaclError if its shape is not that of the clips before it."""
        with self._lock:
            if self._frames is None:
                self._frames = self.take((len(self.draws), *shape))
        if self._frames.shape[1:] != shape:
            raise MicaclError(
                f"A batch holds clips of the shapes {sorted({self._frames.shape[1:], shape})} (the last is {key}).",
                "They cannot be stacked.",
                "Prepare all videos of a dataset with the same --crop settings.",
            )
        place: Pixels = self._frames[i]  # a view: what is written there is in the batch
        return place


class _Part(NamedTuple):
    """Clips of a batch that one task decodes: a task a clip would cost a tenth of decoding it."""

    batch: Decoded
    clips: range


class _Known(NamedTuple):
    """What need not be looked up again of a bag that was read."""

    place: Place
    table: BagTable
    label: int


class BagStream:
    """Reads the bags of some rows in any order that a plan says. Close it, or use it in a `with` block."""

    def __init__(
        self,
        dataset: Dataset,
        rows: SplitRows | pa.Table,
        config: StreamConfig,
        *,
        plan: EpochPlan | None = None,
        nodes: int = 1,
    ) -> None:
        """`plan`: of the draws that will come, for the choice of reads; else the natural order.

        `nodes`: machines that read the plan together.
        """
        self.rows = rows if isinstance(rows, SplitRows) else table_rows(dataset, rows)
        self.config, self.labels = config, dataset.labels
        self._url = dataset.store.url
        self._checked = Checked(len(self.rows))
        self._spans = self._open_spans(dataset, plan, nodes)
        self._known: dict[int, _Known] = {}
        self._buffers = Buffers(2 + config.lookahead)

    def _open_spans(self, dataset: Dataset, plan: EpochPlan | None, nodes: int) -> Spans:
        if type(dataset.store) is LocalStore:
            return LocalSpans(dataset.store)
        config, limit = self.config, self.config.cache_mb * 2**20
        is_open = open_bytes_in_order(self.rows, 1) if plan is None else open_bytes_of_plan(self.rows, plan)
        whole_S = whole_shards(self.rows, is_open, mode=config.reads, cache_bytes=limit, nodes=nodes)
        cache = NodeCache(Path(config.cache_dir) if config.cache_dir else None, limit)
        return RemoteSpans(self.rows, whole_S, cache, config, self._checked)

    def close(self) -> None:
        self._spans.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def bag(self, row: int) -> Bag:
        """One stored bag, hash-checked. Raises MicaclError naming shard and key."""
        place = self.rows.place(row)
        where = f"{self._url(place.shard)} bag {place.key}"
        view = self._spans.view(row, place)
        require_sha256(view, place, where)
        return read_bag(bytes(view), where)

    def clip(self, draw: Draw, *, train: bool) -> Clip:
        """Decode the frames that this draw uses: random by its key in training, always the same else."""
        return next(self.read([draw], train=train))

    def read(self, draws: Iterable[Draw], *, train: bool) -> Iterator[Clip]:
        """Clips in the order of the draws."""
        for one in self.read_batches(([draw] for draw in draws), train=train):
            draw = one.draws[0]
            yield Clip(one.frames_BNTHWC[0], one.labels[0], one.keys[0], draw.row, draw.rng_key)

    def read_batches(self, batches: Iterable[Sequence[Draw]], *, train: bool) -> Iterator[Decoded]:
        """The clips of each batch of draws, in order, `lookahead` of them in flight. No batch may be empty."""
        todo = (part for batch in map(self._begin, batches) for part in _parts(batch))
        asked: deque[_Part] = deque()
        flying: deque[tuple[_Part, Future[None]]] = deque()
        ask = max(0, self.config.prefetch - self.config.lookahead)
        pool = ThreadPoolExecutor(self.config.threads, thread_name_prefix="stream")
        try:
            while True:
                while sum(len(part.clips) for part, _ in flying) <= self.config.lookahead:
                    while sum(len(part.clips) for part in asked) <= ask and (part := next(todo, None)):
                        for i in part.clips:
                            self._spans.ask(part.batch.draws[i].row)
                        asked.append(part)
                    if not asked:
                        break
                    part = asked.popleft()
                    flying.append((part, pool.submit(self._decode_part, part, train)))
                if not flying:
                    return
                part, done = flying.popleft()
                done.result()
                if part.clips.stop == len(part.batch.draws):
                    yield part.batch
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def _decode_part(self, part: _Part, train: bool) -> None:
        for i in part.clips:
            self._decode(part.batch, i, train)

    def _decode(self, batch: Decoded, i: int, train: bool) -> None:
        """One clip into its place. Runs in a decode thread."""
        draw = batch.draws[i]
        view, known = self._checked_view(draw.row)
        table, spans = known.table, known.table.spans
        rng = np.random.Generator(np.random.Philox(key=np.array(draw.rng_key, np.uint64))) if train else None

        def member(number: int) -> memoryview:
            return view[spans[2 * number] : spans[2 * number + 1]]

        def place(shape: tuple[int, ...], _: type[np.uint8]) -> Pixels:
            return batch.place(i, shape, table.key)

        decode_frames(table, member, self.config, rng, place)
        batch.keys[i], batch.labels[i] = table.key, known.label

    def _checked_view(self, row: int) -> tuple[memoryview, _Known]:
        """The span of a row and what is known of it. Raises MicaclError."""
        known = self._known.get(row)
        place = known.place if known else self.rows.place(row)
        view = self._spans.view(row, place)
        if known and row in self._checked and len(view) == place.size:
            return view, known
        where = f"{self._url(place.shard)} bag {place.key}"
        view = self._spans.checked(row, place, view, where)
        self._checked.add(row)
        known = _Known(place, find_bag(view, where), self.rows.label(row))
        if len(self._known) >= _KNOWN:
            self._known.clear()
        self._known[row] = known
        return view, known

    def _begin(self, draws: Sequence[Draw]) -> Decoded:
        return Decoded(draws, [""] * len(draws), [-1] * len(draws), self._buffers.take)


def _parts(batch: Decoded) -> Iterator[_Part]:
    clips = len(batch.draws)
    return (_Part(batch, range(i, min(i + _CLIPS_PER_TASK, clips))) for i in range(0, clips, _CLIPS_PER_TASK))
