"""A CSV or Parquet table beside the videos: `path` and `label`, optionally `split` and `subject`.

Paths are relative to the table's folder, or full URLs. A listed file that is not there is kept as a row: it is
quarantined as missing later, so that every line of the table is accounted for.
"""

from __future__ import annotations

import io
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from pipeline.contract import SPLITS, MicaclError, Video
from pipeline.storage import open_store, split_url

COLUMNS = ("path", "label", "split", "subject")


def list_table(url: str) -> list[Video]:
    """One Video a line. Raises MicaclError if the table is missing, has no `path`, or says a thing twice."""
    root, name = split_url(url)
    store = open_store(root)
    store.check()
    try:
        table = _read(store.get(name), url)
    except (FileNotFoundError, IsADirectoryError) as error:
        raise MicaclError(
            f"{url} does not exist, or is a folder.", "Nothing was read.", "Correct the path of the table."
        ) from error
    if "path" not in table.column_names:
        raise MicaclError(
            f"{url} has the columns {', '.join(table.column_names)}.",
            "Without `path` its videos cannot be found.",
            "Name the columns path, label and, if you have them, split and subject.",
        )
    if len(set(table.column_names)) < len(table.column_names):
        raise MicaclError(f"{url} has a column twice.", "It is not clear which is meant.", "Remove one of them.")
    known = {e.key: e.fingerprint for e in store.list()}
    rows = _as_text(table.select([c for c in COLUMNS if c in table.column_names]), url).to_pylist()
    videos = [_video(row, store.root, known, f"{url} line {n + 2}") for n, row in enumerate(rows)]
    names = [v.name for v in videos]
    if len(set(names)) < len(names):
        twice = next(n for n in names if names.count(n) > 1)
        raise MicaclError(f"{url} lists {twice!r} twice.", "It would be counted twice.", "Remove one of the lines.")
    return videos


def _read(data: bytes, url: str) -> pa.Table:
    try:
        if url.lower().endswith(".parquet"):
            return pq.read_table(io.BytesIO(data))
        text = pa.csv.ConvertOptions(column_types={c: pa.string() for c in COLUMNS}, strings_can_be_null=True)
        return pa.csv.read_csv(io.BytesIO(data), convert_options=text)
    except pa.ArrowException as error:
        raise MicaclError(f"{url}: {error}.", "Nothing was read.", "Give a CSV with a header, or Parquet.") from error


def _as_text(table: pa.Table, url: str) -> pa.Table:
    """Subjects and paths are often numbers in Parquet; here they are names."""
    try:
        return table.cast(pa.schema([(name, pa.string()) for name in table.column_names]))
    except pa.ArrowException as error:
        raise MicaclError(f"{url}: {error}.", "Nothing was read.", "Write its columns as text.") from error


def _video(row: dict[str, Any], root: str, known: dict[str, str], where: str) -> Video:
    path = (row["path"] or "").removeprefix("./")
    if not path:
        raise MicaclError(f"{where} has an empty path.", "Nothing was read.", "Fill it in or remove the line.")
    split = row.get("split") or None
    if split is not None and split not in SPLITS:
        raise MicaclError(f"{where} has split {split!r}.", "Nothing was read.", f"Use one of {', '.join(SPLITS)}.")
    full = path if "://" in path or path.startswith("/") else f"{root}/{path}"
    return Video(
        url=full,
        name=path,
        fingerprint=known.get(path, ""),  # crop looks for those that this listing does not have
        label=row.get("label") or None,
        split=split,
        subject=row.get("subject") or None,
    )
