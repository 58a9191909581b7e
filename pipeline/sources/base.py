"""What every source is: rows that stream, and what a person should know of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from pipeline.contract import MicaclError, Video

FRAMES = ("auto", "original", "images", "aligned", "16f")
"""Which pictures of a clip: its video; a folder of whole frames; of face crops; DFEW's 16 interpolated face crops."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceOptions:
    """Choices that a layout cannot make by itself."""

    frames: str = "auto"
    """One of FRAMES. `auto` takes the authors' face crops if they are there, else the videos."""

    def __post_init__(self) -> None:
        if self.frames not in FRAMES:
            raise MicaclError(f"--frames is {self.frames!r}.", "Nothing was read.", f"Use one of {', '.join(FRAMES)}.")


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """A raw bucket whose layout is known."""

    kind: str
    layout: str
    """One sentence: which layout was found, and where."""
    videos: Callable[[], Iterator[Video]]
    """The rows in any order, as they are listed; call it once. Names may repeat: who stores them checks that.

    Raises MicaclError on a row that makes no sense."""
    labels: tuple[str, ...] | None = None
    """The data set's own label set in its own order; None if the rows decide."""
    notes: tuple[str, ...] = ()
    """What a person should know: variants met, clips left out, counts that differ from the published ones."""


def some(names: list[str] | tuple[str, ...], most: int = 3) -> str:
    """`a, b, c and 7 more`."""
    rest = len(names) - most
    return ", ".join(names[:most]) + (f" and {rest} more" if rest > 0 else "")


def no_frames_choice(kind: str, options: SourceOptions) -> None:
    """Refuse --frames where a layout has one kind of pictures. Raises MicaclError."""
    if options.frames != "auto":
        raise MicaclError(
            f"--frames is {options.frames!r}, and a source of kind {kind} has one kind of pictures.",
            "Nothing was read.",
            "Leave --frames out.",
        )
