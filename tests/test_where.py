"""Filters: one answer for a row and for a table, nulls as the docs say, and no more of Python than is meant."""

from __future__ import annotations

import operator
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.contract import MicaclError
from pipeline.dataset import INDEX_SCHEMA
from pipeline.where import COLUMNS, MAX_CHARACTERS, PACK_COLUMNS, parse_where

Row = dict[str, Any]
WORDS = ("happy", "sad", 'a "quoted" one', "", "ünï")
NUMBERS = (-1.5, -0.3, 0.0, 0.3, 2.0, 48.0)
CONDITION = tuple[str, Callable[[Row], bool]]


def order(column: str, sign: str, bound: float, absolute: bool) -> CONDITION:
    compare = {"<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge}[sign]

    def holds(row: Row) -> bool:
        value = row[column]
        return value is not None and bool(compare(abs(value) if absolute else value, bound))

    return f"{f'abs({column})' if absolute else column} {sign} {bound!r}", holds


def conditions() -> st.SearchStrategy[CONDITION]:
    """Text of a condition, and what the docs say of it in plain Python: null equals nothing and has no order."""
    numeric, words = st.sampled_from(["yaw", "face_px", "fold"]), st.sampled_from(["label", "subject", "scene"])
    bounds, signs = st.sampled_from(NUMBERS), st.sampled_from(["<", "<=", ">", ">="])
    simple = st.one_of(
        st.builds(order, numeric, signs, bounds, st.booleans()),
        st.builds(lambda c, v: (f"{c} == {v!r}", lambda r: r[c] == v), numeric, bounds),
        st.builds(lambda c, v: (f"{c} != {v!r}", lambda r: r[c] != v), words, st.sampled_from(WORDS)),
        st.builds(lambda c, v: (f"{v!r} == {c}", lambda r: r[c] == v), words, st.sampled_from(WORDS)),
        st.builds(
            lambda c, v: (f"{c} in {v!r}", lambda r: r[c] in v), words, st.lists(st.sampled_from(WORDS), min_size=1)
        ),
        st.builds(lambda c, v: (f"{c} not in {v!r}", lambda r: r[c] not in v), numeric, st.just(list(NUMBERS[:3]))),
        st.builds(lambda c: (f"{c} is None", lambda r: r[c] is None), st.one_of(numeric, words)),
        st.builds(lambda c: (f"{c} is not None", lambda r: r[c] is not None), st.one_of(numeric, words)),
        st.builds(
            lambda c, a, b: (f"{a!r} < {c} <= {b!r}", lambda r: r[c] is not None and a < r[c] <= b),
            numeric,
            bounds,
            bounds,
        ),
        st.just(("label == scene", lambda r: r["scene"] is not None and r["label"] == r["scene"])),
        st.just(("-yaw < face_px", lambda r: r["yaw"] is not None and -r["yaw"] < r["face_px"])),
    )

    def combined(inner: st.SearchStrategy[CONDITION]) -> st.SearchStrategy[CONDITION]:
        return st.one_of(
            st.builds(lambda a: (f"not ({a[0]})", lambda r: not a[1](r)), inner),
            st.builds(lambda a, b: (f"({a[0]}) and ({b[0]})", lambda r: a[1](r) and b[1](r)), inner, inner),
            st.builds(lambda a, b: (f"({a[0]}) or ({b[0]})", lambda r: a[1](r) or b[1](r)), inner, inner),
        )

    return st.recursive(simple, combined, max_leaves=5)


ROWS = st.lists(
    st.fixed_dictionaries(
        {
            "yaw": st.one_of(st.none(), st.sampled_from(NUMBERS)),
            "face_px": st.sampled_from(NUMBERS),
            "fold": st.one_of(st.none(), st.integers(1, 3)),
            "label": st.sampled_from(WORDS),
            "subject": st.one_of(st.none(), st.sampled_from(WORDS)),
            "scene": st.one_of(st.none(), st.sampled_from(WORDS)),
        }
    ),
    min_size=1,
    max_size=6,
)


def table_of(rows: list[Row]) -> pa.Table:
    full = [{**dict.fromkeys(INDEX_SCHEMA.names), **row} for row in rows]
    return pa.Table.from_pylist(full, schema=INDEX_SCHEMA)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(conditions(), ROWS)
def test_a_row_and_a_table_get_the_answer_that_the_docs_give(condition: CONDITION, rows: list[Row]) -> None:
    text, wanted = condition
    where = parse_where(text)
    assert [where.holds(row) for row in rows] == [wanted(row) for row in rows]
    mask = where.mask(table_of(rows))
    assert (mask.dtype, mask.tolist()) == (np.dtype(bool), [wanted(row) for row in rows])


@settings(max_examples=200, deadline=None, derandomize=True)
@given(conditions(), ROWS)
def test_of_a_condition_and_its_not_each_row_meets_one(condition: CONDITION, rows: list[Row]) -> None:
    yes, no = parse_where(condition[0]), parse_where(f"not ({condition[0]})")
    assert (yes.mask(table_of(rows)) ^ no.mask(table_of(rows))).all()


@pytest.mark.parametrize(
    ("text", "of_null"),
    [
        ("yaw < 1", False),
        ("yaw >= 1", False),
        ("not yaw < 1", True),
        ("yaw != 1", True),
        ("yaw == 1", False),
        ("yaw not in (1, 2)", True),
        ("abs(yaw) < 1", False),
        ("subject != 'x'", True),
        ("subject == 'x'", False),
        ("not subject == 'x'", True),
        ("subject in ('x',)", False),
        ("subject == scene", False),
        ("subject != scene", True),
        ("subject is None", True),
        ("yaw is not None", False),
    ],
)
def test_null_equals_nothing_and_has_no_order(text: str, of_null: bool) -> None:
    nulls = table_of([{"label": "sad"}])
    assert parse_where(text).holds(nulls.to_pylist()[0]) is of_null
    assert parse_where(text).mask(nulls).tolist() == [of_null]


def test_a_table_in_chunks_is_filtered_by_the_mask() -> None:
    rows = [{"label": "happy", "yaw": 0.1}, {"label": "sad", "yaw": None}, {"label": "sad", "yaw": -0.2}]
    table = pa.concat_tables([table_of(rows[:2]), table_of(rows[2:])])
    where = parse_where(' label in ("sad",) and abs(yaw) < 0.3 ')
    assert table.filter(where.mask(table))["yaw"].to_pylist() == [-0.2]
    assert where.columns == ("label", "yaw")
    assert pickle.loads(pickle.dumps(where)) == where


def test_an_empty_text_is_every_bag() -> None:
    where = parse_where("  ")
    assert where.holds({})
    assert where.columns == ()
    assert where.mask(table_of([{"label": "sad"}] * 3)).tolist() == [True] * 3
    assert parse_where("yaw > 0").mask(INDEX_SCHEMA.empty_table()).tolist() == []


def test_every_column_of_the_index_can_be_asked() -> None:
    for name, kind in COLUMNS.items():
        assert parse_where(f"{name} == {'1' if kind == 'number' else repr('x')}").columns == (name,)
    assert set(COLUMNS) - set(PACK_COLUMNS) == {"shard", "offset", "size", "sha256"}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("detectr_score > 1", "unknown column 'detectr_score'.*Did you mean detector_score.*key, label"),
        ("__import__('os')", "is no condition|unknown column '__import__'"),
        ("().__class__ == 1", "not understood"),
        ("abs(yaw, 1) > 1", "not understood"),
        ("abs(abs) > 1", "is a function"),
        ("yaw + 1 > 1", "`yaw \\+ 1`, which is not understood"),
        ("(yaw := 1) > 1", "not understood"),
        ("[yaw for yaw in (1,)] == 1", "not understood"),
        ("yaw > 1 if yaw else 2", "is no condition"),
        ("lambda: 1", "is no condition"),
        ("label", "is no condition"),
        ("label == 'sad' or 1", "is no condition"),
        ("face_px = 3", "cannot be read"),
        ("yaw > \x001", "cannot be read"),
        ("detector > 3", "`3`, which is a number, compared with a text"),
        ("label in ('sad', 3)", "`3`, which is a number, compared with a text"),
        ("abs(label) == 'x'", "is text"),
        ("label < 'sad'", "no order"),
        ("1 < 2", "compared with a constant"),
        ("1 is None", "is a constant"),
        ("yaw == None", "is None"),
        ("yaw > True", "no number and no text"),
        ("yaw > 1j", "no number and no text"),
        ("yaw is 1", "Only None may"),
        ("label in 'happy'", "Give a list"),
        ("label in ()", "Give a list"),
        ("yaw in (fold,)", "is a column"),
        ("yaw > " + "9" * 400, "too large"),
        ("not " * 200 + "yaw > 1", "nested deeper"),
        ("-" * 900 + "1 < yaw", "nested deeper"),
        ("(" * 900, "cannot be read"),
        ("yaw > 1 or " * 400 + "yaw > 1", f"The cap is {MAX_CHARACTERS}"),
    ],
)
def test_what_is_not_meant_is_refused_in_words(text: str, says: str) -> None:
    with pytest.raises(MicaclError, match=says) as refused:
        parse_where(text)
    assert len(str(refused.value)) < 900


def test_what_a_shard_decides_is_not_asked_before_there_is_one() -> None:
    with pytest.raises(MicaclError, match="known once the shard is written"):
        parse_where("size > 10", PACK_COLUMNS)
