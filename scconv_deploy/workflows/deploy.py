"""``scconv-deploy deploy`` and its Python function: export, verify, build engines, write a bundle.

ModelSpec --load--> nn.Module --export--> onnx_ir.Model --precision--> model.onnx --build--> engines;
verify(reference, artifact) --> ParityReport

An ONNX file takes the same way, see :mod:`.deploy_file`: it is rewritten where a model is exported.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import onnx
import onnx_ir as ir
from torch import nn

from scconv_deploy.bundle.contents import MANIFEST, MODEL, REJECTED, REPORT, REPORT_PAGE
from scconv_deploy.bundle.device.plan import Unfinished
from scconv_deploy.bundle.device_files import write_run_script
from scconv_deploy.bundle.folder import check_output_folder, new_folder
from scconv_deploy.bundle.manifest import manifest_bytes
from scconv_deploy.bundle.reference import LARGEST_BYTES, EngineInputs, write_reference
from scconv_deploy.errors import MissingRuntimeError
from scconv_deploy.exporters.tensorrt.cache import EngineCache
from scconv_deploy.exporters.tensorrt.onnx_source import OnnxSource
from scconv_deploy.exporters.tensorrt.source import NetworkSource
from scconv_deploy.graph import instrument
from scconv_deploy.graph.file import serialize
from scconv_deploy.graph.types import data_type
from scconv_deploy.model.inputs import DynamicAxis
from scconv_deploy.model.prepare import Reference, reference_from_module, reference_from_spec
from scconv_deploy.model.spec import ModelSpec
from scconv_deploy.records import tolerances
from scconv_deploy.records.parity import ParityReport
from scconv_deploy.records.stage import Progress, StageLog, silent
from scconv_deploy.report.render import render, require_html
from scconv_deploy.runtimes.tensorrt.engine import EngineArtifact, EngineManifest
from scconv_deploy.system.atomic import write_file
from scconv_deploy.system.environment import sha256_of
from scconv_deploy.trt_plugins.cpu.build import CPU_LIBRARY
from scconv_deploy.verification import sru_models
from scconv_deploy.verification.engine.verdict import judge_engine
from scconv_deploy.verification.onnx.chain import Shards
from scconv_deploy.verification.onnx.parity import Artifact, Judging, source_of, source_of_engine, verify_onnx
from scconv_deploy.verification.options import Checks
from scconv_deploy.verification.reference.run import ReferenceRun, ReferenceSource
from scconv_deploy.verification.samples import noise_samples, with_progress
from scconv_deploy.workflows.build import Baseline, EngineBuilder, EngineRequest
from scconv_deploy.workflows.export import ExportOptions, export_to_ir, in_precision
from scconv_deploy.workflows.fused_cpu import chosen, with_operators
from scconv_deploy.workflows.provenance import provenance_of, versions
from scconv_deploy.zoo.embed import EmbedResult


@dataclass(frozen=True)
class DeployResult:
    """Bundle that was written: folder, artifact, digest of the manifest, report, unfinished targets, engines, notes.

    ``unfinished`` lists the engines left for devices, by target.
    """

    folder: Path
    artifact: Path
    digest: str
    report: ParityReport
    notes: tuple[str, ...] = ()
    engines: tuple[EngineManifest, ...] = ()
    unfinished: tuple[Unfinished, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.report)

    def as_json(self) -> dict[str, Any]:
        return {
            "folder": str(self.folder),
            "artifact": str(self.artifact),
            "digest": self.digest,
            "notes": list(self.notes),
            "engines": [engine.as_json() for engine in self.engines],
            "unfinished": [entry.as_json() for entry in self.unfinished],
            "report": self.report.as_json(),
        }


class Subject(Protocol):
    """What a bundle is made of: a model in PyTorch (:class:`ModelSubject`) or an ONNX file.

    Attributes:
        name: its name in the report.
        module: the model in PyTorch that int8 is proved against; None for a file.
    """

    @property
    def name(self) -> str: ...

    @property
    def module(self) -> nn.Module | None: ...

    def samples(self) -> list[Iterable[Any]]:
        """Samples to judge on; UsageError or IntegrityError where the data cannot be read."""
        ...

    def exported(self, options: ExportOptions, log: StageLog, progress: Progress) -> ir.Model:
        """The float32 ONNX model, its SRUs as nodes."""
        ...

    def verify(
        self, artifact: Artifact, samples: Iterable[Any], log: StageLog, judging: Judging, facts: Mapping[str, str],
        shards: Shards | None = None, on_run: Callable[[ReferenceRun], None] = lambda run: None,
    ) -> ParityReport:  # fmt: skip
        """Judge the artifact that was made of it.

        Args:
            shards: as for :func:`.chain.verify_artifact`.
            on_run: given every run of :meth:`source` that this makes.
        """
        ...

    def source(self, artifact: Artifact) -> ReferenceSource:
        """Reference of the artifact, for ``reference/`` in the bundle."""
        ...

    def source_of_engine(self, artifact: Artifact) -> ReferenceSource:
        """Reference of the artifact's engines (ModelError if there is none, see :func:`.parity.source_of_engine`)."""
        ...

    def recorded(self) -> list[Any]:
        """Samples of :meth:`source` for ``reference/``; the first one is always kept."""
        ...


