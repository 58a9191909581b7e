"""A look at the upper folders of a bucket, so that a layout is found without listing a million frames."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

from pipeline.contract import MicaclError
from pipeline.image_folders import is_litter
from pipeline.sources.bucket import is_video
from pipeline.storage import Entry, Store

_DEPTH = 6
"""Folders below the URL. The deepest list of a data set (MAFW's) lies four down; doubled folders add some."""
_FOLDERS = 200
"""Listed at most, the upper ones first."""
_MANY = 100
"""A folder with more sub-folders than this holds clips: they are not looked into."""
_NAMES = 1000
"""Read of one folder: a page of a bucket's listing."""


@dataclass(frozen=True, slots=True)
class Folder:
    """What lies in one folder; of a large one its first names."""

    key: str
    """Without a slash at the end; empty for the bucket itself."""
    folders: tuple[str, ...]
    files: tuple[str, ...]

    @property
    def name(self) -> str:
        return self.key.rpartition("/")[2]

    def path(self, name: str) -> str:
        """Key of something that lies in it."""
        return f"{self.key}/{name}" if self.key else name


@dataclass(frozen=True, slots=True)
class Survey:
    """The upper folders of a bucket by key, upper ones first."""

    store: Store
    folders: Mapping[str, Folder]
    whole: bool
    """False if there were more folders than were looked at."""

    @property
    def url(self) -> str:
        return self.store.root

    def __iter__(self) -> Iterator[Folder]:
        return iter(self.folders.values())

    def says(self) -> str:
        """For an error: what was looked at."""
        top = self.folders.get("")
        names = [f"{name}/" for name in top.folders] + list(top.files) if top else []
        seen = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "") if names else "nothing"
        return f"{self.url} holds {seen}" + (
            "" if self.whole else f" (only the upper {_FOLDERS} folders were searched)"
        )


def survey(store: Store) -> Survey:
    """Look at the upper folders, breadth first. Raises MicaclError if the bucket cannot be read."""
    found: dict[str, Folder] = {}
    todo = deque([("", 0)])
    while todo and len(found) < _FOLDERS:
        key, depth = todo.popleft()
        folder = found[key] = _look(store, key)
        if depth < _DEPTH and len(folder.folders) <= _MANY:
            todo += [(folder.path(name), depth + 1) for name in folder.folders]
    return Survey(store, found, not todo)


def _look(store: Store, key: str) -> Folder:
    names = [e.key[len(key) + 1 if key else 0 :] for e in islice(store.children(f"{key}/" if key else ""), _NAMES)]
    names = sorted(name for name in names if not is_litter(name) and name[:1] != ".")
    return Folder(key, tuple(n[:-1] for n in names if n.endswith("/")), tuple(n for n in names if not n.endswith("/")))


def find_clips(store: Store, roots: Sequence[str], clip_of: Callable[[str], str | None], kind: str) -> dict[str, Entry]:
    """Where each clip lies below `roots`: its video, or its folder (without a slash at the end) if `kind` is `frames`.

    Args:
        clip_of: the clip's id from the key of a folder, or of a video without its extension; None if it is no clip.

    Raises MicaclError if a clip lies in two places.
    """
    found: dict[str, Entry] = {}
    todo = [(f"{root}/" if root else "", 0) for root in roots]
    while todo:
        prefix, depth = todo.pop()
        for entry in store.children(prefix):
            if is_litter(entry.key) or entry.key.endswith("__MACOSX/"):
                continue
            folder, key = entry.key.endswith("/"), entry.key.rstrip("/")
            fits = folder if kind == "frames" else is_video(key)
            clip = clip_of(key if folder else key.rpartition(".")[0]) if fits else None
            if clip is None:
                todo += [(entry.key, depth + 1)] if folder and depth < _DEPTH else []
            elif clip in found:
                raise _twice(store, clip, found[clip].key, key)
            else:
                found[clip] = Entry(key, entry.size, entry.fingerprint)
    return found


def _twice(store: Store, clip: str, one: str, other: str) -> MicaclError:
    return MicaclError(
        f"Clip {clip} lies in {' and in '.join(sorted(map(store.url, (one, other))))}.",
        "It is not clear which of the two is meant, and a copy must not be counted twice.",
        "Move one of them away; if an archive was unpacked in parts, merge the parts into one folder.",
    )
