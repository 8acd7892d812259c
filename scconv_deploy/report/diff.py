"""What changed between two reports."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from scconv_deploy.report.engines import engine_facts
from scconv_deploy.report.records import ParityReport, SRUParity

_OUTPUT_NUMBERS = ("replay_error", "noise_floor", "replay_ratio")
_RUN_FACTS = ("command", "seed")  # of how it was run, and not of what was found: said last


@dataclass(frozen=True)
class Change:
    """One thing that is not the same; "" where a side has no such thing."""

    what: str
    before: str
    after: str


@dataclass(frozen=True)
class ReportDiff:
    """The changes from one report to another, verdict first; its truth value says whether there is any."""

    changes: tuple[Change, ...]

    def __bool__(self) -> bool:
        return bool(self.changes)

    def as_json(self) -> dict[str, Any]:
        return {"changes": [asdict(change) for change in self.changes]}


def diff_reports(before: ParityReport, after: ParityReport) -> ReportDiff:
    """Compare verdict, links, gates, outputs, limits, versions and files; seconds are not compared."""
    one, other = dict(_facts(before)), dict(_facts(after))
    names = [*one, *(name for name in other if name not in one)]
    found = [Change(name, one.get(name, ""), other.get(name, "")) for name in names if one.get(name) != other.get(name)]
    return ReportDiff(tuple(found))


def _facts(report: ParityReport) -> Iterator[tuple[str, str]]:
    """What is compared, as words, in the order in which changes are said."""
    yield "verdict", report.verdict
    for link in report.links:
        yield f"link {link.name}", link.status
        for index, check in enumerate(link.checks):
            same = sum(c.name == check.name for c in link.checks[:index])
            yield f"link {link.name}: {check.name}{f' ({same + 1})' if same else ''}", check.status
    for sru in report.srus:
        yield from _sru_facts(sru)
    for output in report.outputs:
        for name in _OUTPUT_NUMBERS:
            yield f"output {output.name}: {name}", f"{getattr(output, name):.3g}"
        for name, value in asdict(output.end_to_end).items():
            if isinstance(value, float):
                yield f"output {output.name}: end to end {name}", f"{value:.3g}"
    for engine in report.engines:
        facts = engine_facts(engine)
        yield from ((f"{engine.backend}: {name}", facts[name]) for name in facts if name != "engine latency")
    if report.accuracy is not None:
        yield "accuracy: difference", f"{report.accuracy.difference:+.4f}"
    if report.first_departure:
        yield "first departure", report.first_departure
    for name, tolerance in report.tolerances.items():
        yield f"tolerance {name}", f"{report.overrides.get(name, tolerance.value):g}"
    for refusal in report.left_alone:
        yield f"left alone {refusal.path}", refusal.reason
    yield "samples", "; ".join(report.samples)
    yield "model", report.model
    yield "artifact sha256", report.artifact_sha256
    yield from sorted(report.provenance.items(), key=lambda item: (item[0] in _RUN_FACTS, item[0]))


def _sru_facts(sru: SRUParity) -> Iterator[tuple[str, str]]:
    yield f"SRU {sru.site}: variant", sru.variant
    yield f"SRU {sru.site}: static", sru.static.status
    yield f"SRU {sru.site}: open", f"{sru.open_share:.1%}"
    for name, count in (("same input", sru.teacher_forced), ("free-running", sru.free_running)):
        if count is not None:
            yield f"SRU {sru.site}: flips, {name}", f"{count.flips} ({count.unexplained} unexplained)"
