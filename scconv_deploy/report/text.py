"""Results as tables for a terminal."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

from scconv_deploy.report.engines import engine_facts
from scconv_deploy.report.records import Check, StageRecord, weights_lines

if TYPE_CHECKING:  # torch is loaded by whoever made the result, not by printing it
    from scconv_deploy.benchmarking import BenchResult
    from scconv_deploy.bundle.finish import FinishResult
    from scconv_deploy.converting import ConvertResult
    from scconv_deploy.doctor import Diagnosis
    from scconv_deploy.exporters.engine import EngineManifest
    from scconv_deploy.exporters.engine_build import BuildResult
    from scconv_deploy.exporting import ExportResult
    from scconv_deploy.inspection import EngineInspection, ModelInspection, OnnxInspection
    from scconv_deploy.pipeline import DeployResult
    from scconv_deploy.report.diff import ReportDiff
    from scconv_deploy.report.records import ParityReport
    from scconv_deploy.report.rejudge import Judgement
    from scconv_deploy.rewriting import RewriteResult
    from scconv_deploy.trt_plugins.build import BuildResult as PluginBuild
    from scconv_deploy.trt_plugins.check import PluginReport
    from scconv_deploy.verification.guard import GuardReport
    from scconv_deploy.zoo.catalogue import Listing

_STYLES = {
    "passed": "green", "failed": "bold red", "not run": "yellow",
    "ok": "green", "missing": "yellow", "warning": "bold yellow",
}  # fmt: skip


def print_export(console: Console, result: ExportResult) -> None:
    """What was exported, where it is, and what was left alone."""
    _print_embedding(console, result.stages)
    _print_left_alone(console, [pair for s in result.stages if s.name == "recognize" for pair in s.skipped])
    what = f"{len(result.sites)} SRUs as nodes" if result.sites else "no SRU recognised, exported as it is"
    _line(console, f"{result.path}: {what}")
    _line(console, f"sha256 {result.sha256}")
    _print_weights(console, weights_lines(result.stages))


def print_rewrite(console: Console, result: RewriteResult) -> None:
    """What was fused and what was not, how both files' gates compare, and the verdict against a reference."""
    _print_left_alone(console, [(miss.node, f"{miss.rule}: {miss.reason}") for miss in result.near_misses])
    if result.guard is not None:
        _print_guard(console, result.guard)
    if result.parity is not None:
        print_report(console, result.parity)
        if result.markdown:
            _line(console, f"\n{result.markdown}\n")
    outcomes = {
        "rewritten": f"{len(result.sites)} SRUs as nodes",
        "partial": f"partial: {len(result.sites)} SRUs as nodes, {len(result.near_misses)} left alone",
        "unchanged": "nothing to do, copied byte for byte",
    }
    _line(console, f"{result.path}: {outcomes[result.outcome]}")
    for path in result.adapted:
        _line(console, f"adapted  {path}")
    _line(console, f"sha256   {result.sha256}")


def _print_guard(console: Console, guard: GuardReport) -> None:
    if guard.gates:
        gates = _table(
            "Gates that differ from PyTorch's formula, fed the same input",
            "site", "gates", "file", "largest margin / s", "rewritten", "unexplained",
        )  # fmt: skip
        for gate in guard.gates:
            gates.add_row(
                Text(gate.site),
                f"{gate.file.gates:,}",
                f"{gate.file.flips:,}",
                f"{gate.file.largest_margin:.1e}",
                str(gate.rewritten.flips),
                str(gate.rewritten.unexplained),
            )
        console.print(gates)
    for name, elements, changed in guard.thresholds:
        _line(console, f"threshold {name}: {changed:,} of {elements:,} differ from the file's")
    for name, forced, free in guard.outputs:
        _line(console, f"output   {name}: {forced:.1e} relative L2 with the file's gates, {free:.1e} without")
    for site, reason in guard.unread:
        _line(console, f"not compared: {site}: {reason}")
    if guard.not_run:
        _line(console, f"not compared with the original: {guard.not_run}")
    if guard.sentence:
        _line(console, guard.sentence)


def print_deploy(console: Console, result: DeployResult) -> None:
    """The report, and where the bundle is."""
    print_report(console, result.report)
    _print_weights(console, weights_lines(result.report.stages))
    _line(console, f"bundle   {result.folder}")
    _line(console, f"artifact {result.artifact}")
    _line(console, f"digest   {result.digest}")
    for engine in result.engines:
        _line(console, f"engine   {engine.summary}")
    for entry in result.unfinished:
        _line(console, f"left     {entry}")
    for note in result.notes:
        _line(console, f"note     {note}")


def print_finish(console: Console, result: FinishResult) -> None:
    """What a device added, as ``finish.pyz`` says it."""
    _line(console, "\n".join(result.lines))


