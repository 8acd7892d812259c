"""The pipeline and the Python API: what the command line calls, and what it returns.

ModelSpec --load--> nn.Module --export--> onnx_ir.Model --save--> model.onnx;
verify(reference, artifact) --> ParityReport
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import onnx
import onnx_ir as ir
import torch
from torch import nn

from scconv_deploy import __version__
from scconv_deploy import signature as signatures
from scconv_deploy.building import EngineBuilder, prepare
from scconv_deploy.bundle.artifact import MODEL_FILE, artifact_file
from scconv_deploy.bundle.atomic import check_output_file, check_output_folder, new_folder, write_file
from scconv_deploy.bundle.manifest import MANIFEST, manifest_bytes
from scconv_deploy.bundle.reference import write_reference
from scconv_deploy.errors import MissingRuntimeError, ModelError, UsageError
from scconv_deploy.exporters.build_options import BuildOptions
from scconv_deploy.exporters.engine import EngineManifest
from scconv_deploy.exporters.engine_cache import EngineCache
from scconv_deploy.exporters.onnx import check, export_model, serialize
from scconv_deploy.gate import recognize, swap_reachable
from scconv_deploy.report.load import REPORT_FILE
from scconv_deploy.report.records import ParityReport, StageLog, StageRecord
from scconv_deploy.report.render import render, require_html
from scconv_deploy.rewrite.apply import apply_rules
from scconv_deploy.rewrite.functions import REWRITTEN, MaskForm
from scconv_deploy.signature import Signature
from scconv_deploy.spec import DynamicAxis, ModelSpec, load_with_record
from scconv_deploy.verification import instrument, tolerances
from scconv_deploy.verification.checks import Checks
from scconv_deploy.verification.onnx_file import read_onnx
from scconv_deploy.verification.parity import Artifact, verify_onnx
from scconv_deploy.verification.progress import with_progress
from scconv_deploy.verification.samples import Sample, noise_samples
from scconv_deploy.verification.torch_reference import Reference, TorchReference
from scconv_deploy.zoo.embed import EmbedResult

HTML_FILE = "report.html"
Progress = Callable[[str], None]
MaskFormChoice = Literal["auto", "where", "multiply"]


@dataclass(frozen=True)
class ExportOptions:
    """How the ONNX model is written.

    Attributes:
        opset: 18 to 23.
        mask_form: ``auto`` is ``multiply``, the faster form in ONNX Runtime, as long as it is the only backend, and
            ``where``, which TensorRT fuses, as soon as there is another.
        backends: what is produced: ``onnx``, ``tensorrt``, ``tensorrt-rtx``.
    """

    opset: int = 18
    mask_form: MaskFormChoice = "auto"
    backends: tuple[str, ...] = ("onnx",)

    @property
    def resolved_mask_form(self) -> MaskForm:
        if self.mask_form != "auto":
            return self.mask_form
        return "multiply" if set(self.backends) <= {"onnx"} else "where"


@dataclass(frozen=True)
class ExportResult:
    """An exported file: where it is, its SHA-256, its SRU nodes (site -> variant) and the stages' records."""

    path: Path
    sha256: str
    sites: Mapping[str, str]
    stages: tuple[StageRecord, ...]

    def as_json(self) -> dict[str, Any]:
        return {
            "path": str(self.path),
            "sha256": self.sha256,
            "sites": dict(self.sites),
            "stages": [_stage_json(stage) for stage in self.stages],
        }


@dataclass(frozen=True)
class DeployResult:
    """A bundle: its folder, the artifact in it, the manifest's own digest, the verdict, what it lacks, its engines."""

    folder: Path
    artifact: Path
    digest: str
    report: ParityReport
    notes: tuple[str, ...] = ()
    engines: tuple[EngineManifest, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.report)

    def as_json(self) -> dict[str, Any]:
        return {
            "folder": str(self.folder),
            "artifact": str(self.artifact),
            "digest": self.digest,
            "notes": list(self.notes),
            "engines": [engine.as_json() for engine in self.engines],
            "report": self.report.as_json(),
        }


def silent(message: str) -> None:
    """The default progress: none."""


def _stage_json(stage: StageRecord) -> dict[str, Any]:
    return {
        "name": stage.name,
        "seconds": stage.seconds,
        "applied": list(stage.applied),
        "skipped": [list(pair) for pair in stage.skipped],
    }


