"""A shard set on storage: its versions and its index.

    <dataset>/versions/000001.json   immutable, written last and only if absent: the commit
    <dataset>/index/<id>.parquet     one row a bag, one file a shard
    <dataset>/shards/<split>/<label>/<id>.tar

Readers see what the newest version lists and nothing else. A version holds no time and no machine name, so the same
inputs give the same bytes. Every file is named with its sha256 in the file that lists it, and checked when read.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.contract import (
    FOLDS,
    SCHEMA_VERSION,
    MicaclError,
    canonical_json,
    digest,
    foreign,
    json_object,
    part_name,
    require_schema,
)
from pipeline.parquet import read_parquet
from pipeline.shapes import VERSION, require_shape
from pipeline.storage import Store, open_store

if TYPE_CHECKING:
    from pipeline.loader import EvalLoader, Loader
    from pipeline.policies import PlanConfig

OF_COMMIT = ("version", "parent", "sha256")
"""Fields of a version file that `commit` adds to the body."""
_VERSION_KEY = re.compile(r"versions/(\d{6})\.json$")

INDEX_SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("label", pa.string()),
        ("split", pa.string()),
        ("subject", pa.string()),
        ("fold", pa.int32()),
        ("scene", pa.string()),
        ("video", pa.string()),
        ("shard", pa.string()),
        ("offset", pa.int64()),
        ("size", pa.int64()),
        ("sha256", pa.string()),
        ("frames", pa.int32()),
        ("instances", pa.int32()),
        ("seconds", pa.float64()),
        ("detector", pa.string()),
        ("detector_score", pa.float64()),
        ("codec", pa.string()),
        ("face_px", pa.float64()),
        ("face_share", pa.float64()),
        ("blur", pa.float64()),
        ("yaw", pa.float64()),
        ("roll", pa.float64()),
        ("phash", pa.string()),
        ("crop", pa.string()),
    ]
)

NULLS = ("subject", "fold", "scene", "yaw")
"""Columns of the index that may hold nulls."""


@dataclass(frozen=True, eq=False)
class Dataset:
    """One version of a shard set, opened for reading."""

    store: Store
    number: int
    body: Mapping[str, Any]
    """The version file: see docs/shard-format.md."""
    sha256: str
    loaded: pa.Table | None = None
    """The index, if it was read already."""
    fold: int | None = None
    """The fold that is seen as `test`, if one was chosen."""
    where: str = ""
    """The bags that were chosen; all by default."""
    val_share: float = 0.0
    """Of the clips of `train`, seen as `val` (pipeline/holdout.py); a dataset with a `val` of its own keeps it."""
    val_seed: int = 0

    @cached_property
    def index(self) -> pa.Table:
        """INDEX_SCHEMA, ordered by shard then offset: the row number is the bag's number everywhere.

        Reads every index file, if that was not done already. Raises MicaclError.
        """
        if self.loaded is not None:
            return self.loaded
        with ThreadPoolExecutor(8) as pool:
            tables = list(pool.map(self.shard_index, self.body["shards"]))
        index = (pa.concat_tables(tables) if tables else INDEX_SCHEMA.empty_table()).combine_chunks()
        if self.fold is not None:
            index = _fold_as_split(index, self.fold)
        if self.val_share:
            from pipeline.holdout import with_validation  # numpy's part; opening a dataset needs none of it

            index = with_validation(index, self.val_share, self.val_seed)
        if self.where:
            from pipeline.where import parse_where  # it knows the index's columns from here

            index = index.filter(pa.array(parse_where(self.where).mask(index)))
        return index

    def shard_index(self, shard: Mapping[str, Any]) -> pa.Table:
        """The index file of one entry of body["shards"], hash-checked. Raises MicaclError."""
        rows = read_index(get_checked(self.store, shard["index"]["path"], shard["index"]["sha256"]))
        offsets, sizes = rows["offset"].to_numpy(), rows["size"].to_numpy()
        if ((offsets < 0) | (sizes < 1) | (sizes > shard["bytes"] - offsets)).any():
            raise foreign(f"an index file ({shard['index']['path']})", ValueError("a bag lies outside its shard"))
        return rows

    @property
    def identity(self) -> str:
        """What the rows are of: the version's sha256, and what was chosen of it."""
        fold = [f"fold {self.fold}"] if self.fold is not None else []
        held = [f"val {self.val_share:g} seed {self.val_seed}"] if self.val_share else []
        return ", ".join([self.sha256, *fold, *held, *([self.where] if self.where else [])])

    @property
    def labels(self) -> tuple[str, ...]:
        return tuple(self.body["labels"])

    def split(self, name: str) -> pa.Table:
        """The rows of one split. Raises MicaclError if there are none."""
        rows = self.index.filter(pa.compute.equal(self.index["split"], name))
        if not rows.num_rows:
            raise self.no_split(name, pc.unique(self.index["split"]).to_pylist())
        return rows

    def loader(self, split: str = "train", plan: PlanConfig | None = None, **rest: Any) -> Loader:
        """One rank's batches of a split by a plan: pipeline.loader.Loader says what else it takes."""
        from pipeline.loader import Loader  # it knows the dataset from here

        return Loader(self, split, plan, **rest)

    def eval_loader(self, split: str = "test", **rest: Any) -> EvalLoader:
        """Every bag of a split once: pipeline.loader.EvalLoader says what it takes. Raises MicaclError."""
        from pipeline.loader import EvalLoader
        from pipeline.rows import split_rows

        return EvalLoader(split_rows(self, split), **rest)

    def no_split(self, name: str, there: Sequence[str]) -> MicaclError:
        """Why a split cannot be read; `there` are the splits that have bags."""
        if FOLDS in there:
            return MicaclError(
                f"{self.store.root} version {self.number} is in folds.",
                f"Without a fold it has no split {name!r}.",
                "Choose the test fold (1, 2, ...): `micacl train` with --train.fold, `micacl evaluate` with --fold.",
            )
        return MicaclError(
            f"{self.store.root} version {self.number} has no bag in split {name!r}.",
            "There is nothing to read.",
            f"Choose one of {', '.join(sorted(self.body['counts']))} with --split.",
        )


