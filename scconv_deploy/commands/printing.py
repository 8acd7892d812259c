"""Printers of results for a terminal: exports, rewrites, builds, inspections. Those of reports are in ``report``."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from rich.console import Console
from rich.text import Text

from scconv_deploy.records.stage import weights_lines
from scconv_deploy.report.sensitivity import print_searches
from scconv_deploy.report.tables import print_embedding, print_left_alone, print_line, styled_status, table_of
from scconv_deploy.report.text import print_report

if TYPE_CHECKING:  # not at run time: these modules import torch
    from scconv_deploy.bundle.device.finish import FinishResult
    from scconv_deploy.exporters.tensorrt.build import BuildResult
    from scconv_deploy.runtimes.tensorrt.engine import EngineManifest
    from scconv_deploy.trt_plugins.build import BuildResult as PluginBuild
    from scconv_deploy.trt_plugins.check import PluginReport
    from scconv_deploy.trt_plugins.cpu.build import CpuBuild
    from scconv_deploy.verification.rewrite_guard import GuardReport
    from scconv_deploy.workflows.bench import BenchResult, BenchRow
    from scconv_deploy.workflows.convert import ConvertResult
    from scconv_deploy.workflows.deploy import DeployResult
    from scconv_deploy.workflows.doctor import Diagnosis
    from scconv_deploy.workflows.export import ExportResult
    from scconv_deploy.workflows.inspect import EngineInspection, ModelInspection, OnnxInspection
    from scconv_deploy.workflows.quantize import QuantizeResult
    from scconv_deploy.workflows.refit import RefitResult
    from scconv_deploy.workflows.rewrite import RewriteResult
    from scconv_deploy.zoo.catalogue import Listing


_LAYERS = 20
"""Layers of a benchmark that are printed."""


def print_export(console: Console, result: ExportResult) -> None:
    """Print an export: the SRUs, the file, and the modules left alone."""
    print_embedding(console, result.stages)
    print_left_alone(console, [pair for s in result.stages if s.name == "recognize" for pair in s.skipped])
    print_searches(console, result.stages)
    what = f"{len(result.sites)} SRUs as nodes" if result.sites else "no SRU recognised, exported as it is"
    print_line(console, f"{result.path}: {what}")
    print_line(console, f"sha256 {result.sha256}")
    _print_weights(console, weights_lines(result.stages))


def print_rewrite(console: Console, result: RewriteResult) -> None:
    """Print a rewrite: fused and refused SRUs, the gates of both files, and the verdict against a reference."""
    print_left_alone(console, [(miss.node, f"{miss.rule}: {miss.reason}") for miss in result.near_misses])
    if result.guard is not None:
        _print_guard(console, result.guard)
    if result.parity is not None:
        print_report(console, result.parity)
        if result.markdown:
            print_line(console, f"\n{result.markdown}\n")
    outcomes = {
        "rewritten": f"{len(result.sites)} SRUs as nodes",
        "partial": f"partial: {len(result.sites)} SRUs as nodes, {len(result.near_misses)} left alone",
        "unchanged": "nothing to do, copied byte for byte",
    }
    print_line(console, f"{result.path}: {outcomes[result.outcome]}")
    for path in result.adapted:
        print_line(console, f"adapted  {path}")
    print_line(console, f"sha256   {result.sha256}")


def _print_guard(console: Console, guard: GuardReport) -> None:
    if guard.gates:
        gates = table_of(
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
        print_line(console, f"threshold {name}: {changed:,} of {elements:,} differ from the file's")
    for name, forced, free in guard.outputs:
        print_line(console, f"output   {name}: {forced:.1e} relative L2 with the file's gates, {free:.1e} without")
    for site, reason in guard.unread:
        print_line(console, f"not compared: {site}: {reason}")
    if guard.not_run:
        print_line(console, f"not compared with the original: {guard.not_run}")
    if guard.sentence:
        print_line(console, guard.sentence)


def print_deploy(console: Console, result: DeployResult) -> None:
    """Print a deployment: the report, and the bundle's path."""
    print_report(console, result.report)
    _print_weights(console, weights_lines(result.report.stages))
    print_line(console, f"bundle   {result.folder}")
    print_line(console, f"artifact {result.artifact}")
    print_line(console, f"digest   {result.digest}")
    for engine in result.engines:
        print_line(console, f"engine   {engine.summary}")
    for entry in result.unfinished:
        print_line(console, f"left     {entry}")
    for note in result.notes:
        print_line(console, f"note     {note}")


