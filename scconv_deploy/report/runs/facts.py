"""Facts of a run's cells as text, for every format."""

from __future__ import annotations

from scconv_deploy.records.run import CellFacts, CellRecord, RunRecord

FACTS = ("accuracy", "artifact", "latency", "bytes moved")
COLUMNS = ("cell", "status", *FACTS, "why")


def headline(record: RunRecord) -> str:
    """Numbers of cells by status, in one line."""
    counts = ", ".join(f"{count} {status}" for status, count in record.counts.items())
    return f"{len(record.cells)} cells: {counts}"


def facts_of(cell: CellRecord) -> dict[str, str]:
    """Facts of a cell as text, by :data:`FACTS`; "" where there is none."""
    found = cell.facts
    return dict.fromkeys(FACTS, "") if found is None else dict(zip(FACTS, _facts(found), strict=True))


def _facts(found: CellFacts) -> tuple[str, ...]:
    accuracy = ""
    if found.accuracy is not None and found.reference_accuracy is not None:
        accuracy = f"{found.accuracy:.2%} (reference {found.reference_accuracy:.2%})"
    return (
        accuracy,
        megabytes(found.artifact_bytes),
        ", ".join(f"{backend} {value:.3f} ms" for backend, value in found.latency_ms.items()),
        ", ".join(f"{plan} {megabytes(value)}" for plan, value in found.moved_bytes.items()),
    )


def megabytes(count: int) -> str:
    """Format bytes, for example ``1.2 MB``."""
    return f"{count / 1e6:.1f} MB" if count >= 1e5 else f"{count / 1e3:.1f} kB"
