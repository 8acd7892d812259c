"""``scconv-deploy rewrite``: replace SRUs in any ONNX file by SRU nodes, and compare with the original.

read --> prepare --> rules --> forms --> check --> guard (and verify, with a reference) --> write
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, islice
from pathlib import Path
from typing import Any, Literal

import onnx
import onnx_ir as ir

from scconv_deploy.errors import ModelError, ParityError, UsageError
from scconv_deploy.graph import inputs, instrument
from scconv_deploy.graph.contract import CRU_FORM, IR_VERSION, MaskForm
from scconv_deploy.graph.file import check, read_onnx
from scconv_deploy.graph.forms import change_mask_form, inlined, without_functions
from scconv_deploy.graph.hygiene import tidy
from scconv_deploy.graph.unknown import before_foreign, foreign_operators
from scconv_deploy.model.prepare import Reference, reference_from_spec
from scconv_deploy.model.spec import ModelSpec
from scconv_deploy.records.parity import ParityReport
from scconv_deploy.records.stage import OpenStage, Progress, StageLog, StageRecord, silent
from scconv_deploy.rewrite.apply import Applied, NearMiss, apply_rules
from scconv_deploy.rewrite.prepare import opset_of, prepare, strip_sites, target_opset
from scconv_deploy.rewrite.rules import sigmoid_threshold
from scconv_deploy.runtimes.onnxruntime import lazily
from scconv_deploy.system.atomic import check_output_file, write_file
from scconv_deploy.system.environment import sha256_of
from scconv_deploy.verification import rewrite_match
from scconv_deploy.verification.onnx import matching
from scconv_deploy.verification.onnx.parity import Artifact, verify_onnx
from scconv_deploy.verification.options import Checks
from scconv_deploy.verification.rewrite_guard import GuardReport, compare_graphs
from scconv_deploy.verification.samples import with_progress
from scconv_deploy.version import __version__
from scconv_deploy.workflows.export import CruFormChoice, MaskFormChoice

_GUARD_SAMPLES = 16
"""Number of samples of a user's data that are also compared with the original file."""


@dataclass(frozen=True)
class RewriteOptions:
    """Options of a rewrite.

    Attributes:
        opset: opset of the result, 18 to 23; None keeps the file's own, or 18 if that is older.
        mask_form: ``auto`` is ``multiply`` for new functions and does not change existing ones.
        inline: expand the functions instead of keeping SRU nodes.
        adapted: also write ``NAME.plugin.onnx`` and ``NAME.inlined.onnx`` for TensorRT before 10.7.
        expect: smallest number of SRU nodes in the result; None requires one, or another rewritten gate.
        seed: seed of the inputs on which both files are compared.
        cru: form of the CRUs; ``auto`` is ``halves``, equal to the bit in ONNX Runtime.
    """

    opset: int | None = None
    mask_form: MaskFormChoice = "auto"
    inline: bool = False
    adapted: bool = False
    expect: int | None = None
    seed: int = 0
    cru: CruFormChoice = "auto"


