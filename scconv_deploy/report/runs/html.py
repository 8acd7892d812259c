"""Overview of a run as one HTML page, without network access or scripts."""

from __future__ import annotations

from urllib.parse import quote

from scconv_deploy.bundle.contents import REPORT_PAGE
from scconv_deploy.records.run import RunRecord
from scconv_deploy.report.html import environment
from scconv_deploy.report.runs.facts import FACTS, facts_of, headline


def overview_page(record: RunRecord) -> str:
    """Render ``index.html``: models by variants first, then a row for each cell with its facts."""
    models = list(dict.fromkeys(cell.model for cell in record.cells))
    variants = list(dict.fromkeys(cell.variant for cell in record.cells))
    cells = {(cell.model, cell.variant): cell for cell in record.cells}
    return environment().get_template("run.html.j2").render(
        record=record, headline=headline(record), models=models, variants=variants, cells=cells, names=FACTS,
        facts_of=facts_of, link=lambda cell: f"{quote(cell.folder)}/{REPORT_PAGE}",
    )  # fmt: skip
