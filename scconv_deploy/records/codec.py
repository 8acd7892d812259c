"""Strict JSON codec of dataclasses: reports, engine manifests, device plans and references. Standard library only.

A field's type decides what its JSON value may be::

    dataclass              an object with a key for each field; a key may be missing where the field has a default
    X | None, int | str    one of them
    Literal["a", "b"]      one of these values
    tuple[X, ...]          a list;  tuple[X, Y]  a list of two
    dict[str, X]           an object with any keys
    float                  a number, or one of the strings "inf", "-inf", "nan"
    str, int, bool         itself;  Any  anything

Fields of dataclasses must have types that can be resolved at run time (none imported for type checking alone).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields, is_dataclass
from functools import cache
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

NON_FINITE = ("inf", "-inf", "nan")
"""JSON strings of the floats that JSON numbers cannot hold."""

Shape = Literal["record", "union", "choice", "list", "entries", "object", "number", "plain", "any"]
Unknown = Literal["refuse", "ignore"]
_T = TypeVar("_T")
_LONGEST = 60
"""Characters of a value that an error quotes."""


class DecodeError(ValueError):
    """Error for JSON that does not fit its record; names the key, the value found and the type expected."""


@dataclass(frozen=True)
class Entry:
    """Key of a record in JSON, its type, and whether it is required."""

    name: str
    kind: Any
    required: bool


@cache
def entries_of(record: Any) -> tuple[Entry, ...]:
    """Entries of a dataclass, in the order of its fields."""
    hints = get_type_hints(record)
    return tuple(
        Entry(f.name, hints[f.name], f.default is MISSING and f.default_factory is MISSING) for f in fields(record)
    )


def shape_of(kind: Any) -> tuple[Shape, tuple[Any, ...]]:
    """JSON shape of a type, and its type arguments (for a choice, its values).

    Raises:
        TypeError: the codec does not support the type.
    """
    origin, args = get_origin(kind), get_args(kind)
    if is_dataclass(kind):
        return "record", ()
    if origin is UnionType:
        return "union", args
    if origin is Literal:
        return "choice", args
    if origin is tuple:
        return ("list", args[:1]) if args[-1] is Ellipsis else ("entries", args)
    if origin in (dict, Mapping) and args[0] is str:
        return "object", args[1:]
    if kind is float:
        return "number", ()
    if kind in (str, int, bool, NoneType):
        return "plain", (kind,)
    if kind is Any:
        return "any", ()
    raise TypeError(f"the codec does not support the type {kind}")


def encode(value: Any) -> Any:
    """Convert a record, or the value of one field, to JSON values."""
    if is_dataclass(value):
        return {entry.name: encode(getattr(value, entry.name)) for entry in fields(value)}
    if isinstance(value, Mapping):
        return {name: encode(inner) for name, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [encode(inner) for inner in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def parse(text: str | bytes) -> Any:
    """Parse JSON text (DecodeError if it is invalid)."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DecodeError(f"not JSON: {error}") from error


def decode(kind: type[_T], value: Any, unknown: Unknown = "refuse") -> _T:
    """Build a record from JSON values, the inverse of :func:`encode`.

    Args:
        unknown: refuse or ignore a key that is no field.

    Raises:
        DecodeError: a key is missing or unknown, or a value has the wrong type.
    """
    return _decode(kind, value, "", unknown)


def _decode(kind: Any, value: Any, where: str, unknown: Unknown) -> Any:
    shape, args = shape_of(kind)
    if shape == "record":
        return _decode_record(kind, value, where, unknown)
    if shape == "union":
        return _decode_union(args, value, where, unknown)
    if shape == "choice":
        good = any(type(value) is type(choice) and value == choice for choice in args)
        return _expect(good, value, " or ".join(map(repr, args)), where)
    if shape in ("list", "entries"):
        _expect(isinstance(value, list), value, "a list", where)
        kinds = args * len(value) if shape == "list" else args
        _expect(len(value) == len(kinds), value, f"{len(kinds)} entries", where)
        return tuple(_decode(k, v, f"{where}[{i}]", unknown) for i, (k, v) in enumerate(zip(kinds, value, strict=True)))
    if shape == "object":
        _expect(isinstance(value, dict), value, "an object", where)
        return {name: _decode(args[0], inner, f"{where}[{name!r}]", unknown) for name, inner in value.items()}
    if shape == "number":
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        _expect(number or value in NON_FINITE, value, "a number", where)
        return value if number else float(value)
    return value if shape == "any" else _expect(type(value) is args[0], value, args[0].__name__, where)


def _decode_record(kind: Any, value: Any, where: str, unknown: Unknown) -> Any:
    _expect(isinstance(value, dict), value, "an object", where)
    found, known = {}, entries_of(kind)
    for entry in known:
        inner = f"{where}.{entry.name}".lstrip(".")
        if entry.name in value:
            found[entry.name] = _decode(entry.kind, value[entry.name], inner, unknown)
        elif entry.required:
            raise DecodeError(f"{inner} is missing")
    if unknown == "refuse" and (more := sorted(value.keys() - {entry.name for entry in known})):
        raise DecodeError(f"{where}.{more[0]} is not known here".lstrip("."))
    return kind(**found)


def _decode_union(kinds: tuple[Any, ...], value: Any, where: str, unknown: Unknown) -> Any:
    present = [kind for kind in kinds if kind is not NoneType]
    if value is None and NoneType in kinds:
        return None
    if len(present) == 1:  # the error of the single type says more than "one of these"
        return _decode(present[0], value, where, unknown)
    for kind in present:
        try:
            return _decode(kind, value, where, unknown)
        except DecodeError:
            continue
    return _expect(False, value, " or ".join(kind.__name__ for kind in present), where)


def _expect(good: bool, value: Any, expected: str, where: str) -> Any:
    if not good:
        raise DecodeError(f"{where or 'the document'} is {json.dumps(value)[:_LONGEST]}, expected {expected}")
    return value
