"""Options of ``bench``, and the checks that each option is used by a subject."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import onnx
import torch

from scconv_deploy.errors import UsageError
from scconv_deploy.exporters.tensorrt.onnx_source import graph_facts
from scconv_deploy.graph.file import read_onnx
from scconv_deploy.model.inputs import InputSpec
from scconv_deploy.model.spec import ModelSpec
from scconv_deploy.runtimes.onnxruntime import CPU
from scconv_deploy.runtimes.tensorrt.engine import EngineArtifact, load_engine
from scconv_deploy.workflows.fused_cpu import is_fused
from scconv_deploy.workflows.subject import Bundle, Engine, Model, OnnxFile

Content = onnx.ModelProto | EngineArtifact | None
"""Content of an ONNX file or an engine; None for a model."""


@dataclass(frozen=True)
class BenchOptions:
    """Options of ``bench``.

    Attributes:
        batch: size of axis 0 if it is open.
        inputs: ``[name:]shape[:dtype]``, for models that are not in the zoo and for other open axes.
        compiled: also time models through torch.compile.
        cuda_graph: also time engines as a CUDA graph.
        device: device that models run on.
        rounds, warmup: number of timed runs of each subject, and of runs before them.
        threads: CPU threads of ONNX Runtime and torch; 0 is their default.
        provider: execution provider of ONNX Runtime; ``cpu+fused`` is its CPU, without and with the fused SRU.
        plugin: plugin library that the engines were built with.
        spec: make the ModelSpec of a name from the model options (factory arguments, weights, embedding).
        of_models: model options that were given, as on the command line.
        layers: also time the layers of engines and ONNX files.
    """

    batch: int = 1
    inputs: tuple[str, ...] = ()
    compiled: bool = False
    cuda_graph: bool = False
    device: Literal["auto", "cpu", "cuda"] = "auto"
    rounds: int = 50
    warmup: int = 5
    threads: int = 0
    seed: int = 0
    provider: str = CPU
    plugin: Path | None = None
    spec: Callable[[str], ModelSpec] = ModelSpec
    of_models: tuple[str, ...] = ()
    layers: bool = False

    @property
    def resolved_device(self) -> str:
        if self.device == "auto":
            return "cuda" if torch.cuda.is_available() else "cpu"
        return self.device


def check_options(subjects: Collection[Model | OnnxFile | Engine | Bundle], options: BenchOptions) -> None:
    """Refuse options for kinds of subjects that are not given (UsageError)."""
    plain = options.provider.lower().removesuffix("executionprovider") == "cpu"
    on_cpu = plain or is_fused(options.provider)
    if options.layers and not on_cpu:
        raise UsageError(
            f"--layers: with --provider {options.provider}, ONNX Runtime says when kernels are launched, not how long "
            "they run.",
            "Leave out --provider or --layers; the layers of an engine are timed on its device.",
        )
    users = {
        "engines": any(isinstance(subject, Engine) for subject in subjects),
        "ONNX files": any(isinstance(subject, (OnnxFile, Bundle)) for subject in subjects),
        "models": any(isinstance(subject, Model) for subject in subjects),
    }
    for option, owners, given in (
        *((option, ("models",), True) for option in options.of_models),
        ("--compile", ("models",), options.compiled),
        ("--device", ("models",), options.device != "auto"),
        ("--cuda-graph", ("engines",), options.cuda_graph),
        ("--plugin", ("engines",), options.plugin is not None),
        ("--layers", ("engines", "ONNX files"), options.layers),
        ("--provider", ("ONNX files",), not plain),
        ("--threads", ("ONNX files", "models"), options.threads != 0),
    ):
        if given and not any(users[owner] for owner in owners):
            raise UsageError(
                f"{option} belongs to {' and '.join(owners)}, and none is among the artifacts.", "Leave it out."
            )


def read(subject: Model | OnnxFile | Engine | Bundle) -> Content:
    """Read and check an ONNX file or an engine (UsageError, IntegrityError); None for a model."""
    if isinstance(subject, Model):
        return None
    return load_engine(subject.path) if isinstance(subject, Engine) else read_onnx(subject.model_file()[0])


def check_use(contents: Mapping[str, Content], options: BenchOptions) -> None:
    """Refuse a plugin, a batch or inputs that no artifact uses (UsageError); models check their inputs themselves."""
    engines = [content for content in contents.values() if isinstance(content, EngineArtifact)]
    if options.plugin is not None and not any(engine.manifest.plugin_sha256 for engine in engines):
        raise UsageError("--plugin: none of the engines was built with a plugin.", "Leave it out.")
    files = [inputs_of(content) for content in contents.values() if content is not None]
    of_model = None in contents.values() and not options.inputs
    if options.batch != 1 and not of_model:
        single = replace(options, batch=1)
        if all(shapes_of(own, options) == shapes_of(own, single) for own in files):
            raise UsageError(
                f"--batch {options.batch}: no artifact has an axis 0 that is open and not given by --input.",
                "Leave it out; --input 8x3x224x224 gives a model its batch.",
            )
    if None in contents.values():
        return
    given = [InputSpec.parse(text) for text in options.inputs]
    names = list(dict.fromkeys(name for own in files for name in own))
    for spec in given:
        if spec.name is not None and spec.name not in names:
            raise UsageError(
                f"--input {spec}: no artifact has an input {spec.name!r}.", f"Inputs: {', '.join(names) or 'none'}."
            )
    places = max((len(own.keys() - {spec.name for spec in given}) for own in files), default=0)
    if surplus := [spec for spec in given if spec.name is None][places:]:
        raise UsageError(f"--input {surplus[0]}: no artifact has an input left for it.", "Leave it out.")


def inputs_of(content: onnx.ModelProto | EngineArtifact) -> dict[str, tuple[int, ...]]:
    """Input shapes by name; an open axis is -1."""
    if isinstance(content, EngineArtifact):
        return {tensor.name: tensor.shape for tensor in content.manifest.inputs}
    return graph_facts(content).shapes


def shapes_of(inputs: Mapping[str, Sequence[int]], options: BenchOptions) -> dict[str, tuple[int, ...]]:
    """Shapes without open axes: from ``--input`` by name, then in order, else the batch on axis 0."""
    given = [InputSpec.parse(text) for text in options.inputs]
    chosen = {spec.name: spec.shape for spec in given if spec.name in inputs}
    free = [name for name in inputs if name not in chosen]
    chosen |= dict(zip(free, (spec.shape for spec in given if spec.name is None), strict=False))
    return {name: chosen.get(name) or _closed(name, shape, options.batch) for name, shape in inputs.items()}


def _closed(name: str, shape: Sequence[int], batch: int) -> tuple[int, ...]:
    sizes = tuple(batch if size == -1 and axis == 0 else size for axis, size in enumerate(shape))
    if -1 in sizes:
        raise UsageError(f"Input {name!r} is {'x'.join(map(str, shape))}.", f"Add --input {name}:SHAPE.")
    return sizes
