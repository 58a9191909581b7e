"""What a run of `prepare` knows of its videos, on disk instead of in memory: an SQLite file of the run's own.

    listing ──add──> videos ──todo──> (crop) ──record──> bags ──plans──> (pack)

10^6 videos are a few hundred megabytes here and nothing in the driver. The file is scratch: what must survive a run is
in the crops, shards and versions on storage, and the next run builds its ledger anew from them.
"""

from __future__ import annotations

import contextlib
import json
import sqlite3
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from pipeline.contract import MicaclError, PackConfig, Reason, Video, canonical_json
from pipeline.crop import CropRecord
from pipeline.pack import UNLABELLED, Member, ShardPlan, cut_ranges, cut_rows, folder_name, members_of, place_of

T = TypeVar("T")
Keep = Callable[[Mapping[str, Any]], bool]
"""Index columns of a bag -> whether it is packed."""
_ROWS = 1000
"""Per statement."""
_SIGN = 2**63
"""SQLite's whole numbers are signed: a place p is stored as p - 2^63, which keeps the order."""

_TABLES = """
PRAGMA journal_mode = OFF;
PRAGMA synchronous = OFF;
PRAGMA cache_size = -32000;
CREATE TABLE videos (
    place INTEGER PRIMARY KEY, name TEXT NOT NULL, video TEXT NOT NULL, label TEXT, object TEXT NOT NULL,
    record TEXT, bags INTEGER NOT NULL DEFAULT 0, reason TEXT
);
CREATE INDEX by_object ON videos (object);
CREATE TABLE crops (object TEXT PRIMARY KEY) WITHOUT ROWID;
CREATE TABLE bags (
    split TEXT NOT NULL, fold INTEGER NOT NULL, label TEXT NOT NULL, place INTEGER NOT NULL, key TEXT NOT NULL,
    size INTEGER NOT NULL, member TEXT NOT NULL,
    PRIMARY KEY (split, fold, label, place, key)
) WITHOUT ROWID;
"""


@contextlib.contextmanager
def open_ledger(keep: Keep = lambda _: True) -> Iterator[Ledger]:
    """An empty ledger in a temporary file without a name (in TMPDIR, else /var/tmp): who is killed leaves nothing."""
    ledger = Ledger(keep=keep)
    try:
        yield ledger
    finally:
        ledger.close()


