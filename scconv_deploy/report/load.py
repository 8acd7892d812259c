"""Reader of ``report.json``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from scconv_deploy.bundle.contents import REPORT
from scconv_deploy.bundle.manifest import differing_files, read_manifest
from scconv_deploy.errors import IntegrityError, MissingRuntimeError, UsageError
from scconv_deploy.records.codec import DecodeError, decode, parse
from scconv_deploy.records.parity import SCHEMA_VERSION, Link, ParityReport


def load_report(path: Path) -> ParityReport:
    """Read and check a report.

    Args:
        path: a ``report.json``, or a bundle that holds one.

    Raises:
        UsageError: there is no such file, or the folder is not a bundle.
        IntegrityError: the file is no report, contradicts itself, or differs from the bundle's manifest.
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
        document = parse(path.read_bytes())
    except DecodeError as error:
        raise IntegrityError(f"{path} is {error}.", "Name a report.json, or verify again.") from error
    return from_json(document, str(path))


def unsealed_files(bundle: Path) -> tuple[str, ...]:
    """Files in a bundle's manifest that are missing or changed.

    Raises:
        UsageError, IntegrityError: see :func:`scconv_deploy.bundle.manifest.read_manifest`.
    """
    manifest = read_manifest(bundle)
    return tuple(name for name in differing_files(bundle, manifest) if name in manifest["files"])


def from_json(document: Any, where: str = "the document") -> ParityReport:
    """Build a report from JSON values, the inverse of :meth:`ParityReport.as_json`.

    Unknown fields are ignored; missing optional fields take their defaults.

    Args:
        document: JSON values.
        where: name of the document for error messages.

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
        report = decode(ParityReport, document, unknown="ignore")
    except DecodeError as error:
        raise IntegrityError(f"{where} is not a parity report: {error}.", remedy) from error
    if problem := _contradiction(report, document.get("verdict")):
        raise IntegrityError(f"{where} contradicts itself: {problem}.", "It was changed after the run; verify again.")
    return report


def _contradiction(report: ParityReport, verdict: Any) -> str:
    for link in report.links:
        if link.checks and link.status != (judged := Link.of(link.name, link.checks).status):
            return f"link {link.name} is {link.status}, its checks say {judged}"
    if verdict != report.verdict:
        return f"the verdict is {verdict!r}, the links say {report.verdict!r}"
    return ""
