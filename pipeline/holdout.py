"""Validation clips out of the training clips: whole subjects, chosen by a hash, never from the test split or fold.

The subjects of `train` are walked in the order of sha256(seed, subject). One goes to `val` if that brings the clips of
`val` nearer to the wanted share of all labelled clips, and if of each of its classes another subject stays. So the
choice is a function of (index, share, seed), `train` keeps every class, and nobody is on both sides. A class that one
subject alone has is not validated on. A bag without a subject stands for its video.

Legend: N rows, G subjects, K classes.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipeline.contract import MicaclError, digest
from pipeline.pack import UNLABELLED

TRAIN, VAL = "train", "val"


def with_validation(index: pa.Table, share: float, seed: int) -> pa.Table:
    """The index with some subjects of `train` in split `val`; unchanged if it has a `val` of its own.

    Raises MicaclError if no subject can be spared.
    """
    split = index["split"]
    if pc.any(pc.equal(split, VAL)).as_py():
        return index
    places = pc.indices_nonzero(pc.and_(pc.equal(split, TRAIN), pc.not_equal(index["label"], UNLABELLED))).to_numpy()
    rows = index.take(places)
    if not rows.num_rows:
        return index
    chosen_N = np.zeros(index.num_rows, bool)
    chosen_N[places] = _choose(rows, share, seed)
    if not chosen_N.any():
        raise MicaclError(
            f"No subject of `train` can be spared for --train.val-share {share:g}.",
            "A class would have no training clip, or all clips are of one person; nothing was trained.",
            "Leave --train.val-share out, or prepare more subjects.",
        )
    return index.set_column(
        index.schema.get_field_index("split"), "split", pc.if_else(pa.array(chosen_N), VAL, split).cast(pa.string())
    )


def _choose(rows: pa.Table, share: float, seed: int) -> NDArray[np.bool_]:
    """(N,) which rows go."""
    names, group_N = _codes(people(rows))
    labels, label_N = _codes(rows["label"].to_pylist())
    clips_GK = np.zeros((len(names), len(labels)), np.int64)
    np.add.at(clips_GK, (group_N, label_N), 1)
    subjects_K, wanted, taken = (clips_GK > 0).sum(0), share * len(group_N), 0
    goes_G = np.zeros(len(names), bool)
    for group in sorted(range(len(names)), key=lambda g: digest(f"{seed}\n{names[g]}".encode())):
        clips, has_K = int(clips_GK[group].sum()), clips_GK[group] > 0
        nearer = abs(taken + clips - wanted) < abs(taken - wanted) or not taken
        if nearer and (subjects_K[has_K] > 1).all():
            goes_G[group] = True
            subjects_K, taken = subjects_K - has_K, taken + clips
        if taken >= wanted:
            break
    chosen_N: NDArray[np.bool_] = goes_G[group_N]
    return chosen_N


def people(rows: pa.Table) -> list[str]:
    """Of each row its subject, or else its video: who must not be on two sides."""
    both = zip(rows["subject"].to_pylist(), rows["video"].to_pylist(), strict=True)
    return [f"subject {subject}" if subject is not None else f"video {video}" for subject, video in both]


def _codes(values: list[Any]) -> tuple[list[Any], NDArray[np.int64]]:
    """(different values, place of each value among them)."""
    coded = pa.array(values).dictionary_encode()
    return coded.dictionary.to_pylist(), coded.indices.to_numpy(zero_copy_only=False).astype(np.int64)


def describe(train: pa.Table, val: pa.Table) -> str:
    """For people: who was held out, and what that leaves open."""
    named = len(val) - val["subject"].null_count
    what = (
        f"{len(set(people(val)))} subjects"
        if named
        else "videos (no subject is known, so a person may be on both sides)"
    )
    text = f"validation: {val.num_rows} of {val.num_rows + train.num_rows} labelled clips of {what}, not trained on"
    lacking = sorted(set(train["label"].to_pylist()) - set(val["label"].to_pylist()) - {UNLABELLED})
    return text + (f"; no clip of {', '.join(lacking)} in it" if lacking else "")
