"""Which checkpoint of a run is best on its validation clips.

<run>/best.json names it. It is decided by validation alone: highest UAR, then lowest loss, then earliest; the test
split is not read in training. Every checkpoint's state.json says the best so far too, so a run that stopped between the
two files goes on with the right one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from micacl.train.checkpoint import complete_steps, folder
from pipeline.contract import MicaclError, canonical_json, expecting, json_object
from pipeline.storage import Store

BEST = "best.json"
RULE = "highest UAR on validation, then lowest loss on it, then earliest"


@dataclass(frozen=True, kw_only=True, slots=True)
class Validated:
    """The validation after a step. Shares in [0, 1]."""

    step: int
    uar: float
    war: float
    loss: float
    """Cross entropy of the class scores, nats a clip."""
    clips: int

    def beats(self, other: Validated | None) -> bool:
        return other is None or (self.uar, -self.loss) > (other.uar, -other.loss)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def of(cls, said: Mapping[str, Any]) -> Validated:
        return cls(**{name: said[name] for name in ("step", "uar", "war", "loss", "clips")})


def put_best(store: Store, best: Validated) -> None:
    """After the checkpoint that it names."""
    store.put(BEST, canonical_json({**best.to_dict(), "rule": RULE}).encode())


def read_best(store: Store) -> Validated | None:
    """What best.json names; None for a run without validation. Raises MicaclError."""
    if not store.exists(BEST):
        return None
    with expecting(store.url(BEST)):
        return Validated.of(json_object(store.get(BEST), store.url(BEST)))


def best_of_checkpoint(store: Store, step: int) -> Validated | None:
    """The best so far as a checkpoint says it. Raises MicaclError."""
    where = f"{folder(step)}/state.json"
    with expecting(store.url(where)):
        said = json_object(store.get(where), store.url(where)).get("best")
        return None if said is None else Validated.of(said)


def step_of(store: Store, which: str) -> int | None:
    """The step of `last` (None: the newest) or `best`. Raises MicaclError."""
    if which == "last":
        return None
    if which != "best":
        raise MicaclError(f"--checkpoint is {which!r}.", "Nothing was read.", "Use last or best.")
    best = read_best(store)
    if best is None:
        raise MicaclError(
            f"{store.root} has no best.json: it was trained without validation, or is no run.",
            "Which checkpoint is best must not be asked of the test split.",
            "Use --checkpoint last, or train with --train.val-share 0.1.",
        )
    if best.step not in complete_steps(store):
        raise MicaclError(
            f"{store.root}/best.json names step {best.step}, whose checkpoint is gone.",
            "There is nothing to read.",
            "Use --checkpoint last.",
        )
    return best.step
