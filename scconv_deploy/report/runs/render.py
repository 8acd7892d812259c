"""Overview of a run in every format: JSON, one HTML page, JUnit, Markdown."""

from __future__ import annotations

import json
from xml.etree import ElementTree

from scconv_deploy.records.codec import encode
from scconv_deploy.records.run import RunRecord
from scconv_deploy.report.escaping import code, markdown, visible
from scconv_deploy.report.runs.facts import COLUMNS, facts_of, headline
from scconv_deploy.report.runs.load import RUN

OVERVIEW = "index.html"
JUNIT = "junit.xml"
SUMMARY = "summary.md"


def overview_files(record: RunRecord) -> dict[str, bytes]:
    """Content of the files beside the bundles, by name; the page is left out where jinja2 is missing."""
    files = {RUN: to_json(record), JUNIT: to_junit(record), SUMMARY: to_markdown(record)}
    try:
        from scconv_deploy.report.runs.html import overview_page
    except ImportError:  # jinja2: a verdict must not depend on a page
        pass
    else:
        files[OVERVIEW] = overview_page(record)
    return {name: text.encode() for name, text in files.items()}


def to_json(record: RunRecord) -> str:
    """Render ``run.json``."""
    return json.dumps({"exit_code": record.exit_code, **encode(record)}, indent=2) + "\n"


def to_junit(record: RunRecord) -> str:
    """Render JUnit XML: a suite for each model, a test case for each variant.

    A cell without a bundle is an error, a cell that was not done is skipped.
    """
    root = ElementTree.Element("testsuites", name="scconv-deploy run")
    for model in dict.fromkeys(cell.model for cell in record.cells):
        cells = [cell for cell in record.cells if cell.model == model]
        statuses = [cell.status for cell in cells]
        suite = ElementTree.SubElement(
            root, "testsuite", name=visible(model), tests=str(len(cells)),
            failures=str(statuses.count("failed") + statuses.count("not judged")),
            errors=str(statuses.count("error")), skipped=str(statuses.count("not done")),
        )  # fmt: skip
        for cell in cells:
            case = ElementTree.SubElement(
                suite, "testcase", classname=visible(model), name=visible(cell.variant), time=f"{cell.seconds:.3f}"
            )
            kind = {"passed": "system-out", "error": "error", "not done": "skipped"}.get(cell.status, "failure")
            message = visible(f"{cell.message} {cell.remedy}".strip())
            if kind == "system-out":
                ElementTree.SubElement(case, kind).text = message
            else:
                ElementTree.SubElement(case, kind, message=message, type=cell.status).text = visible(cell.command)
    for key in ("tests", "failures", "errors", "skipped"):
        root.set(key, str(sum(int(suite.get(key, 0)) for suite in root)))
    ElementTree.indent(root)
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + ElementTree.tostring(root, encoding="unicode") + "\n"


def to_markdown(record: RunRecord) -> str:
    """Render a table for a pull request: a row for each cell, statuses but passed in bold."""
    lines = [f"### {headline(record)}", "", f"| {' | '.join(COLUMNS)} |", f"|{'---|' * len(COLUMNS)}"]
    for cell in record.cells:
        status = cell.status if cell.status == "passed" else f"**{cell.status}**"
        cells = [code(cell.name), status, *(markdown(text) for text in facts_of(cell).values()), markdown(cell.message)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"
