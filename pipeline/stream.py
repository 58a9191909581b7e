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

import itertools
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.bags import Bag
from pipeline.buffers import Buffers
from pipeline.contract import MicaclError
from pipeline.dataset import Dataset
from pipeline.decode import Pixels, StreamConfig, decode_bag, decode_frames
from pipeline.decoders import Decoders, SharedArrays, can_share
from pipeline.node_cache import NodeCache
from pipeline.plan import Draw, EpochPlan
from pipeline.reads import open_bytes_in_order, open_bytes_of_plan, whole_shards
from pipeline.rows import Place, SplitRows, table_rows
from pipeline.shards import BagTable, find_bag, read_bag
from pipeline.spans import Checked, LocalSpans, RemoteSpans, Spans, require_sha256
from pipeline.storage import LocalStore

__all__ = ["BagStream", "Clip", "Decoded", "StreamConfig", "decode_bag"]

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

    def allocate(self, shape: tuple[int, ...]) -> Pixels:
        """The array, made for clips of this shape if it is not there."""
        with self._lock:
            if self._frames is None:
                self._frames = self.take((len(self.draws), *shape))
        return self._frames

    def place(self, i: int, shape: tuple[int, ...], key: str) -> Pixels:
        """The place of clip i. Raises MicaclError if its shape is not that of the clips before it."""
        if self.allocate(shape).shape[1:] != shape:
            raise MicaclError(
                f"A batch holds clips of the shapes {sorted({self.allocate(shape).shape[1:], shape})} (one is {key}).",
                "They cannot be stacked.",
                "Prepare all videos of a dataset with the same --crop settings.",
            )
        place: Pixels = self.allocate(shape)[i]  # a view: what is written there is in the batch
        return place


class _Part(NamedTuple):
    """Clips of a batch that one task decodes: a task a clip would cost a tenth of decoding it."""

    number: int
    batch: Decoded
    clips: range

    def keep(self, found: list[tuple[str, int]]) -> None:
        """Keys and labels of its clips."""
        for i, (key, label) in zip(self.clips, found, strict=True):
            self.batch.keys[i], self.batch.labels[i] = key, label


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
        whole_S: NDArray[np.bool_] | None = None,
    ) -> None:
        """`plan`: of the draws that will come, for the choice of reads; else the natural order.

        `nodes`: machines that read the plan together. `whole_S`: that choice, if it was made already.
        """
        self.rows = rows if isinstance(rows, SplitRows) else table_rows(dataset, rows)
        self.config, self.labels = config, dataset.labels
        self._url = dataset.store.url
        self._checked = Checked(len(self.rows))
        self.whole_S = whole_S
        self._spans = self._open_spans(dataset, plan, nodes)
        self._known: dict[int, _Known] = {}
        self._shape: tuple[int, ...] | None = None
        self._buffers = Buffers(2 + config.lookahead)

    def _open_spans(self, dataset: Dataset, plan: EpochPlan | None, nodes: int) -> Spans:
        if type(dataset.store) is LocalStore:
            return LocalSpans(dataset.store)
        config, limit = self.config, self.config.cache_mb * 2**20
        is_open = open_bytes_in_order(self.rows, 1) if plan is None else open_bytes_of_plan(self.rows, plan)
        if self.whole_S is None:
            self.whole_S = whole_shards(self.rows, is_open, mode=config.reads, cache_bytes=limit, nodes=nodes)
        cache = NodeCache(Path(config.cache_dir) if config.cache_dir else None, limit)
        return RemoteSpans(self.rows, self.whole_S, cache, config, self._checked)

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
        numbers = itertools.count()
        decoder = self._decoder()
        todo = (part for batch in map(self._begin, batches) for part in _parts(batch, numbers, decoder.clips_per_task))
        asked: deque[_Part] = deque()
        flying: deque[tuple[_Part, Future[Any]]] = deque()
        ask = max(0, self.config.prefetch - self.config.lookahead)
        try:
            while True:
                while sum(len(part.clips) for part, _ in flying) <= self.config.lookahead:
                    while sum(len(part.clips) for part in asked) <= ask and (part := next(todo, None)):
                        decoder.ask(part)
                        asked.append(part)
                    if not asked:
                        break
                    part = asked.popleft()
                    flying.append((part, decoder.submit(part, train)))
                if not flying:
                    return
                part, done = flying.popleft()
                part.keep(done.result())
                if part.clips.stop == len(part.batch.draws):
                    yield part.batch
        finally:
            decoder.close()

    def _decoder(self) -> _Threads | _Processes:
        if self.config.processes and can_share(self.rows):
            return _Processes(self)
        return _Threads(self)

    def ask(self, row: int) -> None:
        """Begin to fetch a bag that will be read soon."""
        self._spans.ask(row)

    def decode(self, batch: Decoded, i: int, *, train: bool) -> None:
        """One clip into its place. Runs in a decode thread or process. Raises MicaclError."""
        draw = batch.draws[i]
        view, known = self._checked_view(draw.row)
        table, spans = known.table, known.table.spans
        rng = np.random.Generator(np.random.Philox(key=np.array(draw.rng_key, np.uint64))) if train else None

        def member(number: int) -> memoryview:
            return view[spans[2 * number] : spans[2 * number + 1]]

        def place(shape: tuple[int, ...], _: type[np.uint8]) -> Pixels:
            return batch.place(i, shape, table.key)

        try:
            decode_frames(table, member, self.config, rng, place)
        except MicaclError as error:
            cause = f"{self._url(known.place.shard)}: {error.cause}"
            raise MicaclError(cause, error.consequence, error.remedy) from error
        batch.keys[i], batch.labels[i] = table.key, known.label

    def shape_of(self, row: int) -> tuple[int, ...]:
        """(instances, frames per instance, height, width, RGB) of a bag; reads the first one. Raises MicaclError."""
        if self._shape is None:
            table = self._checked_view(row)[1].table
            self._shape = (len(table.instance_frames), self.config.frames, table.size, table.size, 3)
        return self._shape

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


