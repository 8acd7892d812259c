"""``scconv-deploy deploy F.onnx``: an ONNX file of any exporter becomes a bundle.

read --> rewrite --> guard against the original --> precision --> verify --> engines --> bundle

Without a model, the file is its own reference: its graph in float64, with PyTorch's formula at the gates
(:mod:`.reference.onnx_float64`). With one, the artifact is judged against PyTorch; engines and ``reference/`` still
take the file, whose inputs and outputs are the artifact's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir

from scconv_deploy.bundle.folder import check_output_folder
from scconv_deploy.errors import ModelError, UsageError
from scconv_deploy.exporters.tensorrt.cache import EngineCache
from scconv_deploy.exporters.tensorrt.onnx_source import OnnxSource
from scconv_deploy.graph.file import read_onnx
from scconv_deploy.graph.types import precision_of, quantization_of
from scconv_deploy.graph.unknown import foreign_operators
from scconv_deploy.model.prepare import Reference, reference_from_spec
from scconv_deploy.model.spec import ModelSpec
from scconv_deploy.records import tolerances
from scconv_deploy.records.gates import Refusal
from scconv_deploy.records.parity import ParityReport
from scconv_deploy.records.stage import Progress, StageLog, silent
from scconv_deploy.rewrite.apply import Applied
from scconv_deploy.system.environment import sha256_of
from scconv_deploy.verification.onnx import matching
from scconv_deploy.verification.onnx.chain import Artifact, Judging, Shards, verify_artifact
from scconv_deploy.verification.onnx.parity import verify_onnx
from scconv_deploy.verification.options import Checks
from scconv_deploy.verification.reference.onnx_file import NamedArrays
from scconv_deploy.verification.reference.onnx_float64 import OnnxFloat64Reference
from scconv_deploy.verification.reference.run import ReferenceRun, ReferenceSource
from scconv_deploy.verification.rewrite_guard import GuardReport, link_of
from scconv_deploy.workflows.build import EngineBuilder, EngineRequest
from scconv_deploy.workflows.calibrate import CalibrationOptions, Rows
from scconv_deploy.workflows.deploy import DeployResult, deploy_subject, with_plugin_cpu
from scconv_deploy.workflows.export import ExportOptions
from scconv_deploy.workflows.provenance import provenance_of
from scconv_deploy.workflows.rewrite import RewriteOptions, guard_of, match_reference, rewrite_graph


def deploy_file(
    source: Path,
    folder: Path,
    options: ExportOptions,
    *,
    reference: ModelSpec | None = None,
    checks: Checks = Checks(),
    engines: EngineRequest = EngineRequest(),
    cache: EngineCache | None = None,
    seed: int = 0,
    plugin_cpu: str = "",
    force: bool = False,
    command: str = "",
    progress: Progress = silent,
) -> DeployResult:
    """Rewrite an ONNX file, verify it, build engines, and write a bundle.

    Args:
        source: float32 file; external data beside it.
        reference: model that the file was exported from; None judges the file against itself.
        engines: whose axes are the ranges of the file's open axes.
        seed: of the noise that the file is run on.
        plugin_cpu: the fused SRU for ONNX Runtime on CPUs, as for :func:`.deploy.deploy_spec`.

    Raises:
        UsageError, IntegrityError: the file or the data cannot be read, the bundle not be written, or an axis is not
            the file's.
        ModelError: the file is half or quantised, or cannot run here.
    """
    check_output_folder(folder, force)
    tolerances.table(checks.tolerances)  # refuse a wrong name before any work is done
    if options.quantization is not None:
        raise UsageError(
            f"int8 is proved against the model, and {source} is a file.",
            f"Deploy the model with --precision {options.label}, or use quantize {source} --reference MODEL.",
        )
    original = _readable(source)
    _check_axes(source, original, engines)
    checks, said = with_plugin_cpu(checks, plugin_cpu)
    builder = EngineBuilder.of(engines, cache, command, progress)
    log = StageLog()
    facts = {"command": command, "seed": str(seed), "file": str(source), "file_sha256": sha256_of(source)}
    loaded = None
    if reference is not None:
        loaded, prepared = reference_from_spec(reference, progress)
        log.records += prepared.records
        facts = provenance_of(reference, command, log) | facts
    subject = _FileSubject(source, original, checks, seed, loaded, "" if reference is None else reference.source)
    return deploy_subject(subject, folder, options, checks, log, command, progress, facts, builder, said)


def _readable(source: Path) -> onnx.ModelProto:
    original = read_onnx(source)
    if quantization := quantization_of(original):
        raise ModelError(
            f"{source} is {quantization} already, so nothing at hand says what it must compute.",
            "Deploy the model with --precision int8, or judge this file with verify --reference MODEL.",
        )
    if (precision := precision_of(original)) != "fp32":
        raise ModelError(f"{source} is {precision}.", f"Deploy the float32 file with --precision {precision}.")
    if foreign := foreign_operators(original):
        raise ModelError(
            f"{source} cannot run: neither ONNX nor ONNX Runtime has its operators {', '.join(foreign)}.",
            "Use rewrite, which compares what comes before them.",
        )
    return original


def _check_axes(source: Path, original: onnx.ModelProto, engines: EngineRequest) -> None:
    """Refuse a range of an axis that the file does not have open, also where no engine would notice (UsageError)."""
    shapes = OnnxSource(original).facts.shapes
    for axis in engines.axes:
        wanted = list(shapes) if axis.input is None else [axis.input]
        if wanted[0] not in shapes:
            raise UsageError(f"{source} has no input {axis.input!r}.", f"Its inputs: {', '.join(shapes)}.")
        if not any(axis.axis < len(shapes[name]) and shapes[name][axis.axis] == -1 for name in wanted):
            found = ", ".join(f"{name} {'x'.join(map(str, shapes[name]))}" for name in wanted)
            raise UsageError(
                f"{source} has no open axis {axis.axis} for {axis.symbol} ({found}).",
                "Export the file with that axis open, or leave the range out.",
            )


@dataclass(eq=False)
class _FileSubject:
    """A :class:`.deploy.Subject` in a file; :meth:`exported` comes first, the other methods use its result."""

    path: Path
    original: onnx.ModelProto
    checks: Checks
    seed: int
    model: Reference | None
    origin: str
    _source: OnnxFloat64Reference | None = field(default=None, init=False)
    _names: matching.Names | None = field(default=None, init=False)
    _guard: GuardReport = field(default=GuardReport(), init=False)

    @property
    def name(self) -> str:
        return self.path.name if self.model is None else self.model.name

    @property
    def module(self) -> None:
        """None: int8 was refused."""
        return None

    def samples(self) -> list[Iterable[Any]]:
        if self.model is not None:
            return list(self.checks.samples(self.model, self.seed, self.origin))
        if self.checks.data is None:
            return [self._noise()]
        rows = Rows(self.original, CalibrationOptions(self.checks.data, preprocessing=self._affine, seed=self.seed))
        return [self._noise(), rows.samples()]

    @property
    def _affine(self) -> Any:
        return None if self.checks.preprocessing is None else self.checks.preprocessing.affine

    def _noise(self) -> Iterator[NamedArrays]:
        yield from self._reference.samples(self.seed)

    @property
    def _reference(self) -> OnnxFloat64Reference:
        assert self._source is not None  # noqa: S101  (exported() was called)
        return self._source

    def exported(self, options: ExportOptions, log: StageLog, progress: Progress) -> ir.Model:
        progress("rewriting")
        chosen = RewriteOptions(
            None if options.opset is None and options.precision == "fp32" else options.resolved_opset,
            options.resolved_mask_form, expect=0, seed=self.seed, cru=options.resolved_cru,
        )  # fmt: skip
        with log.stage("rewrite") as stage:
            proto, applied = rewrite_graph(self.original, chosen, stage)
        if self.model is not None:
            self._names = match_reference(proto, applied, self.model, log)
        data = self.checks.data if self.model is None and str(self.checks.data).endswith(".npz") else None
        if applied:
            self._guard = guard_of(self.original, proto, applied, chosen, data, log, progress)
        else:
            self._guard = GuardReport(not_run="the file's SRUs are nodes already, or it has none")
        gates = {one.site: one.gate for one in applied.fused}
        self._source = OnnxFloat64Reference(str(self.path), proto, gates, self.checks.judging.runtime)
        self._source.left_alone = _left_alone(applied)
        return ir.from_proto(proto)

    def verify(
        self, artifact: Artifact, samples: Iterable[Any], log: StageLog, judging: Judging, facts: Mapping[str, str],
        shards: Shards | None = None, on_run: Callable[[ReferenceRun], None] = lambda run: None,
    ) -> ParityReport:  # fmt: skip
        if self.model is None or self._names is None:
            report = verify_artifact(
                self._reference, artifact, samples, log, judging=judging, provenance=facts, on_run=on_run
            )
        else:
            named = replace(artifact, proto=matching.renamed(artifact.proto, self._names))
            if named.float32_model is not None:
                named = replace(named, float32_model=matching.renamed(named.float32_model, self._names))
            report = verify_onnx(self.model, named, samples, log, judging=judging, provenance=facts, shards=shards)
        return replace(report, links=(link_of(self._guard), *report.links))

    def source(self, artifact: Artifact) -> ReferenceSource:
        return self._reference

    def source_of_engine(self, artifact: Artifact) -> ReferenceSource:
        return self._reference

    def recorded(self) -> list[Any]:
        return list(self._reference.samples(self.seed))[1::-1]


def _left_alone(applied: Applied) -> tuple[Refusal, ...]:
    return tuple(Refusal(miss.node, f"{miss.rule}: {miss.reason}") for miss in applied.near_misses)
