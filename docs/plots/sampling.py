"""Draws the pictures of docs/sampling.md: python docs/plots/sampling.py

Same code, same bytes: no dates, fixed ids. Each picture is a function and a file beside this one.
"""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl
import numpy as np

mpl.use("svg")
mpl.rcParams.update({
    "svg.hashsalt": "sampling", "svg.fonttype": "none", "font.size": 9, "axes.spines.top": False,
    "axes.spines.right": False, "legend.frameon": False, "figure.constrained_layout.use": True,
})
import matplotlib.pyplot as plt  # noqa: E402

from pipeline.plan import EpochPlan, PlanConfig, PlanIndex, class_weights  # noqa: E402

HERE = Path(__file__).parent
DFEW = {"happy": 1956, "sad": 1515, "neutral": 2135, "angry": 1738, "surprise": 1175, "disgust": 116, "fear": 721}
COLOURS = plt.get_cmap("tab10").colors


def dfew_index() -> PlanIndex:
    """Clips in class-pure shards of 100."""
    labels = np.repeat(np.arange(7), list(DFEW.values()))
    within = np.concatenate([np.arange(count) for count in DFEW.values()])
    return PlanIndex.of_columns(labels, labels * 1000 + within // 100, 7)


def labels_of(index: PlanIndex) -> np.ndarray:
    return np.repeat(index.runs.labels_R, index.runs.counts_R)


def policies() -> plt.Figure:
    """Share of each class under each policy."""
    configs = {
        "natural": PlanConfig(policy="natural"),
        "power 0.75": PlanConfig(policy="power", power=0.75),
        "sqrt": PlanConfig(policy="sqrt"),
        "effective 0.999": PlanConfig(policy="effective"),
        "sqrt, 2 of 16 a class": PlanConfig(policy="sqrt", clips_per_class=2),
        "uniform": PlanConfig(policy="uniform"),
        "power -0.5": PlanConfig(policy="power", power=-0.5),
    }
    figure, axes = plt.subplots(figsize=(7.5, 2.8))
    for n, (name, config) in enumerate(configs.items()):
        share_C = class_weights(list(DFEW.values()), config) * 100
        axes.bar(np.arange(7) + (n - 3) * 0.12, share_C, 0.12, label=name, color=plt.get_cmap("viridis")(n / 6))
    axes.set_xticks(range(7), [f"{name}\n{count:,}" for name, count in DFEW.items()])
    axes.set_ylabel("share of the draws, %")
    axes.legend(ncols=3, loc="upper left", fontsize=8)
    axes.set_ylim(0, 52)
    return figure


def error() -> plt.Figure:
    """Clips of each class after each step, less what its quota says: the plan, and classes drawn at random."""
    index = dfew_index()
    plan = EpochPlan(index, PlanConfig(policy="effective", global_batch=16, steps_per_epoch=90), 0)
    label_N = labels_of(index)
    count_TC = np.stack([np.bincount(label_N[plan.batch(step)], minlength=7) for step in range(plan.steps)])
    random_TC = np.random.default_rng(0).multinomial(16, plan.quota_C / 16, size=plan.steps)
    figure, both = plt.subplots(1, 2, figsize=(7.5, 2.6))
    for axes, counts_TC, title in zip(both, (count_TC, random_TC), ("the plan", "classes drawn at random"), strict=True):
        away_TC = np.cumsum(counts_TC, 0) - np.arange(1, plan.steps + 1)[:, None] * plan.quota_C
        for label, name in enumerate(DFEW):
            axes.plot(np.round(away_TC[:, label], 2), color=COLOURS[label], lw=0.7, label=name)
        axes.set_title(title, fontsize=9)
        axes.set_xlabel("step")
    both[0].set_ylim(-1.05, 1.05)
    both[0].set_ylabel("clips too many or too few")
    both[1].legend(fontsize=7, ncols=2, loc="lower left")
    return figure


def windows() -> plt.Figure:
    """Which shard each draw of one class comes from: one epoch of two cycles and a half."""
    labels, shards = np.zeros(144, int), np.arange(144) // 6
    index = PlanIndex.of_columns(labels, shards, 1)
    plan = EpochPlan(index, PlanConfig(global_batch=12, steps_per_epoch=30), 0)
    row_N = np.concatenate([plan.batch(step) for step in range(plan.steps)])
    figure, axes = plt.subplots(figsize=(7.5, 2.8))
    for start in range(0, 360, 24):
        axes.axvline(start, color="0.85" if start % 144 else "0.2", lw=0.7)
    axes.scatter(np.arange(360), shards[row_N], s=3, color=COLOURS[0])
    axes.set_xlabel("draw of the class (lines: a window of 4 shards, a cycle of all)")
    axes.set_ylabel("shard")
    return figure


def schedule() -> plt.Figure:
    """Clips of each class in each epoch of a run that begins with the data as it is and ends balanced."""
    config = PlanConfig(policy="natural", then="uniform", then_from=6, then_over=7)
    index = dfew_index()
    draws_EC = np.stack([EpochPlan(index, config, epoch).draws_C for epoch in range(20)])
    figure, axes = plt.subplots(figsize=(7.5, 2.6))
    for label, name in enumerate(DFEW):
        axes.step(range(20), draws_EC[:, label] / draws_EC[0].sum() * 100, where="mid", color=COLOURS[label], label=name)
    axes.set_xlabel("epoch (policy natural, then uniform, then_from 6, then_over 7)")
    axes.set_ylabel("share of the draws, %")
    axes.set_ylim(0)
    axes.set_xticks(range(0, 20, 2))
    axes.legend(ncols=1, fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def master() -> plt.Figure:
    """Uses of each clip of a class after each epoch, in the master order: a band that goes round."""
    index = PlanIndex.of_columns(np.zeros(60, int), np.arange(60) // 6, 1)
    plans = [EpochPlan(index, PlanConfig(global_batch=1, steps_per_epoch=22, seed=2), epoch) for epoch in range(9)]
    row_EN = np.stack([[plan.batch(step)[0] for step in range(plan.steps)] for plan in plans])
    first_use = list(dict.fromkeys(row_EN.ravel().tolist()))
    order = np.argsort(plans[0]._order(0)._cycles.places())  # noqa: SLF001
    assert sorted(first_use) == sorted(order.tolist())
    use_EN = np.stack([np.bincount(row_EN[: epoch + 1].ravel(), minlength=60)[order] for epoch in range(9)])
    figure, axes = plt.subplots(figsize=(7.5, 2.2))
    mesh = axes.imshow(use_EN, cmap="Blues", vmin=0, vmax=5, aspect="auto", interpolation="none")
    figure.colorbar(mesh, ax=axes, label="uses", ticks=range(6))
    axes.set_xlabel("clips of the class, in the master order")
    axes.set_ylabel("after epoch")
    axes.set_yticks(range(9))
    return figure


def main() -> None:
    for draw in (policies, error, windows, schedule, master):
        figure = draw()
        figure.savefig(HERE / f"sampling-{draw.__name__}.svg", metadata={"Date": None, "Creator": None})
        plt.close(figure)


if __name__ == "__main__":
    main()
