"""TensorRT and TensorRT-RTX: one runner, as there is one builder. It needs a GPU and torch's CUDA build for memory."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch

from scconv_deploy.errors import IntegrityError, MissingRuntimeError, ModelError, UsageError
from scconv_deploy.exporters import tensorrt_log as logs
from scconv_deploy.exporters.engine import EngineArtifact
from scconv_deploy.exporters.tensorrt_versions import INSTALL, NAMES, load_module, require_gpu

_DTYPES = {
    "FLOAT": torch.float32, "HALF": torch.float16, "BF16": torch.bfloat16, "INT64": torch.int64,
    "INT32": torch.int32, "INT8": torch.int8, "UINT8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


class TensorRTRunner:
    """Runs an engine on a stream of its own.

    Args:
        artifact: its bytes are checked against its manifest before the library sees them.
        cuda_graph: capture the launches once for each set of shapes and replay them.
        plugin: the library that the engine was built with; it must be the same, byte for byte.

    Raises:
        IntegrityError: the engine or the plugin is not what the manifest says.
        MissingRuntimeError: no library, another version of it, no GPU, a torch without CUDA, or a GPU that the engine
            is not for.
    """

    def __init__(self, artifact: EngineArtifact, cuda_graph: bool = False, plugin: Path | None = None) -> None:
        manifest = artifact.manifest
        data = artifact.verified_bytes()
        self.name = manifest.backend
        self._module = module = load_module(manifest.backend)  # type: ignore[arg-type]
        self._manifest, self._cuda_graph = manifest, cuda_graph
        _check_version(module, artifact)
        require_gpu(manifest.backend, "an engine runs on nothing else", "Run this on a machine with a GPU.")  # type: ignore[arg-type]
        if not torch.cuda.is_available():
            raise MissingRuntimeError("torch here is a CPU build, and it holds the tensors.", "pip install torch.")
        log = logs.library_log(module)
        with log.recording() as messages:
            _load_plugin(module, artifact, plugin)
            self._runtime = module.Runtime(log.logger)
            self._engine = self._runtime.deserialize_cuda_engine(data)
            if self._engine is None:
                reason = next(iter(logs.errors(messages)), "no reason given")
                raise MissingRuntimeError(
                    f"{NAMES[manifest.backend]} cannot open {artifact.path} on this GPU: {reason}",
                    "Build it for this GPU.",
                )
            self._context = self._new_context()
        self._stream = torch.cuda.Stream()
        self._graph: torch.cuda.CUDAGraph | None = None
        self._bound: dict[str, torch.Tensor] = {}
        self.inputs = tuple(tensor.name for tensor in manifest.inputs)
        self.outputs = tuple(tensor.name for tensor in manifest.outputs)

    def __enter__(self) -> TensorRTRunner:
        return self

    def __exit__(self, *exc: object) -> None:
        torch.cuda.synchronize()
        self._graph, self._bound = None, {}
        del self._context, self._engine, self._runtime  # in this order: each lives on the next

    @property
    def device_memory_bytes(self) -> int:
        """What a context needs for activations."""
        return int(self._engine.device_memory_size_v2)

    def layer_information(self) -> tuple[str, ...]:
        """The engine's own layers after fusion, a JSON text each."""
        inspector = self._engine.create_engine_inspector()
        form = self._module.LayerInformationFormat.JSON
        return tuple(inspector.get_layer_information(i, form) for i in range(self._engine.num_layers))

    def run(self, tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Run once; arrays by name in and out. bfloat16 outputs come as float32, which NumPy has.

        Raises:
            UsageError: a missing input, or a shape outside the profile.
            ModelError: an output whose size depends on the data, or the library's refusal.
        """
        self.bind(tensors)
        self.enqueue()
        self._stream.synchronize()
        return {name: _numpy(self._bound[name]) for name in self.outputs}

    def bind(self, tensors: Mapping[str, np.ndarray]) -> None:
        """Copy inputs to the device; new shapes get new buffers and, if wanted, a new graph."""
        self._check_inputs(tensors)
        same = all(n in self._bound and tuple(self._bound[n].shape) == tensors[n].shape for n in self.inputs)
        if not same:
            self._allocate({name: tensors[name].shape for name in self.inputs})
        with torch.cuda.stream(self._stream):
            for name in self.inputs:
                self._bound[name].copy_(torch.from_numpy(np.ascontiguousarray(tensors[name])))
        self._stream.synchronize()
        if not same and self._cuda_graph and self.name == "tensorrt":
            self._capture()

    def enqueue(self) -> None:
        """Start one run on the stream, with what is bound."""
        if self._graph is not None:
            with torch.cuda.stream(self._stream):
                self._graph.replay()
        else:
            self._execute(self._stream)

    def timed(self) -> float:
        """One run; the seconds that it took on the device, between two events on the stream."""
        before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        before.record(self._stream)
        self.enqueue()
        after.record(self._stream)
        self._stream.synchronize()
        return before.elapsed_time(after) * 1e-3

    def _new_context(self) -> Any:
        if not (self._cuda_graph and self.name == "tensorrt-rtx"):
            return self._engine.create_execution_context()
        config = self._engine.create_runtime_config()  # TensorRT-RTX compiles at run time and captures by itself
        config.cuda_graph_strategy = self._module.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
        return self._engine.create_execution_context(config)

    def _check_inputs(self, tensors: Mapping[str, np.ndarray]) -> None:
        profiles = {profile.input: profile for profile in self._manifest.profiles}
        for name in self.inputs:
            if name not in tensors:
                raise UsageError(f"The engine's input {name!r} was not given.", f"Inputs: {', '.join(self.inputs)}.")
            shape, profile = tensors[name].shape, profiles[name]
            ranges = zip(profile.minimum, shape, profile.maximum, strict=False)
            if len(shape) != len(profile.minimum) or any(not low <= size <= high for low, size, high in ranges):
                raise UsageError(
                    f"Input {name!r} is {shape}, the engine takes {profile.minimum} to {profile.maximum}.",
                    "Give another shape, or build the engine for this one.",
                )

    def _allocate(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self._graph = None
        self._bound = {}
        for name, shape in shapes.items():
            self._context.set_input_shape(name, shape)
        dtypes = {tensor.name: tensor.dtype for tensor in (*self._manifest.inputs, *self._manifest.outputs)}
        for name in (*self.inputs, *self.outputs):
            shape = tuple(shapes[name] if name in shapes else self._context.get_tensor_shape(name))
            if -1 in shape:
                raise ModelError(f"The size of output {name!r} depends on the data.", "Run it in ONNX Runtime.")
            self._bound[name] = torch.empty(shape, dtype=_DTYPES[dtypes[name]], device="cuda")
            self._context.set_tensor_address(name, self._bound[name].data_ptr())

    def _capture(self) -> None:
        self._execute(self._stream)  # the first run of a shape allocates, which a capture must not
        self._stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self._stream):
            self._execute(torch.cuda.current_stream())
        self._graph = graph

    def _execute(self, stream: torch.cuda.Stream) -> None:
        with logs.library_log(self._module).recording() as messages:
            if not self._context.execute_async_v3(stream.cuda_stream):
                reason = next(iter(logs.errors(messages)), "no reason given")
                raise ModelError(f"{NAMES[self.name]} cannot run the engine: {reason}", "See the reason.")


def _check_version(module: ModuleType, artifact: EngineArtifact) -> None:
    """An engine is for the release that built it; with --version-compatible also for later ones of TensorRT."""
    manifest = artifact.manifest
    if module.__version__ == manifest.library_version or "VERSION_COMPATIBLE" in manifest.flags:
        return
    package = f"{manifest.backend}=={manifest.library_version}"
    raise MissingRuntimeError(
        f"{artifact.path} was built by {NAMES[manifest.backend]} {manifest.library_version}, installed is "
        f"{module.__version__}.",
        f"pip install {package}, or build it again. {INSTALL[manifest.backend]}",
    )


def _load_plugin(module: ModuleType, artifact: EngineArtifact, plugin: Path | None) -> None:
    wanted = artifact.manifest.plugin_sha256
    if not wanted or artifact.manifest.settings.get("plugins_to_serialize"):
        return
    if plugin is None:
        raise MissingRuntimeError(
            f"{artifact.path} was built with a plugin, which was not given.", "Add --plugin FILE."
        )
    if hashlib.sha256(plugin.read_bytes()).hexdigest() != wanted:
        raise IntegrityError(
            f"{plugin} is not the plugin that {artifact.path} was built with ({wanted[:12]}...).",
            "Give that one, or build the engine again.",
        )
    if module.get_plugin_registry().load_library(str(plugin.resolve())) is None:
        raise MissingRuntimeError(f"TensorRT cannot load {plugin}.", "Check it with scconv-deploy plugin check.")


def _numpy(tensor: torch.Tensor) -> np.ndarray:
    return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).cpu().numpy()
