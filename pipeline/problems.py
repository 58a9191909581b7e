"""What `micacl verify` finds: how bad, what, where, and what to do about it."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

UNFIT = (AttributeError, IndexError, KeyError, TypeError, ValueError)
"""What reading something that is not ours may raise."""

REPACK = (
    "Delete this shard and its index file and run the same `micacl prepare` again: it makes both anew from the crops. "
    "If `micacl forget --delete` removed it, use a newer version."
)
RECOMMIT = "Do not use this version; run the same `micacl prepare` again, which commits a new one."
DELETE_VERSION = "Delete that version file and run the same `micacl prepare` again, which commits a new one."
RESPLIT = "Give the split of each video in the table so that none is on both sides, and run `micacl prepare` again."
LOOK = (
    "Look at both (`micacl report` shows them side by side). If they are one clip, put both on one side in the table "
    "or leave one out, and run `micacl prepare` again; if not, nothing needs to be done."
)


class Severity(StrEnum):
    """How bad a problem is, the worst first."""

    DAMAGE = "damage"  # bytes are not the ones that were written, or do not fit together: do not use it
    LEAK = "leak"  # whole, but by what the source says, scores on it would be too good
    SUSPECT = "suspect"  # perhaps a leak: two clips look and move alike; a person must look


@dataclass(frozen=True, kw_only=True, slots=True)
class Problem:
    """One thing that is wrong."""

    what: str
    where: str
    """URL of an object, with the bag's key where one bag is meant."""
    remedy: str
    severity: Severity = Severity.DAMAGE

    def to_json(self) -> dict[str, str]:
        return {"severity": self.severity.value, "what": self.what, "where": self.where, "remedy": self.remedy}
