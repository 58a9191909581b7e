"""Whole shards or ranges: how the bags of a plan are best read from storage far away. A choice, and nothing else.

    dense    the shards that are open hold mostly bags that this node will use soon    one request a shard, kept on disk
    sparse   of each shard a few bags are used, or too many shards are open at a time  one request a bag

A shard is read whole when this node uses at least half of its bytes while it is open, and all shards that are open at
a time fit in the cache. So at most two bytes are read for one that is used, and no shard is fetched twice in a cycle.
Nodes share a plan by stripes: of 8 nodes each uses an eighth of every shard, and reads ranges.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from pipeline.plan import EpochPlan
from pipeline.rows import SplitRows
from pipeline.runs import Ints

_LEAST_USED = 0.5
"""Share of a shard's bytes that a node must use to fetch it whole."""


def whole_shards(rows: SplitRows, open_bytes: int, *, mode: str, cache_bytes: int, nodes: int) -> NDArray[np.bool_]:
    """Which shards are fetched whole, shape (shards,). `open_bytes`: of the shards that are open at a time."""
    if mode != "auto":
        return np.full(len(rows.shards), mode == "whole")
    if open_bytes > cache_bytes:
        return np.zeros(len(rows.shards), bool)
    return np.asarray(rows.used_bytes / nodes >= _LEAST_USED * rows.shard_bytes, np.bool_)


def open_bytes_of_plan(rows: SplitRows, plan: EpochPlan) -> int:
    """Bytes of the shards that the next clips of a plan can come from: the reader's working set."""
    labels, open_C = plan.index.runs.labels_R, plan.open_shards_C
    of_class = [rows.shard_bytes[plan.index.runs.shards_R[labels == c]] for c in range(plan.index.classes)]
    return sum(_largest(sizes, int(n)) for sizes, n in zip(of_class, open_C, strict=True))


def open_bytes_in_order(rows: SplitRows, ranks: int) -> int:
    """The same of the natural order: ranks are in step, so all read from the same two neighbours or so."""
    return _largest(rows.shard_bytes, 1 + ranks)


def _largest(sizes: Ints | Sequence[int], count: int) -> int:
    return int(np.sort(np.asarray(sizes))[::-1][:count].sum())
