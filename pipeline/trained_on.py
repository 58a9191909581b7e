"""Which runs and bundles were trained on some bags: what their own files say, against what the versions held.

    <run>/config.json, <run>/checkpoints/<step>/state.json, <bundle>/bundle.json     dataset, version, sha256, split
    <run>/evaluation/<split>/scores.json                                             an evaluation lists its clips

A version is known by its sha256, so a dataset that was copied or moved to another URL is still recognised. Where no
sha256 is recorded, URL and number decide. Files are found by listing; nothing is loaded but small JSON.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.contract import FOLDS, MicaclError, digest, expecting, json_object
from pipeline.dataset import INDEX_SCHEMA, list_versions, version_key
from pipeline.storage import Store, open_store
from pipeline.where import parse_where

MAX_JSON_BYTES = 2**20
MAX_SKIPPED = 20
"""URLs of foreign files in the result; `skipped_found` counts all."""
_READERS = 8
_NAMES = ("config.json", "state.json", "bundle.json", "scores.json")
_STATE = re.compile(r"(?:(.*)/)?checkpoints/(\d+)/state\.json$")

Part = tuple[str, int | None]
"""Split and fold of a shard."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Held:
    """What one version of the dataset held of the bags that are asked for."""

    number: int
    sha256: str
    rows: pa.Table
    """Those bags, as INDEX_SCHEMA."""
    lost: frozenset[Part] = frozenset()
    """Parts of which an index file is gone: whether it named such a bag is not known any more."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Said:
    """What one file of a run or bundle says of its data."""

    kind: str
    """run, bundle or evaluation."""
    url: str
    step: int | None
    """Updates of the checkpoint; None where there is none yet."""
    dataset: str
    version: int | None
    sha256: str | None
    split: str
    fold: int | None
    where: str


def held_by_versions(store: Store, rows_of: Callable[[str], pa.Table | None]) -> list[Held]:
    """Of every version file that is there, what it held.

    Args:
        rows_of: key of an index file -> the rows in question; None if the file is gone.

    Raises MicaclError if a version file is none.
    """
    out = []
    for number in list_versions(store):
        data, where = store.get(version_key(number)), store.url(version_key(number))
        with expecting(where):
            shards = [
                (shard["index"]["path"], (str(shard["split"]), shard.get("fold")))
                for shard in json_object(data, where)["shards"]
            ]
        found = [(part, rows_of(key)) for key, part in shards]
        rows = pa.concat_tables([INDEX_SCHEMA.empty_table(), *(rows for _, rows in found if rows is not None)])
        lost = frozenset(part for part, rows in found if rows is None)
        out.append(Held(number=number, sha256=digest(data), rows=rows, lost=lost))
    return out


def trained_on(dataset: Store, held: Sequence[Held], urls: Sequence[str]) -> dict[str, Any]:
    """Runs, bundles and evaluations below `urls` whose split of the dataset held one of the bags.

    Returns {"models", "unknown", "searched"}: models are {"kind", "url", "version", "step" (newest)}; unknown have a
    "why" besides; searched is {"urls", "runs", "bundles", "evaluations", "skipped" (foreign JSON), "skipped_found"}.
    Raises MicaclError if a URL is not there or holds nothing of the kind: a wrong URL must not end as "none".
    """
    said: list[Said] = []
    skipped: list[str] = []
    for url in urls:
        found = list(_read_all(open_store(url)))
        ours = [one for _, several in found for one in several]
        skipped += [where for where, several in found if not several]
        if not ours:
            raise MicaclError(
                f"{url} holds no run and no bundle.",
                "Whether a model was trained on those who are to be forgotten could not be looked up there; "
                "nothing was forgotten.",
                "Correct --runs: a run has a config.json, a bundle a bundle.json.",
            )
        said += ours
    models, unknown = _judge_all(said, dataset.root, held)
    kinds = {kind: len({one.url for one in said if one.kind == kind}) for kind in ("run", "bundle", "evaluation")}
    return {
        "models": models,
        "unknown": unknown,
        "searched": {
            "urls": list(urls),
            **{f"{kind}s": n for kind, n in kinds.items()},
            "skipped": sorted(set(skipped))[:MAX_SKIPPED],
            "skipped_found": len(set(skipped)),
        },
    }


def _read_all(store: Store) -> Iterator[tuple[str, list[Said]]]:
    """(URL, what it says of each of its datasets) of every file with one of our names; nothing for what is foreign."""
    store.check()
    entries = [e for e in store.list() if e.key.rpartition("/")[2] in _NAMES]

    def read(key: str, size: int) -> list[Said]:
        try:
            if size > MAX_JSON_BYTES:
                return []
            return _said(store, key, json_object(store.get(key), key))
        except (MicaclError, FileNotFoundError, RecursionError):  # foreign, dropped meanwhile, nested without end
            return []

    with ThreadPoolExecutor(_READERS) as pool:
        answers = pool.map(lambda e: read(e.key, e.size), entries)
        yield from zip((store.url(e.key) for e in entries), answers, strict=True)


def _said(store: Store, key: str, body: Mapping[str, Any]) -> list[Said]:
    """Of its own dataset, and of those of the runs that it went on from (`--from-run`).

    Raises MicaclError if it is not what train, export or evaluate write.
    """
    folder, _, name = key.rpartition("/")
    with expecting(key):
        if name == "scores.json":
            kind, origin, split, step = "evaluation", body, body["split"], body["origin"]["step"]
        elif name == "bundle.json":
            kind, origin, split = "bundle", body["origin"], body["config"]["train"]["split"]
            step = origin["step"]
        else:
            kind, origin, split, step = "run", body, body["config"]["train"]["split"], None
            if name == "state.json":
                folder, step = _checkpoint_of(key)
        data = origin["dataset"]
        return [
            Said(
                kind=kind,
                url=store.url(folder),
                step=None if step is None else int(step),
                dataset=str(one["url"]),
                version=None if one.get("version") is None else int(one["version"]),
                sha256=one.get("sha256"),
                split=str(one.get("split", split)),
                fold=None if one.get("fold") is None else int(one["fold"]),
                where=str(one.get("where") or ""),
            )
            for one in [data, *data.get("before", [])]
        ]


def _checkpoint_of(key: str) -> tuple[str, int]:
    match = _STATE.match(key)
    if match is None:
        raise ValueError(f"{key} is in no checkpoint")
    return match.group(1) or "", int(match.group(2))


def _judge_all(
    said: Iterable[Said], root: str, held: Sequence[Held]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(certain, unknown), one entry for each (kind, url, version), with the newest step."""
    certain: dict[tuple[str, str, int | None], dict[str, Any]] = {}
    unknown: dict[tuple[str, str, int | None], dict[str, Any]] = {}
    for one in said:
        verdict, number, why = _judge(one, root, held)
        if verdict is False:
            continue
        out = certain if verdict else unknown
        key = (one.kind, one.url, number)
        steps = [s for s in (one.step, out.get(key, {}).get("step")) if s is not None]
        out[key] = {"kind": one.kind, "url": one.url, "version": number, "step": max(steps, default=None)}
        if verdict is None:
            out[key]["why"] = why
    for key in certain:
        unknown.pop(key, None)
    return [certain[k] for k in sorted(certain, key=str)], [unknown[k] for k in sorted(unknown, key=str)]


