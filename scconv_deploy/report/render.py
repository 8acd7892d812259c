"""A report in the formats that people and programs read."""

from __future__ import annotations

import importlib
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Literal, get_args

from scconv_deploy.errors import MissingRuntimeError, UsageError
from scconv_deploy.records.parity import ParityReport
from scconv_deploy.report.junit import to_junit
from scconv_deploy.report.markdown import to_markdown

Format = Literal["text", "markdown", "html", "junit", "json"]
FORMATS: tuple[Format, ...] = get_args(Format)
_SUFFIXES: dict[str, Format] = {
    ".json": "json", ".html": "html", ".htm": "html", ".md": "markdown", ".xml": "junit", ".txt": "text",
}  # fmt: skip


def format_of(path: Path) -> Format:
    """The format that a file's suffix names.

    Raises:
        UsageError: it names none.
        MissingRuntimeError: it names HTML, and what draws the pictures is missing; said before any work is done.
    """
    found = _SUFFIXES.get(path.suffix.lower())
    if found is None:
        raise UsageError(f"{path}: {path.suffix or 'no suffix'} is no report format.", f"Use {', '.join(_SUFFIXES)}.")
    if found == "html":
        require_html()
    return found


def require_html() -> None:
    """Refuse if HTML cannot be made (MissingRuntimeError)."""
    for package in ("jinja2", "matplotlib"):
        try:
            importlib.import_module(package)
        except ImportError as error:
            raise MissingRuntimeError(
                f"The HTML report needs {package}, which is not installed.", "pip install jinja2 matplotlib"
            ) from error


def render(report: ParityReport, form: Format) -> str:
    """A report as one document.

    Raises:
        MissingRuntimeError: HTML without jinja2 or matplotlib.
    """
    return _RENDERERS[form](report)


def to_json(report: ParityReport) -> str:
    """``report.json``."""
    return json.dumps(report.as_json(), indent=2) + "\n"


def to_html(report: ParityReport) -> str:
    """``report.html``; see :mod:`scconv_deploy.report.html`."""
    require_html()
    from scconv_deploy.report.html import html_page

    return html_page(report)


def to_text(report: ParityReport) -> str:
    """The tables of the terminal, uncoloured."""
    from rich.console import Console

    from scconv_deploy.report.text import print_report

    stream = io.StringIO()
    print_report(Console(file=stream, width=160), report)
    return stream.getvalue()


_RENDERERS: dict[Format, Callable[[ParityReport], str]] = {
    "text": to_text, "markdown": to_markdown, "html": to_html, "junit": to_junit, "json": to_json,
}  # fmt: skip