@dataclass(frozen=True)
class RewriteResult:
    """Result of a rewrite.

    Attributes:
        outcome: ``rewritten``; ``partial`` if a candidate was refused; ``unchanged`` if the bytes are the original's.
        sites: SRU nodes of the result, site -> variant.
        near_misses: candidates that were refused.
        adapted: further files that were written.
        guard: comparison with the original.
        parity: verdict against PyTorch, if a reference was given.
    """

    path: Path
    sha256: str
    outcome: Literal["rewritten", "partial", "unchanged"]
    sites: Mapping[str, str]
    near_misses: tuple[NearMiss, ...]
    stages: tuple[StageRecord, ...]
    adapted: tuple[Path, ...] = ()
    guard: GuardReport | None = None
    parity: ParityReport | None = None

    def as_json(self) -> dict[str, Any]:
        return {
            "path": str(self.path),
            "sha256": self.sha256,
            "outcome": self.outcome,
            "sites": dict(self.sites),
            "near_misses": [vars(miss) for miss in self.near_misses],
            "adapted": [str(path) for path in self.adapted],
            "guard": None if self.guard is None else self.guard.as_json(),
            "parity": None if self.parity is None else self.parity.as_json(),
            "markdown": self.markdown,
            "stages": [
                {
                    "name": s.name,
                    "seconds": s.seconds,
                    "applied": list(s.applied),
                    "skipped": [list(p) for p in s.skipped],
                }
                for s in self.stages
            ],
        }

    @property
    def markdown(self) -> str:
        """Markdown table for a pull request: flips of the original file and of the result against PyTorch."""
        if self.guard is None or not self.guard.gates:
            return ""
        lines = [
            "| SRU | variant | gates | changed by your file | changed by the rewritten file |",
            "| --- | --- | --- | --- | --- |",
        ]
        for gate in self.guard.gates:
            counts = (gate.file.gates, gate.file.flips, gate.rewritten.flips)
            cells = [gate.site, self.sites.get(gate.site, ""), *(f"{count:,}" for count in counts)]
            lines.append(f"| {' | '.join(cells)} |")
        lines += ["", f"{self.guard.sentence[:1].upper()}{self.guard.sentence[1:]}."]
        return "\n".join(lines)


def rewrite_onnx(
    source: str | Path,
    output: str | Path,
    *,
    options: RewriteOptions = RewriteOptions(),
    reference: ModelSpec | None = None,
    data: str | None = None,
    force: bool = False,
    command: str = "scconv_deploy.rewrite_onnx",
    progress: Progress = silent,
) -> RewriteResult:
    """Rewrite an ONNX file from any exporter so that it computes its gates as PyTorch does.

    Args:
        source: original file; external data beside it.
        output: file to write; external data goes into the file.
        reference: model that the file was exported from, to judge parity against.
        data: an ``.npz`` with one array per input (with a reference also a folder of images, or ``photos``).
        force: overwrite.

    Raises:
        UsageError, IntegrityError: the file cannot be read, or the output not written.
        ModelError: the file cannot be converted, or holds fewer SRUs than ``options.expect``.
        ParityError: the result does not compute what the original or PyTorch computes.
    """
    source, output = Path(source), Path(output)
    for path in (output, *(_adapted_paths(output) if options.adapted else ())):
        check_output_file(path, force)
    if source.exists() and output.exists() and source.samefile(output):
        raise UsageError(f"{output} is the input itself.", "Name another output.")
    original = read_onnx(source)
    log = StageLog()
    progress("rewriting")
    with log.stage("rewrite") as stage:
        proto, applied = rewrite_graph(original, options, stage)
    sites = _variants(proto)
    if options.expect is not None and len(sites) < options.expect:
        short = f"{len(sites)} of {options.expect} expected SRUs were fused"
        raise ModelError(f"{short}: {_refused(applied.near_misses)}", "Use --expect 0 to accept this.")
    if options.expect is None and not sites and not applied.gates:
        nothing = f"{source} holds no gate to rewrite, expected at least one"
        raise ModelError(f"{nothing}: {_refused(applied.near_misses)}", "Use --expect 0 to accept this.")
    if reference is not None:
        loaded, prepared = reference_from_spec(reference, progress)
        log.records += prepared.records
        names = match_reference(proto, applied, loaded, log)
        sites = _variants(proto)
    unchanged = proto == original
    final = inlined(proto) if options.inline else proto
    if options.inline:
        check(final, "inlined graph")
    adapted = _adapted(proto, output) if options.adapted else {}
    data_bytes = source.read_bytes() if unchanged and not options.inline else _serialize(final)
    guard = guard_of(original, proto, applied, options, None if reference else data, log, progress) if applied else None
    if guard is not None and not guard and not guard.not_run:
        raise ParityError(f"{source}: {guard.failures[0]}", "Nothing was written; please report this file.")
    parity = None
    if reference is not None:
        checks = Checks(data)
        samples = with_progress(checks.samples(loaded, reference.seed, reference.source), progress)
        artifact = Artifact(matching.renamed(proto, names), str(output), data_bytes)
        parity = verify_onnx(loaded, artifact, samples, log, provenance={"command": command})
        if applied:
            seen = islice(chain(*checks.samples(loaded, reference.seed, reference.source)), _GUARD_SAMPLES)
            feeds = {str(s): {n: s.tensors[ours].numpy() for n, ours in names.inputs.items()} for s in seen}
            guard = _compare(original, proto, applied, feeds, log)
    if parity is not None and parity.verdict == "failed":
        output, adapted = _rejected(output), {_rejected(path): content for path, content in adapted.items()}
    write_file(output, data_bytes)
    for path, content in adapted.items():
        write_file(path, content)
    outcome: Literal["rewritten", "partial", "unchanged"] = "partial" if applied.near_misses else "rewritten"
    if unchanged and not options.inline:
        outcome = "unchanged"
    digest = sha256_of(data_bytes)
    misses = tuple(applied.near_misses)
    return RewriteResult(output, digest, outcome, sites, misses, tuple(log.records), tuple(adapted), guard, parity)


