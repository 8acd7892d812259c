"""Reports as tables for a terminal."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from rich.console import Console
from rich.text import Text

from scconv_deploy.records.parity import Check
from scconv_deploy.report.engine_facts import engine_facts, plan_facts
from scconv_deploy.report.sensitivity import print_searches
from scconv_deploy.report.tables import print_embedding, print_left_alone, print_line, styled_status, table_of

if TYPE_CHECKING:  # not at run time: these modules import torch
    from scconv_deploy.records.parity import ParityReport
    from scconv_deploy.report.diff import ReportDiff
    from scconv_deploy.report.rejudge import Judgement


def print_report(console: Console, report: ParityReport) -> None:
    """Print the chain, SRUs and outputs, and the verdict with its reasons last; a failure also first."""
    if not report:
        print_line(console, f"parity   {report.verdict}: {report.headline}")
    print_embedding(console, report.stages)
    print_left_alone(console, [(r.path, r.reason) for r in report.left_alone])
    chain = table_of("Chain", "link", "", "why")
    for link in report.links:
        for index, check in enumerate(link.checks or (Check(link.name, link.status, link.reason),)):
            chain.add_row(Text("" if index else link.name), styled_status(check.status), Text(check.reason))
    console.print(chain)
    if report.srus:
        srus = table_of(
            "SRUs, fed the same input", "site", "variant", "gates", "open", "flips", "unexplained", "static"
        )
        for sru in report.srus:
            count = sru.teacher_forced
            srus.add_row(
                Text(sru.site),
                Text(sru.variant_label),
                f"{count.gates:,}" if count else "-",
                f"{sru.open_share:.0%}",
                str(count.flips) if count else "-",
                str(count.unexplained) if count else "-",
                styled_status(sru.static.status),
            )
        console.print(srus)
    print_searches(console, report.stages)
    outputs = table_of(
        "Outputs", "output", "replay error", "noise floor", "ratio", "end to end rel. L2", "max abs", "top-1 agrees"
    )
    for output in report.outputs:
        top1 = output.end_to_end.top1_agreement
        outputs.add_row(
            Text(output.name),
            f"{output.replay_error:.1e}",
            f"{output.noise_floor:.1e}" + ("" if output.floor_measured else " (assumed)"),
            f"{output.replay_ratio:.1f}x",
            f"{output.end_to_end.relative_l2:.1e}",
            f"{output.end_to_end.max_abs:.1e}",
            "-" if top1 is None else f"{top1:.0%}",
        )
    console.print(outputs)
    _print_findings(console, report)
    print_line(console, f"samples  {'; '.join(report.samples)}")
    console.print(Text("parity   ") + styled_status(report.verdict))
    for failure in report.failures:
        print_line(console, f"  {failure}")
    for caveat in report.caveats:
        print_line(console, f"  not inspected: {caveat}")


def _print_findings(console: Console, report: ParityReport) -> None:
    """Print the findings that only some reports have."""
    free = [(sru.site, sru.free_running) for sru in report.srus if sru.free_running]
    if free:
        flips, gates, bad = (sum(getattr(c, n) for _, c in free) for n in ("flips", "gates", "unexplained"))
        print_line(console, f"running free, gates changed: {flips:,} of {gates:,} ({bad:,} unexplained)")
    for gate in report.other_gates:
        if gate.is_quantizer and not gate.unexplained:
            continue  # there are many, and the check of codes counts them
        print_line(console, f"gate     {gate.sentence}")
    for fact in (fact for engine in report.engines for fact in engine_facts(engine).items()):
        print_line(console, ": ".join(fact))
    for fact in plan_facts(report).items():
        print_line(console, ": ".join(fact))
    if report.first_departure:
        print_line(console, f"departs first: {report.first_departure}")
    for worst in report.worst_inputs[:3]:
        print_line(console, f"worst input: {worst.sample} [{worst.index}], relative L2 {worst.relative_l2:.1e}")
    if found := report.accuracy:
        interval = f"{found.confidence:.0%} interval {found.low:+.2%} to {found.high:+.2%}"
        shares = f"reference {found.reference:.2%}, artifact {found.artifact:.2%}, difference {found.difference:+.2%}"
        note = f"; {found.note}" if found.note else ""
        print_line(console, f"{found.name} on {found.samples:,} samples: {shares} ({interval}){note}")
    for name, value in report.overrides.items():
        usual = f", usually {report.tolerances[name].value:g}" if name in report.tolerances else ""
        print_line(console, f"tolerance changed: {name} {value:g}{usual}")


def print_judgement(console: Console, result: Judgement) -> None:
    """Print the result of ``report check``: the links, the verdict, and every reason."""
    links = table_of("Chain", "link", "", "why")
    for link in result.report.links:
        links.add_row(Text(link.name), styled_status(link.status), Text(link.reason))
    console.print(links)
    _print_findings(console, replace(result.report, worst_inputs=()))
    if result.stored_verdict != result.report.verdict:
        print_line(console, f"the stored verdict was {result.stored_verdict}")
    console.print(Text("check    ") + styled_status("passed" if result else "failed"))
    for failure in result.failures:
        print_line(console, f"  {failure}")
    for caveat in result.report.caveats:
        print_line(console, f"  not inspected: {caveat}")


def print_diff(console: Console, result: ReportDiff) -> None:
    """Print the changes between two reports."""
    if len(set(result.verdicts)) == 1:
        print_line(console, f"verdict  {result.verdicts[0]}, before and after{'' if result else '; no difference'}")
    table = table_of("Changed", "what", "before", "after")
    for change in result.changes:
        table.add_row(Text(change.what), Text(change.before or "-"), Text(change.after or "-"))
    if result:
        console.print(table)