@dataclass(frozen=True, eq=False)
class ModelSubject:
    """A :class:`Subject` in PyTorch; ``origin`` may name a zoo model, for its preprocessing."""

    reference: Reference
    checks: Checks
    seed: int = 0
    origin: str = ""

    @property
    def name(self) -> str:
        return self.reference.name

    @property
    def module(self) -> nn.Module | None:
        return self.reference.model

    def samples(self) -> list[Iterable[Any]]:
        return list(self.checks.samples(self.reference, self.seed, self.origin))

    def exported(self, options: ExportOptions, log: StageLog, progress: Progress) -> ir.Model:
        return export_to_ir(self.reference, options, log, progress)

    def verify(
        self, artifact: Artifact, samples: Iterable[Any], log: StageLog, judging: Judging, facts: Mapping[str, str],
        shards: Shards | None = None, on_run: Callable[[ReferenceRun], None] = lambda run: None,
    ) -> ParityReport:  # fmt: skip
        return verify_onnx(
            self.reference, artifact, samples, log, judging=judging, provenance=facts, shards=shards, on_run=on_run
        )

    def source(self, artifact: Artifact) -> ReferenceSource:
        return source_of(self.reference, artifact)

    def source_of_engine(self, artifact: Artifact) -> ReferenceSource:
        return source_of_engine(self.reference, artifact)

    def recorded(self) -> list[Any]:
        return noise_samples(self.reference.signature, self.seed)[1::-1]


def deploy_spec(
    spec: ModelSpec,
    folder: Path,
    options: ExportOptions,
    *,
    checks: Checks = Checks(),
    engines: EngineRequest = EngineRequest(),
    baseline: str = "",
    plugin_cpu: str = "",
    cache: EngineCache | None = None,
    force: bool = False,
    command: str = "",
    progress: Progress = silent,
) -> DeployResult:
    """Export a model, verify it, build engines, and write a bundle; ``scconv-deploy deploy``.

    An artifact that fails is named ``*.rejected``, and no engine is built from it.

    Args:
        baseline: a model, named like ``spec``'s, whose compiled plan the engines' plans are compared with; "" for none.
        plugin_cpu: the fused SRU for ONNX Runtime on CPUs, judged and shipped: ``auto``, a file, or "" for none.
    """
    check_output_folder(folder, force)
    options.refuse_cache(folder)
    tolerances.table(checks.tolerances)  # refuse a wrong name before any work is done
    checks, said = with_plugin_cpu(checks, plugin_cpu)
    builder = EngineBuilder.of(engines, cache, command, progress, _baseline(baseline, spec, options))
    reference, log = reference_from_spec(spec, progress)
    provenance = provenance_of(spec, command, log)
    subject = ModelSubject(reference, checks, spec.seed, spec.source)
    return deploy_subject(subject, folder, options, checks, log, command, progress, provenance, builder, said)


def _baseline(source: str, spec: ModelSpec, options: ExportOptions) -> Baseline | None:
    """Another network with the same inputs, exported alike; only its plan counts, so its weights are random."""
    if not source:
        return None
    other = ModelSpec(source, inputs=spec.resolved().inputs, dynamic=spec.dynamic, seed=spec.seed)
    other.resolved()  # an unknown name is refused before any work is done

    def export() -> NetworkSource:
        reference, log = reference_from_spec(other)
        return OnnxSource(
            ir.to_proto(in_precision(export_to_ir(reference, options, log), options, log, module=reference.model))
        )

    return Baseline(other.label, export)


def deploy(
    model: nn.Module | EmbedResult,
    example_inputs: Any,
    folder: str | Path,
    *,
    dynamic: Sequence[DynamicAxis] = (),
    options: ExportOptions = ExportOptions(),
    checks: Checks = Checks(),
    engines: EngineRequest = EngineRequest(),
    plugin_cpu: str = "",
    cache: EngineCache | None = None,
    force: bool = False,
) -> DeployResult:
    """Export a module, verify the artifact against it, build engines, and write a bundle.

    Args:
        model, example_inputs, dynamic, options, force: as for :func:`export`.
        folder: folder of the bundle.
        checks: real data, tolerances, and execution provider.
        engines: engines built here and on devices; :meth:`.EngineRequest.of` reads a target.
        plugin_cpu: the fused SRU for ONNX Runtime on CPUs, judged and shipped: ``auto``, a file, or "" for none.
        cache: engine cache; None builds without one.

    Returns:
        The result, falsy if parity failed.

    Raises:
        ScconvDeployError: with the reason and the remedy.
    """
    command = "scconv_deploy.deploy"
    check_output_folder(Path(folder), force)
    options.refuse_cache(Path(folder))
    checks, said = with_plugin_cpu(checks, plugin_cpu)
    builder = EngineBuilder.of(engines, cache, command)
    options = replace(options, backends=tuple(dict.fromkeys((*options.backends, *engines.backends))))
    reference, log = reference_from_module(model, example_inputs, dynamic)
    subject = ModelSubject(reference, checks)
    return deploy_subject(subject, Path(folder), options, checks, log, command, silent, {}, builder, said)


