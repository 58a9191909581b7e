"""`micacl plan`: what a plan does to a split, in a table for people, before anything is trained."""

from __future__ import annotations

from typing import Any

from pipeline.cli import DatasetUrl, absolute, say
from pipeline.contract import require_at_least
from pipeline.dataset import Dataset, open_dataset
from pipeline.decode import StreamConfig
from pipeline.loader import Loader
from pipeline.policies import PlanConfig
from pipeline.reads import open_bytes_of_plan, whole_shards


def plan(
    dataset: DatasetUrl,
    split: str = "train",
    fold: int | None = None,
    where: str = "",
    version: int | None = None,
    epoch: int = 0,
    ranks: int = 1,
    nodes: int = 1,
    plan: PlanConfig = PlanConfig(),
    stream: StreamConfig = StreamConfig(),
) -> dict[str, Any]:
    """What a plan does to a split: clips of each class per batch and epoch, uses of a clip, the reader's working set.

    Args:
        dataset: folder or s3://bucket/prefix.
        fold: the test fold of a dataset in folds.
        where: only bags of which this holds, e.g. `face_px >= 48`.
        version: number; default the newest.
        epoch: counted from 0; it matters with --plan.then.
        ranks: that share the global batch.
        nodes: machines on which they are.
    """
    opened = open_dataset(absolute(dataset), version, fold, where)
    result = describe_plan(opened, split, plan, stream, ranks=ranks, nodes=nodes, epoch=epoch)
    say(str(result["says"]))
    return result


def describe_plan(
    dataset: Dataset, split: str, config: PlanConfig, stream: StreamConfig, *, ranks: int, nodes: int, epoch: int
) -> dict[str, Any]:
    """Counts of one epoch by class, the reader's working set and its way of reading. Raises MicaclError.

    `says` is the same as text; `quota` is clips per global batch, `uses` is draws of a clip in the epoch.
    """
    require_at_least(1, ("--ranks", ranks), ("--nodes", nodes))
    require_at_least(0, ("--epoch", epoch))
    loader = Loader(dataset, split, config, stream, ranks=ranks, nodes=nodes)
    plan, rows = loader.plan(epoch), loader.rows
    of_class = zip(dataset.labels, loader.index.counts, plan.quota_C.tolist(), plan.draws_C.tolist(), strict=True)
    classes = [
        {"label": label, "clips": clips, "quota": round(quota, 4), "draws": draws, "uses": _uses(draws, clips)}
        for label, clips, quota, draws in of_class
    ]
    is_open = open_bytes_of_plan(rows, plan)
    whole_S = whole_shards(rows, is_open, mode=stream.reads, cache_bytes=stream.cache_mb * 2**20, nodes=nodes)
    found = {
        "split": split,
        "epoch": epoch,
        "steps": plan.steps,
        "global_batch": config.global_batch,
        "clips_per_rank": config.global_batch // ranks,
        "classes": classes,
        "shards": len(rows.shards),
        "shards_read_whole": int(whole_S.sum()),
        "working_set_mb": round(is_open / 2**20, 1),
        "plan": plan.hash,
    }
    return {**found, "says": _text(found)}


def _uses(draws: int, clips: int) -> list[int]:
    """Fewest and most draws of one clip: they differ by at most one."""
    return [draws // clips, -(-draws // clips)]


def _text(found: dict[str, Any]) -> str:
    width = max(len(row["label"]) for row in found["classes"])
    lines = [f"{'':{width}}  clips  per batch    draws  uses of a clip"]
    for row in found["classes"]:
        counts = f"{row['clips']:6} {row['quota']:10.2f} {row['draws']:8}"
        lines.append(f"{row['label']:{width}} {counts}  {_span(row['uses'])}")
    steps = f"epoch {found['epoch']}: {found['steps']} steps of {found['global_batch']} clips"
    lines.append(f"{steps}, {found['clips_per_rank']} on each rank")
    whole = f"{found['shards_read_whole']} of {found['shards']} shards would be read whole from a bucket"
    lines.append(f"{whole}; {found['working_set_mb']} MB of shards are open at a time")
    return "\n".join(lines)


def _span(uses: list[int]) -> str:
    return str(uses[0]) if uses[0] == uses[1] else f"{uses[0]} or {uses[1]}"
