"""The JSON Schema of ``report.json``, derived from the records and their docstrings."""

from __future__ import annotations

import inspect
import json
import re
from dataclasses import MISSING, fields, is_dataclass
from types import NoneType, UnionType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from scconv_deploy.records.parity import SCHEMA_VERSION, OutputParity, ParityReport
from scconv_deploy.report.load import NON_FINITE

_PLAIN = {str: "string", int: "integer", bool: "boolean"}


def report_schema() -> dict[str, Any]:
    """The schema, draft 2020-12. Objects may hold more fields than it names: readers ignore what they do not know."""
    definitions: dict[str, Any] = {
        "number": {
            "description": "A number; what JSON has none for is a string.",
            "anyOf": [{"type": "number"}, {"enum": list(NON_FINITE)}],
        }
    }
    _reference(ParityReport, definitions)
    root = definitions.pop(ParityReport.__name__)
    number = {"$ref": "#/$defs/number"}
    definitions[OutputParity.__name__]["properties"]["replay_ratio"] = {
        "description": "replay_error / noise_floor", **number
    }  # fmt: skip
    derived = {
        "schema_version": {"const": SCHEMA_VERSION, "description": "changes when a field changes its meaning"},
        "verdict": {
            "enum": ["passed", "failed", "not run"],
            "description": "failed as soon as a link failed; not run if none ran",
        },
        "failures": {
            "type": "array", "items": {"type": "string"}, "description": "each failed check, the link's name first",
        },
    }  # fmt: skip
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "scconv-deploy parity report",
        **root,
        "properties": derived | root["properties"],
        "required": ["schema_version", "verdict", *root["required"]],
        "$defs": dict(sorted(definitions.items())),
    }


def schema_text() -> str:
    """``docs/report.schema.json``."""
    return json.dumps(report_schema(), indent=2) + "\n"


def _reference(record: Any, definitions: dict[str, Any]) -> dict[str, Any]:
    """A reference to a record's definition, which is made if it is not there."""
    name = record.__name__
    if name not in definitions:
        definitions[name] = {}  # it may hold itself
        hints, described = get_type_hints(record), _descriptions(record)
        properties = {}
        for entry in fields(record):
            note = {"description": described[entry.name]} if entry.name in described else {}
            properties[entry.name] = note | _schema(hints[entry.name], definitions)
        required = [f.name for f in fields(record) if f.default is MISSING and f.default_factory is MISSING]
        summary = inspect.cleandoc(record.__doc__).split("\n\n")[0]
        definitions[name] = {
            "description": _sentence(summary), "type": "object", "properties": properties, "required": required,
        }  # fmt: skip
    return {"$ref": f"#/$defs/{name}"}


def _schema(kind: Any, definitions: dict[str, Any]) -> dict[str, Any]:
    if is_dataclass(kind):
        return _reference(kind, definitions)
    origin, args = get_origin(kind), get_args(kind)
    if origin is UnionType:
        return {"anyOf": [{"type": "null"} if a is NoneType else _schema(a, definitions) for a in args]}
    if origin is Literal:
        return {"enum": list(args)}
    if origin is tuple and args[-1] is Ellipsis:
        return {"type": "array", "items": _schema(args[0], definitions)}
    if origin is tuple:
        entries = [_schema(a, definitions) for a in args]
        return {"type": "array", "prefixItems": entries, "minItems": len(entries), "maxItems": len(entries)}
    if origin is dict:
        return {"type": "object", "additionalProperties": _schema(args[1], definitions)}
    return {"$ref": "#/$defs/number"} if kind is float else {"type": _PLAIN[kind]}


def _descriptions(record: Any) -> dict[str, str]:
    """Field -> what the docstring's section ``Attributes`` says of it."""
    section = inspect.cleandoc(record.__doc__).partition("Attributes:\n")[2]
    found = {}
    for names, text in re.findall(r"^    ([\w, ]+): (.*(?:\n     +.*)*)", section, re.MULTILINE):
        found.update(dict.fromkeys(re.split(r",\s*", names), _sentence(text)))
    return found


def _sentence(text: str) -> str:
    """A docstring's lines as one, its markup gone."""
    return re.sub(r":\w+:`[.~]*([^`]+)`", r"\1", " ".join(text.split())).replace("``", "")
