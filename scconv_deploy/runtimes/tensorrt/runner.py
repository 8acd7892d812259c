"""Runner of TensorRT and TensorRT-RTX engines. It needs a GPU.

Standard library, NumPy and the library's bindings only: it also runs on the device, without torch and onnx.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any

import numpy as np

from scconv_deploy.errors import IntegrityError, MissingRuntimeError, ModelError, UsageError
from scconv_deploy.runtimes.tensorrt import log as logs
from scconv_deploy.runtimes.tensorrt.cuda import Buffer, Cuda, Event, Graph, Stream, close_all, load_cuda
from scconv_deploy.runtimes.tensorrt.debug import Shown, debug_listener
from scconv_deploy.runtimes.tensorrt.engine import (
    EngineArtifact,
    EngineManifest,
    EngineProfile,
    EngineTensor,
    choose_profile,
)
from scconv_deploy.runtimes.tensorrt.layers import layer_profiler
from scconv_deploy.runtimes.tensorrt.plugin_library import load_once
from scconv_deploy.runtimes.tensorrt.versions import load_module, require_gpu
from scconv_deploy.runtimes.timing import LayerTime, layer_times
from scconv_deploy.system.backends import BACKENDS
from scconv_deploy.system.environment import sha256_of

_STORED: dict[str, Any] = {
    "FLOAT": np.float32, "HALF": np.float16, "BF16": np.uint16, "INT64": np.int64,
    "INT32": np.int32, "INT8": np.int8, "UINT8": np.uint8, "BOOL": np.bool_,
}  # fmt: skip
"""NumPy dtype of each TensorRT dtype on the host; NumPy has no bfloat16."""


@dataclass(frozen=True)
class Plan:
    """Bytes of an engine that may be deserialised, with its tensors and profiles.

    Attributes:
        name: name for error messages.
        data: bytes of the engine; the caller has checked them.
        profiles: the range of each input in each optimization profile.
        host_code: whether the engine holds host code, which TensorRT refuses unless allowed: the lean runtime of a
            version-compatible engine, and plugin libraries in it.
    """

    name: str
    backend: str
    data: bytes
    inputs: tuple[EngineTensor, ...]
    outputs: tuple[EngineTensor, ...]
    profiles: tuple[EngineProfile, ...]
    host_code: bool = False


class TensorRTRunner(AbstractContextManager["TensorRTRunner"]):
    """Runner of an engine on a stream of its own.

    Args:
        artifact: engine; its bytes are checked against its manifest before the library gets them.
        cuda_graph: capture the launches once for each set of shapes and replay them.
        plugin: the library that the engine was built with, byte for byte; None to look for it beside the engine.

    Raises:
        IntegrityError: the engine or the plugin is not what the manifest says.
        MissingRuntimeError: the library is missing or of another version, there is no GPU or CUDA runtime, or the
            engine is not for this GPU.
    """

    def __init__(self, artifact: EngineArtifact, cuda_graph: bool = False, plugin: Path | None = None) -> None:
        manifest = artifact.manifest
        data = artifact.verified_bytes()
        module = require_runtime(artifact)
        with logs.library_log(module).recording():
            load_plugin_of(module, artifact, plugin)
        plan = Plan(
            str(artifact.path), manifest.backend, data, manifest.inputs, manifest.outputs, manifest.profiles,
            holds_host_code(manifest),
        )  # fmt: skip
        self._open(module, plan, load_cuda(), cuda_graph)

    @classmethod
    def of_plan(cls, module: ModuleType, plan: Plan, cuda: Cuda, cuda_graph: bool = False) -> TensorRTRunner:
        """Make a runner of an engine that this process has just built; its plugin is loaded already."""
        runner = cls.__new__(cls)
        runner._open(module, plan, cuda, cuda_graph)
        return runner

    def _open(self, module: ModuleType, plan: Plan, cuda: Cuda, cuda_graph: bool) -> None:
        self.name = plan.backend
        self.inputs = tuple(tensor.name for tensor in plan.inputs)
        self.outputs = tuple(tensor.name for tensor in plan.outputs)
        self._module, self._plan, self._cuda, self._cuda_graph = module, plan, cuda, cuda_graph
        self._dtypes = {tensor.name: tensor.dtype for tensor in (*plan.inputs, *plan.outputs)}
        self._graph: Graph | None = None
        self._buffers: dict[str, Buffer] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._profiler: Any = None
        self._profile = 0  # the first context of an engine starts with this one
        log = logs.library_log(module)
        with log.recording() as messages:
            self._runtime = module.Runtime(log.logger)
            if plan.host_code:  # safe: the bytes were checked
                self._runtime.engine_host_code_allowed = True
            self._engine = self._runtime.deserialize_cuda_engine(plan.data)
            self._context: Any = self._new_context() if self._engine is not None else None
        if self._context is None:
            reason = next(iter(logs.errors(messages)), "no reason given")
            raise MissingRuntimeError(
                f"{BACKENDS[plan.backend].title} cannot open {plan.name} on this GPU: {reason}",
                "Build it for this GPU.",
            )
        self._stream = Stream(cuda)
        self._events: tuple[Event, ...] = ()
        self._listener: Any = None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        try:
            self._release(*self._events, self._stream, error=error)
        finally:
            del self._context, self._engine, self._runtime  # in this order: each depends on the next
            self._listener = None  # the context called it

    @property
    def device_memory_bytes(self) -> int:
        """Device memory of activations, inputs and outputs, in bytes."""
        return int(self._engine.device_memory_size_v2) + sum(buffer.size_bytes for buffer in self._buffers.values())

    def layer_information(self) -> tuple[str, ...]:
        """JSON text of each layer of the engine, after fusion."""
        inspector = self._engine.create_engine_inspector()
        form = self._module.LayerInformationFormat.JSON
        return tuple(inspector.get_layer_information(i, form) for i in range(self._engine.num_layers))

    def run(self, tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Run once on arrays by name; return the outputs by name.

        Floating inputs are rounded to the engine's type. bfloat16 outputs come back as float32.

        Raises:
            UsageError: an input is missing, or no optimization profile takes the shapes.
            ModelError: the size of an output depends on the data, or the library refuses.
            CudaError: the launch failed on the device.
        """
        self.bind(tensors)
        self.enqueue()
        return self._outputs()

    def run_watched(
        self, tensors: Mapping[str, np.ndarray], watched: Iterable[str]
    ) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        """Run once as :meth:`run` does, without a CUDA graph, and copy debug tensors.

        Args:
            watched: names of tensors that were marked when the engine was built; other runs do not show them.

        Returns:
            the outputs, and the watched tensors that the library showed, by name; bfloat16 as float32.

        Raises:
            ModelError: the engine has no such debug tensor, or the library takes no listener.
        """
        self.bind(tensors)
        with self._watching(watched) as shown:
            try:
                self._execute()
            finally:  # the library itself has no better reason
                if shown.failure is not None:
                    raise shown.failure
            outputs = self._outputs()
        return outputs, {
            name: from_bfloat16(array) if shown.dtypes[name] == "BF16" else array
            for name, array in shown.tensors.items()
        }

    @contextmanager
    def _watching(self, watched: Iterable[str]) -> Iterator[Shown]:
        """Switch debug tensors on; they are off again afterwards, and the listener stays with the context."""
        title, on = BACKENDS[self.name].title, []
        if self._listener is None:
            listener = debug_listener(self._module, self._cuda, _STORED)
            if not self._context.set_debug_listener(listener):
                raise ModelError(f"{title} takes no listener for debug tensors.", "Build without --debug-tensors.")
            self._listener = listener
        self._listener.shown = Shown()
        try:
            for name in watched:
                if not self._context.set_tensor_debug_state(name, True):
                    raise ModelError(f"{title} has no debug tensor {name!r} in the engine.", "Build the engine again.")
                on.append(name)
            yield self._listener.shown
        finally:
            for name in on:
                self._context.set_tensor_debug_state(name, False)

    def _outputs(self) -> dict[str, np.ndarray]:
        stored: dict[str, np.ndarray] = {n: np.empty(self._shapes[n], _STORED[self._dtypes[n]]) for n in self.outputs}
        for name, array in stored.items():
            self._buffers[name].download(array, self._stream)
        self._stream.synchronize()
        return {n: from_bfloat16(array) if self._dtypes[n] == "BF16" else array for n, array in stored.items()}

    def bind(self, tensors: Mapping[str, np.ndarray]) -> None:
        """Copy inputs to the device; new shapes get their profile, new buffers and, if requested, a new CUDA graph."""
        profile = choose_profile(self._plan.profiles, {name: array.shape for name, array in tensors.items()})
        same = all(self._shapes.get(name) == tensors[name].shape for name in self.inputs)
        if not same:
            self._allocate(profile, {name: tensors[name].shape for name in self.inputs})
        stored = {name: as_stored(tensors[name], self._dtypes[name]) for name in self.inputs}
        for name, array in stored.items():
            self._buffers[name].upload(array, self._stream)
        self._stream.synchronize()
        if not same and self._cuda_graph and self.name == "tensorrt":
            self._execute()  # the first run of a shape allocates, which is not allowed in a capture
            self._stream.synchronize()
            self._graph = self._stream.capture(self._execute)

    def enqueue(self) -> None:
        """Enqueue one run on the stream with the bound tensors."""
        if self._graph is not None:
            self._graph.launch(self._stream)
        else:
            self._execute()

    def timed(self) -> float:
        """Run once; return seconds on the device between two events on the stream."""
        if not self._events:  # made once, outside of the timed runs
            self._events = Event(self._cuda), Event(self._cuda)
        before, after = self._events
        before.record(self._stream)
        self.enqueue()
        after.record(self._stream)
        self._stream.synchronize()
        return after.seconds_since(before)

    def profile_layers(self, tensors: Mapping[str, np.ndarray], rounds: int, warmup: int) -> tuple[LayerTime, ...]:
        """Times of the engine's layers, from runs under the library's profiler, without a CUDA graph.

        The profiler stays attached and slows later runs, so this comes last.

        Args:
            rounds, warmup: number of runs that count, and of runs before them.
        """
        self.bind(tensors)
        reported: list[tuple[str, str, float]] = []
        runs: list[list[tuple[str, str, float]]] = []
        self._profiler = self._context.profiler = layer_profiler(self._module, reported)
        for _ in range(warmup + rounds):
            reported.clear()
            self._execute()  # with a profiler it returns when the run has ended, and has reported it
            self._stream.synchronize()
            runs.append(list(reported))
        return layer_times(runs[warmup:])

    def _new_context(self) -> Any:
        if self.name != "tensorrt-rtx":
            return self._engine.create_execution_context()
        config = self._engine.create_runtime_config()  # TensorRT-RTX alone: it compiles kernels at run time
        # by default the first runs of a shape use fallback kernels while others are compiled in the background: the
        # kernels judged and timed would not be those that run later
        eager = self._module.DynamicShapesKernelSpecializationStrategy.EAGER
        config.dynamic_shapes_kernel_specialization_strategy = eager
        if self._cuda_graph:
            config.cuda_graph_strategy = self._module.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
        return self._engine.create_execution_context(config)

    def _allocate(self, profile: int, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self._release()
        if profile != self._profile:  # before the shapes, which another profile drops
            if not self._context.set_optimization_profile_async(profile, self._stream.address):
                raise ModelError(
                    f"{BACKENDS[self.name].title} refuses the optimization profile {profile}.", "Build it again."
                )
            self._profile = profile
        for name, shape in shapes.items():
            if not self._context.set_input_shape(name, shape):
                raise ModelError(
                    f"{BACKENDS[self.name].title} refuses the shape {shape} of input {name!r}.", "See its profile."
                )
        wanted = dict(shapes)
        for name in self.outputs:
            wanted[name] = tuple(self._context.get_tensor_shape(name))
            if -1 in wanted[name]:
                raise ModelError(f"The size of output {name!r} depends on the data.", "Run it in ONNX Runtime.")
        for name, shape in wanted.items():
            if self._engine.get_tensor_location(name).name == "HOST":  # read on the host, not the device
                raise ModelError(f"{name!r} is a shape, which TensorRT reads on the host.", "Run it in ONNX Runtime.")
            size_bytes = int(np.prod(shape, dtype=np.int64)) * np.dtype(_STORED[self._dtypes[name]]).itemsize
            self._buffers[name] = Buffer(self._cuda, size_bytes)
            if not self._context.set_tensor_address(name, self._buffers[name].address):
                raise ModelError(f"{BACKENDS[self.name].title} refuses memory for {name!r}.", "Run it in ONNX Runtime.")
        self._shapes = wanted

    def _release(self, *further: Any, error: BaseException | None = None) -> None:
        """Release the graph and the buffers, which must not be in use."""
        held = [handle for handle in (self._graph, *self._buffers.values(), *further) if handle is not None]
        self._graph, self._buffers, self._shapes = None, {}, {}
        close_all(held, error)

    def _execute(self) -> None:
        with logs.library_log(self._module).recording() as messages:
            if not self._context.execute_async_v3(self._stream.address):
                reason = next(iter(logs.errors(messages)), "no reason given")
                raise ModelError(f"{BACKENDS[self.name].title} cannot run the engine: {reason}", "See the reason.")


def as_stored(array: np.ndarray, dtype: str) -> np.ndarray:
    """C-contiguous array in the type of an engine's tensor; floating values are rounded to it.

    Raises:
        UsageError: integers were given for a floating tensor, or the reverse.
    """
    wanted = np.dtype(_STORED[dtype])
    floating = dtype in ("FLOAT", "HALF", "BF16")
    given = array.dtype.kind in "fV" or array.dtype.name == "bfloat16"  # the dtypes of ml_dtypes are of kind V
    if given != floating or (not floating and array.dtype != wanted):
        raise UsageError(
            f"The engine takes {dtype}, found an array of {array.dtype}.",
            "Give the types that the model was built for.",
        )
    with np.errstate(over="ignore"):  # values beyond half's range become infinite, and show in the outputs
        converted = to_bfloat16(array) if dtype == "BF16" else array.astype(wanted, copy=False)
    return np.ascontiguousarray(converted).reshape(array.shape)


def to_bfloat16(values: np.ndarray) -> np.ndarray:
    """bfloat16 bits (uint16) of float32 values, rounded to nearest, ties to even; NaN stays NaN."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32).reshape(values.shape)
    rounded = (bits + (0x7FFF + ((bits >> np.uint32(16)) & np.uint32(1)))) >> np.uint32(16)
    return np.where(np.isnan(values), np.uint32(0x7FC0), rounded).astype(np.uint16)


def from_bfloat16(bits: np.ndarray) -> np.ndarray:
    """float32 values of bfloat16 bits (uint16), exact."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def holds_host_code(manifest: EngineManifest) -> bool:
    """Whether the engine holds host code; see :class:`Plan`."""
    return "VERSION_COMPATIBLE" in manifest.flags or carries_plugin(manifest)


def carries_plugin(manifest: EngineManifest) -> bool:
    """Whether the plugin library is serialized in the engine.

    Of TensorRT, version-compatible engines alone take one (NvInfer.h, setPluginsToSerialize); of others the list means
    nothing. TensorRT-RTX puts it into every engine (measured in 1.7.1: the plan holds the library's bytes).
    """
    takes = manifest.backend == "tensorrt-rtx" or "VERSION_COMPATIBLE" in manifest.flags
    return takes and bool(manifest.settings.get("plugins_to_serialize"))


def require_runtime(artifact: EngineArtifact) -> ModuleType:
    """Import the library that an engine needs, and check that the engine can run here.

    Raises:
        MissingRuntimeError: the library is not installed or of another version, there is no GPU, or the engine has no
            weights.
    """
    if "STRIP_PLAN" in artifact.manifest.flags:  # it would run on uninitialized weights
        raise MissingRuntimeError(
            f"{artifact.path} holds no weights: it was built with --strip.",
            "Refit it (scconv-deploy refit --from the ONNX file that it was built from), or build it without --strip.",
        )
    return require_library(artifact, "an engine runs on nothing else")


def require_library(artifact: EngineArtifact, why_gpu: str) -> ModuleType:
    """Import the library that opens an engine.

    Raises:
        MissingRuntimeError: the library is not installed or of another version, or there is no GPU.
    """
    backend = artifact.manifest.backend
    module = load_module(backend)  # type: ignore[arg-type]
    _check_version(module, artifact)
    require_gpu(backend, why_gpu, "Run this on a machine with a GPU.")  # type: ignore[arg-type]
    return module


def _check_version(module: ModuleType, artifact: EngineArtifact) -> None:
    """Refuse an engine of another release; with --version-compatible, TensorRT also accepts earlier releases."""
    manifest = artifact.manifest
    if module.__version__ == manifest.library_version or "VERSION_COMPATIBLE" in manifest.flags:
        return
    index = " --extra-index-url https://pypi.nvidia.com" if manifest.backend == "tensorrt" else ""
    raise MissingRuntimeError(
        f"{artifact.path} was built by {BACKENDS[manifest.backend].title} {manifest.library_version}, installed is "
        f"{module.__version__}.",
        f"Build it again here, or pip install {manifest.backend}=={manifest.library_version}{index}.",
    )


def check_plugin_of(artifact: EngineArtifact, plugin: Path) -> None:
    """Refuse a plugin library that an engine was not built with, without loading it.

    Raises:
        UsageError: there is no such file, or the engine was built without a plugin.
        IntegrityError: the engine was built with another plugin.
    """
    wanted = artifact.manifest.plugin_sha256
    if not wanted:
        raise UsageError(f"--plugin: {artifact.path} was built without a plugin.", "Leave it out.")
    if not plugin.is_file():
        raise UsageError(f"--plugin {plugin} does not exist.", "Build it with scconv-deploy plugin build.")
    if sha256_of(plugin) != wanted:
        raise IntegrityError(
            f"{plugin} is not the plugin that {artifact.path} was built with ({wanted[:12]}...).",
            "Give that one, or build the engine again.",
        )


def _beside(artifact: EngineArtifact) -> Path | None:
    """The engine's plugin in its own folder, which the manifest knows by its SHA-256."""
    found = sorted(artifact.path.parent.glob("*.so"))
    return next((path for path in found if sha256_of(path) == artifact.manifest.plugin_sha256), None)


def load_plugin_of(module: ModuleType, artifact: EngineArtifact, plugin: Path | None) -> None:
    """Load the plugin library that an engine was built with, unless the engine holds it.

    Args:
        plugin: the library; None to look for it beside the engine.

    Raises:
        MissingRuntimeError: it was not found, or cannot be loaded.
        IntegrityError: the engine was built with another one.
    """
    wanted = artifact.manifest.plugin_sha256
    if not wanted or carries_plugin(artifact.manifest):
        return
    plugin = plugin or _beside(artifact)
    if plugin is None:
        raise MissingRuntimeError(
            f"{artifact.path} was built with a plugin, which was not given and does not lie beside it.",
            "Add --plugin FILE.",
        )
    check_plugin_of(artifact, plugin)
    if refused := load_once(module, plugin):
        raise MissingRuntimeError(
            f"TensorRT cannot load {plugin}: {refused}.",
            "Check it with scconv-deploy plugin check; one process takes one build of it.",
        )
