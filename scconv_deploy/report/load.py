"""``report.json`` back into records."""

from __future__ import annotations

import json
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from scconv_deploy.bundle.contents import REPORT
from scconv_deploy.bundle.manifest import differing_files, read_manifest
from scconv_deploy.errors import IntegrityError, MissingRuntimeError, UsageError
from scconv_deploy.records.parity import SCHEMA_VERSION, Link, ParityReport

NON_FINITE = ("inf", "-inf", "nan")
"""What JSON has no numbers for."""


def load_report(path: Path) -> ParityReport:
    """Read a report.

    Args:
        path: a ``report.json``, or a bundle that holds one.

    Raises:
        UsageError: there is no such file, or the folder is not a bundle.
        IntegrityError: the file is not a report, contradicts itself, or is not the one that the bundle was sealed with.
        MissingRuntimeError: a newer scconv-deploy wrote it.
    """
    if path.is_dir():
        if REPORT in unsealed_files(path):
            raise IntegrityError(
                f"{path / REPORT} is not the report that the bundle was sealed with.", "Make the bundle again."
            )
        path = path / REPORT
    if not path.is_file():
        problem = "is not a file" if path.exists() else "does not exist"
        raise UsageError(f"{path} {problem}.", "Name a report.json, or a bundle that holds one.")
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise IntegrityError(f"{path} is not JSON: {error}.", "Name a report.json, or verify again.") from error
    return from_json(document, str(path))


def unsealed_files(bundle: Path) -> tuple[str, ...]:
    """Files of a bundle that its manifest names and that are missing or changed.

    Raises:
        UsageError, IntegrityError: see :func:`scconv_deploy.bundle.manifest.read_manifest`.
    """
    manifest = read_manifest(bundle)
    return tuple(name for name in differing_files(bundle, manifest) if name in manifest["files"])


def from_json(document: Any, where: str = "the document") -> ParityReport:
    """The inverse of :meth:`ParityReport.as_json`. Unknown fields are ignored, absent optional ones take defaults.

    Args:
        document: JSON values.
        where: what an error calls it.

    Raises:
        IntegrityError, MissingRuntimeError: see :func:`load_report`.
    """
    remedy = "Name a report.json that scconv-deploy wrote, or verify again."
    schema = document.get("schema_version") if isinstance(document, dict) else None
    if type(schema) is not int or schema < 1:
        raise IntegrityError(f"{where} is not a parity report: it has no schema_version.", remedy)
    if schema > SCHEMA_VERSION:
        raise MissingRuntimeError(
            f"{where} has schema version {schema}; this scconv-deploy reads up to {SCHEMA_VERSION}.",
            "Install the scconv-deploy that wrote it, or a newer one.",
        )
    try:
        report = _decode(ParityReport, document, "")
    except _Mismatch as error:
        raise IntegrityError(f"{where} is not a parity report: {error}.", remedy) from error
    if problem := _contradiction(report, document.get("verdict")):
        raise IntegrityError(f"{where} contradicts itself: {problem}.", "It was changed after the run; verify again.")
    return report


class _Mismatch(Exception):
    """A value that is not of its field's type."""


def _contradiction(report: ParityReport, verdict: Any) -> str:
    for link in report.links:
        if link.checks and link.status != (judged := Link.of(link.name, link.checks).status):
            return f"link {link.name} is {link.status}, its checks say {judged}"
    if verdict != report.verdict:
        return f"the verdict is {verdict!r}, the links say {report.verdict!r}"
    return ""


def _decode(kind: Any, value: Any, where: str) -> Any:
    """A JSON value as an instance of a record's field type."""
    if is_dataclass(kind):
        return _decode_record(kind, value, where)
    origin, args = get_origin(kind), get_args(kind)
    if origin is UnionType:  # X | None
        present = next(arg for arg in args if arg is not NoneType)
        return None if value is None else _decode(present, value, where)
    if origin is Literal:
        return _expect(value in args, value, " or ".join(map(repr, args)), where)
    if origin is tuple:
        _expect(isinstance(value, list), value, "a list", where)
        if args[-1] is Ellipsis:
            args = args[:1] * len(value)
        _expect(len(value) == len(args), value, f"{len(args)} entries", where)
        return tuple(_decode(arg, v, f"{where}[{i}]") for i, (arg, v) in enumerate(zip(args, value, strict=True)))
    if origin is dict:
        _expect(isinstance(value, dict), value, "an object", where)
        return {name: _decode(args[1], v, f"{where}[{name!r}]") for name, v in value.items()}
    if kind is float:
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        _expect(number or value in NON_FINITE, value, "a number", where)
        return value if number else float(value)
    return _expect(type(value) is kind, value, kind.__name__, where)


def _decode_record(kind: Any, value: Any, where: str) -> Any:
    _expect(isinstance(value, dict), value, "an object", where)
    hints, found = get_type_hints(kind), {}
    for entry in fields(kind):
        inner = f"{where}.{entry.name}".lstrip(".")
        if entry.name in value:
            found[entry.name] = _decode(hints[entry.name], value[entry.name], inner)
        elif entry.default is MISSING and entry.default_factory is MISSING:
            raise _Mismatch(f"{inner} is missing")
    return kind(**found)


def _expect(good: bool, value: Any, expected: str, where: str) -> Any:
    if not good:
        raise _Mismatch(f"{where or 'the document'} is {json.dumps(value)[:60]}, expected {expected}")
    return value
