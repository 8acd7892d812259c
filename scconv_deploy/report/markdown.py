"""Markdown report for a pull request: verdict, reason and chain, with the rest folded."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from scconv_deploy.records.parity import Check, OtherGateParity, ParityReport
from scconv_deploy.report.engine_facts import engine_facts, plan_facts
from scconv_deploy.report.escaping import code, markdown


def to_markdown(report: ParityReport) -> str:
    """Render a report in GitHub's and GitLab's Markdown dialect, with details folded."""
    lines = [f"### Parity {report.verdict}: {code(report.model)}", ""]
    if len(report.failures) > 1:
        lines += [f"{len(report.failures)} checks failed:", ""]
        lines += [*(f"- {markdown(failure)}" for failure in report.failures), ""]
    else:
        lines += [markdown(report.headline), ""]
    if report.first_departure:
        lines += [f"Departs first: {markdown(report.first_departure)}", ""]
    lines += [f"- not inspected: {markdown(caveat)}" for caveat in report.caveats] + [""] * bool(report.caveats)
    lines += _table(("link", "", "why"), [
        (code(link.name), _status(link.status), "<br>".join(map(_check, link.checks)) or markdown(link.reason))
        for link in report.links
    ])  # fmt: skip
    lines += _accuracy(report)
    lines += _changed_limits(report)
    if report.srus:
        lines += _folded(f"{len(report.srus)} SRUs, fed the same input", _srus(report))
    if report.other_gates:
        lines += _folded(f"{len(report.other_gates)} gates of no known SRU", _other_gates(report))
    if report.outputs:
        lines += _folded("Outputs", _outputs(report))
    for engine in report.engines:
        measured = [(markdown(name), markdown(value)) for name, value in engine_facts(engine).items()]
        measured += [(markdown(name), code(value)) for name, value in engine.provenance.items()]
        lines += _folded(f"Engine: {markdown(engine.artifact)}", _table(("what", "value"), measured))
    if report.plans:
        plans = [(markdown(name), markdown(value)) for name, value in plan_facts(report).items()]
        lines += _folded("Compiled plans", _table(("plan", "memory traffic"), plans))
    if report.left_alone:
        rows = [(code(refusal.path), markdown(refusal.reason)) for refusal in report.left_alone]
        lines += _folded("Modules left alone", _table(("module", "why"), rows))
    facts = {"artifact": report.artifact, "sha256": report.artifact_sha256, **report.provenance}
    rows = [(markdown(name), code(value)) for name, value in facts.items()]
    rows.append(("samples", "<br>".join(markdown(sample) for sample in report.samples)))
    lines += _folded("Provenance", _table(("what", "value"), rows))
    return "\n".join(lines).rstrip() + "\n"


def _srus(report: ParityReport) -> list[str]:
    rows = []
    for sru in report.srus:
        forced, free = sru.teacher_forced, sru.free_running
        rows.append((
            code(sru.site),
            code(sru.variant_label),
            f"{forced.gates:,}" if forced else "",
            f"{sru.open_share:.0%}",
            str(forced.flips) if forced else "",
            str(forced.unexplained) if forced else "",
            f"{free.flips} ({free.unexplained} unexplained)" if free else "",
            _status(sru.static.status) + ("" if sru.static.status == "passed" else f": {markdown(sru.static.reason)}"),
        ))  # fmt: skip
    return _table(("site", "variant", "gates", "open", "flips", "unexplained", "running free", "static"), rows)


def _other_gates(report: ParityReport) -> list[str]:
    rows = [(code(gate.site), markdown(gate.node or gate.reason), *_counts(gate)) for gate in report.other_gates]
    return _table(("gate", "decided by", "gates", "changed", "unexplained", "running free", "operands"), rows)


def _counts(gate: OtherGateParity) -> tuple[str, ...]:
    if gate.reason:
        return ("",) * 5
    apart = "" if gate.operand_ratio is None else f"{gate.operand_ratio:.1f}x"
    return (f"{gate.gates:,}", f"{gate.flips:,}", f"{gate.unexplained:,}", f"{gate.free:,}", apart)


def _outputs(report: ParityReport) -> list[str]:
    rows = []
    for output in report.outputs:
        metrics = output.end_to_end
        rows.append((
            code(output.name),
            f"{output.replay_error:.1e}",
            f"{output.noise_floor:.1e}" + ("" if output.floor_measured else " (assumed)"),
            f"{output.replay_ratio:.1f}x",
            f"{metrics.relative_l2:.1e}",
            f"{metrics.max_abs:.1e}",
            "" if metrics.top1_agreement is None else f"{metrics.top1_agreement:.1%}",
        ))  # fmt: skip
    return _table(
        ("output", "replay error", "noise floor", "ratio", "end to end rel. L2", "max abs", "top-1 agrees"), rows
    )


def _accuracy(report: ParityReport) -> list[str]:
    if (found := report.accuracy) is None:
        return []
    name = "Accuracy" if found.metric == "top-1" else found.metric
    note = f"; {found.note}" if found.note else ""
    return [
        f"{name} on {found.samples:,} samples: reference {found.reference:.2%}, artifact {found.artifact:.2%}, "
        f"difference {100 * found.difference:+.2f} points ({found.confidence:.0%} interval {100 * found.low:+.2f} to "
        f"{100 * found.high:+.2f}){note}", "",
    ]  # fmt: skip


def _changed_limits(report: ParityReport) -> list[str]:
    lines = []
    for name, value in report.overrides.items():
        usual = f", usually {report.tolerances[name].value:g}" if name in report.tolerances else ""
        lines.append(f"- tolerance changed: {code(name)} {value:g}{usual}")
    return [*lines, ""] if lines else []


def _check(check: Check) -> str:
    """Line of a check: its status unless it passed, its name, its reason."""
    status = "" if check.status == "passed" else f"**{check.status}** "
    return f"{status}{markdown(check.name)}: {markdown(check.reason)}"


def _status(status: str) -> str:
    return status if status == "passed" else f"**{status}**"


def _folded(summary: str, lines: Iterable[str]) -> list[str]:
    return ["<details>", f"<summary>{summary}</summary>", "", *lines, "</details>", ""]


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    body = [f"| {' | '.join(row)} |" for row in rows]
    return [f"| {' | '.join(header)} |", f"|{'---|' * len(header)}", *body, ""]