class Ledger:
    """Videos by place (their id as a number), what became of them, and their bags by split, fold and label."""

    def __init__(self, path: str | Path = "", keep: Keep = lambda _: True) -> None:
        self._keep = keep
        self._sql = sqlite3.connect(path, isolation_level=None)
        self._sql.executescript(_TABLES)
        self._counts = dict.fromkeys(("listed", "done", "written", "quarantined", "bags"), 0)
        self._reasons: Counter[str] = Counter()

    def close(self) -> None:
        self._sql.close()

    def add(self, videos: Iterable[tuple[Video, str]]) -> None:
        """Take in videos, each with the key of its crop ("" if only a look at the file will tell).

        Raises MicaclError if a name comes twice.
        """
        for part in _parts(videos, _ROWS):
            rows = [(place_of(v.id) - _SIGN, v.name, v.to_json(), v.label, key) for v, key in part]
            try:
                self._sql.executemany("INSERT INTO videos (place, name, video, label, object) VALUES (?,?,?,?,?)", rows)
            except sqlite3.IntegrityError as error:
                raise self._twice(rows) from error
            self._counts["listed"] += len(rows)

    def _twice(self, rows: list[tuple[int, str, str, str | None, str]]) -> MicaclError:
        seen: set[int] = set()
        name = ""
        for place, name, *_ in rows:
            known = self._one("SELECT COUNT(*) FROM videos WHERE place = ? AND name != ?", place, name)
            if place in seen or known:
                break
            seen.add(place)
        return MicaclError(
            f"The source lists {name!r} twice.", "It would be counted twice.", "Remove one of the two from the source."
        )

    def labels(self) -> list[str]:
        """The distinct words, sorted."""
        return [w for (w,) in self._sql.execute("SELECT DISTINCT label FROM videos WHERE label NOTNULL ORDER BY label")]

    def know(self, records: Iterable[CropRecord], crops: Iterable[str]) -> None:
        """Take over records of a former run, of the crops that this run needs and that are still there (`crops`)."""
        for part in _parts(((key,) for key in crops), _ROWS):
            self._sql.executemany("INSERT OR IGNORE INTO crops VALUES (?)", part)
        wanted = "SELECT COUNT(*) FROM videos JOIN crops USING (object) WHERE object = ? AND record IS NULL"
        for record in records:
            if self._one(wanted, record.object):
                self.record(record)

    def record(self, record: CropRecord) -> None:
        """What became of a video. A second record of the same video changes nothing: tasks can be run twice."""
        row = self._sql.execute(
            "SELECT place, video FROM videos WHERE name = ? AND place = ? AND record IS NULL",
            (
                record.video,
                place_of(Video(url="", name=record.video).id) - _SIGN,
            ),
        ).fetchone()
        if row is None:
            return
        video = Video.from_json(row[1])
        rows = [
            r for r in zip(members_of(video, record), record.bags, strict=True) if self._keep(_index_row(video, *r))
        ]
        reason = record.reason or (None if rows else Reason.FILTERED.value)
        self._sql.execute(
            "UPDATE videos SET record = ?, object = ?, bags = ?, reason = ? WHERE place = ?",
            (record.to_json(), record.object, len(rows), reason, row[0]),
        )
        group = (video.split, video.fold or 0, folder_name(video.label or UNLABELLED), row[0])
        values = [(*group, m.key, m.size, canonical_json(asdict(m))) for m, _ in rows]
        self._sql.executemany("INSERT INTO bags VALUES (?,?,?,?,?,?,?)", values)
        self._count(len(rows), reason)

    def _count(self, bags: int, reason: str | None) -> None:
        """Kept while records come in: to count a million rows for each progress line would take longer than they do."""
        for name, more in (("done", 1), ("written", bags > 0), ("quarantined", reason is not None), ("bags", bags)):
            self._counts[name] += more
        if reason is not None:
            self._reasons[reason] += 1

    def todo(self) -> Iterator[Video]:
        """Videos without a record, by place."""
        for (text,) in self._rows("SELECT video FROM videos WHERE record IS NULL ORDER BY place"):
            yield Video.from_json(text)

    def records(self) -> Iterator[tuple[CropRecord, str | None]]:
        """With the video's subject, by place: the same order whatever came first."""
        for video, text in self._rows("SELECT video, record FROM videos WHERE record NOTNULL ORDER BY place"):
            yield CropRecord.from_json(text), Video.from_json(video).subject

    def quarantined(self) -> Iterator[dict[str, str]]:
        """Videos that give nothing to pack, by name: video, reason, detail, object (the crop), subject if known."""
        for video, text, reason in self._rows(
            "SELECT video, record, reason FROM videos WHERE reason NOTNULL ORDER BY name"
        ):
            record, subject = CropRecord.from_json(text), Video.from_json(video).subject
            said = {"video": record.video, "reason": reason, "detail": record.detail, "object": record.object}
            yield said if subject is None else {**said, "subject": subject}

    def counts(self) -> dict[str, int]:
        """Videos: listed, done (have a record), written (have a bag to pack), quarantined; and bags."""
        return dict(self._counts)

    def reasons(self) -> dict[str, int]:
        """Quarantined videos by reason, sorted."""
        return dict(sorted(self._reasons.items()))

    def plans(self, config: PackConfig) -> Iterator[ShardPlan]:
        """Every shard, class by class: the plan that `pack.plan_shards` makes, one shard at a time in memory."""
        groups = self._sql.execute(
            "SELECT DISTINCT split, fold, label FROM bags ORDER BY split, fold, label"
        ).fetchall()
        for split, fold, label in groups:
            group = (split, fold, label)
            for low, high in cut_ranges(lambda a, b, group=group: self._weigh(group, a, b), config):  # type: ignore[misc]
                for part in cut_rows(self._members(group, low, high), config):
                    yield ShardPlan(split=split, fold=fold or None, label=label, members=part)

    def _weigh(self, group: tuple[str, int, str], low: int, high: int) -> tuple[int, int]:
        found = self._sql.execute(f"SELECT COUNT(*), TOTAL(size) {_IN_RANGE}", (*group, *_signed(low, high))).fetchone()
        return int(found[0]), int(found[1])

    def _members(self, group: tuple[str, int, str], low: int, high: int) -> list[Member]:
        found = self._sql.execute(f"SELECT member {_IN_RANGE} ORDER BY key", (*group, *_signed(low, high)))
        return [Member(**json.loads(text)) for (text,) in found]

    def _rows(self, query: str) -> Iterator[tuple[Any, ...]]:
        cursor = self._sql.execute(query)
        while rows := cursor.fetchmany(_ROWS):
            yield from rows

    def _one(self, query: str, *values: Any) -> int:
        return int(self._sql.execute(query, values).fetchone()[0])


_IN_RANGE = "FROM bags WHERE split = ? AND fold = ? AND label = ? AND place BETWEEN ? AND ?"


def _signed(low: int, high: int) -> tuple[int, int]:
    """[low, high) as the ends that BETWEEN includes."""
    return low - _SIGN, high - 1 - _SIGN


def _index_row(video: Video, member: Member, stub: Any) -> dict[str, Any]:
    """The columns of the index that a filter may ask for."""
    said = {"split": video.split, "fold": video.fold, "label": video.label or UNLABELLED, "subject": video.subject}
    return {**stub.columns, **said, "scene": video.scene, "video": video.name, "key": member.key}


def _parts(items: Iterable[T], size: int) -> Iterator[list[T]]:
    rest = iter(items)
    while part := list(islice(rest, size)):
        yield part
