"""The list of videos that gave no bag, one JSON object a line: name, reason, detail, and the key of the crop object.

<dataset>/quarantine/<id>.jsonl    by video id; listed with its sha256 in the version file
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from pipeline.contract import canonical_json, digest, foreign, json_object
from pipeline.shapes import QUARANTINED, require_shape
from pipeline.storage import Store


def write_quarantine(store: Store, said: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """Write the list. Returns how the version names it. Same videos, same bytes."""
    data = "".join(f"{canonical_json(one)}\n" for one in said).encode()
    key = f"quarantine/{digest(data)[:32]}.jsonl"
    store.put_if_absent(key, data)
    return {"path": key, "sha256": digest(data)}


def quarantine_lines(data: bytes, where: str) -> list[dict[str, Any]]:
    """The lines of a list. Raises MicaclError if one is not ours."""
    try:
        lines = data.decode().splitlines()
    except UnicodeDecodeError as error:
        raise foreign(where, error) from error
    out = []
    for number, line in enumerate(lines, 1):
        said = json_object(line, f"line {number} of {where}")
        require_shape(said, QUARANTINED, f"line {number} of {where}")
        out.append(said)
    return out
