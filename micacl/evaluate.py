"""A model on a split: every clip exactly once, at any number of ranks. No augmentation, natural order."""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from micacl.batch import collate
from micacl.bundle import Bundle
from micacl.config import RunConfig
from micacl.metrics import Confusion, Scores
from micacl.predictions import Predictions
from micacl.predictor import output_of
from micacl.train.data import has_split, require_labels, with_where
from pipeline.contract import MicaclError
from pipeline.dataset import Dataset, open_dataset
from pipeline.loader import EvalLoader
from pipeline.rows import SplitRows, split_rows

_CLIPS_PER_FORWARD = 16


@dataclass(frozen=True, slots=True)
class Scored:
    """One clip as evaluated."""

    key: str
    truth: int
    predicted: int
    probabilities: tuple[float, ...]
    features: tuple[float, ...] = ()
    """Of the bag, before the class scores; empty unless asked for."""


def kept_out_fold(config: RunConfig, fold: int | None) -> int | None:
    """The fold to score on: the one that training left out. Raises MicaclError for another one."""
    trained = config.train.fold
    if fold is not None and trained is not None and fold != trained:
        raise MicaclError(
            f"--fold is {fold}, but the model was trained with fold {trained} kept out.",
            f"It has seen the test clips of fold {fold}; their score would say nothing.",
            f"Leave --fold out, or train another run with --train.fold {fold}.",
        )
    return trained if fold is None else fold


def open_for(bundle: Bundle, url: str, version: int | None, fold: int | None, split: str) -> Dataset:
    """The dataset as the model's training saw it: its test fold, and its validation clips apart. Raises MicaclError.

    Who was held out is decided by the index, so another version may hold out others: `val` of it would be clips that
    the model was trained on.
    """
    train = bundle.config.train
    dataset = open_dataset(
        url, version, kept_out_fold(bundle.config, fold), val_share=train.val_share, val_seed=train.val_seed
    )
    if split != "val" or has_split(dataset, "val"):
        return dataset
    trained = bundle.origin["dataset"]
    if not train.val_share:
        raise MicaclError(
            f"{url} has no split val, and {bundle.url} was trained without --train.val-share.",
            "There are no clips that were kept for validation.",
            "Train with --train.val-share 0.1, or choose another split.",
        )
    if trained.get("sha256") != dataset.sha256:
        raise MicaclError(
            f"The validation clips of {bundle.url} are of version {trained.get('version')}, this is version "
            f"{dataset.number} of {url}.",
            "Others would be held out of it, some of which the model was trained on.",
            f"Give --version {trained.get('version')} of {trained.get('url')}.",
        )
    return dataset


def train_clips(bundle: Bundle, dataset: Dataset) -> dict[str, int] | None:
    """Clips of each class that the model was trained on; None of another dataset version than it was trained on."""
    train, trained = bundle.config.train, bundle.origin["dataset"]
    if trained.get("sha256") != dataset.sha256 or trained.get("fold") != dataset.fold:
        return None
    counts = split_rows(with_where(dataset, train.where), train.split).runs.class_counts(len(dataset.labels))
    return dict(zip(dataset.labels, counts.tolist(), strict=True))


@dataclass(frozen=True, slots=True)
class Classified:
    """One clip as the model sees it."""

    key: str
    label: int
    """Place in the label set; -1 if the bag has none."""
    p_K: NDArray[np.float32]
    weights_N: NDArray[np.float32]
    """WIAN's share of each instance."""
    bag_D: NDArray[np.float32]
    """Features of the bag."""


