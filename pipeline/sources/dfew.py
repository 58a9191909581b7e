"""DFEW: 11,697 clips in five folds, lists of clip numbers and label numbers.

Clip/original/00001.mp4, Clip/clip_224x224/00001/00001_00001.jpg, Clip/clip_224x224_16f/00001/...,
EmoLabel_DataSplit/{train,test}(single-labeled)/set_{1..5}.csv (`video_name,label`). Folders are told by what lies in
them, so that renamed and doubled ones are found; lists by their names.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from pipeline.contract import DFEW_LABELS, FOLDS, MicaclError
from pipeline.sources.base import Source, SourceOptions
from pipeline.sources.bucket import is_video
from pipeline.sources.clips import Listed, Pictures, Said, choose_pictures
from pipeline.sources.lists import Line, bad_line, merge_folds, only_one, read_lines, require_folds
from pipeline.sources.tree import Folder, Survey

FOLD_COUNT = 5
_FILE = re.compile(r"(?:(train|test)_set|single_(train|test)set|set)_(\d)\.csv", re.IGNORECASE)
"""set_1.csv; train_set_1.csv (S2D); single_trainset_1.csv (the authors' own code)."""
_FOLDER = re.compile(r"(train|test)(?:[ _-]?\(?single[ _-]?label+ed\)?)?", re.IGNORECASE)
_CLIP = re.compile(r"0*(\d{1,5})(?:\.0|\.mp4|\.avi)?", re.IGNORECASE)
_LABEL = re.compile(r"([0-7])(?:\.0)?")


def find_lists(look: Survey) -> dict[tuple[str, int], list[str]]:
    """Keys of the lists by part (train, test) and fold."""
    found: dict[tuple[str, int], list[str]] = {}
    for folder in look:
        of_folder = _FOLDER.fullmatch(folder.name)
        for name in folder.files:
            file = _FILE.fullmatch(name)
            part = (file[1] or file[2] or (of_folder[1] if of_folder else None)) if file else None
            if file and part:
                found.setdefault((part.lower(), int(file[3])), []).append(folder.path(name))
    return found


def looks_like(look: Survey) -> bool:
    """Lists of folds, and a folder of numbered clips."""
    return any(part == "test" for part, _ in find_lists(look)) and bool(find_pictures(look))


def find_dfew(look: Survey, options: SourceOptions) -> Source:
    """Rows of DFEW. Raises MicaclError if its lists contradict each other or parts are missing."""
    keys = find_lists(look)
    lists = {key: only_one(found, f"{key[0]} set {key[1]}", look.store) for key, found in sorted(keys.items())}
    if not lists:
        raise MicaclError(
            f"{look.says()}, and no lists of DFEW (test(single-labeled)/set_1.csv to set_5.csv).",
            "Without them no clip has a label or a fold.",
            "Unpack EmoLabel_DataSplit.zip there, or give the folder that holds it and the clips.",
        )
    require_folds({fold: key for (part, fold), key in lists.items() if part == "test"}, FOLD_COUNT, "DFEW", look.url)
    numbered = {place: _read(look, key) for place, key in lists.items()}
    base = label_base(int(line.label) for lines in numbered.values() for line in lines)
    named = {
        place: [Line(line.clip, DFEW_LABELS[int(line.label) - base], line.where) for line in lines]
        for place, lines in numbered.items()
    }
    folds, notes = merge_folds(
        *({k: lines for (part, k), lines in named.items() if part == p} for p in ("test", "train"))
    )
    if base == 0:
        notes.append("Labels are 0 to 6 in these lists (the authors' are 1 to 7).")
    if len(lists) < 2 * FOLD_COUNT:
        notes.append(
            f"{len(lists) - FOLD_COUNT} of {FOLD_COUNT} training lists are there; folds are from the test lists."
        )
    pictures = choose_pictures(find_pictures(look), options.frames, ("aligned",), look.url)
    return Listed(
        kind="dfew",
        look=look,
        lists=f"five folds from {lists['test', 1].rpartition('/')[0] or '.'}/",
        labels=DFEW_LABELS,
        said={clip: Said(label, FOLDS, fold) for clip, (label, fold) in folds.items()},
        pictures=pictures,
        clip_of=clip_of,
        place=lambda clip: f"{pictures.roots[0]}/{clip}",
        notes=notes,
    ).source()


def label_base(labels: Iterable[int]) -> int:
    """1 if the labels are 1 to 7, 0 if they are 0 to 6. Raises MicaclError if they do not tell."""
    found = set(labels)
    if (0 in found) != (7 in found):
        return 0 if 0 in found else 1
    both = "both 0 and 7" if 0 in found else "neither 0 nor 7"
    raise MicaclError(
        f"The labels in DFEW's lists hold {both}.",
        "DFEW counts from 1 to 7, some copies from 0 to 6: which of the two this is cannot be told, and a shift by one "
        "would make every label wrong.",
        "Use lists of one release, all five folds; or list the clips in a table with labels as words (docs/data.md).",
    )


def clip_of(key: str) -> str | None:
    """`Clip/clip_224x224/7` -> `00007`."""
    name = key.rpartition("/")[2]
    return f"{int(name):05d}" if name.isascii() and name.isdigit() and len(name) <= 5 else None


def _read(look: Survey, key: str) -> list[Line]:
    out = []
    for n, (where, text) in enumerate(read_lines(look.store, key)):
        fields = [field.strip(' \t"') for field in text.split(",")]
        clip, label = (_CLIP.fullmatch(fields[0]), _LABEL.fullmatch(fields[1])) if len(fields) >= 2 else (None, None)
        if clip and label:
            out.append(Line(f"{int(clip[1]):05d}", label[1], where))
        elif n or any(char.isdigit() for char in text):  # the first line may be a header
            raise bad_line(where, text, "00001,2 (clip number, label 1 to 7)")
    return out


def find_pictures(look: Survey) -> list[Pictures]:
    """The forms in which the clips are there: folders that hold numbered folders or numbered videos."""
    found: dict[tuple[str, str], list[str]] = {}
    for folder in look:
        kind = _holds(folder)
        if kind:
            found.setdefault((_word(folder.key, kind), kind), []).append(folder.key)
    out: dict[str, Pictures] = {}
    for (word, kind), roots in sorted(found.items()):  # `frames` before `video`: aligned frames before aligned videos
        out.setdefault(word, Pictures(word, tuple(sorted(roots)), kind))
    return list(out.values())


def _holds(folder: Folder) -> str:
    clips = sum(clip_of(name) is not None for name in folder.folders)
    if clips * 2 > len(folder.folders):
        return "frames"
    videos = [name for name in folder.files if is_video(name)]
    return "video" if sum(clip_of(name.rpartition(".")[0]) is not None for name in videos) * 2 > len(videos) else ""


def _word(key: str, kind: str) -> str:
    near = "/".join(key.split("/")[-2:])  # a folder may be doubled, or hold the parts of an archive
    if "16f" in near.lower():
        return "16f"
    return "aligned" if kind == "frames" or re.search(r"224|align|affine", near, re.IGNORECASE) else "original"
