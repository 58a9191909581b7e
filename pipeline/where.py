"""Filter expressions over the index: which bags to pack, which to read.

    detector_score > 0.8 and face_px >= 48 and not (blur < 20)
    label in ("happy", "sad") and abs(yaw) < 0.3 and subject != "x"

Python's syntax, read by its own parser, and nothing of its power: a tree of the few nodes below is walked, no code is
run. Numbers are compared as float64. Null (a yaw without landmarks, a subject that nobody named) is a value of its
own: it equals nothing, so `!=` and `not in` hold of it, and it is neither below nor above anything. `not` is the plain
complement. So of any condition and its `not`, each bag meets exactly one. `is None` and `is not None` ask for it.
"""

from __future__ import annotations

import ast
import math
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.contract import MicaclError
from pipeline.dataset import INDEX_SCHEMA

MAX_CHARACTERS = 2000
MAX_DEPTH = 20
NUMBER, TEXT = "number", "text"
COLUMNS: Mapping[str, str] = {
    column.name: TEXT if pa.types.is_string(column.type) else NUMBER for column in INDEX_SCHEMA
}
"""Kind of every column of the index."""
PACK_COLUMNS = {name: kind for name, kind in COLUMNS.items() if name not in ("shard", "offset", "size", "sha256")}
"""Those that are known of a bag before its shard is written."""

_ORDER = {ast.Lt: operator.lt, ast.LtE: operator.le, ast.Gt: operator.gt, ast.GtE: operator.ge}
_EQUAL = {ast.Eq: operator.eq, ast.NotEq: operator.ne}


@dataclass(frozen=True, slots=True)
class _Value:
    """One side of a comparison: of one bag (scalars) or of many (arrays of one length)."""

    kind: str
    values: Any
    """float64 (NaN where null) or str."""
    known: Any = True
    """False where null."""
    column: bool = False
    """Whether a column is in it."""


Reader = Callable[[str], _Value]


@dataclass(frozen=True, slots=True)
class Where:
    """A condition on bags, checked: its columns exist and its comparisons fit their kinds."""

    text: str
    columns: tuple[str, ...]
    """The columns that it reads, sorted."""
    _tree: ast.expr | None = field(compare=False, repr=False)
    """None: every bag."""

    def mask(self, table: pa.Table) -> NDArray[np.bool_]:
        """Shape (rows,): whether it holds, for each row of a table that has `columns`. Raises KeyError."""
        if self._tree is None:
            return np.ones(table.num_rows, bool)
        read = {name: _column(table[name], COLUMNS[name]) for name in self.columns}
        return np.asarray(_holds(self._tree, read.__getitem__, self.text), bool)

    def holds(self, row: Mapping[str, Any]) -> bool:
        """The same for one row, None for null. Raises KeyError."""
        if self._tree is None:
            return True
        read = {name: _scalar(row[name], COLUMNS[name]) for name in self.columns}
        return bool(_holds(self._tree, read.__getitem__, self.text))


def parse_where(text: str, columns: Mapping[str, str] = COLUMNS) -> Where:
    """The condition that `text` says; an empty text is every bag.

    Args:
        columns: kind (NUMBER, TEXT) by name of those that may be used.

    Raises MicaclError: no expression, an unknown column, a comparison of different kinds, too long or too deep.
    """
    text = text.strip()
    if not text:
        return Where("", (), None)
    if len(text) > MAX_CHARACTERS:
        raise _refused(text, f"has {len(text)} characters", f"The cap is {MAX_CHARACTERS}.")
    try:
        tree = ast.parse(text, mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        said = error.msg if isinstance(error, SyntaxError) else str(error)
        raise _refused(
            text, f"cannot be read ({said})", "Compare columns, e.g. `face_px >= 48 and blur > 20`."
        ) from error
    _require_shallow(tree, text)
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)} - {"abs"}
    for name in sorted(names):
        _require_column(name, columns, text)
    _holds(tree, lambda name: _Value(columns[name], math.nan if columns[name] == NUMBER else None, False, True), text)
    return Where(text, tuple(sorted(names)), tree)


def _require_shallow(node: ast.AST, text: str, depth: int = 0) -> None:
    if depth > MAX_DEPTH:
        raise _refused(text, f"is nested deeper than {MAX_DEPTH}", "Say it flatter: `a and b and c`.")
    for child in ast.iter_child_nodes(node):
        _require_shallow(child, text, depth + 1)


def _require_column(name: str, columns: Mapping[str, str], text: str) -> None:
    if name in columns:
        return
    near = get_close_matches(name, columns, n=3)
    hint = "It is known once the shard is written. " if name in COLUMNS else ""
    mean = f"Did you mean {' or '.join(near)}? " if near else ""
    raise _refused(text, f"has the unknown column {name!r}", f"{hint}{mean}The columns are {', '.join(columns)}.")


def _holds(node: ast.expr, read: Reader, text: str) -> Any:
    """Whether a condition holds: a bool, or an array of them. Raises MicaclError if the node is no condition."""
    if isinstance(node, ast.BoolOp):
        parts = [_holds(part, read, text) for part in node.values]
        combine = np.logical_and if isinstance(node.op, ast.And) else np.logical_or
        return combine.reduce(parts)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        return np.logical_not(_holds(node.operand, read, text))
    if isinstance(node, ast.Compare):
        return _chain(node, read, text)
    raise _unfit(node, text, "is no condition", "Compare it with something: `face_px > 48`, `subject is None`.")


