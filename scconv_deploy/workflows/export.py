"""``scconv-deploy export`` and its Python function: write a model to one ONNX file, its SRUs as nodes."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import onnx_ir as ir
from torch import nn

from scconv_deploy.errors import ModelError, UsageError
from scconv_deploy.exporters.onnx import export_model
from scconv_deploy.exporters.trained_weights import store_trained_weights
from scconv_deploy.graph.contract import CRU_FORM, OPSETS, REWRITTEN, CruForm, MaskForm
from scconv_deploy.graph.file import check, serialize
from scconv_deploy.graph.hygiene import tidy
from scconv_deploy.graph.types import FIRST_OPSET, IoTypes, Precision
from scconv_deploy.model.fake_quantize import unprovable
from scconv_deploy.model.inputs import DynamicAxis
from scconv_deploy.model.prepare import Reference, reference_from_module, reference_from_spec
from scconv_deploy.model.spec import ModelSpec
from scconv_deploy.precision.half import HalfOptions, converted
from scconv_deploy.precision.int8 import FIRST_HALF_OPSET
from scconv_deploy.records.codec import encode
from scconv_deploy.records.stage import Progress, StageLog, StageRecord, silent
from scconv_deploy.rewrite.apply import apply_rules
from scconv_deploy.system.atomic import check_output_file, write_file
from scconv_deploy.system.environment import sha256_of
from scconv_deploy.workflows.calibrate import require_own_file
from scconv_deploy.workflows.quantize import QuantizeOptions, quantize_model
from scconv_deploy.zoo.embed import EmbedResult

MaskFormChoice = Literal["auto", "where", "multiply"]
CruFormChoice = Literal["auto", "as-is", "halves", "merged"]
_HALVES_FOR_INT8 = (
    "--cru auto takes halves for int8: merged convolutions have no modules in PyTorch that could prove them, and would "
    "stay in float"
)


@dataclass(frozen=True)
class ExportOptions:
    """Options of the exported ONNX model.

    Attributes:
        opset: 18 to 23; None takes the lowest that the precision allows, 18 or (bf16) 22.
        mask_form: ``auto`` is ``multiply``, the faster form in ONNX Runtime, if ``onnx`` is the only backend, else
            ``where``, which TensorRT fuses.
        backends: backends to produce artifacts for: ``onnx``, ``tensorrt``, ``tensorrt-rtx``.
        precision: type of the data; statistics, gates and parameters of SRUs stay in float32.
        io: types of the graph's inputs and outputs if the precision is half.
        keep: patterns (``*`` and ``?``) of nodes, weights or values that stay in float32.
        quantization: int8 on top of the precision; None for none. ``keep`` then names what stays in the precision.
        cru: form of the CRUs; ``auto`` is ``halves`` (no concatenation of 2C channels), the fastest in ONNX Runtime, if
            ``onnx`` is the only backend or the graph is quantised, else ``merged`` (two convolutions), which moves the
            fewest bytes in TensorRT.

    Raises:
        UsageError: an unknown value, or options that contradict each other.
    """

    opset: int | None = None
    mask_form: MaskFormChoice = "auto"
    backends: tuple[str, ...] = ("onnx",)
    precision: Precision = "fp32"
    io: IoTypes = "float32"
    keep: tuple[str, ...] = ()
    cru: CruFormChoice = "auto"
    quantization: QuantizeOptions | None = None

    def __post_init__(self) -> None:
        for name, known in (
            ("precision", Precision),
            ("io", Literal["float32", "half"]),
            ("mask_form", MaskFormChoice),
            ("cru", CruFormChoice),
        ):
            if getattr(self, name) not in get_args(known):
                raise UsageError(f"{name} is {getattr(self, name)!r}.", f"There are {', '.join(get_args(known))}.")
        if self.precision == "fp32" and self.quantization is not None and self.io != "float32":
            raise UsageError("--io half is for half precision.", "Add --precision int8+fp16 or int8+bf16.")
        if self.precision == "fp32" and self.quantization is None:
            if self.io != "float32" or self.keep:
                name = "--io half" if self.io != "float32" else f"--keep {self.keep[0]!r}"
                raise UsageError(f"{name} is for half precision.", "Add --precision fp16 or bf16.")
        elif self.opset is not None and self.opset < (first := self._first_opset):
            raise UsageError(
                f"--precision {self.label} needs opset {first} or later, found {self.opset}.",
                f"Use --opset {first}, or leave --opset out.",
            )

    def refuse_cache(self, output: Path) -> None:
        """Refuse a calibration cache that is the output, or stands in it (UsageError)."""
        if self.quantization is not None:
            require_own_file(self.quantization.calibration.cache, output)

    @property
    def resolved_opset(self) -> int:
        if self.opset is not None:
            return self.opset
        return self._first_opset

    @property
    def _first_opset(self) -> int:
        """Lowest opset of the precision."""
        first = OPSETS[0] if self.precision == "fp32" else FIRST_OPSET[self.precision]
        halved = self.precision != "fp32" and self.quantization is not None
        return max(first, FIRST_HALF_OPSET) if halved else first

    @property
    def label(self) -> str:
        """Precision as the command line names it."""
        if self.quantization is None:
            return self.precision
        return "int8" if self.precision == "fp32" else f"int8+{self.precision}"

    @property
    def half(self) -> HalfOptions | None:
        """Options of the conversion to half; None for float32."""
        if self.precision == "fp32":
            return None
        return HalfOptions(self.precision, self.io, self.keep if self.quantization is None else ())

    @property
    def resolved_mask_form(self) -> MaskForm:
        if self.mask_form != "auto":
            return self.mask_form
        return "where" if self.builds_engines else "multiply"

    @property
    def resolved_cru(self) -> CruForm:
        if self.cru != "auto":
            return self.cru
        return "merged" if self.builds_engines and self.quantization is None else "halves"

    @property
    def builds_engines(self) -> bool:
        """Whether a backend besides ``onnx`` is requested."""
        return not set(self.backends) <= {"onnx"}


@dataclass(frozen=True)
class ExportResult:
    """Result of an export: path, SHA-256, SRU nodes (site -> variant) and stage records."""

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


def _stage_json(stage: StageRecord) -> dict[str, Any]:
    return {name: value for name, value in encode(stage).items() if value is not None}


def export_to_ir(reference: Reference, options: ExportOptions, log: StageLog, progress: Progress = silent) -> ir.Model:
    """Export a prepared model to onnx-ir and check it, without writing a file."""
    progress("exporting to ONNX")
    model = export_model(
        reference.swapped,
        reference.recognition,
        reference.signature,
        log,
        opset=options.resolved_opset,
        mask_form=options.resolved_mask_form,
        metadata={
            "scconv_deploy.source": reference.name,
            "scconv_deploy.mask_form": options.resolved_mask_form,
            CRU_FORM: options.resolved_cru,
            **reference.metadata,
        },
    )
    with log.stage("rewrite") as stage:
        applied = apply_rules(model, options.resolved_mask_form, options.resolved_opset, options.resolved_cru)
        stage.applied += applied.lines() or ["nothing to do"]
        if applied.crus and options.cru == "auto" and options.quantization is not None:
            stage.applied.append(_HALVES_FOR_INT8)
        stage.skipped += applied.refusals()
        if applied.gates:
            found = {one.site: one.gate.variant.label for one in applied.fused}
            sites = json.loads(model.metadata_props["scconv_deploy.sites"]) | found
            model.metadata_props["scconv_deploy.sites"] = json.dumps(sites)
            model.metadata_props[REWRITTEN] = json.dumps(sorted(found))
        if stored := store_trained_weights(model, reference.swapped):
            stage.applied.append(f"{stored} layers with the int8 weights that training rounded them to")
        return _tidied(model, "rewritten graph")


def in_precision(
    model: ir.Model,
    options: ExportOptions,
    log: StageLog,
    progress: Progress = silent,
    module: nn.Module | None = None,
) -> ir.Model:
    """Convert an exported model to the requested precision, and quantise it if asked; the given one is not changed.

    Args:
        module: the model in PyTorch that int8 is proved against; None if it is not at hand.

    Raises:
        ModelError: the model is quantised already, because it was trained with fake quantisation.
    """
    if (options.half or options.quantization) and any(n.op_type == "QuantizeLinear" for n in model.graph):
        raise ModelError(
            f"The model was trained with fake quantisation and is int8 as it is, so --precision {options.label} is not "
            "for it.",
            "Leave --precision out, or give the float model.",
        )
    if options.half is not None:
        progress(f"converting to {options.precision}")
        with log.stage("precision") as stage:
            result = converted(model, options.half)
            stage.applied.append(f"{result.half} nodes in {options.precision}, {result.casts} casts")
            stage.skipped += result.kept
            model = _tidied(result.model, "converted graph")
    if options.quantization is not None:
        proto = ir.to_proto(model)
        digest = sha256_of(proto.SerializeToString(deterministic=True))
        proved_by = None if module is None else partial(unprovable, module)
        made = quantize_model(proto, digest, options.quantization, log, progress, proved_by)
        model = ir.from_proto(made.proto)
    return model


def _tidied(model: ir.Model, name: str) -> ir.Model:
    """Bring a model to the form of all files that this tool writes, and check it (ModelError)."""
    proto = ir.to_proto(model)
    tidy(proto)
    check(proto, name)
    return ir.from_proto(proto)


def export_spec(
    spec: ModelSpec, path: Path, options: ExportOptions, force: bool = False, progress: Progress = silent
) -> ExportResult:
    """Load a model and export it; ``scconv-deploy export``."""
    check_output_file(path, force)
    options.refuse_cache(path)
    reference, log = reference_from_spec(spec, progress)
    return _write_export(reference, path, options, log, progress)


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
        model: module in eval mode, float32, on the CPU, or the result of :func:`scconv_deploy.embed`; not changed.
        example_inputs: a tensor, a tuple of positional arguments, or a dictionary of named ones.
        path: the file to write.
        dynamic: axes to leave open; the example needs a size of at least 2 there.
        force: overwrite.

    Raises:
        ScconvDeployError: with the reason and the remedy.
    """
    check_output_file(Path(path), force)
    options.refuse_cache(Path(path))
    reference, log = reference_from_module(model, example_inputs, dynamic)
    return _write_export(reference, Path(path), options, log, silent)


def _write_export(
    reference: Reference, path: Path, options: ExportOptions, log: StageLog, progress: Progress
) -> ExportResult:
    model = in_precision(export_to_ir(reference, options, log, progress), options, log, progress, reference.model)
    data = serialize(model)
    write_file(path, data)
    sites = json.loads(model.metadata_props["scconv_deploy.sites"])
    return ExportResult(path, sha256_of(data), sites, tuple(log.records))