def reference_from_spec(spec: ModelSpec, log: StageLog, progress: Progress = silent) -> Reference:
    """Load a model, embed ScConv if asked, and recognise its SRUs.

    Raises:
        UsageError, ModelError, IntegrityError: see :func:`scconv_deploy.spec.load`; or the model refuses its inputs.
    """
    with log.stage("load") as stage:
        progress(f"loading {spec.source}")
        spec = spec.resolved()
        noted: list[str] = []
        model, embedded = load_with_record(spec, noted)
        signature = signatures.from_specs(model, spec.inputs, spec.dynamic, spec.seed)
        stage.applied.append(f"{spec.source} with inputs {', '.join(str(i) for i in spec.inputs)}")
        if spec.weights:
            stage.applied.append(f"weights {spec.weights}")
            stage.skipped += [(f"weights {spec.weights}", problems) for problems in noted if problems]
    if embedded is not None:
        log.records.append(_embedding(embedded))
    return _reference(spec.label, model, signature, spec.seed, log, progress)


def _embedding(embedded: EmbedResult) -> StageRecord:
    applied = (*embedded.summary, *(f"{path}: {what}" for path, what in embedded.replaced))
    return StageRecord("embed", embedded.seconds, applied, embedded.left)


def reference_from_module(
    model: nn.Module | EmbedResult, example_inputs: Any, dynamic: Sequence[DynamicAxis] = (), seed: int = 0
) -> tuple[Reference, StageLog]:
    """The same for a module at hand; it is not changed.

    Args:
        model: or what :func:`scconv_deploy.embed` returned, whose record is then kept.
        example_inputs: a tensor, a tuple of positional arguments, or a dictionary of named ones.
    """
    log = StageLog()
    if isinstance(model, EmbedResult):
        log.records.append(_embedding(model))
        model = model.model
    model = getattr(model, "_orig_mod", model)  # torch.compile's wrapper hides the modules
    if isinstance(model, torch.jit.ScriptModule):
        raise UsageError("The model is TorchScript, which hides its modules.", "Give the eager nn.Module.")
    if any(module.training for module in model.modules()):
        raise UsageError("The model is in train mode.", "Call model.eval() first.")
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = {}
    if isinstance(example_inputs, dict):
        kwargs = example_inputs
    else:
        args = tuple(example_inputs) if isinstance(example_inputs, (tuple, list)) else (example_inputs,)
    signature = signatures.from_example(model, args, kwargs, dynamic)
    return _reference(type(model).__name__, model, signature, seed, log, silent), log


def _reference(
    name: str, model: nn.Module, signature: Signature, seed: int, log: StageLog, progress: Progress
) -> Reference:
    with log.stage("recognize") as stage:
        progress("recognising SRUs by their behaviour")
        _require_float32(model)
        try:
            signature.call(model, signature.tensors)
        except RuntimeError as error:  # torch's word for a shape that does not fit
            shapes = ", ".join(f"{n} {'x'.join(map(str, t.shape))}" for n, t in signature.tensors.items())
            raise ModelError(
                f"{name} refuses its inputs ({shapes}): {str(error).splitlines()[0]}",
                _shape_remedy(name, model, signature),
            ) from error
        recognition = recognize(model, signature.args, signature.kwargs, seed)
        recognition, swapped = swap_reachable(model, recognition, lambda m: signature.call(m, signature.tensors))
        stage.applied += [f"{found.path}: {found.variant}" for found in recognition.srus]
        stage.skipped += [(refusal.path, refusal.reason) for refusal in recognition.refused]
    return Reference(name, model, swapped, recognition, signature)


def _require_float32(model: nn.Module) -> None:
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_floating_point() and tensor.dtype != torch.float32:
            raise ModelError(f"{name} is {tensor.dtype}; the reference is float32.", "Call model.float() first.")


def _shape_remedy(name: str, model: nn.Module, signature: Signature) -> str:
    """The command with the channels that the first convolution wants, where that is what is wrong."""
    first = next((m for m in model.modules() if isinstance(m, nn.Conv2d)), None)
    shape = next((list(t.shape) for t in signature.tensors.values() if t.dim() == 4), None)
    if first is not None and shape is not None and shape[1] != first.in_channels:
        shape[1] = first.in_channels
        return f"Its first convolution takes {first.in_channels} channels: {name} --input {'x'.join(map(str, shape))}"
    return "Give another --input shape."


