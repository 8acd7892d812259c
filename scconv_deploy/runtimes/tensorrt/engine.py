"""Engines on disk: the plan and its manifest (``F.engine.json``), checked before a library opens the plan.

An engine is native code, and deserialising an engine runs it. TensorRT gets only bytes whose SHA-256 is the manifest's.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from scconv_deploy.errors import IntegrityError, UsageError
from scconv_deploy.records.codec import DecodeError, decode, encode, parse
from scconv_deploy.records.engine import PlanTraffic
from scconv_deploy.system.atomic import check_output_file, write_file
from scconv_deploy.system.environment import sha256_of

SCHEMA_VERSION = 1
_SRU_NODE = re.compile(r"\| .+ \(SRU(?:Norm|Soft)?\)$")


@dataclass(frozen=True)
class EngineProfile:
    """Range of one input in an optimization profile: smallest, best and largest shape; equal if the input is static.

    ``index`` counts the engine's optimization profiles from 0; each of them has a range for every input.
    """

    input: str
    minimum: tuple[int, ...]
    optimum: tuple[int, ...]
    maximum: tuple[int, ...]
    index: int = 0

    def takes(self, shape: Sequence[int]) -> bool:
        """Whether a shape is inside the range."""
        return len(shape) == len(self.minimum) and all(
            low <= size <= high for low, size, high in zip(self.minimum, shape, self.maximum, strict=True)
        )


@dataclass(frozen=True)
class EngineTensor:
    """Input or output of an engine; a dynamic axis is -1."""

    name: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class EngineLayer:
    """Layer of the network before fusion, and the types of its outputs."""

    name: str
    type: str
    dtypes: tuple[str, ...]


@dataclass(frozen=True)
class EngineSRU:
    """Form of one SRU node in an engine (fused plugin or expanded function), and the reason.

    ``layers`` is the number of layers that the library made from the node, before fusion; 0 if it does not say.
    """

    site: str
    form: Literal["plugin", "expanded"]
    reason: str
    layers: int = 0


@dataclass(frozen=True)
class EngineQuantized:
    """A layer whose weights the model stores as integers, and the types of the operands that its kernel multiplies.

    ``operands`` are those of data and weights, in the library's words; empty if it does not list its kernels.
    """

    node: str
    operands: tuple[str, ...] = ()

    @property
    def in_int8(self) -> bool:
        return self.operands == ("Int8", "Int8")


@dataclass(frozen=True)
class DebugTensor:
    """End of an SRU that can be read from an engine: its input x or its output y.

    It is an input or an output of the engine, or was marked as a debug tensor.
    """

    name: str
    site: str
    side: Literal["x", "y"]


@dataclass(frozen=True)
class PlanLayer:
    """A kernel of a compiled plan.

    Attributes:
        name, kind: in the library's words.
        bytes_moved: of its inputs and outputs, weights not counted; None where an open axis hides them.
        nodes: ONNX nodes that it computes, or takes part in.
        operands: types of its first input and of its first constant, or second input: data and weights of a layer.
    """

    name: str
    kind: str
    bytes_moved: int | None
    nodes: tuple[str, ...] = ()
    operands: tuple[str, ...] = ()

    @property
    def of_sru(self) -> bool:
        """Whether it takes part in an SRU: its plugin, or nodes that the parser called from its function."""
        return self.kind == "custom_layer" or any(_SRU_NODE.search(node) for node in self.nodes)


@dataclass(frozen=True)
class CompiledPlan:
    """Kernels of a compiled plan, and the bytes that they move, for the first optimization profile.

    Attributes:
        bytes_moved: of all layers; None where an open axis hides those of one.
        launches: kernels that run, in one pass.
        batch: what an open batch axis counts as in the bytes; None where no axis is open, or another one is.
        layers: in the order of their launches.
    """

    bytes_moved: int | None
    launches: int
    batch: int | None
    layers: tuple[PlanLayer, ...]

    def traffic(self, name: str, backend: str, baseline: bool = False) -> PlanTraffic:
        """The plan as a report has it."""
        kernels = tuple(layer.bytes_moved for layer in self.layers)
        srus = tuple(index for index, layer in enumerate(self.layers) if layer.of_sru)
        return PlanTraffic(name, backend, baseline, self.batch, self.bytes_moved, self.launches, kernels, srus)


@dataclass(frozen=True)
class EngineManifest:
    """Manifest of an engine; its settings were read back from the library.

    Attributes:
        sha256, file_bytes: SHA-256 and size of the plan.
        backend, library_version: ``tensorrt`` or ``tensorrt-rtx``, and the version that built the engine.
        target: requested target.
        compute_capabilities: compute capabilities given to the library; empty for its default.
        gpu: GPU that the engine was built on; "" if none was needed.
        flags: builder flags that were set.
        settings: optimization level, workspace in bytes and the like.
        layers: layers before fusion.
        plugin_sha256: SHA-256 of the plugin library; "" without a plugin.
        onnx_sha256: SHA-256 of the ONNX file that the weights come from.
        warnings: warnings of the library, each once.
        versions: versions of scconv-deploy and Python.
        structure_sha256: SHA-256 of the model without the values of its weights; "" if an engine was
            built on a device, or from folded constants.
        refitted_from: SHA-256 of the engine whose weights were replaced by those of the ONNX file; "" if none were.
        debug_tensors: ends of SRUs that can be read, with ``--debug-tensors``, in the order of the SRUs.
        quantized: layers whose weights the model stores as integers, in the graph's order.
    """

    sha256: str
    file_bytes: int
    backend: str
    library_version: str
    target: str
    compute_capabilities: tuple[str, ...]
    gpu: str
    flags: tuple[str, ...]
    settings: dict[str, Any]
    inputs: tuple[EngineTensor, ...]
    outputs: tuple[EngineTensor, ...]
    profiles: tuple[EngineProfile, ...]
    layers: tuple[EngineLayer, ...]
    srus: tuple[EngineSRU, ...]
    plugin_sha256: str
    onnx_sha256: str
    command: str
    warnings: tuple[str, ...] = ()
    build_seconds: float = 0.0
    versions: dict[str, str] = field(default_factory=dict)
    plan: CompiledPlan | None = None
    structure_sha256: str = ""
    refitted_from: str = ""
    debug_tensors: tuple[DebugTensor, ...] = ()
    quantized: tuple[EngineQuantized, ...] = ()

    def as_json(self) -> dict[str, Any]:
        """JSON values of the manifest, with a seal (a hash of the rest) that reveals edits."""
        document = {"schema_version": SCHEMA_VERSION, **encode(self)}
        return document | {"seal": _seal(document)}

    @property
    def data_type(self) -> Literal["float32", "float16", "bfloat16"]:
        """Type of the data: half if any layer has a half output. The statistics of gates are float32 in any case."""
        found = {dtype for layer in self.layers for dtype in layer.dtypes}
        return "bfloat16" if "BF16" in found else "float16" if "HALF" in found else "float32"

    @property
    def is_quantized(self) -> bool:
        """Whether any layer rounds to integers."""
        return bool(self.quantized) or any(layer.type in ("QUANTIZE", "DEQUANTIZE") for layer in self.layers)

    @property
    def precision_name(self) -> str:
        """Precision as the command line names it, ``fp32`` or ``int8+fp16``."""
        between = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}[self.data_type]
        if not self.is_quantized:
            return between
        return "int8" if between == "fp32" else f"int8+{between}"

    @property
    def left_in_float(self) -> list[EngineQuantized]:
        """Layers with integer weights whose kernel is known not to multiply integers."""
        return [layer for layer in self.quantized if layer.operands and not layer.in_int8]

    @property
    def summary(self) -> str:
        """Library, compute capabilities and size in one line, as text."""
        where = ", ".join(self.compute_capabilities) or self.gpu or self.target
        kind = f"{self.precision_name} engine" if self.is_quantized else "engine"
        return f"{self.backend} {self.library_version} {kind} for {where}, {self.file_bytes / 1e6:.1f} MB"


@dataclass(frozen=True)
class EngineArtifact:
    """Engine on disk: path of the plan, and its manifest."""

    path: Path
    manifest: EngineManifest

    def verified_bytes(self) -> bytes:
        """Read the plan and check its bytes against the manifest.

        Raises:
            IntegrityError: the plan was truncated or changed, or the manifest is another engine's.
        """
        data = _read(self.path)
        check_bytes(self.path, data, self.manifest)
        return data

    def as_json(self) -> dict[str, Any]:
        return {"path": str(self.path), "manifest": self.manifest.as_json()}


def sidecar(path: Path) -> Path:
    """Path of the manifest beside an engine."""
    return path.with_name(path.name + ".json")


def write_engine(path: Path, data: bytes, manifest: EngineManifest) -> EngineArtifact:
    """Write the plan, then its manifest: an interrupted write leaves an engine that is refused."""
    write_file(path, data)
    write_file(sidecar(path), (json.dumps(manifest.as_json(), indent=1) + "\n").encode())
    return EngineArtifact(path, manifest)


def check_engine_output(output: Path, source: Path, force: bool) -> None:
    """Refuse an engine's path before anything takes time (UsageError): it exists, or is an ONNX file's name."""
    for path in (output, sidecar(output)):
        check_output_file(path, force)
    if output.suffix == ".onnx" or output.resolve() == source.resolve():
        raise UsageError(f"{output} would be an engine under an ONNX file's name.", "Name it for example model.engine.")


def reject(engine: EngineArtifact) -> EngineArtifact:
    """Rename an engine that failed parity, and its manifest, to ``*.rejected``, so that nobody ships it by accident."""
    rejected = engine.path.with_name(engine.path.name + ".rejected")
    sidecar(engine.path).replace(sidecar(rejected))  # the manifest first: without it the engine is refused
    engine.path.replace(rejected)
    return EngineArtifact(rejected, engine.manifest)


def load_engine(path: Path) -> EngineArtifact:
    """Read a manifest and check the engine's bytes against it, without the library.

    Raises:
        UsageError: there is no such file.
        IntegrityError: the manifest is missing, damaged, edited, or another engine's.
    """
    if not path.is_file():
        raise UsageError(f"{path} {'is not a file' if path.exists() else 'does not exist'}.", "Check the path.")
    place = sidecar(path)
    if not place.is_file():
        raise IntegrityError(
            f"{path} has no manifest {place.name}, so nobody knows what it is.", "Copy both files, or build it again."
        )
    artifact = EngineArtifact(path, _parse(place, _read(place)))
    artifact.verified_bytes()
    return artifact


def check_bytes(path: Path, data: bytes, manifest: EngineManifest) -> None:
    """Refuse bytes of another size or SHA-256 than the manifest's (IntegrityError)."""
    if len(data) != manifest.file_bytes:
        raise IntegrityError(
            f"{path} has {len(data)} bytes, its manifest says {manifest.file_bytes}.", "Copy or build it again."
        )
    found = sha256_of(data)
    if found != manifest.sha256:
        raise IntegrityError(
            f"{path}: its SHA-256 is {found[:12]}..., its manifest says {manifest.sha256[:12]}....",
            "Do not use it; build it again.",
        )


