"""What a JSON file of ours must look like before anything is made of it: shapes, and the first place that does not fit.

str, int, float, bool, None     a value of that kind (a whole number is a float too, a bool is no number)
(str, None)                     one of several
[shape]                         a list
{str: shape}                    a mapping from any text
{"name": shape, "more?": shape} a mapping that has these fields; with ? it may lack them; others do not matter
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.contract import foreign

Shape = Any

FILE = {"path": str, "sha256": str}
_SHARD = {"path": str, "split": str, "fold?": (int, None), "label": str, "bags": int, "bytes": int, "index": FILE}
VERSION = {
    "labels": [str],
    "shards": [_SHARD],
    "counts": {str: {str: int}},
    "parent?": (int, None),
    "crop?": {"hash": str},
    "pack?": {str: (str, float)},
    "videos?": {str: int},
    "quarantined?": {str: int},
    "quarantine?": (FILE, None),
    "records?": [FILE],
    "source?": {str: str},
    "forgotten?": [str],
}
RECORD = {
    "video": str,
    "object": str,
    "frames": int,
    "reason": (str, None),
    "detail": str,
    "bags": [{"key": str, "sha256": str, "size": int, "columns": {str: (str, float, None)}}],
}
QUARANTINED = {"video": str, "reason": str, "detail": str, "object?": (str, None), "subject?": (str, None)}


def misfit(value: Any, shape: Shape, at: str = "") -> str:
    """Where `value` does not have the shape, and what is there instead; empty if it has."""
    if isinstance(shape, tuple):
        found = [misfit(value, one, at) for one in shape]
        return "" if "" in found else found[0]
    if isinstance(shape, list):
        if not isinstance(value, Sequence) or isinstance(value, str):
            return _said(value, at)
        return next(filter(None, (misfit(one, shape[0], f"{at}[{i}]") for i, one in enumerate(value))), "")
    if isinstance(shape, Mapping):
        return _misfit_of_fields(value, shape, at) if isinstance(value, Mapping) else _said(value, at)
    if shape is None:
        return "" if value is None else _said(value, at)
    kinds = (int, float) if shape is float else shape
    return "" if isinstance(value, kinds) and (shape is bool or not isinstance(value, bool)) else _said(value, at)


def _misfit_of_fields(value: Mapping[str, Any], shape: Mapping[Any, Shape], at: str) -> str:
    if str in shape:
        return next(filter(None, (misfit(one, shape[str], f"{at}.{name}") for name, one in value.items())), "")
    for name, of_field in shape.items():
        plain = name.removesuffix("?")
        if plain not in value:
            if plain == name:
                return f"{at}.{name} is missing".removeprefix(".")
        elif found := misfit(value[plain], of_field, f"{at}.{plain}"):
            return found
    return ""


def _said(value: Any, at: str) -> str:
    return f"{at or 'it'} is {str(value)[:40]!r}, a {type(value).__name__}".removeprefix(".")


def require_shape(value: Any, shape: Shape, what: str) -> None:
    """Raises MicaclError, naming the first place that does not fit."""
    if found := misfit(value, shape):
        raise foreign(what, TypeError(found))
