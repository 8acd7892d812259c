"""``scconv-deploy deploy`` and its Python function: export, verify, build engines, write a bundle.

ModelSpec --load--> nn.Module --export--> onnx_ir.Model --precision--> model.onnx --build--> engines;
verify(reference, artifact) --> ParityReport
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
from torch import nn

from scconv_deploy.bundle.contents import MANIFEST, MODEL, REJECTED, REPORT, REPORT_PAGE
from scconv_deploy.bundle.device.plan import Unfinished
from scconv_deploy.bundle.device_files import write_run_script
from scconv_deploy.bundle.folder import check_output_folder, new_folder
from scconv_deploy.bundle.manifest import manifest_bytes
from scconv_deploy.bundle.reference import EngineInputs, write_reference
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
from scconv_deploy.verification import sru_models
from scconv_deploy.verification.engine.verdict import judge_engine
from scconv_deploy.verification.onnx.parity import Artifact, source_of, verify_onnx
from scconv_deploy.verification.options import Checks
from scconv_deploy.verification.samples import Sample, noise_samples, with_progress
from scconv_deploy.workflows.build import Baseline, EngineBuilder, EngineRequest
from scconv_deploy.workflows.export import ExportOptions, export_to_ir, in_precision
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


def deploy_spec(
    spec: ModelSpec,
    folder: Path,
    options: ExportOptions,
    *,
    checks: Checks = Checks(),
    engines: EngineRequest = EngineRequest(),
    baseline: str = "",
    cache: EngineCache | None = None,
    force: bool = False,
    command: str = "",
    progress: Progress = silent,
) -> DeployResult:
    """Export a model, verify it, build engines, and write a bundle; ``scconv-deploy deploy``.

    An artifact that fails is named ``*.rejected``, and no engine is built from it.

    Args:
        baseline: a model, named like ``spec``'s, whose compiled plan the engines' plans are compared with; "" for none.
    """
    check_output_folder(folder, force)
    tolerances.table(checks.tolerances)  # refuse a wrong name before any work is done
    builder = EngineBuilder.of(engines, cache, command, progress, _baseline(baseline, spec, options))
    reference, log = reference_from_spec(spec, progress)
    provenance = provenance_of(spec, command, log)

    def draw() -> list[Iterable[Sample]]:
        return checks.samples(reference, spec.seed, spec.source)

    return _deploy(reference, folder, options, checks, draw, log, command, progress, provenance, builder)


def _baseline(source: str, spec: ModelSpec, options: ExportOptions) -> Baseline | None:
    """Another network with the same inputs, exported alike; only its plan counts, so its weights are random."""
    if not source:
        return None
    other = ModelSpec(source, inputs=spec.resolved().inputs, dynamic=spec.dynamic, seed=spec.seed)
    other.resolved()  # an unknown name is refused before any work is done

    def export() -> NetworkSource:
        reference, log = reference_from_spec(other)
        return OnnxSource(ir.to_proto(in_precision(export_to_ir(reference, options, log), options, log)))

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
    cache: EngineCache | None = None,
    force: bool = False,
) -> DeployResult:
    """Export a module, verify the artifact against it, build engines, and write a bundle.

    Args:
        model, example_inputs, dynamic, options, force: as for :func:`export`.
        folder: folder of the bundle.
        checks: real data, tolerances, and execution provider.
        engines: engines built here and on devices; :meth:`.EngineRequest.of` reads a target.
        cache: engine cache; None builds without one.

    Returns:
        The result, falsy if parity failed.

    Raises:
        ScconvDeployError: with the reason and the remedy.
    """
    command = "scconv_deploy.deploy"
    check_output_folder(Path(folder), force)
    builder = EngineBuilder.of(engines, cache, command)
    options = replace(options, backends=tuple(dict.fromkeys((*options.backends, *engines.backends))))
    reference, log = reference_from_module(model, example_inputs, dynamic)
    draw = partial(checks.samples, reference, 0)
    return _deploy(reference, Path(folder), options, checks, draw, log, command, silent, {}, builder)


def _deploy(
    reference: Reference,
    folder: Path,
    options: ExportOptions,
    checks: Checks,
    draw: Callable[[], list[Iterable[Sample]]],
    log: StageLog,
    command: str,
    progress: Progress,
    provenance: Mapping[str, str],
    builder: EngineBuilder,
) -> DeployResult:
    samples = draw()  # refuse unreadable data before any work is done
    float32_model = export_to_ir(reference, options, log, progress)
    model = in_precision(float32_model, options, log, progress)
    data = serialize(model)
    artifact = Artifact(onnx.load_model_from_string(data), MODEL, data)
    if options.half is not None and options.quantization is None:
        artifact = replace(artifact, float32_model=onnx.load_model_from_string(serialize(float32_model)))
    here, shards = checks.shared_out(samples, progress)
    report = verify_onnx(
        reference, artifact, with_progress(here, progress), log,
        judging=checks.judging, provenance=provenance, shards=shards,
    )  # fmt: skip
    name = MODEL + REJECTED if report.verdict == "failed" else MODEL
    engines = _engine_inputs(artifact) if options.builds_engines else None

    def judge(engine: EngineArtifact, plugin: Path | None) -> ParityReport:
        return judge_engine(
            source_of(reference, artifact), engine, with_progress(draw(), progress), StageLog(),
            overrides=checks.tolerances, plugin=plugin, provenance=provenance,
            sru_models=partial(sru_models.of_artifact, artifact.proto),
        )  # fmt: skip

    with new_folder(folder) as temporary:
        built = builder.build(artifact.proto, data, temporary, report, judge)
        report = built.report
        notes = (*_write_page(temporary, report, progress), *built.notes)
        write_file(temporary / name, data)
        write_file(temporary / REPORT, report.as_bytes())
        noise, nodes = noise_samples(reference.signature, 0), instrument.sites(ir.to_proto(model))
        write_reference(
            temporary, source_of(reference, artifact), noise[1::-1], nodes, engines=engines,
            rounded_to="" if artifact.precision == "fp32" else data_type(artifact.precision).name,
        )  # fmt: skip
        write_run_script(temporary)
        facts: dict[str, Any] = {
            "versions": versions(), "command": command, "model": reference.name, "verdict": report.verdict,
            "unfinished": [entry.as_json() for entry in built.unfinished],
        }  # fmt: skip
        sealed = manifest_bytes(temporary, facts)
        write_file(temporary / MANIFEST, sealed)
    digest = sha256_of(sealed)
    return DeployResult(folder, folder / name, digest, report, notes, built.manifests, built.unfinished)


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
