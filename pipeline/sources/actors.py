"""CREMA-D and RAVDESS: acted clips whose file names say everything. Folds are of whole actors.

Neither has an official split. The folds are those of HiCMAE: actors in the order of their numbers, CREMA-D 5 folds of
18 (the last of 19), RAVDESS 6 folds of 4.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from pipeline.contract import FOLDS, MicaclError, Video
from pipeline.sources.base import Source, SourceOptions, no_frames_choice, some
from pipeline.sources.bucket import is_video
from pipeline.sources.published import differences
from pipeline.sources.tree import Survey
from pipeline.storage import Entry, Store

CREMA_D = {"ANG": "angry", "DIS": "disgust", "FEA": "fear", "HAP": "happy", "NEU": "neutral", "SAD": "sad"}
CREMA_D_CLIPS = 7442
CREMA_D_BROKEN = ("1076_MTI_NEU_XX", "1076_MTI_SAD_XX", "1064_TIE_SAD_XX", "1064_IEO_DIS_MD")
"""Named as damaged by the data set's authors."""
RAVDESS = ("neutral", "calm", "happy", "sad", "angry", "fearful", "disgust", "surprised")
_CREMA_D = re.compile(r"(1\d{3})_([A-Z]{3})_(ANG|DIS|FEA|HAP|NEU|SAD)_(?:LO|MD|HI|XX|X)")
_RAVDESS = re.compile(r"(0[1-3])-(0[12])-(0[1-8])-(0[12])-(0[12])-(0[12])-(\d\d)")


@dataclass(frozen=True, slots=True)
class Take:
    """What a file name says."""

    clip: str
    """The performance: the same in all files that show it."""
    label: str
    subject: str
    fold: int
    scene: str | None = None


def looks_like_crema_d(look: Survey) -> bool:
    """Some folder holds files named so, and hardly any others."""
    return _named(look, lambda name: bool(_CREMA_D.fullmatch(name)))


def looks_like_ravdess(look: Survey) -> bool:
    """Some folder holds files named so, and hardly any others."""
    return _named(look, lambda name: bool(_RAVDESS.fullmatch(name)))


def find_crema_d(look: Survey, options: SourceOptions) -> Source:
    """Rows of CREMA-D: every video. Raises MicaclError on a video whose name says nothing, or a copy."""
    no_frames_choice("crema-d", options)
    found: dict[str, tuple[Take, Entry]] = {}
    for entry in _videos(look.store):
        take = _crema_d(_stem(entry.key))
        if take is None:
            raise _no_name(look.store.url(entry.key), "1001_DFA_ANG_XX.flv (actor, sentence, emotion, level)")
        if take.clip in found:
            raise _copy(look.store, take.clip, found[take.clip][1].key, entry.key)
        found[take.clip] = (take, entry)
    broken = [name for name in CREMA_D_BROKEN if name in found]
    notes = (
        [f"{', '.join(broken)}: named as damaged by the authors; quarantined if they do not decode."] if broken else []
    )
    if len(found) != CREMA_D_CLIPS:
        notes.append(f"{len(found)} clips, {CREMA_D_CLIPS} are published.")
    return _source("crema-d", look, "5 folds of 18 actors (the last of 19)", tuple(CREMA_D.values()), found, notes)


