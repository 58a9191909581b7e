"""AFEW: clips of films, {Train,Val}_AFEW/<Emotion>/*.avi; face crops in */AlignedFaces*/Faces/<clip>/*.jpg.

Labels are the folders of the videos, also where the pictures are the authors' face crops. Labels of the test part are
not public: it is left out.
"""

from __future__ import annotations

import re

from pipeline.contract import MicaclError
from pipeline.sources.base import Source, SourceOptions
from pipeline.sources.bucket import is_video
from pipeline.sources.clips import Listed, Pictures, Said, choose_pictures
from pipeline.sources.tree import Survey

LABELS = ("angry", "disgust", "fear", "happy", "neutral", "sad", "surprise")
_PART = re.compile(r"(train|val|test)_afew", re.IGNORECASE)


def looks_like(look: Survey) -> bool:
    """A folder of either name with emotions in it."""
    return bool(_roots(look))


def find_afew(look: Survey, options: SourceOptions) -> Source:
    """Rows of AFEW's train and val parts. Raises MicaclError if a folder is no emotion or parts are missing."""
    roots = _roots(look)
    if missing := sorted({"train", "val"} - set(roots)):
        names = " and ".join(f"{part.capitalize()}_AFEW" for part in missing)
        raise MicaclError(
            f"{look.says()}, and no {names} with folders of emotions.",
            "Labels come from those folders, and the part of a clip from their names.",
            "Unpack it there, or give the folder that holds Train_AFEW and Val_AFEW.",
        )
    faces = tuple(folder.key for folder in look if folder.name.lower() == "faces" and _part(folder.key))
    faces = tuple(key for key in faces if "Faces" not in look.folders[key].folders)
    said = {clip: Said(label, part) for part, root in roots.items() for clip, label in _labels(look, part, root)}
    found = [Pictures("original", tuple(roots.values()), "video")]
    found += [Pictures("aligned", faces, "frames")] if faces else []
    tested = any(_part(folder.key) == "test" for folder in look)
    pictures = choose_pictures(found, options.frames, ("aligned",), look.url)
    return Listed(
        kind="afew",
        look=look,
        lists=f"labels from the folders of {' and '.join(roots.values())}",
        labels=LABELS,
        said=said,
        pictures=pictures,
        clip_of=_clip_of,
        place=lambda clip: _place(pictures, clip),
        notes=["Test_AFEW has no labels: left out. Give it as a bucket of its own to predict it."] if tested else [],
    ).source()


def _place(pictures: Pictures, clip: str) -> str:
    part, _, name = clip.partition("/")
    return f"{next((root for root in pictures.roots if _part(root) == part), pictures.roots[0])}/{name}"


def _part(key: str) -> str | None:
    parts = [match[1].lower() for name in key.split("/") if (match := _PART.fullmatch(name))]
    return parts[-1] if parts else None


def _roots(look: Survey) -> dict[str, str]:
    """The folder that holds the emotions, by part."""
    found: dict[str, str] = {}
    for folder in look:
        part = _part(folder.key)
        if part in ("train", "val") and any(name.lower() in LABELS for name in folder.folders):
            found.setdefault(part, folder.key)
    return dict(sorted(found.items()))


def _clip_of(key: str) -> str | None:
    """`Val_AFEW/Angry/000149120` -> `val/000149120`; a clip has one number in its video and in its folder of faces."""
    name = key.rpartition("/")[2]
    return f"{_part(key)}/{name}" if any(char.isdigit() for char in name) and not _PART.fullmatch(name) else None


def _labels(look: Survey, part: str, root: str) -> list[tuple[str, str]]:
    out = []
    for name in look.folders[root].folders:
        videos = [e.key for e in look.store.children(f"{root}/{name}/") if is_video(e.key)]
        if videos and name.lower() not in LABELS:
            raise MicaclError(
                f"{look.store.url(root)} has the folder {name}, with {len(videos)} videos.",
                "It is none of AFEW's seven emotions, so its clips would have no label.",
                f"Move it away; the emotions are {', '.join(LABELS)}.",
            )
        out += [(f"{part}/{key.rpartition('/')[2].rpartition('.')[0]}", name.lower()) for key in videos]
    return out