def _chain(node: ast.Compare, read: Reader, text: str) -> Any:
    """`a < b < c` is `a < b and b < c`."""
    sides = [node.left, *node.comparators]
    parts = [_compare(op, sides[i], sides[i + 1], read, text) for i, op in enumerate(node.ops)]
    return np.logical_and.reduce(parts)


def _compare(op: ast.cmpop, left: ast.expr, right: ast.expr, read: Reader, text: str) -> Any:
    if isinstance(op, ast.Is | ast.IsNot):
        return _compare_none(op, left, right, read, text)
    if isinstance(op, ast.In | ast.NotIn):
        found = _is_in(left, right, read, text)
        return found if isinstance(op, ast.In) else np.logical_not(found)
    a, b = _value(left, read, text), _value(right, read, text)
    if not (a.column or b.column):
        raise _unfit(left, text, "is compared with a constant", "Put a column on one side.")
    _require_kind(a.kind, b.kind, right, text)
    if type(op) in _ORDER:
        if a.kind == TEXT:
            raise _unfit(left, text, "is text, which has no order here", "Use ==, !=, in or not in.")
        return np.logical_and(np.logical_and(a.known, b.known), _ORDER[type(op)](a.values, b.values))
    same = np.logical_and(np.logical_and(a.known, b.known), a.values == b.values)
    return same if isinstance(op, ast.Eq) else np.logical_not(same)


def _compare_none(op: ast.cmpop, left: ast.expr, right: ast.expr, read: Reader, text: str) -> Any:
    if not (isinstance(right, ast.Constant) and right.value is None):
        raise _unfit(right, text, "stands after `is`", "Only None may: `subject is None`; else use ==.")
    value = _value(left, read, text)
    if not value.column:
        raise _unfit(left, text, "is a constant", "Put a column before `is`.")
    return np.logical_not(value.known) if isinstance(op, ast.Is) else np.logical_and(value.known, True)


def _is_in(left: ast.expr, right: ast.expr, read: Reader, text: str) -> Any:
    if not isinstance(right, ast.Tuple | ast.List) or not right.elts:
        raise _unfit(right, text, "stands after `in`", 'Give a list of constants: `label in ("happy", "sad")`.')
    value = _value(left, read, text)
    if not value.column:
        raise _unfit(left, text, "is a constant", "Put a column before `in`.")
    found: Any = False
    for item in right.elts:
        one = _value(item, read, text)
        if one.column:
            raise _unfit(item, text, "is a column", "A list after `in` has constants.")
        _require_kind(value.kind, one.kind, item, text)
        found = np.logical_or(found, np.logical_and(value.known, value.values == one.values))
    return found


def _value(node: ast.expr, read: Reader, text: str) -> _Value:
    if isinstance(node, ast.Name):
        if node.id == "abs":
            raise _unfit(node, text, "is a function", "Use it as abs(yaw).")
        return read(node.id)
    if isinstance(node, ast.Constant):
        return _constant(node, text)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return _numeric(node.operand, operator.neg, read, text)
    if _is_abs(node):
        return _numeric(node.args[0], np.abs, read, text)  # type: ignore[attr-defined]
    raise _unfit(node, text, "is not understood", "Only columns, numbers, texts, abs(...) and lists after `in` are.")


def _is_abs(node: ast.expr) -> bool:
    called = isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "abs"
    return called and isinstance(node, ast.Call) and len(node.args) == 1 and not node.keywords


def _numeric(node: ast.expr, function: Callable[[Any], Any], read: Reader, text: str) -> _Value:
    value = _value(node, read, text)
    if value.kind != NUMBER:
        raise _unfit(node, text, "is text", "abs and minus are of numbers.")
    return _Value(NUMBER, function(value.values), value.known, value.column)


def _constant(node: ast.Constant, text: str) -> _Value:
    said = node.value
    if isinstance(said, str):
        return _Value(TEXT, said)
    if isinstance(said, int | float) and not isinstance(said, bool):
        try:
            return _Value(NUMBER, float(said))
        except OverflowError as error:
            raise _unfit(node, text, "is too large for a float64", "Give a smaller number.") from error
    hint = "Null is asked for by `is None`." if said is None else "Only numbers and texts can be compared."
    raise _unfit(node, text, "is no number and no text", hint)


def _require_kind(left: str, right: str, node: ast.expr, text: str) -> None:
    if left != right:
        raise _unfit(node, text, f"is a {right}, compared with a {left}", "Text stands in quotes, numbers do not.")


def _column(values: pa.ChunkedArray, kind: str) -> _Value:
    known = values.is_valid().to_numpy()
    if kind == TEXT:
        return _Value(TEXT, values.to_numpy().astype(object), known, True)
    return _Value(NUMBER, values.cast(pa.float64(), safe=False).to_numpy(), known, True)


def _scalar(value: Any, kind: str) -> _Value:
    if value is None:
        return _Value(kind, math.nan if kind == NUMBER else None, False, True)
    return _Value(kind, str(value) if kind == TEXT else float(value), True, True)


def _unfit(node: ast.expr, text: str, what: str, remedy: str) -> MicaclError:
    part = ast.get_source_segment(text, node) or text
    return _refused(text, f"has `{_short(part)}`, which {what}", remedy)


def _refused(text: str, what: str, remedy: str) -> MicaclError:
    return MicaclError(f"The filter `{_short(text)}` {what}.", "No bag was chosen by it.", remedy)


def _short(text: str) -> str:
    return text if len(text) <= 100 else f"{text[:100]}…"