def _judge(said: Said, root: str, held: Sequence[Held]) -> tuple[bool | None, int | None, str]:
    """(whether its split held one of the bags; None if that cannot be told, version, why it cannot)."""
    version = _version_of(said, root, held)
    if version is None:
        if _plain(said.dataset) != _plain(root):
            return False, None, ""
        return None, said.version, "the version that it names is not in the dataset any more"
    if _seen(said, version.rows):
        return True, version.number, ""
    if any(_in_split(split, fold, said) for split, fold in version.lost):
        return None, version.number, "index files of its version were deleted, so what they listed is not known"
    return False, version.number, ""


def _version_of(said: Said, root: str, held: Sequence[Held]) -> Held | None:
    if said.sha256 is not None:
        return next((one for one in held if one.sha256 == said.sha256), None)
    if _plain(said.dataset) != _plain(root):
        return None
    return next((one for one in held if one.number == said.version), None)


def _plain(url: str) -> str:
    return url.removeprefix("file://").rstrip("/")


def _seen(said: Said, rows: pa.Table) -> bool:
    """Whether one of the bags was in the split, and passed the filter, that it says."""
    parts = zip(rows["split"].to_pylist(), rows["fold"].to_pylist(), strict=True)
    rows = rows.filter(pa.array([_in_split(split, fold, said) for split, fold in parts], pa.bool_()))
    try:
        where = parse_where(said.where)
    except MicaclError:  # a filter of another release: as if there were none
        return bool(rows.num_rows)
    return bool(pc.any(pa.array(where.mask(rows))).as_py())


def _in_split(split: str, fold: int | None, said: Said) -> bool:
    """As `open_dataset(fold=...)` shows it. A bag in folds counts as seen by who does not say which fold it used."""
    if split != FOLDS or fold is None:
        return split == said.split
    if said.fold is None:
        return True
    return said.split == ("test" if fold == said.fold else "train")