def classify_rank(
    bundle: Bundle, rows: SplitRows, rank: int = 0, ranks: int = 1, *, temperature: float | None = None
) -> Iterator[Classified]:
    """This rank's share of the rows; the shares of all ranks are disjoint and together whole. Raises MicaclError.

    `temperature`: of the probabilities; None is the bundle's.
    """
    require_labels(rows.dataset, bundle.config)
    model, device = bundle.build(), torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model.to(device)
    stream, by = bundle.config.stream, bundle.temperature if temperature is None else temperature
    for batch in EvalLoader(rows, stream, clips_per_batch=_CLIPS_PER_FORWARD, rank=rank, ranks=ranks):
        output = output_of(model, collate(batch, bundle.config.batch, train=False), device)
        p_BK = (output.logits_BK.float() / by).softmax(-1).cpu().numpy()
        weights_BN, bag_BD = (x.float().cpu().numpy() for x in (output.weights_BN, output.bag_BD))
        for i in np.flatnonzero(batch.mask_B):
            yield Classified(batch.keys[i], int(batch.labels_B[i]), p_BK[i], weights_BN[i], bag_BD[i])


def score_rank(
    bundle: Bundle, dataset: Dataset, split: str, rank: int = 0, ranks: int = 1, *, embeddings: bool = False
) -> Iterator[Scored]:
    """`classify_rank` of a split whose bags all have labels, at temperature 1. Raises MicaclError."""
    rows = split_rows(dataset, split)
    rows.require_labelled()
    for one in classify_rank(bundle, rows, rank, ranks, temperature=1.0):
        features = tuple(one.bag_D.tolist()) if embeddings else ()
        yield Scored(one.key, one.label, int(one.p_K.argmax()), tuple(float(p) for p in one.p_K), features)


def gather_scores(scored: list[Scored], labels: tuple[str, ...], expected_clips: int) -> tuple[Scores, Confusion]:
    """Scores of the whole split. Raises MicaclError if a clip is missing or counted twice."""
    confusion = Confusion(labels)
    for one in scored:
        confusion.add(one.key, one.truth, one.predicted)
    if len(confusion) != expected_clips:
        raise MicaclError(
            f"{len(confusion)} clips were scored, the split has {expected_clips}.",
            "The numbers would not be those of the split, so none are given.",
            "Run the evaluation again; if it stays, `micacl verify URL`.",
        )
    return confusion.scores(), confusion


def predictions_of(scored: list[Scored], dataset: Dataset, split: str) -> Predictions:
    """The table of a split, in the order of the keys."""
    rows = dataset.split(split)
    subject_of = dict(zip(rows["key"].to_pylist(), rows["subject"].to_pylist(), strict=True))
    ordered = sorted(scored, key=lambda one: one.key)
    p_NK = np.array([one.probabilities for one in ordered], np.float64)
    return Predictions(
        labels=dataset.labels,
        keys=tuple(one.key for one in ordered),
        subjects=tuple(subject_of[one.key] for one in ordered),
        truth_N=np.array([one.truth for one in ordered], np.int64),
        predicted_N=np.array([one.predicted for one in ordered], np.int64),
        p_NK=p_NK / p_NK.sum(1, keepdims=True),
    )


def confusion_png(scores: Scores, title: str) -> bytes:
    """The confusion matrix as a picture: shares of each true class, counts written in."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    counts_KK = np.array(scores.matrix)
    share_KK = counts_KK / np.maximum(counts_KK.sum(1, keepdims=True), 1)
    figure = Figure(figsize=(6.4, 5.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    image = axes.imshow(share_KK, cmap="Blues", vmin=0, vmax=1)
    places = range(len(scores.classes))
    axes.set_xticks(places, scores.classes, rotation=45, ha="right")
    axes.set_yticks(places, [f"{c} ({n})" for c, n in zip(scores.classes, counts_KK.sum(1), strict=True)])
    axes.set_xlabel("predicted")
    axes.set_ylabel("true (clips)")
    for (i, j), n in np.ndenumerate(counts_KK):
        if n:
            axes.text(j, i, str(n), ha="center", va="center", color="white" if share_KK[i, j] > 0.5 else "black")
    figure.colorbar(image, label="share of the true class")
    axes.set_title(f"{title}\nUAR {scores.uar:.3f}, WAR {scores.war:.3f}, {scores.clips} clips")
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=120, metadata={"Software": None})
    return out.getvalue()
