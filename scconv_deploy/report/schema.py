"""JSON Schema of ``report.json``, derived from the records and their docstrings."""

from __future__ import annotations

import inspect
import json
import re
from types import NoneType
from typing import Any

from scconv_deploy.records.codec import NON_FINITE, entries_of, shape_of
from scconv_deploy.records.parity import SCHEMA_VERSION, OutputParity, ParityReport

_PLAIN = {str: "string", int: "integer", bool: "boolean", NoneType: "null"}


def report_schema() -> dict[str, Any]:
    """Make the schema, draft 2020-12. Objects may hold further fields, which readers ignore."""
    definitions: dict[str, Any] = {
        "number": {
            "description": "A number, or a string for infinity and NaN.",
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
    """Content of ``docs/report.schema.json``."""
    return json.dumps(report_schema(), indent=2) + "\n"


def _reference(record: Any, definitions: dict[str, Any]) -> dict[str, Any]:
    """Reference to a record's definition, which is added if missing."""
    name = record.__name__
    if name not in definitions:
        definitions[name] = {}  # before the fields: the record may contain itself
        described, entries = _descriptions(record), entries_of(record)
        properties = {}
        for entry in entries:
            note = {"description": described[entry.name]} if entry.name in described else {}
            properties[entry.name] = note | _schema(entry.kind, definitions)
        required = [entry.name for entry in entries if entry.required]
        summary = inspect.cleandoc(record.__doc__).split("\n\n")[0]
        definitions[name] = {
            "description": _sentence(summary), "type": "object", "properties": properties, "required": required,
        }  # fmt: skip
    return {"$ref": f"#/$defs/{name}"}


def _schema(kind: Any, definitions: dict[str, Any]) -> dict[str, Any]:
    shape, args = shape_of(kind)
    if shape == "record":
        return _reference(kind, definitions)
    if shape == "choice":
        return {"enum": list(args)}
    if shape == "number":
        return {"$ref": "#/$defs/number"}
    if shape == "plain":
        return {"type": _PLAIN[kind]}
    inner = [_schema(arg, definitions) for arg in args]
    if shape == "union":
        return {"anyOf": inner}
    if shape == "entries":
        return {"type": "array", "prefixItems": inner, "minItems": len(inner), "maxItems": len(inner)}
    return (
        {"type": "array", "items": inner[0]}
        if shape == "list"
        else {"type": "object", "additionalProperties": inner[0]}
    )


def _descriptions(record: Any) -> dict[str, str]:
    """Description of each field in the docstring's section ``Attributes``."""
    section = inspect.cleandoc(record.__doc__).partition("Attributes:\n")[2]
    found = {}
    for names, text in re.findall(r"^    ([\w, ]+): (.*(?:\n     +.*)*)", section, re.MULTILINE):
        found.update(dict.fromkeys(re.split(r",\s*", names), _sentence(text)))
    return found


def _sentence(text: str) -> str:
    """Join a docstring's lines and remove its markup."""
    return re.sub(r":\w+:`[.~]*([^`]+)`", r"\1", " ".join(text.split())).replace("``", "")
