"""One run of an experiment: a dataset, a config and a control -> the test split's predictions, kept as one JSON file.

The run uses the house's own plan, stream, loop and metrics (micacl.train.loop.fit with the plain engine, one process,
one thread). It leaves out checkpoints and Ray, so that a table of fifty runs fits two cores.

Controls change the frames of a clip, in training and in test alike:

    none
    single     one frame of the clip in all places: a random one in training, in test a place that the row decides
    shuffled   all frames of the clip, their order lost

`regroup` cuts a clip of N instances x T frames into N*T instances of one frame: the encoder then sees no movement, and
what is between instances has to find it.

Legend: B clips, N instances, T frames per instance, H W height and width, C channels.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from micacl.batch import collate
from micacl.config import RunConfig, to_dict
from micacl.loss.objective import Objective
from micacl.metrics import Confusion
from micacl.model.micacl import MICACL, build_model
from micacl.posthoc import PostHoc, apply
from micacl.predictor import forward
from micacl.train.data import train_data
from micacl.train.engine import PlainEngine
from micacl.train.loop import fit
from micacl.train.precision import ComputeConfig
from pipeline.dataset import Dataset, open_dataset
from pipeline.loader import ClipBatch, EvalLoader, Loader
from pipeline.rows import split_rows

CONTROLS = ("none", "single", "shuffled")


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """One cell of a table, but for its seed."""

    name: str
    config: RunConfig
    control: str = "none"
    regroup: bool = False
    posthoc: bool = False
    """Also test the trained model with its classifier corrected afterwards."""


def run(experiment: Experiment, dataset_url: str, seed: int, out: Path) -> dict[str, Any]:
    """Train and test, or read what was found before. The file's name tells the experiment, the seed and the config."""
    config = _seeded(experiment.config, seed)
    path = out / f"{experiment.name.replace('/', '_')}-{experiment.control}-{seed}-{config.hash}.json"
    if path.exists():
        found: dict[str, Any] = json.loads(path.read_text())
        return found
    torch.set_num_threads(1)
    start_s, dataset = time.monotonic(), open_dataset(dataset_url)
    model, curve, clips = train(experiment, config, dataset)
    confusion, rows = test(experiment, config, dataset, model)
    corrected = {name: test(experiment, config, dataset, m)[0] for name, m in posthoc(experiment, model, clips).items()}
    scores = confusion.scores()
    result = {
        "name": experiment.name,
        "control": experiment.control,
        "seed": seed,
        "config": to_dict(config),
        "dataset": dataset.sha256,
        "seconds": round(time.monotonic() - start_s, 1),
        "uar": scores.uar,
        "war": scores.war,
        "recall": scores.recall,
        "matrix": scores.to_dict()["matrix"],
        "posthoc": {name: c.scores().to_dict()["matrix"] for name, c in corrected.items()},
        "train_clips": clips,
        "loss": curve,
        "rows": rows,
    }
    out.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result))
    return result


def _seeded(config: RunConfig, seed: int) -> RunConfig:
    """Weights, dropout and plan of this seed."""
    replace = dataclasses.replace
    return replace(config, plan=replace(config.plan, seed=seed), train=replace(config.train, seed=seed))


class _Curve:
    def __init__(self) -> None:
        self.points: list[dict[str, float]] = []

    def after_step(self, record: Any) -> None:
        if record.losses is not None:
            self.points.append({"step": record.step, **{k: round(v, 4) for k, v in record.losses.items()}})


def posthoc(experiment: Experiment, model: MICACL, clips: tuple[int, ...]) -> dict[str, MICACL]:
    """By name, copies of the model with another classifier (micacl/posthoc.py)."""
    if not experiment.posthoc:
        return {}
    found = {f"tau-norm {tau:g}": PostHoc(tau_norm=tau) for tau in (0.5, 1.0)}
    found["logit adjustment"] = PostHoc(adjust=1.0, counts=tuple(float(n) for n in clips))
    return {name: apply(copy.deepcopy(model), how) for name, how in found.items()}


def train(
    experiment: Experiment, config: RunConfig, dataset: Dataset
) -> tuple[MICACL, list[dict[str, float]], tuple[int, ...]]:
    """(model, mean losses of each epoch, training clips of each class)."""
    data, curve = train_data(dataset, config), _Curve()

    def read(loader: Loader, epochs: int) -> Iterator[ClipBatch]:
        for batch in loader.batches(epochs):
            yield changed(batch, experiment)

    model = build_model(config.model, config.train.seed)
    engine = PlainEngine(model, config.train, compute=ComputeConfig(channels_last=True))
    torch.manual_seed(config.train.seed)  # dropout's
    fit(
        engine,
        data.batches(0, 0, 1, read=read),
        Objective(config.loss, data.seen_counts, engine.model),
        config.train,
        start_step=0,
        steps=data.steps,
        steps_per_epoch=data.steps_per_epoch,
        log_every=data.steps_per_epoch,
        hooks=[curve],
    )
    return engine.model, curve.points, data.class_counts


def test(
    experiment: Experiment, config: RunConfig, dataset: Dataset, model: MICACL
) -> tuple[Confusion, list[list[Any]]]:
    """(confusion, rows of [key, subject, truth, predicted]) of the test split."""
    rows, confusion, out = split_rows(dataset, "test"), Confusion(dataset.labels), []
    subject = dict(zip(*(dataset.split("test").column(c).to_pylist() for c in ("key", "subject")), strict=True))
    model.eval()
    for clips in EvalLoader(rows, config.stream, clips_per_batch=32):
        batch = changed(clips, experiment)
        p_BK = forward(model, collate(batch, config.batch, train=False), torch.device("cpu"))[0]
        for i in np.flatnonzero(batch.mask_B):
            key, truth, predicted = batch.keys[i], int(batch.labels_B[i]), int(p_BK[i].argmax())
            confusion.add(key, truth, predicted)
            out.append([key, subject[key], truth, predicted])
    return confusion, out


def changed(batch: ClipBatch, experiment: Experiment) -> ClipBatch:
    """The batch under the control, regrouped if asked."""
    frames_BNTHWC = batch.frames_BNTHWC
    clips, instances, per_instance = frames_BNTHWC.shape[:3]
    flat_BFHWC = frames_BNTHWC.reshape(clips, instances * per_instance, *frames_BNTHWC.shape[3:])
    if experiment.control != "none":
        flat_BFHWC = np.stack([f[_places(experiment.control, len(f), batch, i)] for i, f in enumerate(flat_BFHWC)])
    shape = (instances * per_instance, 1) if experiment.regroup else (instances, per_instance)
    return dataclasses.replace(batch, frames_BNTHWC=flat_BFHWC.reshape(clips, *shape, *flat_BFHWC.shape[2:]))


def _places(control: str, frames: int, batch: ClipBatch, clip: int) -> np.ndarray[Any, Any]:
    """Which frame stands in each place: of a training clip by its place in the plan, of a test clip by its row."""
    key = [int(batch.rows_B[clip])] if not batch.state else [int(k) for k in batch.rng_keys_B2[clip]]
    rng = np.random.default_rng([0xC0, *key])
    return np.full(frames, rng.integers(frames)) if control == "single" else rng.permutation(frames)
