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
from micacl.predictor import forward
from micacl.train.data import require_labels
from pipeline.contract import MicaclError
from pipeline.dataset import Dataset
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


@dataclass(frozen=True, slots=True)
class Classified:
    """One clip as the model sees it."""

    key: str
    label: int
    """Place in the label set; -1 if the bag has none."""
    p_K: NDArray[np.float32]
    weights_N: NDArray[np.float32]
    """WIAN's share of each instance."""


def classify_rank(bundle: Bundle, rows: SplitRows, rank: int = 0, ranks: int = 1) -> Iterator[Classified]:
    """This rank's share of the rows; the shares of all ranks are disjoint and together whole. Raises MicaclError."""
    require_labels(rows.dataset, bundle.config)
    model, device = bundle.build(), torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model.to(device)
    stream = bundle.config.stream
    for batch in EvalLoader(rows, stream, clips_per_batch=_CLIPS_PER_FORWARD, rank=rank, ranks=ranks):
        p_BK, weights_BN = forward(model, collate(batch, bundle.config.batch, train=False), device)
        for i in np.flatnonzero(batch.mask_B):
            yield Classified(batch.keys[i], int(batch.labels_B[i]), p_BK[i], weights_BN[i])


def score_rank(bundle: Bundle, dataset: Dataset, split: str, rank: int = 0, ranks: int = 1) -> Iterator[Scored]:
    """`classify_rank` of a split whose bags all have labels. Raises MicaclError."""
    rows = split_rows(dataset, split)
    rows.require_labelled()
    for one in classify_rank(bundle, rows, rank, ranks):
        yield Scored(one.key, one.label, int(one.p_K.argmax()), tuple(float(p) for p in one.p_K))


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