def print_finish(console: Console, result: FinishResult) -> None:
    """Print the results of ``finish``, as ``finish.pyz`` does."""
    print_line(console, "\n".join(result.lines))


def print_build(console: Console, result: BuildResult) -> None:
    """Print a built engine: its facts, the outcome of its SRUs, and the library's warnings."""
    manifest = result.engine.manifest
    _print_engine(console, manifest)
    for note in result.notes:
        print_line(console, f"note     {note}")
    how = "from the cache" if result.from_cache else "built"
    print_line(console, f"{result.engine.path}: {how} in {result.seconds:.2f} s")
    print_line(console, f"sha256   {manifest.sha256}")


def print_refit(console: Console, result: RefitResult) -> None:
    """Print a refitted engine."""
    _print_engine(console, result.engine.manifest)
    print_line(console, f"{result.engine.path}: refitted in {result.seconds:.2f} s")
    print_line(console, f"sha256   {result.engine.manifest.sha256}")


def _print_engine(console: Console, manifest: EngineManifest) -> None:
    print_line(console, manifest.summary)
    for tensor in (*manifest.inputs, *manifest.outputs):
        print_line(console, f"tensor   {tensor.name}: {tensor.dtype}[{', '.join(map(str, tensor.shape))}]")
    several = any(profile.index for profile in manifest.profiles)
    for profile in manifest.profiles:
        shapes = ("x".join(map(str, shape)) for shape in (profile.minimum, profile.optimum, profile.maximum))
        number = f"{profile.index}, " if several else ""
        print_line(console, f"profile  {number}{profile.input}: {' to '.join(dict.fromkeys(shapes))}")
    print_line(console, f"flags    {', '.join(manifest.flags) or 'none'}; {len(manifest.layers)} layers before fusion")
    settings = ", ".join(f"{name} {_setting(value)}" for name, value in manifest.settings.items())
    print_line(console, f"settings {settings or 'none'}")
    reasons: dict[tuple[str, str], list[str]] = {}
    for sru in manifest.srus:
        reasons.setdefault((sru.form, sru.reason if sru.form == "expanded" else ""), []).append(sru.site)
    for (form, reason), sites in reasons.items():
        print_line(console, f"{form:<8} {', '.join(sites)}{f': {reason}' if reason else ''}")
    if known := [layer for layer in manifest.quantized if layer.operands]:
        left = [f"{layer.node} ({layer.operands[0]})" for layer in manifest.left_in_float]
        in_float = f"; in float: {', '.join(left)}" if left else ""
        print_line(console, f"int8     {len(known) - len(left)} of {len(known)} layers multiply int8{in_float}")
    if manifest.debug_tensors:
        shown = len({tensor.site for tensor in manifest.debug_tensors})
        print_line(console, f"debug    {len(manifest.debug_tensors)} ends of {shown} SRUs can be read")
    if manifest.plan is not None:
        print_line(console, f"plan     moves {manifest.plan.traffic('', manifest.backend)}, weights not counted")
    if manifest.refitted_from:
        print_line(console, f"refitted from the engine with sha256 {manifest.refitted_from}")
    for warning in manifest.warnings:
        print_line(console, f"warning  {warning}")


def _setting(value: object) -> str:
    return (", ".join(map(str, value)) or "none") if isinstance(value, (list, tuple)) else str(value)


def print_engine(console: Console, result: EngineInspection) -> None:
    """Print an engine's manifest, and its layers if it could be opened."""
    _print_engine(console, result.engine.manifest)
    print_line(console, f"built by {result.engine.manifest.command}")
    print_line(console, f"onnx     sha256 {result.engine.manifest.onnx_sha256}")
    if result.unopened:
        print_line(console, f"its own layers are not shown: {result.unopened}")
    for layer in result.layers:
        print_line(console, layer)


