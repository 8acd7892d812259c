"""``scconv-deploy quantize``: a float ONNX file to int8 with float32 gates, and the proof.

read --> place --> calibrate --> (search) --> quantise --> check --> verify against PyTorch or the float file --> write
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import onnx

from scconv_deploy.errors import UsageError
from scconv_deploy.graph.file import check, read_onnx
from scconv_deploy.graph.types import precision_of, quantization_of
from scconv_deploy.model.fake_quantize import unprovable
from scconv_deploy.model.prepare import Reference, reference_from_spec
from scconv_deploy.model.spec import ModelSpec
from scconv_deploy.precision.calibration import Calibration
from scconv_deploy.precision.int8 import prepared, quantized_proto
from scconv_deploy.precision.placement import Placement, PlacementOptions, Unprovable
from scconv_deploy.records.parity import ParityReport
from scconv_deploy.records.quantization import Target, largest_code
from scconv_deploy.records.stage import Progress, StageLog, silent
from scconv_deploy.report.render import format_of, render
from scconv_deploy.report.sensitivity import search_lines
from scconv_deploy.report.verdict import parity_error
from scconv_deploy.runtimes.half import runs_here
from scconv_deploy.runtimes.onnxruntime import RuntimeOptions
from scconv_deploy.system.atomic import check_output_file, write_file
from scconv_deploy.system.environment import sha256_of
from scconv_deploy.verification.onnx.chain import Artifact, verify_artifact
from scconv_deploy.verification.options import Checks
from scconv_deploy.verification.reference.onnx_file import OnnxReference
from scconv_deploy.workflows.budget import Budget, find_plan
from scconv_deploy.workflows.calibrate import CalibrationOptions, Rows, calibrate, require_own_file
from scconv_deploy.workflows.fused_cpu import with_operators
from scconv_deploy.workflows.plans import Plans
from scconv_deploy.workflows.provenance import provenance_of
from scconv_deploy.workflows.sensitivity import refuse_foreign


@dataclass(frozen=True)
class QuantizeOptions:
    """Settings of a quantisation.

    Attributes:
        calibration: data and method.
        placement: choice of layers.
        target: hardware that the codes are for.
        budget: largest cost; sites stay in float until it is met. None quantises all that the placement chooses.
        reduce_range: weights of 7 bits, whose products do not saturate in 16 bits.
    """

    calibration: CalibrationOptions
    placement: PlacementOptions = field(default_factory=PlacementOptions)
    target: Target = "gpu"
    budget: Budget | None = None
    reduce_range: bool = False

    @property
    def largest_code(self) -> int:
        """Code of the largest weight of a channel."""
        return largest_code(self.reduce_range)


@dataclass(frozen=True, eq=False)
class Quantized:
    """A quantised model, before it is judged and written; ``notes`` are about its calibration."""

    proto: onnx.ModelProto
    placement: Placement
    calibration: Calibration
    notes: tuple[str, ...]


@dataclass(frozen=True)
class QuantizeResult:
    """Result of a quantisation.

    Attributes:
        precision: ``int8`` and the type between the quantisers, as ``int8+fp16``.
        chosen, kept: (node, reason) of what is quantised and of what stays in float.
        multiply_adds: (quantised, all) for one row; None if a shape is not known.
        bytes_before, bytes_after: sizes of the files.
        report: parity, against PyTorch if a model was given, else against the float file.
    """

    path: Path
    sha256: str
    precision: str
    chosen: tuple[tuple[str, str], ...]
    kept: tuple[tuple[str, str], ...]
    multiply_adds: tuple[int, int] | None
    calibration: Calibration
    bytes_before: int
    bytes_after: int
    notes: tuple[str, ...]
    report: ParityReport

    def as_json(self) -> dict[str, Any]:
        plain = ("sha256", "precision", "chosen", "kept", "multiply_adds", "bytes_before", "bytes_after", "notes")
        calibration = {n: v for n, v in vars(self.calibration).items() if n != "ranges"}
        return {name: getattr(self, name) for name in plain} | {
            "path": str(self.path), "calibration": calibration, "report": self.report.as_json(),
        }  # fmt: skip


def quantize_onnx(
    source: str | Path,
    output: str | Path,
    options: QuantizeOptions,
    *,
    reference: ModelSpec | None = None,
    checks: Checks = Checks(),
    report: Path | None = None,
    force: bool = False,
    command: str = "",
    progress: Progress = silent,
) -> QuantizeResult:
    """Quantise a float file to int8.

    Args:
        source: float32, float16 or bfloat16, rewritten; external data beside it.
        output: where to write; external data goes into the file.
        reference: the model that the file came from, for the proof; without it, gates and costs are judged against the
            float file.
        report: file for the report, of a file that failed too; its suffix gives the format.
        checks: tolerances (``max_drop``) and the provider; the data are those of the calibration, all rows.
        force: overwrite.

    Raises:
        UsageError, IntegrityError: the file or the data cannot be read, or the output not written; a pattern matches
            nothing.
        ModelError: the file is quantised already, or cannot be run.
        ParityError: a check failed, or the budget does not hold; nothing was written.
    """
    source, output = Path(source), Path(output)
    check_output_file(output, force)
    require_own_file(options.calibration.cache, output)
    form = None if report is None else format_of(report)
    if report is not None:
        check_output_file(report, force)
        if report.resolve() in (output.resolve(), source.resolve()):
            raise UsageError(f"--report {report} is the model's own file.", "Name another file for the report.")
        require_own_file(options.calibration.cache, report)
    if source.exists() and output.exists() and source.samefile(output):
        raise UsageError(f"{output} is the input itself.", "Name another output.")
    checks, original = with_operators(checks), read_onnx(source)
    if reference is None and not runs_here(original, RuntimeOptions()):
        raise UsageError(
            f"ONNX Runtime cannot run {source} here, so without its model nothing could be compared.",
            "Name the model with --reference MODEL.",
        )
    model, log = (None, StageLog()) if reference is None else reference_from_spec(reference, progress)
    proved_by = None if model is None else partial(unprovable, model.model)
    made = quantize_model(original, sha256_of(source), options, log, progress, proved_by, source.name)
    content = made.proto.SerializeToString(deterministic=True)
    artifact = Artifact(made.proto, str(output), content)
    progress("verifying")
    if reference is None or model is None:
        judged = _against_file(source, original, artifact, options.calibration, checks, log, command)
    else:
        judged = _against_model(reference, model, artifact, checks, log, command, progress)
    if report is not None and form is not None:
        write_file(report, render(judged, form).encode())
    if judged.verdict == "failed":
        remedy = "see --keep, --calibration and --max-drop."
        if options.budget is not None:
            remedy = "the search measures in ONNX Runtime, the check may in PyTorch: give a smaller --budget."
        written = "Nothing was written" if report is None else f"Nothing but {report} was written"
        raise parity_error(source, judged, f"{written}; {remedy}")
    write_file(output, content)
    before = len(original.SerializeToString())
    return QuantizeResult(
        output, sha256_of(content), name_of(made.proto), tuple(made.placement.chosen), tuple(made.placement.kept),
        made.placement.multiply_adds, made.calibration, before, len(content), made.notes, judged,
    )  # fmt: skip


def quantize_model(
    proto: onnx.ModelProto,
    digest: str,
    options: QuantizeOptions,
    log: StageLog,
    progress: Progress = silent,
    proved_by: Unprovable | None = None,
    name: str = "the model",
) -> Quantized:
    """Quantise a model in memory, and check it; the stage record names every node with its reason.

    Args:
        digest: SHA-256 of its file.
        proved_by: why PyTorch has no layer that could be fake-quantised; None if the result is not to be proved.
        name: name of the file, for messages.

    Raises:
        ParityError: no plan meets the budget.
    """
    refuse_foreign(proto)
    with log.stage("quantize") as stage:
        found = prepared(proto, options.placement, proved_by)
        rows = Rows(proto, options.calibration)
        calibration, seen = calibrate(proto, digest, found, rows, options.calibration, progress)
        record = calibration.record(options.target, options.largest_code)
        plans = Plans(proto, found, options.placement, calibration, record, proved_by)
        placing = options.placement
        if options.budget is not None:
            stage.search = find_plan(plans, rows, options.budget, options.calibration, name, progress)
            stage.applied += search_lines(stage.search)
            placing = plans.keeping(stage.search.keep)
            found = prepared(proto, placing, proved_by)
        progress("quantising")
        placement = found.placement
        written = quantized_proto(found, calibration.ranges, plans.record(placing))
        stage.applied += [f"{node}: {reason}" for node, reason in placement.chosen]
        if placement.multiply_adds is not None:
            part, total = placement.multiply_adds
            stage.applied.append(f"{part:,} of {total:,} multiply-adds in int8 ({part / max(total, 1):.1%})")
        stage.applied.append(
            f"scales by {calibration.method} of {calibration.samples} rows of {calibration.data} "
            f"(sha256 {calibration.data_sha256[:12]})"
        )
        stage.applied += [f"note: {note}" for note in seen.notes]
        stage.skipped += placement.kept
        check(written, "quantised graph")
    return Quantized(written, placement, calibration, seen.notes)


def name_of(proto: onnx.ModelProto) -> str:
    """``int8``, and the type between the quantisers unless that is float32."""
    between = precision_of(proto)
    kind = quantization_of(proto).split(" ")[0]
    return kind if between == "fp32" else f"{kind}+{between}"


def _against_file(
    source: Path,
    original: onnx.ModelProto,
    artifact: Artifact,
    options: CalibrationOptions,
    checks: Checks,
    log: StageLog,
    command: str,
) -> ParityReport:
    """Judge gates and costs against the float file."""
    reference = OnnxReference(str(source), original, measured=False)
    provenance = {"command": command, "seed": str(options.seed)}
    samples = Rows(original, options).samples()
    return verify_artifact(reference, artifact, samples, log, judging=checks.judging, provenance=provenance)


def _against_model(
    spec: ModelSpec,
    reference: Reference,
    artifact: Artifact,
    checks: Checks,
    log: StageLog,
    command: str,
    progress: Progress,
) -> ParityReport:
    """Prove the file against fake-quantised PyTorch."""
    from scconv_deploy.verification.onnx.parity import verify_onnx
    from scconv_deploy.verification.samples import with_progress

    samples: Iterable[Any] = checks.samples(reference, spec.seed, spec.source)
    return verify_onnx(
        reference, artifact, with_progress(list(samples), progress), log,
        judging=checks.judging, provenance=provenance_of(spec, command, log),
    )  # fmt: skip
