"""predictions.parquet: one row a clip of an evaluated split, and what the file beside it says of it.

    <model>/evaluation/<split>/predictions.parquet    key, subject, truth, predicted, p_<class>...
                               scores.json            the numbers, and of what they are (micacl.summary)
                               embeddings.parquet     key, bag: the bag's features; only if asked for

Of the newest checkpoint; the folder of the one that is best on validation is called `<split>-best`.

Legend: N clips, K classes.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from micacl.metrics import Scores, score
from pipeline.contract import MicaclError, expecting, json_object
from pipeline.parquet import read_parquet
from pipeline.storage import Store, open_store

PREDICTIONS, SCORES, EMBEDDINGS = "predictions.parquet", "scores.json", "embeddings.parquet"
LAST, BEST = "last", "best"
_OFF_ONE = 1e-3
"""Shares are stored as float32."""


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

    Read is what `micacl evaluate` would write again: every clip once, and numbers that are those of its rows.
    """
    if checkpoint not in (LAST, BEST):
        raise MicaclError(f"--checkpoint is {checkpoint!r}.", "Nothing was read.", f"Use {LAST} or {BEST}.")
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
    with expecting(store.url(SCORES)):
        labels = _require_fields(scores)
    with expecting(store.url(PREDICTIONS)):
        predictions = read_predictions(data, labels)
    _require_same_numbers(scores, predictions, store.url(SCORES))
    return Evaluation(store.root, scores, predictions)


def _require_fields(scores: Mapping[str, Any]) -> tuple[str, ...]:
    """The classes; what the fields that others read are not raises one of the errors that `expecting` names."""
    labels, clips = tuple(str(word) for word in scores["classes"]), scores.get("train_clips")
    int(scores["origin"]["step"]), str(scores["split"]), dict(scores.get("posthoc") or {})
    temperature = scores["calibration"]["temperature"]
    known = [temperature["value"], temperature["step"]] if temperature else []
    known += [clips[word] for word in labels] if clips is not None else []
    [float(value) for value in known if value is not None]
    str(scores["dataset"]["url"]), int(scores["dataset"]["version"])
    return labels


def _require_same_numbers(scores: Mapping[str, Any], predictions: Predictions, where: str) -> None:
    """Raises MicaclError if the numbers are not those of the rows: one of the files was changed afterwards."""
    found = score_predictions(predictions).to_dict()
    for name in ("clips", "matrix", "war", "uar", "macro_f1", "recall"):
        if not _equal(scores.get(name), found[name]):
            raise MicaclError(
                f"{where} says {name} {scores.get(name)}, and {PREDICTIONS} beside it {found[name]}.",
                "Neither is used: one of them was changed after it was written.",
                "Evaluate again: `micacl evaluate`; it writes both.",
            )


def _equal(said: Any, found: Any) -> bool:
    """Whether two numbers, or two lists or dicts of them, are the same but for the last digits."""
    if isinstance(found, float) and isinstance(said, float):
        return math.isclose(said, found, abs_tol=1e-9)
    if isinstance(found, dict) and isinstance(said, dict):
        return said.keys() == found.keys() and all(_equal(said[name], value) for name, value in found.items())
    return bool(said == found)


def score_predictions(table: Predictions) -> Scores:
    """The numbers of these rows."""
    return score_labels(table.truth_N, table.predicted_N, table.labels)


def score_labels(truth_N: NDArray[np.int64], predicted_N: NDArray[np.int64], labels: Sequence[str]) -> Scores:
    """The numbers of clips of these classes, taken for those."""
    count = len(labels)
    matrix_KK = np.bincount(truth_N * count + predicted_N, minlength=count * count).reshape(count, count)
    return score(matrix_KK, labels)


def read_predictions(data: bytes, labels: tuple[str, ...]) -> Predictions:
    """Of a predictions.parquet; one of an earlier release has no subjects. Raises ValueError for rows that are none."""
    table = read_parquet(data).sort_by("key")
    number = {label: i for i, label in enumerate(labels)}
    keys = table["key"].to_pylist()
    subjects = table["subject"].to_pylist() if "subject" in table.column_names else [None] * len(keys)
    p_NK = np.stack([table[f"p_{label}"].to_numpy() for label in labels], 1).astype(np.float64)
    if len(set(keys)) != len(keys) or None in keys or not keys:
        raise ValueError(f"{len(keys)} rows with {len({*keys} - {None})} keys")
    if not (np.isfinite(p_NK).all() and p_NK.min() >= 0 and (np.abs(p_NK.sum(1) - 1) < _OFF_ONE).all()):
        raise ValueError("shares of the classes that are not in [0, 1] or do not sum to 1")
    return Predictions(
        labels=labels,
        keys=tuple(keys),
        subjects=tuple(subjects),
        truth_N=np.array([number[word] for word in table["truth"].to_pylist()], np.int64),
        predicted_N=np.array([number[word] for word in table["predicted"].to_pylist()], np.int64),
        p_NK=p_NK / p_NK.sum(1, keepdims=True),
    )