def print_bench(console: Console, result: BenchResult) -> None:
    """Print a benchmark: times of one run in milliseconds, throughput and memory of each subject."""
    table = table_of(
        f"{result.rounds} rounds, taking turns, batch {result.batch}",
        "what", "type", "p50", "p90", "p99", "items/s", "device p50", "memory", "load",
    )  # fmt: skip
    for row in result.rows:
        device = "-" if row.device_p50_ms is None else f"{row.device_p50_ms:.3f} ms"
        memory = "-" if row.memory_bytes is None else f"{row.memory_bytes / 1e6:.0f} MB {row.memory_of}"
        times = (f"{value:.3f} ms" for value in (row.p50_ms, row.p90_ms, row.p99_ms))
        table.add_row(
            Text(row.name),
            row.precision or "-",
            *times,
            f"{row.items_per_s:,.1f}",
            device,
            memory,
            f"{row.load_s:.2f} s",
        )
    console.print(table)
    for row in result.rows:
        if row.layers:
            _print_layers(console, row)
    print_line(console, "; ".join(f"{name} {value}" for name, value in result.environment.items()))


def _print_layers(console: Console, row: BenchRow) -> None:
    """Print the longest layers; the JSON has all."""
    total = sum(layer.p50_ms for layer in row.layers)
    print_line(console, f"Layers of {row.name}, under the profiler: {len(row.layers)}, together {total:.3f} ms")
    table = table_of("", "layer", "type", "p50", "share")
    for layer in row.layers[:_LAYERS]:
        table.add_row(Text(layer.name), Text(layer.kind or "-"), f"{layer.p50_ms:.3f} ms", f"{layer.share:.1%}")
    rest = row.layers[_LAYERS:]
    if rest:
        time, share = sum(layer.p50_ms for layer in rest), sum(layer.share for layer in rest)
        table.add_row(f"{len(rest)} more", "", f"{time:.3f} ms", f"{share:.1%}")
    console.print(table)


def print_onnx(console: Console, result: OnnxInspection) -> None:
    """Print an inspected ONNX file."""
    opsets = ", ".join(f"{domain} {number}" for domain, number in result.opsets.items())
    print_line(console, f"{result.path}: {result.file_bytes / 1e6:.1f} MB, IR {result.ir_version}, opset {opsets}")
    print_line(console, f"parameters {result.parameters:,}")
    print_line(console, f"precision  {result.precision}")
    for what, tensors in (("input", result.inputs), ("output", result.outputs)):
        for tensor in tensors:
            print_line(console, f"{what:<10} {tensor.name}: {tensor.dtype}[{', '.join(map(str, tensor.shape))}]")
    for name, nodes in result.functions.items():
        print_line(console, f"function   {name}: {nodes} nodes")
    if result.sites:
        sites = table_of("SRUs", "site", "variant")
        for site, variant in result.sites.items():
            sites.add_row(Text(site), Text(variant))
        console.print(sites)
    operators = table_of("Operators", "operator", "nodes")
    for operator, count in result.operators.items():
        operators.add_row(Text(operator), str(count))
    console.print(operators)
    for note in result.notes:
        print_line(console, f"note: {note}")


def print_model(console: Console, result: ModelInspection) -> None:
    """Print an inspected PyTorch model."""
    print_embedding(console, result.stages)
    print_line(
        console, f"{result.model}: {result.parameters:,} parameters, {result.multiply_adds:,} multiply-adds a sample"
    )
    print_line(console, f"inputs   {', '.join(result.inputs)}")
    print_line(console, f"watched  {'; '.join(result.samples)}")
    _print_weights(console, result.weights)
    if result.srus:
        srus = table_of("SRUs", "site", "variant", "C", "open", "never open", "always open", "training")
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
        print_line(console, "no SRU was recognised")
    print_left_alone(console, result.left_alone.items())


