"""The same plan, decoded by Ray Data: CPU machines decode for the ranks that hold the GPUs.

    places (epoch, step) ──> actors, one CPU each: Loader.batch ──> blocks in the object store ──> this rank, in order

On a single machine the threads of `pipeline.loader` are faster: nothing passes through the object store. This way wins
where the ranks' own machine has too few cores to feed its GPUs and others have cores to spare (docs/sampling.md). Each
rank runs its own small Ray Data job over its own stripe of the plan: `streaming_split` would hand out blocks in the
order in which ranks ask, and the sequence would depend on the machines.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import ray
import ray.data

from pipeline.contract import MicaclError
from pipeline.loader import ClipBatch, Loader
from pipeline.prepare import quiet_ray_data

_STEPS_PER_TASK = 4
"""A block in the object store is so many batches."""
_STEPS_PER_JOB = 8192


def ray_batches(loader: Loader, epochs: int, *, actors: int, cpus_per_actor: float = 1) -> Iterator[ClipBatch]:
    """The batches from where the loader is to the end of epoch `epochs` - 1, on the Ray that is up; moves the loader.

    Raises MicaclError if the cluster cannot hold the actors, and as the loader does.
    """
    _require_cpus(actors * cpus_per_actor)
    quiet_ray_data()
    ray.data.DataContext.get_current().execution_options.preserve_order = True
    at, steps = loader.state_dict(), loader.steps_per_epoch
    for first in range(at["epoch"] * steps + at["step"], epochs * steps, _STEPS_PER_JOB):
        job = range(first, min(first + _STEPS_PER_JOB, epochs * steps))
        for batch in _run(loader, job, actors, cpus_per_actor):
            loader.seek(batch.epoch, batch.step + 1)
            yield batch


def _run(loader: Loader, places: range, actors: int, cpus_per_actor: float) -> Iterator[ClipBatch]:
    """The batches of some steps of the run, counted through its epochs."""
    # Not ray.data.range: its tasks would want a CPU each, and wait for ever when the actors hold them all.
    rows = ray.data.from_items(list(places), override_num_blocks=-(-len(places) // _STEPS_PER_TASK))
    decoded = rows.map_batches(
        _Decode,
        fn_constructor_args=(loader,),
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(size=actors),
        num_cpus=cpus_per_actor,
    )
    clips_per_rank = loader.config.global_batch // loader.ranks
    batches = decoded.iter_batches(batch_size=clips_per_rank, batch_format="numpy", prefetch_batches=2)
    for place, columns in zip(places, batches, strict=True):
        yield _batch(loader, *divmod(place, loader.steps_per_epoch), columns)


class _Decode:
    """An actor that holds a loader."""

    def __init__(self, loader: Loader) -> None:
        self.loader = loader

    def __call__(self, rows: dict[str, Any]) -> dict[str, Any]:
        """One batch, a row a clip."""
        batch = self.loader.batch(*divmod(int(rows["item"][0]), self.loader.steps_per_epoch))
        return {
            "frames": batch.frames_BNTHWC,
            "label": batch.labels_B,
            "key": np.array(batch.keys),
            "row": batch.rows_B,
            "position": batch.positions_B,
            "rng_key": batch.rng_keys_B2,
        }


def _batch(loader: Loader, epoch: int, step: int, columns: dict[str, Any]) -> ClipBatch:
    return ClipBatch(
        frames_BNTHWC=columns["frames"],
        labels_B=columns["label"],
        keys=tuple(str(key) for key in columns["key"]),
        rows_B=columns["row"],
        positions_B=columns["position"],
        rng_keys_B2=columns["rng_key"],
        mask_B=np.ones(len(columns["row"]), bool),
        epoch=epoch,
        step=step,
        state=loader.state_after(epoch, step),
    )


def _require_cpus(wanted: float) -> None:
    there = ray.cluster_resources().get("CPU", 0.0)
    if there < wanted:
        raise MicaclError(
            f"The stream's decoders want {wanted:g} CPUs, the Ray cluster has {there:g}.",
            "They would wait for ever, and training with them.",
            "Add CPU machines, lower --scaling.decoders, or leave it out: then each rank decodes in its own threads.",
        )