def export_to_ir(reference: Reference, options: ExportOptions, log: StageLog, progress: Progress = silent) -> ir.Model:
    """Export and check; nothing is written."""
    progress("exporting to ONNX")
    model = export_model(
        reference.swapped,
        reference.recognition,
        reference.signature,
        log,
        opset=options.opset,
        mask_form=options.resolved_mask_form,
        metadata={"scconv_deploy.source": reference.name, "scconv_deploy.mask_form": options.resolved_mask_form},
    )
    with log.stage("rewrite") as stage:
        applied = apply_rules(model, options.resolved_mask_form, options.opset)
        stage.applied += applied.lines() or ["nothing to do"]
        stage.skipped += [(f"{miss.node} ({miss.rule})", miss.reason) for miss in applied.near_misses]
        if applied:
            found = {one.site: one.variant.name for one in applied.fused}
            sites = json.loads(model.metadata_props["scconv_deploy.sites"]) | found
            model.metadata_props["scconv_deploy.sites"] = json.dumps(sites)
            model.metadata_props[REWRITTEN] = json.dumps(sorted(found))
            check(ir.to_proto(model))
    return model


def export_spec(
    spec: ModelSpec, path: Path, options: ExportOptions, force: bool = False, progress: Progress = silent
) -> ExportResult:
    """``scconv-deploy export``."""
    check_output_file(path, force)
    log = StageLog()
    return _write_export(reference_from_spec(spec, log, progress), path, options, log, progress)


def export(
    model: nn.Module | EmbedResult,
    example_inputs: Any,
    path: str | Path,
    *,
    dynamic: Sequence[DynamicAxis] = (),
    options: ExportOptions = ExportOptions(),
    force: bool = False,
) -> ExportResult:
    """Export a module to ONNX, its SRUs as function nodes.

    Args:
        model: in eval mode, float32, on the CPU; it is not changed. Or the result of :func:`scconv_deploy.embed`.
        example_inputs: a tensor, a tuple of positional arguments, or a dictionary of named ones.
        path: the file to write.
        dynamic: axes to leave open; trace such an axis with a size of at least 2.
        force: overwrite.

    Raises:
        ScconvDeployError: with the reason and the remedy.
    """
    check_output_file(Path(path), force)
    reference, log = reference_from_module(model, example_inputs, dynamic)
    return _write_export(reference, Path(path), options, log, silent)


def _write_export(
    reference: Reference, path: Path, options: ExportOptions, log: StageLog, progress: Progress
) -> ExportResult:
    model = export_to_ir(reference, options, log, progress)
    data = serialize(model)
    write_file(path, data)
    sites = json.loads(model.metadata_props["scconv_deploy.sites"])
    return ExportResult(path, hashlib.sha256(data).hexdigest(), sites, tuple(log.records))


def deploy_spec(
    spec: ModelSpec,
    folder: Path,
    options: ExportOptions,
    *,
    checks: Checks = Checks(),
    engines: Sequence[BuildOptions] = (),
    cache: EngineCache | None = None,
    force: bool = False,
    command: str = "",
    progress: Progress = silent,
) -> DeployResult:
    """``scconv-deploy deploy``: export, verify, build engines, and write a bundle.

    An artifact that fails is named ``*.rejected``, and no engine is built from it.
    """
    check_output_folder(folder, force)
    tolerances.table(checks.tolerances)  # refused before any work is done
    prepared = [(wanted, prepare(wanted, cache)) for wanted in engines]
    log = StageLog()
    reference = reference_from_spec(spec, log, progress)
    samples = checks.samples(reference, spec.seed, spec.source)
    builder = EngineBuilder(prepared, cache, command, progress)
    provenance = _provenance(spec, command)
    return _deploy(reference, folder, options, checks, samples, log, command, progress, provenance, builder)


def deploy(
    model: nn.Module | EmbedResult,
    example_inputs: Any,
    folder: str | Path,
    *,
    dynamic: Sequence[DynamicAxis] = (),
    options: ExportOptions = ExportOptions(),
    checks: Checks = Checks(),
    force: bool = False,
) -> DeployResult:
    """Export a module, verify the result against it, and write the bundle; arguments as for :func:`export`.

    Args:
        checks: real data, tolerances, and what runs the artifact.

    Returns:
        The result, falsy when parity failed.
    """
    check_output_folder(Path(folder), force)
    reference, log = reference_from_module(model, example_inputs, dynamic)
    samples = checks.samples(reference, 0)
    return _deploy(reference, Path(folder), options, checks, samples, log, "scconv_deploy.deploy", silent, {})


