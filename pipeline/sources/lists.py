"""Lists that come with a data set: small text files, in memory, each line with its place for errors."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pipeline.contract import MicaclError
from pipeline.sources.base import some
from pipeline.storage import Store

_MOST_BYTES = 64 * 2**20


@dataclass(frozen=True, slots=True)
class Line:
    """One clip of a list."""

    clip: str
    label: str
    where: str
    """`URL line 7`."""


def read_lines(store: Store, key: str) -> list[tuple[str, str]]:
    """(`URL line n`, text) of the lines that are not blank. UTF-8 with or without a mark, else GBK; CRLF or LF.

    Raises MicaclError if the list is gone or has more than 64 MiB.
    """
    found = store.stat(key)
    if found is None or found.size > _MOST_BYTES:
        what = "is not there any more" if found is None else f"has {found.size} bytes; a list has at most {_MOST_BYTES}"
        raise MicaclError(f"{store.url(key)} {what}.", "Nothing was read.", "Unpack the data set's lists again.")
    data = store.get(key)
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = data.decode("gb18030", errors="replace")  # ids and labels are ASCII; captions are not read
    lines = re.split("\r\n|\n|\r", text)
    return [(f"{store.url(key)} line {n}", line.strip()) for n, line in enumerate(lines, 1) if line.strip()]


def bad_line(where: str, text: str, expected: str) -> MicaclError:
    """A line that a list of this kind does not have."""
    return MicaclError(
        f"{where} is {text[:80]!r}.",
        "It is not clear which clip it means, so nothing was read.",
        f"A line looks like {expected}; unpack the list again, or correct the line.",
    )


def require_unique(lines: Sequence[Line]) -> dict[str, Line]:
    """The lines by clip. Raises MicaclError if a list says a clip twice."""
    out: dict[str, Line] = {}
    for line in lines:
        if line.clip in out:
            raise MicaclError(
                f"{line.where} lists clip {line.clip}, as {out[line.clip].where} does.",
                "It would be counted twice.",
                "Remove one of the lines.",
            )
        out[line.clip] = line
    return out


def require_same_label(one: Line, other: Line) -> None:
    """Raises MicaclError if two lists call one clip by two labels."""
    if one.label != other.label:
        raise MicaclError(
            f"Clip {one.clip} is {one.label} in {one.where}, and {other.label} in {other.where}.",
            "It is not clear which is right, so nothing was read.",
            "Do not mix lists of different releases (labels 0 to 6 and 1 to 7, for one); unpack them again.",
        )


def merge_folds(
    tests: Mapping[int, Sequence[Line]], trains: Mapping[int, Sequence[Line]]
) -> tuple[dict[str, tuple[str, int]], list[str]]:
    """(label, fold) of each clip from the lists of each fold, and notes.

    A clip is tested in exactly one fold and may be trained on in all others. What contradicts that is refused; a clip
    that some training list leaves out is noted, because here every other fold trains on it.

    Raises MicaclError.
    """
    where: dict[str, tuple[Line, int]] = {}
    for fold, lines in sorted(tests.items()):
        for clip, line in require_unique(lines).items():
            if clip in where:
                require_same_label(where[clip][0], line)
                raise MicaclError(
                    f"Clip {clip} is tested in fold {where[clip][1]} ({where[clip][0].where}) and in fold {fold} "
                    f"({line.where}).",
                    "Its results would count twice in the mean over the folds.",
                    "Unpack the lists again: each clip is in one test list.",
                )
            where[clip] = (line, fold)
    notes = [note for fold, lines in sorted(trains.items()) for note in _check_train(fold, lines, where)]
    return {clip: (line.label, fold) for clip, (line, fold) in where.items()}, notes


def _check_train(fold: int, lines: Sequence[Line], where: Mapping[str, tuple[Line, int]]) -> list[str]:
    trained = require_unique(lines)
    for clip, line in trained.items():
        if clip not in where:
            raise MicaclError(
                f"{line.where} trains on clip {clip}, which is in no test list.",
                "Its fold is not known: each clip must be tested in one fold.",
                "Unpack all test lists again; they belong to one release with the training lists.",
            )
        require_same_label(where[clip][0], line)
        if where[clip][1] == fold:
            raise MicaclError(
                f"Clip {clip} is trained on in fold {fold} ({line.where}) and tested in it ({where[clip][0].where}).",
                "The score of that fold would be too good.",
                "Unpack the lists again; a clip is in one of the two.",
            )
    left_out = sorted(clip for clip, (_, tested) in where.items() if tested != fold and clip not in trained)
    if not left_out:
        return []
    return [
        f"Training list {fold} leaves out {len(left_out)} clips ({some(left_out)}); here fold {fold} trains on them."
    ]


def require_folds(found: Mapping[int, str], folds: int, what: str, url: str) -> None:
    """Refuse if a test list is missing. Raises MicaclError."""
    missing = [str(k) for k in range(1, folds + 1) if k not in found]
    if missing:
        raise MicaclError(
            f"{url} has the test lists of the folds {', '.join(map(str, sorted(found))) or 'none'} of {what}, not of "
            f"{', '.join(missing)}.",
            "The fold of a clip is the one that tests it: with a test list missing, clips would have none.",
            f"Put all {folds} test lists beside each other.",
        )


def only_one(keys: Sequence[str], what: str, store: Store) -> str:
    """The one key; refuse two lists for one thing. Raises MicaclError."""
    if len(keys) > 1:
        raise MicaclError(
            f"There are {len(keys)} lists for {what}: {some([store.url(key) for key in keys])}.",
            "It is not clear which is meant.",
            "Keep one release of the lists; move the others away.",
        )
    return keys[0]
