"""``scconv-deploy inspect``: contents of a model or an artifact."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import onnx
import torch
from onnx import TensorProto
from torch.utils.flop_counter import FlopCounterMode

from scconv_deploy.errors import MissingRuntimeError
from scconv_deploy.gate.gate import Gate
from scconv_deploy.graph import instrument
from scconv_deploy.graph.file import read_onnx
from scconv_deploy.graph.types import described_precision
from scconv_deploy.graph.unknown import foreign_operators
from scconv_deploy.model.prepare import Reference, reference_from_spec
from scconv_deploy.model.replay import record_gates
from scconv_deploy.model.spec import ModelSpec
from scconv_deploy.records.codec import encode
from scconv_deploy.records.stage import Progress, StageRecord, silent, weights_lines
from scconv_deploy.runtimes.tensorrt.engine import EngineArtifact, load_engine
from scconv_deploy.runtimes.tensorrt.runner import TensorRTRunner, check_plugin_of
from scconv_deploy.verification.preprocessing import Preprocessing
from scconv_deploy.verification.samples import Sample, load_samples, noise_samples
from scconv_deploy.workflows.subject import Bundle, OnnxFile

_FOREIGN = "no operator of ONNX or ONNX Runtime, nor a function of the file; a runtime needs a plugin for it"


@dataclass(frozen=True)
class TensorInfo:
    """Graph input or output; an open axis is a symbol's name."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True)
class OnnxInspection:
    """Contents of an ONNX file.

    Attributes:
        functions: ``domain::name`` (with the overload) -> number of nodes in the body.
        sites: SRU node -> its variant, or its operator if the file does not say.
        operators: number of nodes by operator, without function bodies.
        parameters: number of values in the initializers.
        precision: type of the data: ``fp32``, ``fp16`` or ``bf16``, or the quantisation ``int8 (Q/DQ)``, on top of half
            ``int8 (Q/DQ) on fp16``.
    """

    path: str
    file_bytes: int
    ir_version: int
    opsets: dict[str, int]
    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]
    functions: dict[str, int]
    sites: dict[str, str]
    operators: dict[str, int]
    parameters: int
    metadata: dict[str, str]
    precision: str = "fp32"
    notes: tuple[str, ...] = ()

    def as_json(self) -> dict[str, Any]:
        return {"kind": "onnx", **asdict(self)}


@dataclass(frozen=True)
class EngineInspection:
    """Contents of an engine: its manifest, and JSON texts of its layers if the library can open it here.

    Attributes:
        unopened: why the engine could not be opened; "" if it was.
    """

    engine: EngineArtifact
    layers: tuple[str, ...] = ()
    unopened: str = ""

    def as_json(self) -> dict[str, Any]:
        return {
            "kind": "engine", **self.engine.as_json(), "plan": encode(self.engine.manifest.plan),
            "layers_of_the_engine": list(self.layers),
            "unopened": self.unopened,
        }  # fmt: skip


def inspect_engine(path: Path, plugin: Path | None = None) -> EngineInspection:
    """Read an engine's manifest, and open the engine if there is a library and a GPU for it.

    Args:
        plugin: plugin library that the engine was built with; without it such an engine is not opened.

    Raises:
        UsageError: the engine was built without a plugin; or see
            :func:`scconv_deploy.runtimes.tensorrt.engine.load_engine`.
        IntegrityError: the engine was built with another plugin; or see ``load_engine``.
    """
    artifact = load_engine(path)
    if plugin is not None:
        check_plugin_of(artifact, plugin)
    try:
        with TensorRTRunner(artifact, plugin=plugin) as runner:
            return EngineInspection(artifact, runner.layer_information())
    except MissingRuntimeError as error:
        return EngineInspection(artifact, (), error.message)


@dataclass(frozen=True)
class SRUInspection:
    """One SRU of a model.

    Attributes:
        training: whether gamma and beta are trained, as text.
        open_share: share of gates that are open on the samples.
        never_open, always_open: number of channels whose gates are never, or always, open on the samples.
    """

    site: str
    variant: str
    channels: int
    training: str
    open_share: float
    never_open: int
    always_open: int


@dataclass(frozen=True)
class ModelInspection:
    """Contents of a PyTorch model.

    Attributes:
        parameters: number of trainable values.
        multiply_adds: multiply-adds of one sample in convolutions and matrix products (FLOPs in many papers).
        left_alone: candidate -> why it was not recognised as an SRU.
        samples: names of the samples that the gates were computed on.
        weights: origin of the parameters: files loaded, number of random ones.
        stages: stage records of loading and preparing the model.
    """

    model: str
    parameters: int
    multiply_adds: int
    inputs: tuple[str, ...]
    srus: tuple[SRUInspection, ...]
    left_alone: dict[str, str]
    samples: tuple[str, ...]
    weights: tuple[str, ...] = ()
    stages: tuple[StageRecord, ...] = ()

    def as_json(self) -> dict[str, Any]:
        return {"kind": "model", **asdict(self)}