def print_conversion(console: Console, result: ConvertResult) -> None:
    """Print a conversion: what stays in float32 and why, and the distance from the original."""
    for node, reason in result.kept:
        print_line(console, f"float32  {node}: {reason}")
    before, after = result.bytes_before / 1e6, result.bytes_after / 1e6
    print_line(console, f"{result.path}: {result.precision}, {result.half} nodes in half, {result.casts} casts")
    print_line(console, f"size     {before:.1f} -> {after:.1f} MB")
    print_report(console, result.report)
    print_line(console, f"sha256 {result.sha256}")


def print_quantization(console: Console, result: QuantizeResult) -> None:
    """Print a quantisation: what is int8 and what is not, the scales' origin, and the parity."""
    for node, reason in result.kept:
        print_line(console, f"float    {node}: {reason}")
    for node, reason in result.chosen:
        print_line(console, f"int8     {node}: {reason}")
    before, after, found = result.bytes_before / 1e6, result.bytes_after / 1e6, result.calibration
    share = ""
    if result.multiply_adds is not None:
        share = f", {result.multiply_adds[0] / max(result.multiply_adds[1], 1):.1%} of the multiply-adds"
    print_line(console, f"{result.path}: {result.precision}, {len(result.chosen)} places{share}")
    print_line(console, f"scales   {found.method} of {found.samples} rows of {found.data}")
    print_line(console, f"size     {before:.1f} -> {after:.1f} MB ({after / before:.2f}x)")
    for note in result.notes:
        print_line(console, f"note     {note}")
    print_report(console, result.report)
    print_line(console, f"sha256 {result.sha256}")


def print_diagnosis(console: Console, result: Diagnosis) -> None:
    """Print the findings of ``doctor``, each missing one with the command that installs it."""
    table = table_of("This machine", "", "", "found")
    for finding in result.findings:
        table.add_row(Text(finding.name), styled_status(finding.status), Text(finding.found))
    console.print(table)
    for finding in result.findings:
        if finding.status != "ok":
            purpose = f" (for {finding.needed_for})" if finding.needed_for else ""
            print_line(console, f"{finding.name}{purpose}: {finding.remedy}")


def print_models(console: Console, listing: Listing) -> None:
    """Print the zoo."""
    table = table_of("", "name", "input", "ScConvs", "parameters", "multiply-adds", "source")
    for entry in listing.entries:
        counts = entry.counts
        shape = "x".join(map(str, entry.input_shape))
        amounts = f"{counts.parameters:,}", f"{counts.multiply_adds:,}"
        table.add_row(Text(entry.name), shape, str(counts.scconvs), *amounts, Text(entry.source))
    console.print(table)


def print_plugin_build(console: Console, result: PluginBuild) -> None:
    """Print a built plugin: its path, architectures and versions."""
    what = f"TensorRT {result.tensorrt} headers" if result.tensorrt else "kernels only"
    how = "from the cache" if result.cached else f"{result.seconds:g} s"
    print_line(console, f"{result.path}: sm_{', sm_'.join(result.architectures)}, CUDA {result.cuda}, {what}, {how}")
    if result.register is not None:
        print_line(console, f"{result.register}: registers it where a host only dlopens")
    for note in result.notes:
        print_line(console, f"note   {note}")
    print_line(console, f"sha256 {result.sha256}")


def print_cpu_build(console: Console, result: CpuBuild) -> None:
    """Print a built CPU library: its path and compiler."""
    how = "from the cache" if result.cached else f"{result.seconds:g} s"
    print_line(console, f"{result.path}: for CPUs, {result.compiler}, {how}")
    print_line(console, f"sha256 {result.sha256}")


def print_plugin(console: Console, result: PluginReport) -> None:
    """Print the checks of a built plugin."""
    table = table_of(str(result.path), "", "", "found")
    for row in result.rows:
        table.add_row(Text(row.name), styled_status(row.verdict), Text(row.found))
    console.print(table)


def _print_weights(console: Console, lines: Iterable[str]) -> None:
    """Print the lines on weights, aligned with the other facts."""
    for line in lines:
        print_line(console, f"weights  {line.removeprefix('weights').removeprefix(':').strip()}")
