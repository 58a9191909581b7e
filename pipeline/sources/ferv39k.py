"""FERV39k: 38,935 clips in 22 scenes, one fixed split, lists of `Action/Sad/0010 Sad` without a header.

4_setups/All_scenes/{train,test}_All.csv; clips in 2_ClipsforFaceCrop/<Scene>/<Emotion>/<id>/*.jpg (face crops),
3_ClipsforScenImages/... (whole frames), 0_7_LabelClips/<Scene>/<Emotion>/<id>.mp4. Also S2D's Annotation/train.csv
(`path,id`) with label_index.txt. Clip folders are told by the scenes in them, so that doubled folders and the parts
of a Google Drive download are found.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from pipeline.contract import DFEW_LABELS, MicaclError
from pipeline.sources.base import Source, SourceOptions
from pipeline.sources.clips import Listed, Pictures, Said, choose_pictures
from pipeline.sources.lists import Line, bad_line, only_one, read_lines, require_unique
from pipeline.sources.tree import Survey

_SCENES = (
    "action argue business conflict contest crime crisis dailylife elegantart experiment history interview liveshow "
    "medicine officialevent scholarreport school social speech talkshow terror war"
)
SCENES = frozenset(_SCENES.split())
_ALL = re.compile(r"(train|test)_all\.(?:csv|txt)", re.IGNORECASE)
_ANNOTATION = re.compile(r"(train|test)\.csv", re.IGNORECASE)
_PATH = re.compile(r"(?:\./)?([^/]+)/([^/]+)/(\d+)/?")
_INDEX = "label_index.txt"
ALPHABETICAL = tuple(sorted(DFEW_LABELS))
"""The order of S2D's label numbers, where its label_index.txt is not there."""


def find_lists(look: Survey) -> tuple[dict[str, list[str]], str | None]:
    """Keys of the lists by part, and the folder that numbers the labels (None if the lists have words)."""
    words: dict[str, list[str]] = {}
    numbers: dict[str, list[str]] = {}
    home = None
    for folder in look:
        for name in folder.files:
            if match := _ALL.fullmatch(name):
                words.setdefault(match[1].lower(), []).append(folder.path(name))
            elif (match := _ANNOTATION.fullmatch(name)) and (_INDEX in folder.files or folder.name == "Annotation"):
                numbers.setdefault(match[1].lower(), []).append(folder.path(name))
                home = folder.key
    return (words, None) if words else (numbers, home)


def looks_like(look: Survey) -> bool:
    """Its lists, and a folder of scenes."""
    return bool(find_lists(look)[0]) and bool(find_pictures(look))


def find_ferv39k(look: Survey, options: SourceOptions) -> Source:
    """Rows of FERV39k. Raises MicaclError if a list and its folders disagree or parts are missing."""
    keys, home = find_lists(look)
    lists = {part: only_one(found, f"the {part} part", look.store) for part, found in keys.items()}
    if missing := sorted({"train", "test"} - set(lists)):
        raise MicaclError(
            f"{look.says()}, and no {' and no '.join(f'{part}_All.csv' for part in missing)}.",
            "Without both lists it is not known which clips are for training and which for the test.",
            "Unpack 4_setups (All_scenes/train_All.csv, test_All.csv), or give the folder that holds it and the clips.",
        )
    index = None if home is None else _label_index(look, home)
    train, test = (require_unique(_read(look, lists[part], index)) for part in ("train", "test"))
    for clip, line in test.items():
        if clip in train:
            raise MicaclError(
                f"Clip {clip} is in both lists: {train[clip].where} and {line.where}.",
                "A clip that is trained on must not be tested.",
                "Unpack the lists again; a clip is in one of the two.",
            )
    said = {clip: _said(line, "train") for clip, line in train.items()}
    pictures = choose_pictures(find_pictures(look), options.frames, ("aligned", "original"), look.url)
    return Listed(
        kind="ferv39k",
        look=look,
        lists=f"train and test from {lists['train'].rpartition('/')[0] or '.'}/",
        labels=DFEW_LABELS,
        said={**said, **{clip: _said(line, "test") for clip, line in test.items()}},
        pictures=pictures,
        clip_of=clip_of,
        place=lambda clip: f"{pictures.roots[0]}/{clip}",
        notes=["Labels are numbers in these lists (a copy; the authors' are words)."] if index else [],
    ).source()


def _said(line: Line, split: str) -> Said:
    return Said(line.label, split, scene=line.clip.partition("/")[0])


def clip_of(key: str) -> str | None:
    """`2_ClipsforFaceCrop/Action/Happy/0267` -> `Action/Happy/0267`."""
    parts = key.split("/")
    return "/".join(parts[-3:]) if len(parts) >= 3 and parts[-1].isdigit() else None


def _read(look: Survey, key: str, index: Mapping[str, str] | None) -> list[Line]:
    out = []
    for n, (where, text) in enumerate(read_lines(look.store, key)):
        path, _, said = re.sub(r"[\s,]+", " ", text.replace("\\", "/")).partition(" ")
        match = _PATH.fullmatch(path)
        label = said.lower() if index is None else index.get(said, "")
        if match and label in DFEW_LABELS:
            if match[2].lower() != label:
                raise _disagree(where, path, match[2], said, label)
            out.append(Line("/".join(match.groups()), label, where))
        elif n or match:  # a first line without a path is a header
            wanted = "Sad (scene/emotion/clip, label)" if index is None else f"5 (a number of {_INDEX})"
            raise bad_line(where, text, f"Action/Sad/0010 {wanted}")
    return out


def _disagree(where: str, path: str, folder: str, said: str, label: str) -> MicaclError:
    number = f" (number {said})" if said.lower() != label else ""
    return MicaclError(
        f"{where} calls {path} {label}{number}, and it lies in the folder {folder}.",
        "In FERV39k the folder is the label: one of the two is wrong, so nothing was read.",
        "Unpack the lists again; if the labels are numbers, label_index.txt must be the one they were made with.",
    )


def _label_index(look: Survey, home: str) -> dict[str, str]:
    """Label word by number, from lines `Angry 0`."""
    key = f"{home}/{_INDEX}" if home else _INDEX
    if not look.store.exists(key):
        return {str(number): word for number, word in enumerate(ALPHABETICAL)}
    out = {}
    for where, text in read_lines(look.store, key):
        word, _, number = text.partition(" ")
        if word.lower() not in DFEW_LABELS or not number.strip().isdigit():
            raise bad_line(where, text, "Angry 0 (label, number)")
        out[number.strip()] = word.lower()
    return out


def find_pictures(look: Survey) -> list[Pictures]:
    """The forms in which the clips are there: folders whose sub-folders are scenes, outside of the lists."""
    found: dict[str, list[str]] = {}
    for folder in look:
        scenes = sum(name.lower() in SCENES for name in folder.folders)
        if scenes * 2 > len(folder.folders) and "setups" not in folder.key.lower():
            found.setdefault(_word(folder.key), []).append(folder.key)
    return [
        Pictures(word, tuple(sorted(roots)), "video" if word == "original" else "frames")
        for word, roots in sorted(found.items())
    ]


def _word(key: str) -> str:
    """By the last folder that says it: one of an outer name may be anything."""
    for name in reversed(key.lower().split("/")):
        if "labelclips" in name or name.startswith("0_7"):
            return "original"
        if "scenimage" in name or "sceneimage" in name:
            return "images"
        if "facecrop" in name:
            return "aligned"
    return "aligned"
