"""A CSV or Parquet table: a line a clip, read as a stream.

`path` is a video or a folder of images, relative to the table's folder, or a full URL. A listed file that is not there
is kept as a row: it is quarantined as missing later, so that every line of the table is accounted for.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from pathlib import PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.contract import FOLDS, SPLITS, MicaclError, Video
from pipeline.sources.base import Source, SourceOptions, no_frames_choice
from pipeline.storage import Store, open_store, split_url

COLUMNS = ("path", "label", "split", "fold", "subject", "scene", "kind", "cropped", "start_s", "end_s", "box")
_MOST_FOLDS = 1000
_MOST_SECONDS = 1e6
_BUFFER_BYTES = 2**20
_BATCH_ROWS = 4096
_NO_CSV = "Give a CSV with a header, the same number of fields in every line (quotes around commas), in UTF-8."


def is_table(url: str) -> bool:
    """Told by the extension."""
    return PurePosixPath(url).suffix.lower() in (".csv", ".parquet")


def find_table(url: str, options: SourceOptions) -> Source:
    """A table's rows. Its header is checked here, its lines as they are read.

    Fingerprints are left empty: a table may name a few clips of a huge bucket, or of several, so nothing is listed;
    the task that takes up a clip asks for it.

    Raises MicaclError if the table is missing or has no `path`.
    """
    no_frames_choice("table", options)
    root, name = split_url(url)
    store = open_store(root)
    store.check()
    header = _header(store, name, url)
    used = [column for column in header if column in COLUMNS]
    if "path" not in used:
        raise MicaclError(
            f"{url} has the columns {', '.join(header)}.",
            "Without `path` its videos cannot be found.",
            f"Name the columns path, label and, if you have them, {', '.join(COLUMNS[2:])}.",
        )
    if len(set(used)) < len(used):
        raise MicaclError(f"{url} has a column twice.", "It is not clear which is meant.", "Remove one of them.")
    return Source(
        kind="table",
        layout=f"A table, {url}, with the columns {', '.join(used)}.",
        videos=lambda: _videos(store, name, url),
        notes=tuple(_unused(header)),
    )


def _unused(header: list[str]) -> Iterator[str]:
    for column in header:
        if column not in COLUMNS:
            near = get_close_matches(column, COLUMNS, n=1, cutoff=0.75)
            yield f"The column {column!r} is not used" + (f" (did you mean {near[0]}?)." if near else ".")


class _StoredFile(io.RawIOBase):
    """A stored object as a file, read by ranges."""

    def __init__(self, store: Store, name: str, size: int) -> None:
        super().__init__()
        self._store, self._name, self._size, self._at = store, name, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any) -> int:
        want = max(0, min(len(buffer), self._size - self._at))
        data = self._store.read_range(self._name, self._at, want) if want else b""
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)


def _open(store: Store, name: str, url: str) -> tuple[io.BufferedReader, str]:
    """The table as a file, and its fingerprint."""
    found = store.stat(name)
    if found is None:
        raise MicaclError(
            f"{url} does not exist, or is a folder.", "Nothing was read.", "Correct the path of the table."
        )
    return io.BufferedReader(_StoredFile(store, name, found.size), _BUFFER_BYTES), found.fingerprint


def _header(store: Store, name: str, url: str) -> list[str]:
    """Column names."""
    file, _ = _open(store, name, url)
    with file:
        return _parquet(file, url).schema_arrow.names if _is_parquet(name) else next(_lines(file, url))[1]


def _is_parquet(name: str) -> bool:
    return name.lower().endswith(".parquet")


def _parquet(file: io.BufferedReader, url: str) -> Any:
    try:
        return pq.ParquetFile(file, pre_buffer=False)
    except (pa.ArrowException, OSError) as error:
        raise MicaclError(f"{url}: {error}.", "Nothing was read.", "Give a CSV with a header, or Parquet.") from error


def _lines(file: io.BufferedReader, url: str) -> Iterator[tuple[int, list[str]]]:
    """(line number, fields) of a CSV, the header first. Raises MicaclError."""
    text = io.TextIOWrapper(file, encoding="utf-8-sig", newline="")
    lines = csv.reader(text, strict=True)
    width = 0
    try:
        for fields in lines:
            if not any(fields):
                continue
            if width and len(fields) != width:
                what = f"line {lines.line_num} has {len(fields)} fields, the header has {width}"
                raise MicaclError(f"{url} {what}.", "It is not clear which field is which.", _NO_CSV)
            yield lines.line_num, fields if width else [field.strip() for field in fields]
            width = width or len(fields)
    except (csv.Error, UnicodeDecodeError) as error:
        where = f"{url} near line {lines.line_num + 1}"
        raise MicaclError(f"{where}: {error}.", "It was not read on from there.", _NO_CSV) from error
    if not width:
        raise MicaclError(f"{url} is empty.", "Nothing was read.", _NO_CSV)


def _videos(store: Store, name: str, url: str) -> Iterator[Video]:
    file, fingerprint = _open(store, name, url)
    first: Video | None = None
    with file:
        for where, row in (_parquet_rows if _is_parquet(name) else _csv_rows)(file, url):
            video = _video(row, store.root, where)
            first = first or video
            if (video.fold is None) != (first.fold is None):
                raise MicaclError(
                    f"{where} has {'no fold' if video.fold is None else 'a fold'}, unlike the lines before it.",
                    "Clips with folds and clips with splits do not go into one data set.",
                    "Fill in `fold` in every line, or in none.",
                )
            yield video
    now = store.stat(name)
    if now is None or now.fingerprint != fingerprint:
        raise MicaclError(
            f"{url} changed while it was read.",
            "Its lines may be of two versions, so none was used.",
            "Run the same command again once the table is at rest.",
        )


def _csv_rows(file: io.BufferedReader, url: str) -> Iterator[tuple[str, dict[str, str]]]:
    lines = _lines(file, url)
    _, header = next(lines)
    for number, fields in lines:
        yield f"{url} line {number}", dict(zip(header, fields, strict=True))


def _parquet_rows(file: io.BufferedReader, url: str) -> Iterator[tuple[str, dict[str, str]]]:
    table = _parquet(file, url)
    columns = [column for column in table.schema_arrow.names if column in COLUMNS]
    number = 0
    try:
        for batch in table.iter_batches(batch_size=_BATCH_ROWS, columns=columns, use_threads=False):
            for row in batch.to_pylist():
                number += 1
                yield f"{url} row {number}", {column: _text(value) for column, value in row.items()}
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise MicaclError(
            f"{url}: {error}.", "It was not read on from there.", "Write the Parquet file again."
        ) from error


def _text(value: Any) -> str:
    """Subjects, labels and paths are often numbers in Parquet, and whole ones floats where some are missing."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    if isinstance(value, bytes):
        return value.decode("utf-8", errors="replace")
    return " ".join(map(_text, value)) if isinstance(value, (list, tuple)) else str(value)


