"""MAFW: 9,172 single-labelled clips of eleven classes in five folds.

<Train & Test Set>/single/{no_caption,with_caption}/set_{1..5}/{train,test}.txt, lines `03747.mp4 anger` (with captions:
tabs, GBK); data/clips/00001.mp4, data/frames/00001/*. The compound set (two emotions a clip) is not read.
"""

from __future__ import annotations

import re

from pipeline.contract import FOLDS, MicaclError
from pipeline.sources.base import Source, SourceOptions
from pipeline.sources.clips import Listed, Pictures, Said, choose_pictures
from pipeline.sources.dfew import clip_of
from pipeline.sources.dfew import find_pictures as find_numbered
from pipeline.sources.lists import Line, bad_line, merge_folds, only_one, read_lines, require_folds
from pipeline.sources.tree import Survey

_LABELS = "anger disgust fear happiness neutral sadness surprise contempt anxiety helplessness disappointment"
LABELS = tuple(_LABELS.split())
FOLD_COUNT = 5
_FOLDER = re.compile(r"(?:.*/)?single/(no|with)_caption/set_(\d)", re.IGNORECASE)
_FILE = re.compile(r"(train|test)\.txt", re.IGNORECASE)
_LINE = re.compile(r"0*(\d{1,5})(?:\.mp4)?[ \t]+([A-Za-z]+)(?:[\t ].*)?")


def find_lists(look: Survey) -> dict[tuple[str, int], list[str]]:
    """Keys of the lists by part and fold: those without captions if they are there."""
    found: dict[str, dict[tuple[str, int], list[str]]] = {"no": {}, "with": {}}
    for folder in look:
        if of_folder := _FOLDER.fullmatch(folder.key):
            for name in folder.files:
                if file := _FILE.fullmatch(name):
                    lists = found[of_folder[1].lower()]
                    lists.setdefault((file[1].lower(), int(of_folder[2])), []).append(folder.path(name))
    return found["no"] or found["with"]


def looks_like(look: Survey) -> bool:
    """Its lists."""
    return bool(find_lists(look))


def find_mafw(look: Survey, options: SourceOptions) -> Source:
    """Rows of MAFW's single-labelled set. Raises MicaclError if lists contradict each other or parts are missing."""
    keys = find_lists(look)
    lists = {key: only_one(found, f"{key[0]} set {key[1]}", look.store) for key, found in sorted(keys.items())}
    if not lists:
        raise MicaclError(
            f"{look.says()}, and no lists of MAFW (single/no_caption/set_1/test.txt and others).",
            "Without them no clip has a label or a fold.",
            "Unpack `Train & Test Set` there, or give the folder that holds it and the clips.",
        )
    require_folds({fold: key for (part, fold), key in lists.items() if part == "test"}, FOLD_COUNT, "MAFW", look.url)
    lines = {place: _read(look, key) for place, key in lists.items()}
    folds, notes = merge_folds(
        *({k: read for (part, k), read in lines.items() if part == p} for p in ("test", "train"))
    )
    pictures = _pictures(look, options)
    return Listed(
        kind="mafw",
        look=look,
        lists=f"five folds of single labels from {lists['test', 1].rpartition('/set_')[0]}/",
        labels=LABELS,
        said={clip: Said(label, FOLDS, fold) for clip, (label, fold) in folds.items()},
        pictures=pictures,
        clip_of=clip_of,
        place=lambda clip: f"{pictures.roots[0]}/{clip}",
        notes=notes,
    ).source()


def _read(look: Survey, key: str) -> list[Line]:
    out = []
    for where, text in read_lines(look.store, key):
        match = _LINE.fullmatch(text)
        if not match or match[2].lower() not in LABELS:
            raise bad_line(where, text, f"03747.mp4 anger (clip, one of {', '.join(LABELS)})")
        out.append(Line(f"{int(match[1]):05d}", match[2].lower(), where))
    return out


def _pictures(look: Survey, options: SourceOptions) -> Pictures:
    """The videos, or the folders of frames if --frames says what they show. Raises MicaclError."""
    numbered = find_numbered(look)
    videos = [Pictures("original", p.roots, p.kind) for p in numbered if p.kind == "video"]
    roots = tuple(root for p in numbered if p.kind == "frames" for root in p.roots)
    if roots and not videos and options.frames == "auto":
        raise MicaclError(
            f"{look.url} has the clips of MAFW as folders of frames in {roots[0]}/, and no videos.",
            "Whole frames and face crops are both in use under that name, and they need different work.",
            "Say --frames images if they show whole scenes, --frames aligned if they show one face each.",
        )
    word = options.frames if options.frames in ("images", "aligned") else "images"
    frames = [Pictures(word, roots, "frames")] if roots else []
    return choose_pictures([*videos, *frames], options.frames, ("original",), look.url)
