"""Who stays out: the digests that `micacl forget` leaves in a version, so that the next `prepare` brings nobody back.

A version's `forgotten` is a sorted list of digests of names. A digest holds no name, but it is no secret either: who
can guess a name can test it, and names of subjects are often easy to guess (docs/data.md).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

from pipeline.contract import Video, digest
from pipeline.dataset import list_versions, read_version
from pipeline.storage import Store

_DIGITS = 32


def tombstone(kind: str, name: str) -> str:
    """32 hex digits of sha256("<kind>:<name>"). `kind` is subject or video."""
    return digest(f"{kind}:{name}".encode())[:_DIGITS]


def tombstones(subjects: Iterable[str] = (), videos: Iterable[str] = ()) -> set[str]:
    return {*(tombstone("subject", name) for name in subjects), *(tombstone("video", name) for name in videos)}


def is_forgotten(video: Video, forgotten: Collection[str]) -> bool:
    """Whether its name or its subject is in a version's `forgotten` (give a set where there are many videos)."""
    if tombstone("video", video.name) in forgotten:
        return True
    return video.subject is not None and tombstone("subject", video.subject) in forgotten


def forgotten_of(body: Mapping[str, Any]) -> frozenset[str]:
    """`forgotten` of a version body; nobody where the field is absent."""
    return frozenset(str(one) for one in body.get("forgotten") or ())


def newest_forgotten(store: Store) -> tuple[int | None, frozenset[str]]:
    """(number, `forgotten`) of the newest version, for whoever makes the next one; (None, nobody) if there is none.

    Commit with `parent=number`: somebody may be forgotten while the next version is made.
    """
    if not list_versions(store):
        return None, frozenset()
    number, body, _ = read_version(store)
    return number, forgotten_of(body)