def _video(row: Mapping[str, str], root: str, where: str) -> Video:
    path = _tidy(row["path"])
    if not path.strip("/"):
        raise MicaclError(f"{where} has an empty path.", "Nothing was read.", "Fill it in or remove the line.")
    if path.rstrip("/").rpartition("/")[2] == "..":
        raise _bad(where, "path", row["path"], "name a file or a folder of images")
    kind = _one_of(row, "kind", ("video", "frames"), where)
    if kind is None:
        kind = "frames" if path.endswith("/") or "." not in path.rpartition("/")[2] else "video"
    path = path.rstrip("/")
    fold = _fold(row, where)
    split = _one_of(row, "split", SPLITS if fold is None else (*SPLITS, FOLDS), where)
    if (split == FOLDS) != (fold is not None) and split is not None:
        raise _bad(where, "split", split, "leave `split` out where `fold` is given, or the other way round")
    start_s, end_s = (_seconds(row, column, where) for column in ("start_s", "end_s"))
    start_s = (start_s or None) if end_s is None else (start_s or 0.0)  # the same part has the same name
    if end_s is not None and start_s is not None and end_s <= start_s:
        raise _bad(where, "end_s", row["end_s"], "give seconds after start_s")
    box = _box(row, where)
    return Video(
        url=path if "://" in path or path.startswith("/") else f"{root.rstrip('/')}/{path}",
        name=path + _part(start_s, end_s, box),
        label=_word(row, "label"),
        split=split if fold is None else FOLDS,
        subject=_word(row, "subject"),
        fold=fold,
        scene=_word(row, "scene"),
        kind=kind,
        cropped=_one_of(row, "cropped", ("true", "false"), where) == "true",
        start_s=start_s,
        end_s=end_s,
        box=box,
    )