def _deploy(
    reference: Reference,
    folder: Path,
    options: ExportOptions,
    checks: Checks,
    samples: list[Iterable[Sample]],
    log: StageLog,
    command: str,
    progress: Progress,
    provenance: Mapping[str, str],
    builder: EngineBuilder = EngineBuilder(),
) -> DeployResult:
    model = export_to_ir(reference, options, log, progress)
    data = serialize(model)
    proto = onnx.load_model_from_string(data)
    report = verify_onnx(
        reference, Artifact(proto, MODEL_FILE, data), with_progress(samples, progress), log,
        judging=checks.judging, provenance=provenance,
    )  # fmt: skip
    name = MODEL_FILE if report else f"{MODEL_FILE}.rejected"
    with new_folder(folder) as temporary:
        engines, report, built = builder.build(proto, data, temporary, report)
        page, notes = _page(report, progress)
        write_file(temporary / name, data)
        write_file(temporary / REPORT_FILE, report.as_bytes())
        if page is not None:
            write_file(temporary / HTML_FILE, page)
        noise = noise_samples(reference.signature, 0)
        write_reference(temporary, TorchReference(reference), noise[::-1], instrument.sites(ir.to_proto(model)))
        facts = {"versions": _versions(), "command": command, "model": reference.name, "verdict": report.verdict}
        sealed = manifest_bytes(temporary, facts)
        write_file(temporary / MANIFEST, sealed)
    digest = hashlib.sha256(sealed).hexdigest()
    return DeployResult(folder, folder / name, digest, report, (*notes, *built), engines)


def _page(report: ParityReport, progress: Progress) -> tuple[bytes | None, tuple[str, ...]]:
    """``report.html``, or why there is none: a verdict must not be lost because pictures cannot be drawn."""
    try:
        require_html()
    except MissingRuntimeError as error:
        return None, (f"{HTML_FILE} was not written: {error}",)
    progress("drawing the report")
    return render(report, "html").encode(), ()


def verify_spec(
    artifact: Path,
    spec: ModelSpec,
    *,
    checks: Checks = Checks(),
    command: str = "",
    progress: Progress = silent,
) -> ParityReport:
    """``scconv-deploy verify``: judge an ONNX file, or the one in a bundle, against a model."""
    tolerances.table(checks.tolerances)
    path, notes = artifact_file(artifact)
    proto = read_onnx(path)
    log = StageLog()
    reference = reference_from_spec(spec, log, progress)
    samples = with_progress(checks.samples(reference, spec.seed, spec.source), progress)
    return verify_onnx(
        reference, Artifact(proto, str(path), path.read_bytes()), samples, log,
        judging=checks.judging, provenance=_provenance(spec, command) | notes,
    )  # fmt: skip


def verify(
    artifact: str | Path,
    model: nn.Module | EmbedResult,
    example_inputs: Any,
    *,
    dynamic: Sequence[DynamicAxis] = (),
    checks: Checks = Checks(),
) -> ParityReport:
    """Judge an ONNX file, or the one in a bundle, against a module; arguments as for :func:`deploy`.

    Returns:
        The report, falsy when parity failed.
    """
    path, notes = artifact_file(Path(artifact))
    proto = read_onnx(path)
    reference, log = reference_from_module(model, example_inputs, dynamic)
    samples = with_progress(checks.samples(reference, 0), silent)
    artifact_read = Artifact(proto, str(path), path.read_bytes())
    return verify_onnx(reference, artifact_read, samples, log, judging=checks.judging, provenance=notes)


def _provenance(spec: ModelSpec, command: str) -> dict[str, str]:
    facts = {"seed": str(spec.seed), "command": command, "kwargs": json.dumps(dict(spec.kwargs), sort_keys=True)}
    if spec.embed is not None:
        facts["embed"] = str(spec.embed)
    if spec.weights is not None:
        facts["weights_sha256"] = hashlib.sha256(spec.weights.read_bytes()).hexdigest()
    return facts


def _versions() -> dict[str, str]:
    names = ("torch", "onnx", "onnx-ir", "onnxscript", "onnxruntime", "onnxsim", "numpy")
    found = {"scconv-deploy": __version__}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "unknown"
    return found
