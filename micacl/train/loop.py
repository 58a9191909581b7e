"""fit(): the loop, nothing else. Data comes as an iterator, machines as an engine, everything besides as hooks."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence

import torch

from micacl.batch import Batch, to_input
from micacl.loss.objective import Losses, Objective
from micacl.train.engine import Engine
from micacl.train.hooks import Hook, StepRecord
from micacl.train.optim import OptimConfig, lr_at, progress_at
from pipeline.contract import MicaclError


def fit(
    engine: Engine,
    batches: Iterator[Batch],
    objective: Objective,
    optim: OptimConfig,
    *,
    start_step: int,
    steps: int,
    steps_per_epoch: int,
    log_every: int,
    hooks: Sequence[Hook],
    newest: Callable[[], str] = lambda: "the last complete checkpoint",
) -> None:
    """Train from `start_step` (updates done) to `steps`, in one stage or two (micacl.train.optim).

    Args:
        batches: this rank's batches from `start_step` on, in plan order; as many as there are steps left.
        newest: says which checkpoint is good, for the message of a run that must stop.

    Raises MicaclError on a loss that is not finite, before the update that would spoil the weights.
    """
    engine.model.train()
    clock = _Clock()
    for step in range(start_step, steps):
        with clock.waiting():
            batch = next(batches)
        progress = progress_at(step, steps, steps_per_epoch, optim)
        engine.head_only = progress.head_only
        if progress.head_only and progress.step == 0:
            engine.restart_head()
        lr, labels_B = lr_at(progress.step, progress.steps, optim), batch.labels_B.to(engine.device)
        clips_BNCTHW = to_input(batch, engine.device)
        output = engine.forward(clips_BNCTHW)
        losses = objective(output, labels_B, engine.gather, progress)
        _require_finite(losses, batch, step, newest)
        engine.step(losses.total, lr)
        if not progress.head_only:
            objective.after_update(output, labels_B, engine.gather, clips_BNCTHW, engine.model)
        clock.clips += len(batch.keys) * engine.ranks
        logs = (step + 1) % log_every == 0 or step + 1 == steps
        record = StepRecord(
            step=step + 1,
            steps=steps,
            epoch=step // steps_per_epoch,
            lr=lr,
            losses=_means(engine, losses) if logs else None,
            clips_per_s=clock.clips_per_s,
            wait_share=clock.wait_share,
            keys=batch.keys,
        )
        for hook in hooks:
            hook.after_step(record)
        if logs:
            clock = _Clock()


def _means(engine: Engine, losses: Losses) -> dict[str, float]:
    names = ["total", *losses.parts]
    values = torch.stack([losses.total.detach().float(), *(v.detach().float() for v in losses.parts.values())])
    return dict(zip(names, engine.mean(values).tolist(), strict=True))


def _require_finite(losses: Losses, batch: Batch, step: int, newest: Callable[[], str]) -> None:
    if not torch.isfinite(losses.total):
        parts = ", ".join(f"{name} {float(value):g}" for name, value in losses.parts.items())
        raise MicaclError(
            f"The loss of step {step + 1} is not finite ({parts}) on the clips {', '.join(batch.keys)}.",
            f"The weights were not updated with it; good is {newest()}.",
            "Lower --train.lr, or look at those clips with `micacl report`.",
        )


class _Clock:
    """Rates since the last log."""

    def __init__(self) -> None:
        self.start_s = time.perf_counter()
        self.wait_s = 0.0
        self.clips = 0

    def waiting(self) -> _Waiting:
        return _Waiting(self)

    @property
    def _elapsed_s(self) -> float:
        return max(1e-9, time.perf_counter() - self.start_s)

    @property
    def clips_per_s(self) -> float:
        return self.clips / self._elapsed_s

    @property
    def wait_share(self) -> float:
        return self.wait_s / self._elapsed_s


class _Waiting:
    def __init__(self, clock: _Clock) -> None:
        self.clock = clock

    def __enter__(self) -> None:
        self.since_s = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self.clock.wait_s += time.perf_counter() - self.since_s
