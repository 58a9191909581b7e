"""How well clips are mixed, by shard window: python bench/shuffle_quality.py

A split with DFEW's classes, ten times as large, in class-pure shards of 180 clips. A video has four clips, side by side
in one shard, as `prepare` packs them. Means over EPOCHS epochs and all draws of the classes:

    order        absolute rank correlation (Spearman) of a clip's place in the epoch and its shard's place on storage
    distance     between the shards of two clips of a class in a row, 1 being that of a full shuffle
    same shard   share of two clips of a class in a row that are from one shard
    same video   share of pairs of one class in a global batch that are from one video
"""

from __future__ import annotations

import datetime as dt
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from demo_steps import commit, machine

from pipeline.plan import EpochPlan, PlanConfig, PlanIndex
from pipeline.runs import Runs

COUNTS = tuple(10 * n for n in (1956, 1515, 2135, 1738, 1175, 116, 721))
WINDOWS = (1, 2, 4, 8, 16, 10**6)
EPOCHS = 5

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Split:
    """Rows by class and shard; the class, shard (counted in its class) and video of each."""

    label_N: Ints
    shard_N: Ints
    video_N: Ints
    counts: tuple[int, ...]

    @classmethod
    def of(cls, counts: tuple[int, ...], shard_rows: int = 180, video_clips: int = 4) -> Split:
        within = np.concatenate([np.arange(count) for count in counts])
        label = np.repeat(np.arange(len(counts)), counts)
        in_shard = within % shard_rows
        video = (label * 10**4 + within // shard_rows) * shard_rows + in_shard // video_clips
        return cls(label, within // shard_rows, video, counts)

    def index(self) -> PlanIndex:
        return PlanIndex(Runs.of_columns(self.label_N, self.label_N * 10**4 + self.shard_N), len(self.counts))


def quality(split: Split, index: PlanIndex, config: PlanConfig, epoch: int) -> tuple[float, float, float, float]:
    """(order, distance in shares of the class's shards, same shard, same video) of one epoch."""
    plan = EpochPlan(index, config, epoch)
    row_TG = np.stack([plan.batch(step) for step in range(plan.steps)])
    row_N = row_TG.ravel()
    found, weight = [], []
    for label in range(len(split.counts)):
        shard_N = split.shard_N[row_N[split.label_N[row_N] == label]]
        step = np.abs(np.diff(shard_N))
        found.append((abs(rank_correlation(shard_N)), step.mean() / (shard_N.max() + 1), (step == 0).mean()))
        weight.append(len(shard_N))
    order, distance, same = np.average(found, axis=0, weights=weight)
    return float(order), float(distance), float(same), same_video(split, row_TG)


def rank_correlation(shard_N: Ints) -> float:
    """Spearman's, of places 0..N with the shards at them; clips of one shard share a rank."""
    if not np.ptp(shard_N):
        return 0.0
    count_S = np.bincount(shard_N)
    rank_S = np.cumsum(count_S) - count_S / 2
    return float(np.corrcoef(np.arange(len(shard_N)), rank_S[shard_N])[0, 1])


def same_video(split: Split, row_TG: Ints) -> float:
    """Pairs of different clips of one video, of the pairs of different clips of one class, in a batch."""
    label_TG, video_TG = split.label_N[row_TG], split.video_N[row_TG]
    upper = np.triu_indices(row_TG.shape[1], 1)
    pair_TP = (row_TG[:, upper[0]] != row_TG[:, upper[1]]) & (label_TG[:, upper[0]] == label_TG[:, upper[1]])
    same_TP = pair_TP & (video_TG[:, upper[0]] == video_TG[:, upper[1]])
    return float(same_TP.sum() / pair_TP.sum())


def measure(split: Split, window: int, epochs: int = EPOCHS) -> npt.NDArray[np.float64]:
    config = PlanConfig(shard_window=window, global_batch=32)
    index = split.index()
    return np.mean([quality(split, index, config, epoch) for epoch in range(epochs)], axis=0)


def main() -> None:
    print(f"`python bench/shuffle_quality.py`, commit {commit()}, {machine()}, {dt.date.today().isoformat()}\n")  # noqa: DTZ011
    split = Split.of(COUNTS)
    measured = {window: measure(split, window) for window in WINDOWS}
    full = measured[WINDOWS[-1]]
    print("| shards in a window | order | distance | same shard, % | same video, % |")
    print("| --- | ---: | ---: | ---: | ---: |")
    for window, (order, distance, same_shard, video) in measured.items():
        name = f"{window}" if window < 10**6 else "all: a full shuffle"
        print(f"| {name} | {order:.3f} | {distance / full[1]:.2f} | {same_shard * 100:.1f} | {video * 100:.2f} |")


if __name__ == "__main__":
    main()
