"""Data sets with lists: what the lists say of a clip, joined with where its pictures lie."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from pipeline.contract import MicaclError, Video, part_name
from pipeline.image_folders import fingerprints_of
from pipeline.sources.base import Source, some
from pipeline.sources.published import differences
from pipeline.sources.tree import Survey, find_clips
from pipeline.storage import Entry


@dataclass(frozen=True, slots=True)
class Said:
    """What the lists say of a clip."""

    label: str
    split: str
    fold: int | None = None
    scene: str | None = None


@dataclass(frozen=True, slots=True)
class Pictures:
    """One of the forms in which the clips of a data set lie there."""

    word: str
    """Of FRAMES."""
    roots: tuple[str, ...]
    kind: str
    """Video.kind."""

    @property
    def cropped(self) -> bool:
        return self.word in ("aligned", "16f")

    def says(self) -> str:
        where = some([f"{root or '.'}/" for root in self.roots])
        return f"{'folders of frames' if self.kind == 'frames' else 'videos'} in {where}"


def choose_pictures(found: Sequence[Pictures], wanted: str, prefer: Sequence[str], url: str) -> Pictures:
    """The form that --frames names; with `auto` the first of `prefer` that is there, or the only one.

    Raises MicaclError if it is not there, or if two are and neither is in `prefer`.
    """
    have = {pictures.word: pictures for pictures in found}
    there = "; ".join(f"{word}: {pictures.says()}" for word, pictures in have.items())
    if not have:
        raise MicaclError(
            f"{url} has the lists of the data set, and no clips.",
            "There is nothing to prepare.",
            "Unpack the clips beside the lists, with the folder names they come with (docs/data.md).",
        )
    if wanted != "auto" and wanted not in have:
        raise MicaclError(
            f"--frames is {wanted}, and {url} has only {there}.",
            "Nothing was read.",
            f"Use --frames {' or '.join(have)}, or unpack the {wanted} clips there.",
        )
    for word in (wanted, *prefer, *(have if len(have) == 1 else ())):
        if word in have:
            return have[word]
    raise MicaclError(
        f"{url} has its clips in {len(have)} forms: {there}.",
        "They give different bags, so none was chosen for you.",
        f"Say which with --frames {' or '.join(have)}.",
    )


@dataclass(frozen=True, slots=True)
class Listed:
    """All that makes a source of a data set with lists."""

    kind: str
    look: Survey
    lists: str
    """Where the lists lie, in words."""
    labels: tuple[str, ...]
    said: Mapping[str, Said]
    """By clip."""
    pictures: Pictures
    clip_of: Callable[[str], str | None]
    """As find_clips takes it."""
    place: Callable[[str], str]
    """Key of a clip that is missing: where it would lie, without an extension."""
    notes: Sequence[str] = ()

    def source(self) -> Source:
        """Look where the clips lie (not at their frames), and say what is missing."""
        found = find_clips(self.look.store, self.pictures.roots, self.clip_of, self.pictures.kind)
        chosen = f"--frames {self.pictures.word}: {self.pictures.says()}"
        counts: dict[str, dict[str, int]] = {}
        for said in self.said.values():
            part = counts.setdefault(part_name(said.split, said.fold), {})
            part[said.label] = part.get(said.label, 0) + 1
        published = differences(self.kind, counts)
        return Source(
            kind=self.kind,
            layout=f"{self.kind} below {self.look.url}: {self.lists}; {chosen}.",
            videos=lambda: self._videos(found),
            labels=self.labels,
            notes=(*self.notes, *_presence(self.said, found), *(f"Lists: {text}" for text in published)),
        )

    def _videos(self, found: Mapping[str, Entry]) -> Iterator[Video]:
        store, pictures = self.look.store, self.pictures
        fingerprints: dict[str, str] = {entry.key: entry.fingerprint for entry in found.values()}
        if pictures.kind == "frames":
            folders, fingerprints = set(fingerprints), {}
            for root in pictures.roots:
                fingerprints |= fingerprints_of(folders, store.list(f"{root}/" if root else ""))
        for clip, said in self.said.items():
            entry = found.get(clip)
            key = entry.key if entry else self.place(clip).lstrip("/") + ("" if pictures.kind == "frames" else ".mp4")
            yield Video(
                url=store.url(key),
                name=key,
                fingerprint=fingerprints.get(key, ""),
                label=said.label,
                split=said.split,
                fold=said.fold,
                scene=said.scene,
                kind=pictures.kind,
                cropped=pictures.cropped,
            )


def _presence(said: Mapping[str, Said], found: Mapping[str, Entry]) -> list[str]:
    missing, unlisted = [c for c in said if c not in found], [c for c in found if c not in said]
    notes = []
    if missing:
        notes.append(
            f"{len(missing)} of {len(said)} listed clips are not there ({some(missing)}): quarantined as missing."
        )
    if unlisted:
        notes.append(f"{len(unlisted)} clips are there and in no list ({some(unlisted)}): left out.")
    return notes