class _Threads:
    """Decodes parts in threads of this process."""

    clips_per_task = 4

    def __init__(self, stream: BagStream) -> None:
        self._stream = stream
        self._pool = ThreadPoolExecutor(stream.config.threads, thread_name_prefix="stream")

    def ask(self, part: _Part) -> None:
        for i in part.clips:
            self._stream.ask(part.batch.draws[i].row)

    def submit(self, part: _Part, train: bool) -> Future[list[tuple[str, int]]]:
        return self._pool.submit(self._decode, part, train)

    def _decode(self, part: _Part, train: bool) -> list[tuple[str, int]]:
        for i in part.clips:
            self._stream.decode(part.batch, i, train=train)
        return [(part.batch.keys[i], part.batch.labels[i]) for i in part.clips]

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)


class _Processes:
    """Decodes parts in children (pipeline/decoders.py), into memory that both see."""

    clips_per_task = 8

    def __init__(self, stream: BagStream) -> None:
        self._stream, self._arrays = stream, SharedArrays()
        self._buffers = Buffers(2**30, self._arrays.new)  # none is ever dropped: a child has it mapped
        self._children = Decoders(stream.rows, stream.config, stream.whole_S)

    def ask(self, part: _Part) -> None:
        self._children.ask(part.number, [part.batch.draws[i].row for i in part.clips])

    def submit(self, part: _Part, train: bool) -> Future[Any]:
        draws, batch = part.batch.draws, part.batch
        batch.take = self._buffers.take
        frames = batch.allocate(self._stream.shape_of(draws[0].row))
        clips = [(i, draws[i].row, draws[i].rng_key if train else None) for i in part.clips]
        return self._children.submit(part.number, self._arrays.shared(frames), frames.shape, clips)

    def close(self) -> None:
        self._children.close()
        self._arrays.close()


def _parts(batch: Decoded, numbers: Iterator[int], size: int) -> Iterator[_Part]:
    clips = len(batch.draws)
    parts = (range(i, min(i + size, clips)) for i in range(0, clips, size))
    return (_Part(next(numbers), batch, part) for part in parts)