def version_key(number: int) -> str:
    return f"versions/{number:06d}.json"


def list_versions(store: Store) -> list[int]:
    """Version numbers, ascending."""
    return sorted(int(m.group(1)) for e in store.list("versions/") if (m := _VERSION_KEY.search(e.key)))


def read_version(store: Store, number: int | None = None) -> tuple[int, dict[str, Any], str]:
    """(number, body, sha256) of a version, the newest by default. Raises MicaclError if there is none."""
    store.check()
    known = list_versions(store)
    if not known or (number is not None and number not in known):
        wanted = "no version" if number is None else f"no version {number} (it has {known or 'none'})"
        raise MicaclError(
            f"{store.root} has {wanted}.",
            "It is no dataset that can be read.",
            "Run `micacl prepare RAW URL` to make one; `micacl status URL` shows what is there.",
        )
    number = number or known[-1]
    data = store.get(version_key(number))
    body = json_object(data, store.url(version_key(number)))
    require_schema(body.get("schema"), f"{store.url(version_key(number))}")
    require_shape(body, VERSION, store.url(version_key(number)))
    return number, body, digest(data)


def open_dataset(
    url: str,
    version: int | None = None,
    fold: int | None = None,
    where: str = "",
    val_share: float = 0.0,
    val_seed: int = 0,
) -> Dataset:
    """Open a dataset for reading. Index files are read, hash-checked, when they are asked for. Raises MicaclError.

    Args:
        fold: for datasets in folds (DFEW, MAFW): bags of this fold are seen as split `test`, all others as `train`.
        where: only bags of which this holds, e.g. `face_px >= 48` (pipeline/where.py).
        val_share: of the clips of `train`, seen as split `val`; which, is decided before `where` is asked.
    """
    store = open_store(url)
    number, body, sha256 = read_version(store, version)
    if fold is not None:
        _require_fold(body, fold, store.root)
    return Dataset(store, number, body, sha256, fold=fold, where=where, val_share=val_share, val_seed=val_seed)


def _require_fold(body: Mapping[str, Any], fold: int, where: str) -> None:
    known = sorted({shard["fold"] for shard in body["shards"] if shard.get("fold") is not None})
    if fold not in known:
        has = f"the folds {', '.join(map(str, known))}" if known else "no folds"
        raise MicaclError(f"{where} has no fold {fold}.", "Nothing was read.", f"It has {has}: correct --fold.")


def _fold_as_split(index: pa.Table, fold: int) -> pa.Table:
    is_test = pc.fill_null(pc.equal(index["fold"], fold), False)
    seen = pc.if_else(is_test, "test", pc.if_else(pc.is_valid(index["fold"]), "train", index["split"]))
    return index.set_column(index.schema.get_field_index("split"), "split", seen)