def inspect_onnx(artifact: OnnxFile | Bundle) -> OnnxInspection:
    """Read an ONNX file, or the one in a bundle.

    Raises:
        UsageError, IntegrityError: see :func:`scconv_deploy.graph.file.read_onnx`.
    """
    path, facts = artifact.model_file()
    model = read_onnx(path)
    known = json.loads(next((p.value for p in model.metadata_props if p.key == "scconv_deploy.sites"), "{}"))
    return OnnxInspection(
        path=str(path),
        file_bytes=path.stat().st_size,
        ir_version=model.ir_version,
        opsets={o.domain or "ai.onnx": o.version for o in model.opset_import},
        inputs=tuple(_tensor_info(value) for value in model.graph.input),
        outputs=tuple(_tensor_info(value) for value in model.graph.output),
        functions={_function_name(f): len(f.node) for f in model.functions},
        sites={site: known.get(site, node.op_type) for site, node in instrument.sites(model).items()},
        operators=dict(Counter(_operator(node) for node in model.graph.node).most_common()),
        parameters=sum(_size(tensor) for tensor in model.graph.initializer),
        metadata={p.key: p.value for p in model.metadata_props},
        precision=described_precision(model),
        notes=(
            *(f"{key}: {value}" for key, value in facts.items()),
            *(f"{name}: {_FOREIGN}" for name in foreign_operators(model)),
        ),
    )


def _tensor_info(value: onnx.ValueInfoProto) -> TensorInfo:
    tensor = value.type.tensor_type
    shape = tuple(d.dim_value if d.HasField("dim_value") else d.dim_param or "?" for d in tensor.shape.dim)
    return TensorInfo(value.name, TensorProto.DataType.Name(tensor.elem_type).lower(), shape)


def _function_name(function: onnx.FunctionProto) -> str:
    return f"{function.domain}::{function.name}" + (f" ({function.overload})" if function.overload else "")


def _operator(node: onnx.NodeProto) -> str:
    return f"{node.domain}::{node.op_type}" if node.domain not in ("", "ai.onnx") else node.op_type


def _size(tensor: onnx.TensorProto) -> int:
    size = 1
    for dim in tensor.dims:
        size *= dim
    return size


def inspect_model(spec: ModelSpec, data: str | None = None, progress: Progress = silent) -> ModelInspection:
    """Load a model and look at its SRUs.

    Args:
        data: see :func:`scconv_deploy.verification.samples.load_samples`; seeded noise without it.
    """
    reference, log = reference_from_spec(spec, progress)
    preprocessing = Preprocessing.of(spec.source, reference.model)
    samples: Iterable[Sample]
    if data:
        samples = load_samples(data, reference.signature, preprocessing, checkpoint=reference.checkpoint)
    else:
        samples = noise_samples(reference.signature, spec.seed)[:2]
    known = spec.inputs or (reference.checkpoint.inputs if reference.checkpoint else ())
    progress("watching the gates")
    return ModelInspection(
        model=spec.label,
        parameters=sum(p.numel() for p in reference.model.parameters()),
        multiply_adds=multiply_adds(reference),
        inputs=tuple(str(i) for i in replace(spec, inputs=known).resolved().inputs),
        srus=_srus(reference, samples),
        left_alone={r.path: r.reason for r in reference.recognition.refused},
        samples=tuple(str(s) for s in samples),
        weights=weights_lines(log.records),
        stages=tuple(log.records),
    )


def multiply_adds(reference: Reference) -> int:
    """Multiply-adds of one sample: half of torch's FLOP count, divided by the batch."""
    batch = max((len(t) for t in reference.signature.tensors.values() if t.dim()), default=1)
    with FlopCounterMode(display=False) as counter:
        reference.signature.call(reference.model, reference.signature.tensors)
    return counter.get_total_flops() // 2 // batch


def _srus(reference: Reference, samples: Iterable[Sample]) -> tuple[SRUInspection, ...]:
    opened: dict[str, torch.Tensor] = {}
    total: Counter[str] = Counter()
    gates: dict[str, Gate] = {}
    for sample in samples:
        for site, recorded in record_gates(reference.swapped, reference.signature, sample.tensors)[1].items():
            count = recorded.mask.sum(dim=(0, 2, 3))
            opened[site] = opened[site] + count if site in opened else count
            total[site] += recorded.mask.numel() // recorded.mask.shape[1]
            gates[site] = recorded.swapped.gate
    return tuple(
        SRUInspection(
            site=site,
            variant=str(gate.variant),
            channels=gate.channels,
            training=describe_training(gate),
            open_share=float(opened[site].sum()) / (total[site] * gate.channels),
            never_open=int((opened[site] == 0).sum()),
            always_open=int((opened[site] == total[site]).sum()),
        )
        for site, gate in gates.items()
    )


def describe_training(gate: Gate) -> str:
    """Describe whether gamma and beta are trained.

    A hard mask passes no gradient to gamma and beta, so the original code trains neither: beta stays exactly 0, and
    gamma keeps its random initial values (weight decay may scale them).
    """
    if bool((gate.beta != 0).any()):
        return "trained"
    if bool((gate.gamma == 1).all()):
        return "untrained: gamma 1, beta 0"
    why = " (a hard mask gives them no gradient)" if gate.variant.operator == "SRU" else ""
    return f"untrained: beta 0, gamma random, std {float(gate.gamma.std()):.2f}{why}"