def _crema_d(stem: str) -> Take | None:
    match = _CREMA_D.fullmatch(stem)
    if not match or not 1001 <= int(match[1]) <= 1091:
        return None
    return Take(stem, CREMA_D[match[3]], match[1], min((int(match[1]) - 1001) // 18, 4) + 1, match[2])


def find_ravdess(look: Survey, options: SourceOptions) -> Source:
    """Rows of RAVDESS: one of each spoken performance, the video-only file (02) before the one with sound (01).

    Both show the same frames. Songs are left out: they have other emotions, and no number in the literature has them.
    """
    no_frames_choice("ravdess", options)
    found: dict[str, tuple[Take, Entry]] = {}
    songs, copies, silent = 0, 0, 0
    for entry in sorted(_videos(look.store), key=lambda e: (_stem(e.key)[:2] != "02", e.key)):
        match = _RAVDESS.fullmatch(_stem(entry.key))
        if not match or not 1 <= int(match[7]) <= 24:
            raise _no_name(look.store.url(entry.key), "02-01-05-01-02-01-12.mp4 (seven fields, the last is the actor)")
        _check_actor(look.store.url(entry.key), match[7])
        modality, channel, emotion, _, statement, _, actor = match.groups()
        if modality == "03" or channel == "02":
            silent, songs = silent + (modality == "03"), songs + (channel == "02" and modality != "03")
            continue
        clip = match[0][3:]
        if clip in found:
            if _stem(found[clip][1].key) == match[0]:
                raise _copy(look.store, match[0], found[clip][1].key, entry.key)
            copies += 1
            continue
        take = Take(clip, RAVDESS[int(emotion) - 1], actor, (int(actor) - 1) // 4 + 1, f"statement-{statement}")
        found[clip] = (take, entry)
    notes = [
        text
        for number, text in (
            (copies, f"{copies} files with sound (01-...) show the same frames as video-only ones (02-...): left out."),
            (songs, f"{songs} files of songs (..-02-...): left out."),
            (silent, f"{silent} files of sound alone (03-...): left out."),
        )
        if number
    ]
    return _source("ravdess", look, "6 folds of 4 actors, speech alone", RAVDESS, found, notes)


def _source(
    kind: str,
    look: Survey,
    folds: str,
    labels: tuple[str, ...],
    found: dict[str, tuple[Take, Entry]],
    notes: list[str],
) -> Source:
    def videos() -> Iterator[Video]:
        for take, entry in found.values():
            yield Video(
                url=look.store.url(entry.key),
                name=entry.key,
                fingerprint=entry.fingerprint,
                label=take.label,
                split=FOLDS,
                subject=take.subject,
                fold=take.fold,
                scene=take.scene,
            )

    counts: dict[str, dict[str, int]] = {}
    for take, _ in found.values():
        part = counts.setdefault(f"fold-{take.fold}", {})
        part[take.label] = part.get(take.label, 0) + 1
    layout = f"{kind} below {look.url}: labels from the names of the files; {folds}."
    return Source(kind=kind, layout=layout, videos=videos, labels=labels, notes=(*notes, *differences(kind, counts)))


def _videos(store: Store) -> Iterator[Entry]:
    return (entry for entry in store.list() if is_video(entry.key))


def _stem(key: str) -> str:
    return key.rpartition("/")[2].rpartition(".")[0]


def _named(look: Survey, fits: Callable[[str], bool]) -> bool:
    for folder in look:
        videos = [name.rpartition(".")[0] for name in folder.files if is_video(name)]
        if videos and sum(map(fits, videos)) * 10 > 9 * len(videos):
            return True
    return False


def _check_actor(url: str, actor: str) -> None:
    folder = re.search(r"Actor_(\d\d)", url.rpartition("/")[0].rpartition("/")[2])
    if folder and folder[1] != actor:
        raise MicaclError(
            f"{url} is of actor {actor} by its name, and lies in the folder of actor {folder[1]}.",
            "Folds are of whole actors: one of the two is wrong.",
            "Move it into the right folder.",
        )


def _no_name(url: str, expected: str) -> MicaclError:
    return MicaclError(
        f"{url} has no name of this data set.",
        "Its label and its actor are not known.",
        f"Names look like {expected}. Move it away, or list the clips in a table (docs/data.md).",
    )


def _copy(store: Store, clip: str, one: str, other: str) -> MicaclError:
    return MicaclError(
        f"{clip} is there twice: {some(sorted(map(store.url, (one, other))))}.",
        "It would be counted twice.",
        "Move one of the two away, or give the folder of one of them.",
    )
