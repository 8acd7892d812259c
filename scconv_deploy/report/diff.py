"""Differences between two reports."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from scconv_deploy.records.parity import OutputParity, ParityReport, SRUParity
from scconv_deploy.report.engine_facts import engine_facts, plan_facts

_OF_OUTPUTS = {"relative_l2": "relative L2", "max_abs": "max abs", "top1_agreement": "top-1 agrees",
               "top5_agreement": "top-5 agrees"}  # fmt: skip
_RUN_FACTS = ("command", "seed")  # facts about the run, not its results: listed last
Facts = list[tuple[str, str]]


@dataclass(frozen=True)
class Change:
    """Fact with different values in two reports; "" on a side without the fact."""

    what: str
    before: str
    after: str


@dataclass(frozen=True)
class ReportDiff:
    """Changes from one report to another, verdict first; true if there is any.

    Attributes:
        verdicts: verdict before and after.
    """

    changes: tuple[Change, ...]
    verdicts: tuple[str, str]

    def __bool__(self) -> bool:
        return bool(self.changes)

    def as_json(self) -> dict[str, Any]:
        before, after = self.verdicts
        return {
            "verdict": {"before": before, "after": after},
            "changes": [asdict(change) for change in self.changes],
        }


def diff_reports(before: ParityReport, after: ParityReport) -> ReportDiff:
    """Compare verdict, links, gates, outputs, limits, versions and files; seconds are not compared."""
    found: list[Change] = []
    for ones, others in zip(_sections(before), _sections(after), strict=True):
        one, other = dict(ones), dict(others)
        names = [*one, *(name for name in other if name not in one)]
        for name in names:
            if one.get(name) != other.get(name):
                found.append(Change(name, one.get(name, ""), other.get(name, "")))
    return ReportDiff(tuple(found), (before.verdict, after.verdict))


def _sections(report: ParityReport) -> list[Facts]:
    """Facts of a report as text, in the order of the output: results first, then their inputs and settings."""
    return [
        [("verdict", report.verdict)],
        list(_link_facts(report)),
        [("departs first", report.first_departure)] if report.first_departure else [],
        list(_accuracy_facts(report)),
        [("samples", "; ".join(report.samples))],  # other inputs explain other numbers
        [(f"tolerance {name}", f"{report.overrides.get(name, t.value):g}") for name, t in report.tolerances.items()],
        [fact for sru in report.srus for fact in _sru_facts(sru)],
        [(f"gate {gate.site}", gate.sentence) for gate in report.other_gates],
        [fact for output in report.outputs for fact in _output_facts(output)],
        [
            (f"{engine.backend}: {name}", text)
            for engine in report.engines
            for name, text in engine_facts(engine).items()
            if name != "engine latency"
        ],
        list(plan_facts(report).items()),
        [(f"left alone {refusal.path}", refusal.reason) for refusal in report.left_alone],
        [("model", report.model), ("artifact sha256", report.artifact_sha256)],
        sorted(report.provenance.items(), key=lambda item: (item[0] in _RUN_FACTS, item[0])),
    ]


def _link_facts(report: ParityReport) -> Iterator[tuple[str, str]]:
    """Status of each link and check, with the reason if it did not pass."""
    for link in report.links:
        yield f"link {link.name}", link.status if link.checks else _told(link.status, link.reason)
        for index, check in enumerate(link.checks):
            same = sum(c.name == check.name for c in link.checks[:index])
            name = f"link {link.name}: {check.name}{f' ({same + 1})' if same else ''}"
            yield name, _told(check.status, check.reason)


def _told(status: str, reason: str) -> str:
    return status if status == "passed" else f"{status}: {reason}"


def _accuracy_facts(report: ParityReport) -> Iterator[tuple[str, str]]:
    if (found := report.accuracy) is not None:
        yield f"{found.name} of the reference", f"{found.reference:.2%} of {found.samples:,}"
        yield f"{found.name} of the artifact", f"{found.artifact:.2%} of {found.samples:,}"


def _output_facts(output: OutputParity) -> Iterator[tuple[str, str]]:
    yield f"output {output.name}: replay error", f"{output.replay_error:.3g}"
    yield f"output {output.name}: noise floor", f"{output.noise_floor:.3g}"
    yield f"output {output.name}: times the noise floor", f"{output.replay_ratio:.3g}"
    for name, words in _OF_OUTPUTS.items():
        value = getattr(output.end_to_end, name)
        if value is not None:
            yield f"output {output.name}: running free, {words}", f"{value:.3g}"


def _sru_facts(sru: SRUParity) -> Iterator[tuple[str, str]]:
    yield f"SRU {sru.site}: variant", sru.variant
    yield f"SRU {sru.site}: static", sru.static.status
    yield f"SRU {sru.site}: open", f"{sru.open_share:.1%}"
    for name, count in (("same input", sru.teacher_forced), ("running free", sru.free_running)):
        if count is not None:
            yield f"SRU {sru.site}: gates changed, {name}", f"{count.flips:,} ({count.unexplained:,} unexplained)"
