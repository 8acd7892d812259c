"""Differences between two runs: cells that came and went, and what changed in each bundle's report."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from scconv_deploy.records.run import CellRecord, RunRecord
from scconv_deploy.report.diff import Change, ReportDiff, diff_reports
from scconv_deploy.report.load import load_report
from scconv_deploy.report.runs.load import load_run


def diff_runs(before: Path, after: Path) -> ReportDiff:
    """Compare two runs; each change is named after its cell.

    Args:
        before, after: folders of runs, or the ``run.json`` in them.

    Raises:
        UsageError, IntegrityError, MissingRuntimeError: a record or a report cannot be read.
    """
    first, second = load_run(before), load_run(after)
    places = [path if path.is_dir() else path.parent for path in (before, after)]
    one, other = ({cell.name: cell for cell in run.cells} for run in (first, second))
    changes: list[Change] = []
    for name in [*one, *(name for name in other if name not in one)]:
        a, b = one.get(name), other.get(name)
        if a is None or b is None:
            changes.append(Change(f"cell {name}", a.status if a else "", b.status if b else ""))
            continue
        changes += (Change(f"{name}: {c.what}", c.before, c.after) for c in _of_cell(a, b, places))
    return ReportDiff(tuple(changes), (_verdict(first), _verdict(second)))


def _of_cell(a: CellRecord, b: CellRecord, places: list[Path]) -> Iterator[Change]:
    if a.digest and b.digest:
        if a.digest != b.digest:
            yield from diff_reports(*(load_report(p / c.folder) for p, c in zip(places, (a, b), strict=True))).changes
    elif (a.status, a.message) != (b.status, b.message):
        yield Change("status", _told(a), _told(b))


def _told(cell: CellRecord) -> str:
    return f"error: {cell.message}" if cell.status == "error" else cell.status


def _verdict(record: RunRecord) -> str:
    return "passed" if not record.exit_code else f"failed (exit code {record.exit_code})"
