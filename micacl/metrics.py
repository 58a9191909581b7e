"""How good predictions are: the confusion of truth and prediction, and the field's two numbers, WAR and UAR.

* WAR, weighted average recall: the share of clips that are right (accuracy).
* UAR, unweighted average recall: the mean of the classes' recalls. A class that the truth does not contain has no
  recall; it is left out of the mean and named in `absent`.
* Macro F1: the mean of 2 TP / (clips of the class + clips predicted as it) over the same classes as UAR.
* Head, mid and tail: a class with at least half as many training clips as the largest is of the head, one with at most
  a quarter of the tail, one between of the middle; a group's recall is the mean over its classes. The rule is ours:
  counts relative to the largest class mean the same for 700 clips and for 30,000. DFEW's fold 1 has five classes in the
  head, fear in the middle and disgust in the tail; FERV39k four, surprise, and disgust with fear.

`Confusion` counts by clip key, and a key counts once: padded last batches and ranks that overlap are errors, said in
words, rather than a number that is slightly off.

Shape suffixes: K classes; a matrix_KK has the truth in rows and the prediction in columns.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.contract import MicaclError

Counts = npt.NDArray[np.int64]
Shares = npt.NDArray[np.float64]
GROUPS = ("head", "mid", "tail")
Row = tuple[str, int, int]
"""(clip key, class number of the truth, class number of the prediction)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Scores:
    """The result of an evaluation. Shares are in [0, 1], not percent."""

    classes: tuple[str, ...]
    clips: int
    war: float
    uar: float
    macro_f1: float
    recall: dict[str, float | None]
    """By class; None where the truth has no clip of it."""
    f1: dict[str, float | None]
    absent: tuple[str, ...]
    """Classes left out of `uar` and `macro_f1`: the truth has no clip of them."""
    matrix: tuple[tuple[int, ...], ...]
    """Clips, truth in rows, prediction in columns, in the order of `classes`."""

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, lists and numbers, fit for JSON."""
        fields = asdict(self)
        return fields | {name: list(fields[name]) for name in ("classes", "absent")} | {"matrix": _lists(self.matrix)}

    def to_text(self) -> str:
        """One line for people, in percent."""
        left_out = f", none of {', '.join(self.absent)}: left out" if self.absent else ""
        percent = (f"{100 * share:.2f}" for share in (self.war, self.uar, self.macro_f1))
        return "WAR {}  UAR {}  macro F1 {}".format(*percent) + f"  ({self.clips} clips{left_out})"


def _lists(matrix: tuple[tuple[int, ...], ...]) -> list[list[int]]:
    return [list(row) for row in matrix]


def recall_by_class(matrix_KK: Counts) -> Shares:
    """(K,) recalls; NaN for a class without clips."""
    return _ratio(np.diagonal(matrix_KK), matrix_KK.sum(1))


def f1_by_class(matrix_KK: Counts) -> Shares:
    """(K,) F1; NaN for a class without clips, even where it was predicted."""
    f1_K = _ratio(2 * np.diagonal(matrix_KK), matrix_KK.sum(1) + matrix_KK.sum(0))
    return np.where(matrix_KK.sum(1) > 0, f1_K, np.nan)


def war(matrix_KK: Counts) -> float:
    """Share of clips that are right. Raises MicaclError without clips."""
    return float(np.trace(matrix_KK) / _require_clips(matrix_KK))


def uar(matrix_KK: Counts) -> float:
    """Mean recall over the classes of the truth. Raises MicaclError without clips."""
    _require_clips(matrix_KK)
    return float(np.nanmean(recall_by_class(matrix_KK)))


def macro_f1(matrix_KK: Counts) -> float:
    """Mean F1 over the classes of the truth. Raises MicaclError without clips."""
    _require_clips(matrix_KK)
    return float(np.nanmean(f1_by_class(matrix_KK)))


def score(matrix_KK: Counts, classes: Sequence[str]) -> Scores:
    """Every number of a confusion matrix. Raises MicaclError without clips."""
    recalls = _by_class(classes, recall_by_class(matrix_KK))
    return Scores(
        classes=tuple(classes),
        clips=_require_clips(matrix_KK),
        war=war(matrix_KK),
        uar=uar(matrix_KK),
        macro_f1=macro_f1(matrix_KK),
        recall=recalls,
        f1=_by_class(classes, f1_by_class(matrix_KK)),
        absent=tuple(word for word, recall in recalls.items() if recall is None),
        matrix=tuple(tuple(int(n) for n in row) for row in matrix_KK),
    )


def _by_class(classes: Sequence[str], values_K: Shares) -> dict[str, float | None]:
    return {word: None if np.isnan(x) else float(x) for word, x in zip(classes, values_K, strict=True)}


def long_tail_groups(train_clips: Mapping[str, int]) -> dict[str, list[str]]:
    """Classes in `head`, `mid` and `tail`, by their training clips; classes without any are in none."""
    largest = max(train_clips.values(), default=0)
    groups: dict[str, list[str]] = {name: [] for name in GROUPS}
    for word, clips in train_clips.items():
        if clips:
            groups["head" if 2 * clips >= largest else "tail" if 4 * clips <= largest else "mid"].append(word)
    return groups


def group_recalls(recall: Mapping[str, float | None], groups: Mapping[str, Sequence[str]]) -> dict[str, float | None]:
    """Mean recall of each group over those of its classes that the truth has; None for a group without any."""
    out: dict[str, float | None] = {}
    for name, words in groups.items():
        found = [r for word in words if (r := recall.get(word)) is not None]
        out[name] = float(np.mean(found)) if found else None
    return out


def _ratio(part_K: Counts, whole_K: Counts) -> Shares:
    out_K: Shares = np.full(part_K.shape, np.nan)
    np.divide(part_K, whole_K, out=out_K, where=whole_K > 0)
    return out_K


def _require_clips(matrix_KK: Counts) -> int:
    clips = int(matrix_KK.sum())
    if clips == 0:
        raise MicaclError("No clip was scored.", "There is no WAR or UAR.", "Check the split and its filters.")
    return clips


class Confusion:
    """Predictions by clip key; each key counts once."""

    def __init__(self, classes: Sequence[str]) -> None:
        self.classes = tuple(classes)
        self._rows: dict[str, tuple[int, int]] = {}

    def __len__(self) -> int:
        return len(self._rows)

    def add(self, key: str, truth: int, predicted: int) -> None:
        """Count one clip. Raises MicaclError when the key was counted before or a class number does not exist."""
        if key in self._rows:
            raise MicaclError(
                f"Clip {key!r} was scored twice.",
                "It was counted once; the evaluation stops, since its numbers would be off.",
                "Give each clip to one rank and do not pad the last batch.",
            )
        for what, number in (("truth", truth), ("prediction", predicted)):
            if not 0 <= number < len(self.classes):
                raise MicaclError(
                    f"The {what} of clip {key!r} is class number {number} of {len(self.classes)}.",
                    "It was not counted.",
                    "Score with the label set that the model was trained on.",
                )
        self._rows[key] = (int(truth), int(predicted))

    def extend(self, rows: Iterable[Sequence[Any]]) -> None:
        """Count many clips; `rows` as `rows()` gives them, also after a trip through JSON."""
        for key, truth, predicted in rows:
            self.add(key, truth, predicted)

    def rows(self) -> list[Row]:
        """Sorted by key: the same for the same clips, whichever rank scored them."""
        return [(key, truth, predicted) for key, (truth, predicted) in sorted(self._rows.items())]

    def merged(self, others: Iterable[Confusion]) -> Confusion:
        """This one and those of other ranks as one. Raises MicaclError when a clip is in two or classes differ."""
        out = Confusion(self.classes)
        for part in (self, *others):
            if part.classes != self.classes:
                raise MicaclError(
                    f"Ranks scored with the classes {self.classes} and {part.classes}.",
                    "Nothing was merged.",
                    "Evaluate one bundle on all ranks.",
                )
            out.extend(part.rows())
        return out

    def matrix(self) -> Counts:
        """(K, K) clips, truth in rows, prediction in columns."""
        matrix_KK = np.zeros((len(self.classes), len(self.classes)), dtype=np.int64)
        for truth, predicted in self._rows.values():
            matrix_KK[truth, predicted] += 1
        return matrix_KK

    def scores(self) -> Scores:
        """Raises MicaclError when no clip was counted."""
        return score(self.matrix(), self.classes)
