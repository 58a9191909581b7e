"""`micacl forget`: a new version without some subjects or videos, for good.

    newest version ──> shards and lists that hold them ──> the same without them ──> commit, with their tombstones
                       all others: listed as they were                           └─> --delete: the bytes, everywhere

Nothing is decoded and no other shard is read. A rewritten shard has the name that `prepare` would give to the same
bags. The version's `forgotten` keeps them out of the next `prepare` (pipeline/tombstones.py). Everything that has to be
known is looked up before anything is written, and a command that was stopped is finished by the same command.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.contract import MicaclError, Video, part_name
from pipeline.dataset import INDEX_SCHEMA, Dataset, commit, open_dataset
from pipeline.erase import (
    BY_VIDEO,
    Rows,
    erase,
    finish_erasures,
    holders,
    holding,
    listed_keys,
    pending_erasures,
    read_rows,
    read_who,
    video_id_of,
)
from pipeline.leftovers import Outcome, checklist, to_text
from pipeline.rewrite import body_without, old_body
from pipeline.storage import LocalStore, Store
from pipeline.tombstones import forgotten_of, tombstone, tombstones
from pipeline.trained_on import Held, held_by_versions, trained_on


@dataclass(frozen=True, kw_only=True, slots=True)
class _Found:
    """All that is looked up before anything is written."""

    who: Rows
    videos: frozenset[str]
    """Names of the videos that were named or show a named subject."""
    ahead: tuple[str, ...]
    """Names that no file of the dataset knows."""
    held: list[Held]
    """What each version held of them."""
    models: dict[str, Any] | None
    """From `trained_on`; None where no URL was given."""


def forget(
    url: str,
    subjects: Sequence[str] = (),
    videos: Sequence[str] = (),
    delete: bool = False,
    *,
    ahead: bool = False,
    dry_run: bool = False,
    runs: Sequence[str] = (),
) -> dict[str, Any]:
    """Commit a version without `subjects` and `videos` (names as the index has them) that keeps them out from now on.

    Without `delete`, older versions stay readable and still hold them.

    Args:
        delete: after the commit, delete every shard, index file, list and crop that holds one of their videos, in
            whichever version or none. Older version files stay: they then list objects that are gone.
        ahead: names that the dataset does not know are taken too, so that `prepare` will leave them out.
        dry_run: look everything up, write and delete nothing.
        runs: URLs below which runs, bundles and evaluations that held them are looked for.

    Returns {"dataset", "version", "committed", "dry_run", "videos", "bags", "quarantined", "ahead", "shards_rewritten",
    "deleted", "held" (by version, before: {"version", "sha256", "parts", "bags"}), "models" (from `trained_on`),
    "remains" (a checklist of {"what", "where", "do"}), "text"}.
    Raises MicaclError for a name that is not there, if somebody else commits at the same time, or if what an object
    holds cannot be told; then nothing was committed or deleted.
    """
    _require_some(subjects, videos)
    dataset = open_dataset(url)
    store = dataset.store
    keys = _finish_stopped(dataset, dry_run=dry_run)
    found = _look_up(dataset, subjects, videos, ahead=ahead, runs=runs)
    more = holders(store, found.who, found.videos) if delete else []
    here = dataset.index.filter(holding(dataset.index, found.videos))
    number, new = dataset.number, False
    if not dry_run:
        body = body_without(dataset, here, found.videos, tombstones(subjects, [*videos, *found.videos]))
        number, new = commit(store, body, parent=dataset.number)
        more = [key for key in more if key not in listed_keys(body)]
        erase(store, more)
    done = Outcome(
        dataset=store.root,
        version=number,
        dry_run=dry_run,
        delete=delete,
        videos=tuple(sorted(found.videos)),
        ahead=found.ahead,
        bags=here.num_rows,
        quarantined=_quarantined(dataset, found),
        deleted=tuple(dict.fromkeys([*keys, *more])),
        held=tuple(one.number for one in found.held if one.rows.num_rows),
        broken=tuple(one.number for one in found.held if one.lost),
        models=found.models,
        unattributed=_unattributed(store, found.who),
        nameless=sum(rows["subject"].null_count for rows in _lists(found.who)) if subjects else 0,
        temporaries=_temporaries(store),
        still=tuple(holders(store, read_who(store), found.videos)) if delete and not dry_run else (),
    )
    return {
        **{name: getattr(done, name) for name in ("dataset", "version", "dry_run", "bags", "quarantined", "models")},
        **{name: list(getattr(done, name)) for name in ("videos", "ahead", "deleted")},
        "committed": new,
        "shards_rewritten": len(set(here["shard"].to_pylist())),
        "held": [_said_of(one) for one in found.held if one.rows.num_rows],
        "remains": checklist(done),
        "text": to_text(done),
    }


def lift(url: str, subjects: Sequence[str] = (), videos: Sequence[str] = ()) -> dict[str, Any]:
    """Commit a version that does not keep out `subjects` and `videos` any more; the next `prepare` takes them again.

    Of a subject, the videos that files of the dataset still name are lifted with it. Nothing that was deleted comes
    back by itself.

    Returns {"dataset", "version", "committed", "lifted" (digests), "forgotten" (digests left), "text"}.
    Raises MicaclError for a name that is not forgotten, or if somebody else commits at the same time.
    """
    _require_some(subjects, videos)
    dataset = open_dataset(url)
    _finish_stopped(dataset, dry_run=False)
    forgotten = forgotten_of(dataset.body)
    for kind, names in (("subject", subjects), ("video", videos)):
        for name in names:
            if tombstone(kind, name) not in forgotten:
                raise MicaclError(
                    f"The {kind} {name!r} is not forgotten in {dataset.store.root}.",
                    "Nothing was lifted, nor were the other names that were given.",
                    "Check the name: the list holds digests, so no near names can be shown.",
                )
    lifted = forgotten & tombstones(subjects, [*videos, *_videos_of(read_who(dataset.store), subjects)])
    left = sorted(forgotten - lifted)
    number, new = commit(dataset.store, {**old_body(dataset), "forgotten": left}, parent=dataset.number)
    text = (
        f"Version {number} does not keep them out any more ({len(lifted)} digests lifted, {len(left)} left). The next "
        "`micacl prepare` takes their raw videos again; one that it still counts as forgotten is lifted with --video."
    )
    return {
        "dataset": dataset.store.root,
        "version": number,
        "committed": new,
        "lifted": sorted(lifted),
        "forgotten": left,
        "text": text,
    }


def _require_some(subjects: Sequence[str], videos: Sequence[str]) -> None:
    if not subjects and not videos:
        raise MicaclError("No subject and no video was named.", "Nothing was done.", "Use --subject or --video.")


def _finish_stopped(dataset: Dataset, *, dry_run: bool) -> list[str]:
    """Keys that a `forget` which was stopped had still to delete; deleted now unless `dry_run`."""
    listed = listed_keys(dataset.body)
    if not dry_run:
        return finish_erasures(dataset.store, listed)
    return [key for keys in pending_erasures(dataset.store, listed).values() for key in keys]


def _look_up(
    dataset: Dataset, subjects: Sequence[str], videos: Sequence[str], *, ahead: bool, runs: Sequence[str]
) -> _Found:
    """Raises MicaclError for an unknown name, an unreadable list, or a wrong URL in `runs`."""
    store = dataset.store
    who = read_who(store)
    forgotten = forgotten_of(dataset.body)
    missing: list[str] = []
    for kind, names in (("subject", subjects), ("video", videos)):
        known = {str(name) for rows in who.values() for name in pc.unique(rows[kind]).to_pylist() if name is not None}
        for name in names:
            if name in known or tombstone(kind, name) in forgotten:
                continue
            if not ahead:
                raise _unknown(store, kind, name, known)
            missing.append(name)
    wanted = _videos_of(who, subjects) | {v for rows in who.values() for v in _among(rows, videos)}
    with_rows = {k: read_rows(store, k) for k, r in who.items() if k.startswith("index/") and _among(r, wanted)}

    def rows_of(key: str) -> pa.Table | None:
        if key not in who:
            return None
        rows = with_rows.get(key)
        return INDEX_SCHEMA.empty_table() if rows is None else rows.filter(holding(rows, wanted))

    held = held_by_versions(store, rows_of)
    models = trained_on(store, held, runs) if runs else None
    return _Found(who=who, videos=frozenset(wanted), ahead=tuple(missing), held=held, models=models)


def _videos_of(who: Rows, subjects: Sequence[str]) -> set[str]:
    """Videos that any file of the dataset says to show one of the subjects."""
    values = pa.array(subjects, pa.string())
    return {
        str(v) for rows in who.values() for v in rows.filter(pc.is_in(rows["subject"], values))["video"].to_pylist()
    }


def _among(rows: pa.Table, videos: Collection[str]) -> set[str]:
    return set(rows.filter(holding(rows, videos))["video"].to_pylist())


def _unknown(store: Store, kind: str, name: str, known: Collection[str]) -> MicaclError:
    """A typo must not end as "done"."""
    near = get_close_matches(name, known, n=3, cutoff=0.4)
    mean = f"Did you mean {' or '.join(near)}?" if near else f"It has {len(known)} {kind}s; check the name."
    return MicaclError(
        f"{store.root} has no {kind} {name!r}.",
        "Nothing was forgotten, nor were the other names that were given.",
        f"{mean} --ahead True forgets a name that was not prepared yet.",
    )


def _quarantined(dataset: Dataset, found: _Found) -> int:
    """Videos of the newest version's quarantine list that are to go."""
    rows = found.who.get(str(dict(dataset.body.get("quarantine") or {}).get("path")))
    return 0 if rows is None else len(_among(rows, found.videos))


def _said_of(held: Held) -> dict[str, Any]:
    """A version that held them: who finds a model later can tell by it whether that was trained on them."""
    seen = zip(held.rows["split"].to_pylist(), held.rows["fold"].to_pylist(), strict=True)
    parts = sorted({part_name(split, fold) for split, fold in seen})
    return {"version": held.number, "sha256": held.sha256, "parts": parts, "bags": held.rows.num_rows}


def _lists(who: Rows) -> Iterable[pa.Table]:
    return [rows for key, rows in who.items() if not key.startswith("index/")]


def _unattributed(store: Store, who: Rows) -> int:
    """Crops of videos that no index file and no list names."""
    names = {str(name) for rows in who.values() for name in pc.unique(rows["video"]).to_pylist()}
    ids = {Video(url="", name=name).id for name in names}
    return sum(video_id_of(entry.key) not in ids for folder in BY_VIDEO for entry in store.list(folder))


def _temporaries(store: Store) -> int:
    return sum(1 for _ in Path(store.root).rglob(".tmp-*")) if isinstance(store, LocalStore) else 0
