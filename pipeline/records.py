"""Records of all crops of a version, many in one object, so that the next run need not open each crop to know of it.

<dataset>/records/<id>.parquet    by video id; listed with its sha256 in the version file as `records`
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.contract import digest, foreign
from pipeline.crop import CropRecord
from pipeline.dataset import get_checked
from pipeline.parquet import read_parquet
from pipeline.storage import Store

FILE_RECORDS = 8192


def write_records(store: Store, records: Iterable[tuple[CropRecord, str | None]]) -> list[dict[str, str]]:
    """Write records, each with the video's subject, in the order given. Returns the files as the version lists them.

    Same records, same bytes.
    """
    files, rest = [], iter(records)
    while part := list(islice(rest, FILE_RECORDS)):
        columns = {
            "video": pa.array([r.video for r, _ in part], pa.string()),
            "subject": pa.array([subject for _, subject in part], pa.string()),
            "object": pa.array([r.object for r, _ in part], pa.string()),
            "record": pa.array([r.to_json() for r, _ in part], pa.string()),
        }
        out = io.BytesIO()
        pq.write_table(pa.table(columns), out, compression="zstd")
        sha256 = digest(out.getvalue())
        key = f"records/{sha256[:32]}.parquet"
        store.put_if_absent(key, out.getvalue())
        files.append({"path": key, "sha256": sha256})
    return files


def read_records(store: Store, files: Iterable[Mapping[str, Any]]) -> Iterator[CropRecord]:
    """The records of a version, one file in memory. Raises MicaclError if a file was changed or is gone."""
    for file in files:
        where = store.url(str(file["path"]))
        try:
            table = read_parquet(get_checked(store, str(file["path"]), str(file["sha256"])))
            texts = table["record"].cast(pa.string()).to_pylist()
        except (pa.ArrowException, OSError, ValueError, KeyError) as error:
            raise foreign(where, error) from error
        for text in texts:
            yield CropRecord.from_json(text or "", where)