def _word(row: Mapping[str, str], column: str) -> str | None:
    """Without the spaces that tables have around words: they would make two people of one."""
    return (row.get(column) or "").strip() or None


def _tidy(path: str) -> str:
    """The same path without `.` and, where something goes before it, `..`: one file has one name."""
    if "://" in path:
        return path
    out: list[str] = []
    for part in path.split("/"):
        if part == ".." and out and out[-1] not in ("", ".."):
            out.pop()
        elif part != "." and (part or not out or out != [""]):
            out.append(part)
    tidy = "/".join(out)
    return tidy if path.startswith("/") else tidy.lstrip("/")


def _part(start_s: float | None, end_s: float | None, box: tuple[float, ...] | None) -> str:
    """What tells two parts of one file apart, a function of the line alone: `#12.5-20,box=10,20,64,64`."""
    said = []
    if start_s is not None or end_s is not None:
        said.append("-".join("" if at is None else _number(at) for at in (start_s, end_s)))
    if box is not None:
        said.append(f"box={','.join(map(_number, box))}")
    return f"#{','.join(said)}" if said else ""


def _number(value: float) -> str:
    return f"{value:.6f}".rstrip("0").rstrip(".")


def _bad(where: str, column: str, value: str, remedy: str) -> MicaclError:
    return MicaclError(f"{where} has {column} {value!r}.", "Nothing was written.", f"{remedy[:1].upper()}{remedy[1:]}.")


def _one_of(row: Mapping[str, str], column: str, words: tuple[str, ...], where: str) -> str | None:
    said = (row.get(column) or "").strip()
    word = {"1": "true", "0": "false", "yes": "true", "no": "false"}.get(said.lower(), said.lower())
    if word and word not in words:
        raise _bad(where, column, said, f"use one of {', '.join(words)}")
    return word or None


def _fold(row: Mapping[str, str], where: str) -> int | None:
    text = (row.get("fold") or "").strip()
    if not text:
        return None
    if not (text.isascii() and text.isdigit()) or not 1 <= int(text) <= _MOST_FOLDS:
        raise _bad(where, "fold", text, f"give the number of the fold that tests the clip, from 1 to {_MOST_FOLDS}")
    return int(text)


def _seconds(row: Mapping[str, str], column: str, where: str) -> float | None:
    text = (row.get(column) or "").strip()
    if not text:
        return None
    found = _floats(text)
    if len(found) != 1 or not 0 <= found[0] <= _MOST_SECONDS:
        raise _bad(where, column, text, "give seconds from the first frame of the file, e.g. 12.5; 0 or more")
    return round(found[0], 6)


def _box(row: Mapping[str, str], where: str) -> tuple[float, float, float, float] | None:
    text = (row.get("box") or "").strip()
    if not text:
        return None
    found = _floats(text)
    if len(found) != 4 or min(found[2:]) <= 0:
        raise _bad(where, "box", text, "give four numbers, `x y w h` in pixels, w and h above 0")
    return found[0], found[1], found[2], found[3]


def _floats(text: str) -> tuple[float, ...]:
    """Numbers with spaces or commas between; nothing if one of them is none."""
    try:
        found = tuple(float(word) for word in text.replace(",", " ").split())
    except ValueError:
        return ()
    return tuple(value + 0.0 for value in found) if all(map(math.isfinite, found)) else ()  # -0 is 0