def rewrite_graph(
    original: onnx.ModelProto, options: RewriteOptions, stage: OpenStage
) -> tuple[onnx.ModelProto, Applied]:
    """Rewrite a model in memory, without the comparison.

    Returns:
        The rewritten model, or the original if there was nothing to do; and the rules applied and refused.
    """
    opset = target_opset(original, options.opset)
    model = prepare(original, opset, stage)
    mask_form: MaskForm = "where" if options.mask_form == "where" else "multiply"
    applied = apply_rules(model, mask_form, opset, "halves" if options.cru == "auto" else options.cru)
    strip_sites(model)
    stage.applied += applied.lines()
    stage.skipped += applied.refusals()
    converted = options.opset is not None and options.opset != opset_of(original)
    if applied or converted:
        proto = ir.to_proto(model)
    else:
        stage.applied[:] = []
        proto = onnx.ModelProto()
        proto.CopyFrom(original)
    if applied.crus:  # the form that the exporter noted is no longer theirs
        kept = [entry for entry in proto.metadata_props if entry.key != CRU_FORM]
        del proto.metadata_props[:]
        proto.metadata_props.extend(kept)
    reformed: list[str] = []
    if options.mask_form != "auto":
        reformed, skipped = change_mask_form(proto, options.mask_form)
        stage.applied += [f"{name}: mask form {options.mask_form}" for name in reformed]
        stage.skipped += skipped
    untidy = proto.SerializeToString(deterministic=True)
    tidy(proto)
    if not applied and not converted and not reformed:
        if proto.SerializeToString(deterministic=True) != untidy:
            stage.applied.append("SRUs have parameters of their own")
            _finish(proto)
            return proto, applied
        stage.applied.append("nothing to do")
        return original, applied
    _finish(proto)
    return proto, applied


def _finish(proto: onnx.ModelProto) -> None:
    """Add our metadata to the file's own, and run the full checker."""
    sites = _variants(proto)
    ours = {"scconv_deploy.version": __version__}
    if sites:
        proto.ir_version = IR_VERSION
        ours["scconv_deploy.sites"] = json.dumps(dict(sites))
    else:
        proto.ir_version = min(proto.ir_version, IR_VERSION)
    kept = {entry.key: entry.value for entry in proto.metadata_props} | ours
    onnx.helper.set_model_props(proto, kept)
    check(proto, "rewritten graph")


def _variants(proto: onnx.ModelProto) -> dict[str, str]:
    found = {}
    for site, node in instrument.sites(proto).items():
        found[site] = next((e.value for e in node.metadata_props if e.key == "scconv.variant"), node.op_type)
    return found


def _serialize(proto: onnx.ModelProto) -> bytes:
    return proto.SerializeToString(deterministic=True)