def choose_profile(profiles: Sequence[EngineProfile], shapes: Mapping[str, Sequence[int]]) -> int:
    """Index of the optimization profile that input shapes run with.

    Of several that take the shapes it is the one whose best shapes are nearest (the sum of the differences of sizes),
    then the first.

    Raises:
        UsageError: an input is missing, or no profile takes the shapes.
    """
    names = list(dict.fromkeys(profile.input for profile in profiles))
    for name in names:
        if name not in shapes:
            raise UsageError(f"The engine's input {name!r} was not given.", f"Inputs: {', '.join(names)}.")
    distances: dict[int, int] = {}
    refused: set[int] = set()
    for profile in profiles:
        shape = tuple(shapes[profile.input])
        if not profile.takes(shape):
            refused.add(profile.index)
            continue
        away = sum(abs(size - best) for size, best in zip(shape, profile.optimum, strict=True))
        distances[profile.index] = distances.get(profile.index, 0) + away
    fitting = [index for index in distances if index not in refused]
    if refused and not fitting:
        raise _outside(profiles, names, shapes)
    return min(fitting, key=lambda index: (distances[index], index), default=0)


def _outside(
    profiles: Sequence[EngineProfile], names: Sequence[str], shapes: Mapping[str, Sequence[int]]
) -> UsageError:
    for name in names:
        own, shape = [p for p in profiles if p.input == name], tuple(shapes[name])
        if not any(profile.takes(shape) for profile in own):
            ranges = " or ".join(dict.fromkeys(f"{p.minimum} to {p.maximum}" for p in own))
            return UsageError(
                f"Input {name!r} is {shape}, the engine takes {ranges}.",
                "Give another shape, or build the engine for this one.",
            )
    given = ", ".join(f"{name} {tuple(shapes[name])}" for name in names)
    return UsageError(
        f"No optimization profile of the engine takes {given} together.",
        "Give shapes of one profile (scconv-deploy inspect lists them), or build the engine for these.",
    )


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}.", "Check its permissions.") from error


def _seal(document: Mapping[str, Any]) -> str:
    return sha256_of(json.dumps(document, sort_keys=True).encode())


def _parse(place: Path, data: bytes) -> EngineManifest:
    try:
        document = parse(data)
        if not isinstance(document, dict) or not {"seal", "schema_version"} <= document.keys():
            raise DecodeError("it has no seal or no schema_version")
        seal, version = document.pop("seal"), document["schema_version"]
        if version != SCHEMA_VERSION:
            raise IntegrityError(
                f"{place} has schema version {version}, expected {SCHEMA_VERSION}.",
                "Use the scconv-deploy that wrote it, or build the engine again.",
            )
        manifest = decode(EngineManifest, {name: v for name, v in document.items() if name != "schema_version"})
    except DecodeError as error:
        raise IntegrityError(f"{place} is damaged or not ours: {error}.", "Build the engine again.") from error
    if seal != _seal(document):
        raise IntegrityError(f"{place} was edited: its seal does not fit its content.", "Build the engine again.")
    return manifest