def print_build(console: Console, result: BuildResult) -> None:
    """An engine: what it is, what became of its SRUs, and what the library warned of."""
    manifest = result.engine.manifest
    _print_engine(console, manifest)
    for note in result.notes:
        _line(console, f"note     {note}")
    how = "from the cache" if result.from_cache else "built"
    _line(console, f"{result.engine.path}: {how} in {result.seconds:.2f} s")
    _line(console, f"sha256   {manifest.sha256}")


def _print_engine(console: Console, manifest: EngineManifest) -> None:
    _line(console, manifest.summary)
    for tensor in (*manifest.inputs, *manifest.outputs):
        _line(console, f"tensor   {tensor.name}: {tensor.dtype}[{', '.join(map(str, tensor.shape))}]")
    for profile in manifest.profiles:
        shapes = ("x".join(map(str, shape)) for shape in (profile.minimum, profile.optimum, profile.maximum))
        _line(console, f"profile  {profile.input}: {' to '.join(dict.fromkeys(shapes))}")
    _line(console, f"flags    {', '.join(manifest.flags) or 'none'}; {len(manifest.layers)} layers before fusion")
    settings = ", ".join(f"{name} {_setting(value)}" for name, value in manifest.settings.items())
    _line(console, f"settings {settings or 'none'}")
    reasons: dict[tuple[str, str], list[str]] = {}
    for sru in manifest.srus:
        reasons.setdefault((sru.form, sru.reason if sru.form == "expanded" else ""), []).append(sru.site)
    for (form, reason), sites in reasons.items():
        _line(console, f"{form:<8} {', '.join(sites)}{f': {reason}' if reason else ''}")
    for warning in manifest.warnings:
        _line(console, f"warning  {warning}")


def _setting(value: object) -> str:
    return (", ".join(map(str, value)) or "none") if isinstance(value, (list, tuple)) else str(value)


def print_engine(console: Console, result: EngineInspection) -> None:
    """An engine's manifest, and its own layers where it could be opened."""
    _print_engine(console, result.engine.manifest)
    _line(console, f"built by {result.engine.manifest.command}")
    _line(console, f"onnx     sha256 {result.engine.manifest.onnx_sha256}")
    if result.unopened:
        _line(console, f"its own layers are not shown: {result.unopened}")
    for layer in result.layers:
        _line(console, layer)


def print_bench(console: Console, result: BenchResult) -> None:
    """Times of one run, in milliseconds, and what else is known of each subject."""
    table = _table(
        f"{result.rounds} rounds, taking turns, batch {result.batch}",
        "what", "p50", "p90", "p99", "items/s", "device p50", "memory", "load",
    )  # fmt: skip
    for row in result.rows:
        device = "-" if row.device_p50_ms is None else f"{row.device_p50_ms:.3f} ms"
        memory = "-" if row.memory_bytes is None else f"{row.memory_bytes / 1e6:.0f} MB {row.memory_of}"
        times = (f"{value:.3f} ms" for value in (row.p50_ms, row.p90_ms, row.p99_ms))
        table.add_row(Text(row.name), *times, f"{row.items_per_s:,.1f}", device, memory, f"{row.load_s:.2f} s")
    console.print(table)
    _line(console, "; ".join(f"{name} {value}" for name, value in result.environment.items()))


def print_report(console: Console, report: ParityReport) -> None:
    """The chain, the SRUs and the outputs; the verdict last, with its reasons. A failure is said first as well."""
    if not report:
        _line(console, f"parity   {report.verdict}: {report.headline}")
    _print_embedding(console, report.stages)
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
                Text(sru.variant_label),
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
    _print_findings(console, report)
    _line(console, f"samples  {'; '.join(report.samples)}")
    console.print(Text("parity   ") + _status(report.verdict))
    for failure in report.failures:
        _line(console, f"  {failure}")
    for caveat in report.caveats:
        _line(console, f"  not inspected: {caveat}")


def _print_findings(console: Console, report: ParityReport) -> None:
    """What only some reports have."""
    free = [(sru.site, sru.free_running) for sru in report.srus if sru.free_running]
    if free:
        flips, gates, bad = (sum(getattr(c, n) for _, c in free) for n in ("flips", "gates", "unexplained"))
        _line(console, f"running free, gates changed: {flips:,} of {gates:,} ({bad:,} unexplained)")
    for gate in report.other_gates:
        _line(console, f"gate     {gate.sentence}")
    for fact in (fact for engine in report.engines for fact in engine_facts(engine).items()):
        _line(console, ": ".join(fact))
    if report.first_departure:
        _line(console, f"departs first: {report.first_departure}")
    for worst in report.worst_inputs[:3]:
        _line(console, f"worst input: {worst.sample} [{worst.index}], relative L2 {worst.relative_l2:.1e}")
    if found := report.accuracy:
        interval = f"{found.confidence:.0%} interval {found.low:+.2%} to {found.high:+.2%}"
        shares = f"reference {found.reference:.2%}, artifact {found.artifact:.2%}, difference {found.difference:+.2%}"
        _line(console, f"accuracy on {found.samples:,} samples: {shares} ({interval})")
    for name, value in report.overrides.items():
        usual = f", usually {report.tolerances[name].value:g}" if name in report.tolerances else ""
        _line(console, f"tolerance changed: {name} {value:g}{usual}")