def _refused(misses: Sequence[NearMiss]) -> str:
    return "; ".join(f"{miss.node} ({miss.rule}): {miss.reason}" for miss in misses) or "no candidate was found"


def match_reference(proto: onnx.ModelProto, applied: Applied, reference: Reference, log: StageLog) -> matching.Names:
    """Take names, and parameters lost in folding, from the reference; other nodes are not changed."""
    with log.stage("match") as stage:
        outputs = list(reference.signature.call(reference.model, reference.signature.tensors))
        names = matching.match_names(proto, reference.signature.names, outputs)
        stage.applied += names.renamed
        known = len(applied.near_misses)
        completed = rewrite_match.adopt(proto, applied, reference, names)
        stage.applied += [f"{site}: parameters from the reference, for the file has lost gamma" for site in completed]
        if applied.fused:
            _finish(proto)
        stage.skipped += [(f"{miss.node} ({miss.rule})", miss.reason) for miss in applied.near_misses[known:]]
    return names


def guard_of(
    original: onnx.ModelProto,
    proto: onnx.ModelProto,
    applied: Applied,
    options: RewriteOptions,
    data: str | None,
    log: StageLog,
    progress: Progress,
) -> GuardReport:
    """Compare a file with its original, on seeded noise and on an ``.npz`` of the user's."""
    progress("comparing with the original")
    try:
        feeds = {"seeded noise": inputs.noise(original, options.seed, lazily(original))}
    except ModelError as error:
        if data is None:
            return GuardReport(not_run=str(error))
        feeds = {}
    if data is not None:
        given = {Path(data).name: inputs.load(data, original)}
        report = _compare(original, proto, applied, feeds | given, log)
        # an axis may be open in name only: noise of a guessed size then runs in neither file, the user's data does
        return _compare(original, proto, applied, given, log) if report.not_run and feeds else report
    return _compare(original, proto, applied, feeds, log)


def _compare(
    original: onnx.ModelProto, proto: onnx.ModelProto, applied: Applied, feeds: Mapping[str, Any], log: StageLog
) -> GuardReport:
    with log.stage("guard") as stage:
        thresholds = _thresholds(proto, applied)
        report = compare_graphs(original, proto, applied, thresholds, feeds)
        if report.not_run and (foreign := foreign_operators(original)) and (parts := before_foreign(original, proto)):
            report = compare_graphs(*parts, applied, thresholds, feeds)
            why = "ONNX Runtime has no such operator; the files were compared up to what it is given"
            report = replace(report, unread=(*report.unread, *((operator, why) for operator in foreign)))
        stage.applied += report.samples
        stage.skipped += report.unread
        if report.not_run:
            stage.skipped.append(("guard", report.not_run))
    return report


def _thresholds(proto: onnx.ModelProto, applied: Applied) -> dict[str, str]:
    """Rewritten sigmoid thresholds still in the graph: name of the mask -> name of the sigmoid's argument."""
    names = set(applied.changed.get(sigmoid_threshold.NAME, ()))
    stored = {tensor.name for tensor in proto.graph.initializer}
    return {
        node.output[0]: node.input[0]
        for node in proto.graph.node
        if node.op_type in ("GreaterOrEqual", "Less") and node.output[0] in names and node.input[1] in stored
    }


def _rejected(path: Path) -> Path:
    return path.with_name(f"{path.name}.rejected")


def _adapted_paths(output: Path) -> tuple[Path, Path]:
    return output.with_suffix(".plugin.onnx"), output.with_suffix(".inlined.onnx")


def _adapted(proto: onnx.ModelProto, output: Path) -> dict[Path, bytes]:
    """Files for TensorRT before 10.7, checked: without the SRUs' functions, and with them expanded."""
    files = {}
    for path, form in zip(_adapted_paths(output), (without_functions(proto), inlined(proto)), strict=True):
        check(form, f"graph of {path.name}")
        files[path] = _serialize(form)
    return files
