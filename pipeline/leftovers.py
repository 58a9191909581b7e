"""What a `forget` did, and what it cannot reach: a checklist for whoever answers for the data, as JSON and as text."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

_SHOWN = 5


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """Of one `forget`, done or only looked up (`dry_run`)."""

    dataset: str
    version: int
    """The newest version, after the commit."""
    dry_run: bool
    delete: bool
    videos: tuple[str, ...]
    ahead: tuple[str, ...]
    bags: int
    quarantined: int
    """Videos that were taken out of the quarantine list."""
    deleted: tuple[str, ...]
    held: tuple[int, ...]
    """Versions that held bags of them, the one before the commit too."""
    broken: tuple[int, ...]
    """Older versions that list an index file which is gone."""
    models: dict[str, Any] | None
    """From `trained_on`; None if no URL was given."""
    unattributed: int
    """Crops of videos that no index file and no list names: of a run that was stopped, or is under way."""
    nameless: int
    """Rows of lists that say no subject, where a subject was asked for."""
    temporaries: int
    """Half-written files of killed processes (local folders only)."""
    still: tuple[str, ...]
    """Objects that hold one of the videos after all (somebody wrote meanwhile)."""


def checklist(done: Outcome) -> list[dict[str, str]]:
    """Items {"what", "where", "do"}, the most pressing first."""
    items = [*_of_storage(done), *_of_models(done), *_of_copies(done)]
    return [{"what": what, "where": where, "do": do} for what, where, do in items]


def to_text(done: Outcome) -> str:
    """A few lines for a person."""
    if done.dry_run:
        head = (
            f"Nothing was written. The next version would be without {done.bags} bags of {len(done.videos)} videos and "
            f"{done.quarantined} quarantined videos; {len(done.deleted)} objects would be deleted."
        )
    else:
        head = (
            f"Version {done.version} is without {done.bags} bags of {len(done.videos)} videos and {done.quarantined} "
            f"quarantined videos; {len(done.deleted)} objects were deleted. `micacl prepare` keeps them out."
        )
    items = checklist(done)
    return "\n".join([head, "What remains:", *(f"[ ] {i['what']}: {i['where']}\n    {i['do']}" for i in items)])


def _of_storage(done: Outcome) -> Iterator[tuple[str, str, str]]:
    if done.still:
        do = "Something wrote them meanwhile (a prepare that was under way?): run the same command again."
        yield "objects that hold them still", _some(done.still), do
    named = [*done.videos, *done.ahead]
    do = "Delete them there too: `micacl prepare` leaves them out from now on, other readers of that bucket do not."
    yield "the raw videos", f"every raw bucket and table; {_some(named)}", do
    deleted = done.delete and not done.dry_run
    if done.held and not deleted:
        do = "They list shards, crops and lists that hold them: run with --delete True to remove the bytes."
        yield "versions", f"{done.dataset}, {_numbers(done.held)}", do
    if gone := sorted({*done.broken, *(done.held if deleted else ())}):
        do = "They list objects that are gone and cannot be read whole any more; nothing is to be done."
        yield "versions without their objects", f"{done.dataset}, {_numbers(gone)}", do
    if done.unattributed:
        do = "Of runs that were stopped. Whose they are is not known: finish that `micacl prepare`, or delete crops/."
        yield f"{done.unattributed} crops of videos that no version names", f"{done.dataset}/crops", do
    if done.nameless:
        do = "If one of them shows the subject, name it with --video."
        yield f"{done.nameless} rows of lists that say no subject", f"{done.dataset}/quarantine", do
    if done.temporaries:
        do = "Half-written files of killed processes: delete them while nothing is running."
        yield f"{done.temporaries} files .tmp-*", done.dataset, do


def _of_models(done: Outcome) -> Iterator[tuple[str, str, str]]:
    if done.models is None:
        do = "Not looked for: give the URLs where they lie with --runs; before a --delete, which takes the evidence."
        which = f"those that name {_numbers(done.held)} of this dataset" if done.held else "of versions that are gone"
        yield "runs and bundles that were trained on them", which, do
        return
    for model in done.models["models"]:
        yield _was(model), model["url"], _remedy(model["kind"])
    for model in done.models["unknown"]:
        do = f"It cannot be told ({model['why']}). Treat it as if it was, or show that it was not."
        yield f"{_was(model)}, perhaps", model["url"], do
    searched = done.models["searched"]
    if searched["skipped_found"]:
        do = "They are named like files of a run or bundle but are none that can be read: look at them by hand."
        yield f"{searched['skipped_found']} foreign files", _some(searched["skipped"]), do


def _was(model: dict[str, Any]) -> str:
    step = "" if model["step"] is None else f", step {model['step']}"
    held = "that lists them" if model["kind"] == "evaluation" else "that was trained on them"
    return f"{model['kind']} {held} (version {model['version']}{step})"


def _remedy(kind: str) -> str:
    if kind == "evaluation":
        return "Delete its predictions.parquet: it has a row for each of their clips."
    return "Train anew on the new version, then delete it, its copies, and stop servers that use it."


def _of_copies(done: Outcome) -> Iterator[tuple[str, str, str]]:
    if done.dataset.startswith("s3://"):
        do = "Expire them by a lifecycle rule, or delete them; object lock keeps them until it ends."
        yield "old object versions, replicas and backups of the bucket", done.dataset, do
        do = "Delete folders of --stream.cache-dir, and micacl-cache-* in the temporary folder of machines that died."
        yield "shards that training machines keep", "wherever the dataset was read", do
    else:
        yield "backups and snapshots of the folder", done.dataset, "Delete them from there."
    do = "Run the same command on copies of the dataset; delete reports, predictions and downloads that show them."
    yield "copies", "wherever somebody made some", do


def _some(names: Collection[str] | Sequence[str]) -> str:
    shown = ", ".join(list(names)[:_SHOWN])
    return f"{shown} and {len(names) - _SHOWN} more" if len(names) > _SHOWN else shown


def _numbers(versions: Sequence[int]) -> str:
    return f"version{'s' if len(versions) > 1 else ''} {', '.join(map(str, versions))}"
