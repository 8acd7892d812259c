"""Rendering of a report in every format."""

from __future__ import annotations

import importlib
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Literal, get_args

from scconv_deploy.errors import MissingRuntimeError, UsageError
from scconv_deploy.records.parity import ParityReport
from scconv_deploy.records.sensitivity import Sensitivity
from scconv_deploy.report.junit import to_junit
from scconv_deploy.report.markdown import to_markdown

Format = Literal["text", "markdown", "html", "junit", "json"]
FORMATS: tuple[Format, ...] = get_args(Format)
_SUFFIXES: dict[str, Format] = {
    ".json": "json", ".html": "html", ".htm": "html", ".md": "markdown", ".xml": "junit", ".txt": "text",
}  # fmt: skip


def format_of(path: Path) -> Format:
    """Report format of a file's suffix.

    Raises:
        UsageError: the suffix names no format.
        MissingRuntimeError: the format is HTML, and jinja2 or matplotlib is missing.
    """
    found = _SUFFIXES.get(path.suffix.lower())
    if found is None:
        raise UsageError(f"{path}: {path.suffix or 'no suffix'} is no report format.", f"Use {', '.join(_SUFFIXES)}.")
    if found == "html":
        require_html()
    return found


def require_html() -> None:
    """Raise MissingRuntimeError if jinja2 or matplotlib, which HTML needs, is missing."""
    for package in ("jinja2", "matplotlib"):
        try:
            importlib.import_module(package)
        except ImportError as error:
            raise MissingRuntimeError(
                f"The HTML report needs {package}, which is not installed.", "pip install jinja2 matplotlib"
            ) from error


def sensitivity_format(path: Path) -> Literal["html", "json"]:
    """Format of a file for the costs of int8 sites; errors as :func:`format_of`."""
    found = format_of(path)
    if found not in ("html", "json"):
        raise UsageError(f"{path}: costs of sites are not written as {path.suffix}.", "Use .html or .json.")
    return found


def render_sensitivity(result: Sensitivity, form: Literal["html", "json"]) -> str:
    """Render the costs of int8 sites as one document; errors as :func:`render`."""
    if form == "json":
        return json.dumps(result.as_json(), indent=2) + "\n"
    from scconv_deploy.report.html import sensitivity_page

    return sensitivity_page(result)


def render(report: ParityReport, form: Format) -> str:
    """Render a report as one document.

    Raises:
        MissingRuntimeError: the format is HTML, and jinja2 or matplotlib is missing.
    """
    return _RENDERERS[form](report)


def to_json(report: ParityReport) -> str:
    """Render ``report.json``."""
    return json.dumps(report.as_json(), indent=2) + "\n"


def to_html(report: ParityReport) -> str:
    """Render ``report.html``; see :mod:`scconv_deploy.report.html`."""
    require_html()
    from scconv_deploy.report.html import html_page

    return html_page(report)


def to_text(report: ParityReport) -> str:
    """Render the tables of the terminal without colour."""
    from rich.console import Console

    from scconv_deploy.report.text import print_report

    stream = io.StringIO()
    print_report(Console(file=stream, width=160), report)
    return stream.getvalue()


_RENDERERS: dict[Format, Callable[[ParityReport], str]] = {
    "text": to_text, "markdown": to_markdown, "html": to_html, "junit": to_junit, "json": to_json,
}  # fmt: skip