def print_judgement(console: Console, result: Judgement) -> None:
    """A stored report judged again: the links, then whether it may be signed, with every reason."""
    links = _table("Chain", "link", "", "why")
    for link in result.report.links:
        links.add_row(Text(link.name), _status(link.status), Text(link.reason))
    console.print(links)
    _print_findings(console, replace(result.report, worst_inputs=()))
    if result.stored_verdict != result.report.verdict:
        _line(console, f"the stored verdict was {result.stored_verdict}")
    console.print(Text("check    ") + _status("passed" if result else "failed"))
    for failure in result.failures:
        _line(console, f"  {failure}")
    for caveat in result.report.caveats:
        _line(console, f"  not inspected: {caveat}")


def print_diff(console: Console, result: ReportDiff) -> None:
    """What changed between two reports."""
    if len(set(result.verdicts)) == 1:
        _line(console, f"verdict  {result.verdicts[0]}, before and after{'' if result else '; no difference'}")
    table = _table("Changed", "what", "before", "after")
    for change in result.changes:
        table.add_row(Text(change.what), Text(change.before or "-"), Text(change.after or "-"))
    if result:
        console.print(table)


def print_onnx(console: Console, result: OnnxInspection) -> None:
    """An ONNX file."""
    opsets = ", ".join(f"{domain} {number}" for domain, number in result.opsets.items())
    _line(console, f"{result.path}: {result.file_bytes / 1e6:.1f} MB, IR {result.ir_version}, opset {opsets}")
    _line(console, f"parameters {result.parameters:,}")
    _line(console, f"precision  {result.precision}")
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
    _print_embedding(console, result.stages)
    _line(console, f"{result.model}: {result.parameters:,} parameters, {result.multiply_adds:,} multiply-adds a sample")
    _line(console, f"inputs   {', '.join(result.inputs)}")
    _line(console, f"watched  {'; '.join(result.samples)}")
    _print_weights(console, result.weights)
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


def print_conversion(console: Console, result: ConvertResult) -> None:
    """What stays in float32 and why, and how far the result is from the original."""
    for node, reason in result.kept:
        _line(console, f"float32  {node}: {reason}")
    before, after = result.bytes_before / 1e6, result.bytes_after / 1e6
    _line(console, f"{result.path}: {result.precision}, {result.half} nodes in half, {result.casts} casts")
    _line(console, f"size     {before:.1f} -> {after:.1f} MB")
    print_report(console, result.report)
    _line(console, f"sha256 {result.sha256}")


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


def print_models(console: Console, listing: Listing) -> None:
    """The zoo."""
    table = _table("", "name", "input", "ScConvs", "parameters", "multiply-adds", "source")
    for entry in listing.entries:
        counts = entry.counts
        shape = "x".join(map(str, entry.input_shape))
        amounts = f"{counts.parameters:,}", f"{counts.multiply_adds:,}"
        table.add_row(Text(entry.name), shape, str(counts.scconvs), *amounts, Text(entry.source))
    console.print(table)


def _print_embedding(console: Console, stages: Iterable[StageRecord]) -> None:
    """What ``--embed`` did; the convolutions that it left, by reason."""
    for stage in stages:
        if stage.name != "embed":
            continue
        for line in stage.applied:
            _line(console, f"embed    {line}")
        reasons: dict[str, list[str]] = {}
        for path, reason in stage.skipped:
            reasons.setdefault(reason, []).append(path)
        for reason, paths in reasons.items():
            _line(console, f"left     {', '.join(paths)}: {reason}")


def print_plugin_build(console: Console, result: PluginBuild) -> None:
    """What was built, for what, and where it is."""
    what = f"TensorRT {result.tensorrt} headers" if result.tensorrt else "kernels only"
    how = "from the cache" if result.cached else f"{result.seconds:g} s"
    _line(console, f"{result.path}: sm_{', sm_'.join(result.architectures)}, CUDA {result.cuda}, {what}, {how}")
    if result.register is not None:
        _line(console, f"{result.register}: registers it where a host only dlopens")
    for note in result.notes:
        _line(console, f"note   {note}")
    _line(console, f"sha256 {result.sha256}")


def print_plugin(console: Console, result: PluginReport) -> None:
    """What a built plugin is."""
    table = _table(str(result.path), "", "", "found")
    for row in result.rows:
        table.add_row(Text(row.name), _status(row.verdict), Text(row.found))
    console.print(table)


def _print_weights(console: Console, lines: Iterable[str]) -> None:
    """``weights: random ...`` and ``weights FILE: ...`` below each other, as the other facts are."""
    for line in lines:
        _line(console, f"weights  {line.removeprefix('weights').removeprefix(':').strip()}")


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
