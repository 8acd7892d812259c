"""Results as tables for a terminal."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

from scconv_deploy.report.records import Check

if TYPE_CHECKING:  # torch is loaded by whoever made the result, not by printing it
    from scconv_deploy.doctor import Diagnosis
    from scconv_deploy.inspection import ModelInspection, OnnxInspection
    from scconv_deploy.pipeline import DeployResult, ExportResult
    from scconv_deploy.report.records import ParityReport
    from scconv_deploy.trt_plugins.build import BuildResult
    from scconv_deploy.trt_plugins.check import PluginReport

_STYLES = {
    "passed": "green", "failed": "bold red", "not run": "yellow",
    "ok": "green", "missing": "yellow", "warning": "bold yellow",
}  # fmt: skip


def print_export(console: Console, result: ExportResult) -> None:
    """What was exported, where it is, and what was left alone."""
    _print_left_alone(console, [pair for s in result.stages if s.name == "recognize" for pair in s.skipped])
    what = f"{len(result.sites)} SRUs as nodes" if result.sites else "no SRU recognised, exported as it is"
    _line(console, f"{result.path}: {what}")
    _line(console, f"sha256 {result.sha256}")


def print_deploy(console: Console, result: DeployResult) -> None:
    """The report, and where the bundle is."""
    print_report(console, result.report)
    _line(console, f"bundle   {result.folder}")
    _line(console, f"artifact {result.artifact}")
    _line(console, f"digest   {result.digest}")


def print_report(console: Console, report: ParityReport) -> None:
    """The chain, the SRUs and the outputs; the verdict last, with its reasons."""
    _print_left_alone(console, [(r.path, r.reason) for r in report.left_alone])
    chain = _table("Chain", "link", "", "why")
    for link in report.links:
        for index, check in enumerate(link.checks or (Check(link.name, link.status, link.reason),)):
            chain.add_row(Text("" if index else link.name), _status(check.status), Text(check.reason))
    console.print(chain)
    if report.srus:
        srus = _table("SRUs, fed the same input", "site", "variant", "gates", "open", "flips", "unexplained", "static")
        for sru in report.srus:
            count = sru.teacher_forced
            srus.add_row(
                Text(sru.site),
                Text(sru.variant.split(" ")[0]),
                f"{count.gates:,}" if count else "-",
                f"{sru.open_share:.0%}",
                str(count.flips) if count else "-",
                str(count.unexplained) if count else "-",
                _status(sru.static.status),
            )
        console.print(srus)
    outputs = _table(
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
    _line(console, f"samples  {'; '.join(report.samples)}")
    console.print(Text("parity   ") + _status(report.verdict))
    for failure in report.failures:
        _line(console, f"  {failure}")
    for caveat in report.caveats:
        _line(console, f"  not inspected: {caveat}")


def print_onnx(console: Console, result: OnnxInspection) -> None:
    """An ONNX file."""
    opsets = ", ".join(f"{domain} {number}" for domain, number in result.opsets.items())
    _line(console, f"{result.path}: {result.file_bytes / 1e6:.1f} MB, IR {result.ir_version}, opset {opsets}")
    _line(console, f"parameters {result.parameters:,}")
    for what, tensors in (("input", result.inputs), ("output", result.outputs)):
        for tensor in tensors:
            _line(console, f"{what:<10} {tensor.name}: {tensor.dtype}[{', '.join(map(str, tensor.shape))}]")
    for name, nodes in result.functions.items():
        _line(console, f"function   {name}: {nodes} nodes")
    if result.sites:
        sites = _table("SRUs", "site", "variant")
        for site, variant in result.sites.items():
            sites.add_row(Text(site), Text(variant))
        console.print(sites)
    operators = _table("Operators", "operator", "nodes")
    for operator, count in result.operators.items():
        operators.add_row(Text(operator), str(count))
    console.print(operators)
    for note in result.notes:
        _line(console, f"note: {note}")


def print_model(console: Console, result: ModelInspection) -> None:
    """A PyTorch model."""
    _line(console, f"{result.model}: {result.parameters:,} parameters, {result.multiply_adds:,} multiply-adds a sample")
    _line(console, f"inputs   {', '.join(result.inputs)}")
    _line(console, f"watched  {'; '.join(result.samples)}")
    if result.srus:
        srus = _table("SRUs", "site", "variant", "C", "open", "never open", "always open", "training")
        for sru in result.srus:
            srus.add_row(
                Text(sru.site),
                Text(sru.variant),
                str(sru.channels),
                f"{sru.open_share:.0%}",
                str(sru.never_open),
                str(sru.always_open),
                Text(sru.training),
            )
        console.print(srus)
    else:
        _line(console, "no SRU was recognised")
    _print_left_alone(console, result.left_alone.items())


def print_diagnosis(console: Console, result: Diagnosis) -> None:
    """What the doctor found; what is missing comes with the command that brings it."""
    table = _table("This machine", "", "", "found")
    for finding in result.findings:
        table.add_row(Text(finding.name), _status(finding.status), Text(finding.found))
    console.print(table)
    for finding in result.findings:
        if finding.status != "ok":
            purpose = f" (for {finding.needed_for})" if finding.needed_for else ""
            _line(console, f"{finding.name}{purpose}: {finding.remedy}")


def print_build(console: Console, result: BuildResult) -> None:
    """What was built, for what, and where it is."""
    what = f"TensorRT {result.tensorrt} headers" if result.tensorrt else "kernels only"
    how = "from the cache" if result.cached else f"{result.seconds:g} s"
    _line(console, f"{result.path}: sm_{', sm_'.join(result.architectures)}, CUDA {result.cuda}, {what}, {how}")
    if result.register is not None:
        _line(console, f"{result.register}: registers it where a host only dlopens")
    _line(console, f"sha256 {result.sha256}")


def print_plugin(console: Console, result: PluginReport) -> None:
    """What a built plugin is."""
    table = _table(str(result.path), "", "", "found")
    for row in result.rows:
        table.add_row(Text(row.name), _status(row.verdict), Text(row.found))
    console.print(table)


def _print_left_alone(console: Console, pairs: Iterable[tuple[str, str]]) -> None:
    for path, reason in pairs:
        _line(console, f"left alone: {path}: {reason}")


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def _status(status: str) -> Text:
    return Text(status, style=_STYLES[status])


def _line(console: Console, text: str) -> None:
    """Plain text: no markup, no highlighting, no wrapping, so that paths can be copied."""
    console.print(Text(text), soft_wrap=True)