def with_plugin_cpu(checks: Checks, plugin_cpu: str) -> tuple[Checks, tuple[str, ...]]:
    """Options with the library to judge and ship, and notes on it."""
    library, note = chosen(plugin_cpu)
    checks = with_operators(checks) if library is None else replace(checks, operators=library)
    return checks, (note,) if note else ()


def deploy_subject(
    subject: Subject,
    folder: Path,
    options: ExportOptions,
    checks: Checks,
    log: StageLog,
    command: str,
    progress: Progress,
    provenance: Mapping[str, str],
    builder: EngineBuilder,
    said: tuple[str, ...] = (),
) -> DeployResult:
    """Make the artifact of a subject, verify it, build engines, and write a bundle."""
    samples = subject.samples()  # refuse unreadable data before any work is done
    float32_model = subject.exported(options, log, progress)
    model = in_precision(float32_model, options, log, progress, subject.module)
    data = serialize(model)
    artifact = Artifact(onnx.load_model_from_string(data), MODEL, data)
    if options.half is not None and options.quantization is None:
        artifact = replace(artifact, float32_model=onnx.load_model_from_string(serialize(float32_model)))
    here, shards = checks.shared_out(samples, progress)
    recorded = _Recorded(subject.recorded())
    report = subject.verify(
        artifact, with_progress(here, progress), log, checks.judging, provenance, shards, recorded.keep
    )
    name = MODEL + REJECTED if report.verdict == "failed" else MODEL
    engines = _engine_inputs(artifact) if options.builds_engines else None

    def judge(engine: EngineArtifact, plugin: Path | None) -> ParityReport:
        return judge_engine(
            subject.source_of_engine(artifact), engine, with_progress(subject.samples(), progress), StageLog(),
            overrides=checks.tolerances, plugin=plugin, provenance=provenance,
            sru_models=partial(sru_models.of_artifact, artifact.proto),
        )  # fmt: skip

    with new_folder(folder) as temporary:
        built = builder.build(artifact.proto, data, temporary, report, judge)
        report = built.report
        notes = (*said, *_write_page(temporary, report, progress), *built.notes)
        write_file(temporary / name, data)
        write_file(temporary / REPORT, report.as_bytes())
        nodes = instrument.sites(artifact.proto)
        source = subject.source(artifact)
        write_reference(
            temporary, source, recorded.runs(source), nodes, engines=engines,
            rounded_to="" if artifact.precision == "fp32" else data_type(artifact.precision).name,
            artifact=artifact.proto,
        )  # fmt: skip
        write_run_script(temporary)
        if checks.operators is not None and nodes:
            write_file(temporary / CPU_LIBRARY, checks.operators.read_bytes())
        facts: dict[str, Any] = {
            "versions": versions(), "command": command, "model": subject.name, "verdict": report.verdict,
            "unfinished": [entry.as_json() for entry in built.unfinished],
        }  # fmt: skip
        sealed = manifest_bytes(temporary, facts)
        write_file(temporary / MANIFEST, sealed)
    digest = sha256_of(sealed)
    return DeployResult(folder, folder / name, digest, report, notes, built.manifests, built.unfinished)


@dataclass(eq=False)
class _Recorded:
    """Runs of the samples that ``reference/`` holds, kept from verification: each costs a dozen passes of the model."""

    samples: Sequence[Any]
    _kept: dict[str, ReferenceRun] = field(default_factory=dict, init=False)

    def keep(self, run: ReferenceRun) -> None:
        size = sum(array.nbytes for site in run.sites.values() for array in (site.x, site.mask) if array is not None)
        if run.sample in {sample.name for sample in self.samples} and size <= LARGEST_BYTES:
            self._kept[run.sample] = run

    def runs(self, source: ReferenceSource) -> Iterator[ReferenceRun]:
        """The runs; one that was too large to keep is made again."""
        for sample in self.samples:
            yield self._kept.get(sample.name) or source.run(sample)


def _engine_inputs(artifact: Artifact) -> EngineInputs:
    """Reference data for judging the engines of an artifact, on the device too, where there is no onnx."""
    return EngineInputs(data_type(artifact.precision).name, partial(sru_models.of_artifact, artifact.proto))


def _write_page(folder: Path, report: ParityReport, progress: Progress) -> tuple[str, ...]:
    """Write ``report.html``, or return a note if that fails; a verdict must not depend on pictures."""
    try:
        require_html()
    except MissingRuntimeError as error:
        return (f"{REPORT_PAGE} was not written: {error}",)
    progress("drawing the report")
    write_file(folder / REPORT_PAGE, render(report, "html").encode())
    return ()