def get_checked(store: Store, key: str, sha256: str) -> bytes:
    """The object, if its bytes are the ones that were listed. Raises MicaclError."""
    try:
        data = store.get(key)
    except FileNotFoundError as error:
        raise _lost(store, key, "is missing") from error
    if digest(data) != sha256:
        raise _lost(store, key, f"has sha256 {digest(data)[:12]}… and {len(data)} bytes, listed is {sha256[:12]}…")
    return data


def _lost(store: Store, key: str, what: str) -> MicaclError:
    return MicaclError(
        f"{store.url(key)} {what}.",
        "It was changed or deleted after the version was committed, so nothing of it is used.",
        "Delete the object and run the same `micacl prepare` again: it makes missing shards anew from the crops.",
    )


def write_index(rows: list[dict[str, Any]]) -> bytes:
    """Parquet bytes of index rows. Same rows, same bytes."""
    out = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows, schema=INDEX_SCHEMA), out, compression="zstd", store_schema=True)
    return out.getvalue()


def read_index(data: bytes) -> pa.Table:
    """The rows of an index file. Raises MicaclError if it is not one."""
    try:
        rows = read_parquet(data).cast(INDEX_SCHEMA)
    except (pa.ArrowException, OSError, ValueError, KeyError, TypeError) as error:
        raise foreign("an index file", error) from error
    for column in INDEX_SCHEMA.names:
        if rows[column].null_count and column not in NULLS:
            raise foreign("an index file", ValueError(f"{column} has nulls"))
    return rows


def commit(store: Store, body: dict[str, Any], parent: int | None = None) -> tuple[int, bool]:
    """Make `body` the next version unless the newest one says the same already.

    Args:
        parent: the version that `body` was derived from, which must be the newest still; None does not ask.

    Returns (version number, whether it was written). Raises MicaclError if somebody else committed meanwhile.
    """
    newest, before = newest_version(store)
    if before is not None and _said(before) == json.loads(canonical_json(body)):
        return newest, False
    if parent is not None and newest != parent:
        raise _late(store, newest)
    number = newest + 1
    full = {**body, "version": number, "parent": newest or None}
    full["sha256"] = body_sha256(full)
    if not store.put_if_absent(version_key(number), canonical_json(full).encode()):
        _, theirs, _ = read_version(store, number)
        if _said(theirs) == _said(full):  # an equal run was faster, e.g. on top of another parent
            return number, False
        raise _late(store, number)
    return number, True


def newest_version(store: Store) -> tuple[int, dict[str, Any] | None]:
    """(number, body) of the newest version; (0, None) if there is none yet. Raises MicaclError."""
    known = list_versions(store)
    return (known[-1], read_version(store, known[-1])[1]) if known else (0, None)


def _said(body: Mapping[str, Any]) -> dict[str, Any]:
    """What a version says, without its place among the others."""
    return {k: v for k, v in body.items() if k not in OF_COMMIT}


def body_sha256(body: Mapping[str, Any]) -> str:
    """Of a version file's other fields: nothing else lists the file, so it names its own hash."""
    return digest(canonical_json({k: v for k, v in body.items() if k != "sha256"}).encode())


def _late(store: Store, number: int) -> MicaclError:
    body = read_version(store, number)[1]
    held = ", ".join(f"{sum(of.values())} bags in {part}" for part, of in sorted(dict(body.get("counts", {})).items()))
    return MicaclError(
        f"Somebody else committed version {number} of {store.root} first ({held or 'no bags'}).",
        "Your version was not written and nothing of theirs was touched; your crops and shards are kept.",
        "Run the same command again: it will commit on top of theirs without decoding anything twice.",
    )


def bag_counts(shards: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, int]]:
    """Bags by part (a split, or fold-1, ...) and label over the shards of a version."""
    out: dict[str, dict[str, int]] = {}
    for shard in shards:
        of_split = out.setdefault(part_name(shard["split"], shard.get("fold")), {})
        of_split[shard["label"]] = of_split.get(shard["label"], 0) + shard["bags"]
    return out


def version_body(
    *, labels: tuple[str, ...], shards: list[dict[str, Any]], rows: dict[str, Any], **rest: Any
) -> dict[str, Any]:
    """The body of a version file, without its number and parent."""
    ordered = sorted(shards, key=lambda s: s["path"])
    return {"schema": SCHEMA_VERSION, "labels": list(labels), "shards": ordered, "counts": rows, **rest}
