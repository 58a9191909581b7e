"""predictions.parquet: one row a clip of an evaluated split, and what the file beside it says of it.

    <model>/evaluation/<split>/predictions.parquet    key, subject, truth, predicted, p_<class>...
                               scores.json            the numbers, and of what they are (micacl.summary)
                               embeddings.parquet     key, bag: the bag's features; only if asked for

Of the newest checkpoint; the folder of the one that is best on validation is called `<split>-best`.

Legend: N clips, K classes.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipeline.contract import MicaclError, expecting, json_object
from pipeline.parquet import read_parquet
from pipeline.storage import Store, open_store

PREDICTIONS, SCORES, EMBEDDINGS = "predictions.parquet", "scores.json", "embeddings.parquet"
LAST, BEST = "last", "best"


@dataclass(frozen=True, eq=False, slots=True)
class Predictions:
    """Clips in the order of their keys."""

    labels: tuple[str, ...]
    keys: tuple[str, ...]
    subjects: tuple[str | None, ...]
    truth_N: NDArray[np.int64]
    predicted_N: NDArray[np.int64]
    p_NK: NDArray[np.float64]
    """As float32 is stored, rows scaled to sum to 1."""

    def __len__(self) -> int:
        return len(self.keys)

    def to_parquet(self) -> bytes:
        """One row a clip."""
        labels = np.array(self.labels, object)
        columns: dict[str, Any] = {
            "key": list(self.keys),
            "subject": pa.array(list(self.subjects), pa.string()),
            "truth": labels[self.truth_N].tolist(),
            "predicted": labels[self.predicted_N].tolist(),
        }
        columns |= {f"p_{label}": self.p_NK[:, i].tolist() for i, label in enumerate(self.labels)}
        return _parquet(columns)


def embeddings_parquet(keys: Sequence[str], features_ND: NDArray[np.float32]) -> bytes:
    """Bag features by key, sorted by it."""
    order = sorted(range(len(keys)), key=keys.__getitem__)
    bags = pa.FixedSizeListArray.from_arrays(pa.array(features_ND[order].ravel()), features_ND.shape[1])
    return _parquet({"key": [keys[i] for i in order], "bag": bags})


def read_embeddings(store: Store) -> tuple[list[str], NDArray[np.float32]] | None:
    """(keys, features_ND), or None if they were not asked for."""
    if not store.exists(EMBEDDINGS):
        return None
    with expecting(store.url(EMBEDDINGS)):
        table = read_parquet(store.get(EMBEDDINGS))
        features = table["bag"].combine_chunks()
        return table["key"].to_pylist(), features.flatten().to_numpy().reshape(len(features), -1)


def _parquet(columns: Mapping[str, Any]) -> bytes:
    out = io.BytesIO()
    pq.write_table(pa.table(dict(columns)), out, compression="zstd")
    return out.getvalue()


def folder_of(split: str, checkpoint: str) -> str:
    """Where an evaluation lies in a run or bundle."""
    return f"evaluation/{split}" if checkpoint == LAST else f"evaluation/{split}-{checkpoint}"


@dataclass(frozen=True, eq=False, slots=True)
class Evaluation:
    """What `micacl evaluate` has left."""

    url: str
    scores: Mapping[str, Any]
    predictions: Predictions


def read_evaluation(url: str, split: str = "test", checkpoint: str = LAST) -> Evaluation:
    """The evaluation of a run or bundle, or the one that lies at `url` itself. Raises MicaclError.

    The remedy says how it is made, where it is not there.
    """
    store = open_store(url)
    store.check()
    if not store.exists(PREDICTIONS):
        store = open_store(store.url(folder_of(split, checkpoint)))
    try:
        scores, data = json_object(store.get(SCORES), store.url(SCORES)), store.get(PREDICTIONS)
    except FileNotFoundError as error:
        best = "" if checkpoint == LAST else f" --checkpoint {checkpoint}"
        raise MicaclError(
            f"{url} has no evaluation of split {split!r}{best and ' by its best checkpoint'}.",
            "Predictions are read here, not made.",
            f"Make it: `micacl evaluate {url} DATASET --split {split}{best}`.",
        ) from error
    with expecting(store.url(PREDICTIONS)):
        return Evaluation(store.root, scores, read_predictions(data, tuple(scores["classes"])))


def read_predictions(data: bytes, labels: tuple[str, ...]) -> Predictions:
    """Of a predictions.parquet; one of an earlier release has no subjects."""
    table = read_parquet(data).sort_by("key")
    number = {label: i for i, label in enumerate(labels)}
    keys = table["key"].to_pylist()
    subjects = table["subject"].to_pylist() if "subject" in table.column_names else [None] * len(keys)
    p_NK = np.stack([table[f"p_{label}"].to_numpy() for label in labels], 1).astype(np.float64)
    return Predictions(
        labels=labels,
        keys=tuple(keys),
        subjects=tuple(subjects),
        truth_N=np.array([number[word] for word in table["truth"].to_pylist()], np.int64),
        predicted_N=np.array([number[word] for word in table["predicted"].to_pylist()], np.int64),
        p_NK=p_NK / p_NK.sum(1, keepdims=True),
    )
