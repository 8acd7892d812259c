"""The names of TensorRT's Python API that the runner uses, with ONNX Runtime behind them: a plan is an ONNX model, and
an execution reads the bound memory of the host, runs the model and writes its outputs, in its turn on the stream.

It is a real computation through the real runner, and no evidence about TensorRT.
"""

from __future__ import annotations

import ctypes
from functools import cached_property, partial
from types import SimpleNamespace

import numpy as np
import onnx
from onnx import TensorProto

from scconv_deploy.graph.types import precision_of
from scconv_deploy.runtimes.half import runner_of
from scconv_deploy.runtimes.onnxruntime import RuntimeOptions
from scconv_deploy.runtimes.tensorrt.cuda import Buffer
from scconv_deploy.runtimes.tensorrt.runner import from_bfloat16, to_bfloat16

NAMES = {
    TensorProto.FLOAT: "FLOAT", TensorProto.FLOAT16: "HALF", TensorProto.BFLOAT16: "BF16", TensorProto.INT64: "INT64",
    TensorProto.BOOL: "BOOL",
}  # fmt: skip
_STORED = {"FLOAT": np.float32, "HALF": np.float16, "BF16": np.uint16, "INT64": np.int64, "BOOL": np.bool_}


MARKED = "debug tensors"
"""Key of a plan's metadata: names of the tensors that ``mark_debug`` was called with."""
_HALVES = {"fp16": "HALF", "bf16": "BF16"}
_capsule = ctypes.pythonapi.PyCapsule_New
_capsule.argtypes, _capsule.restype = (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p), ctypes.py_object


def marked(model, names):
    """A plan with these tensors marked, as ``mark_debug`` leaves it."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    copy.metadata_props.add(key=MARKED, value="\n".join(names))
    return copy


def at(address, shape, dtype):
    """Host memory as an array."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    return np.frombuffer((ctypes.c_char * size).from_address(address), dtype).reshape(shape)


class Module:
    """Stands where the module ``tensorrt`` stands.

    Args:
        host: the CUDA runtime on host memory.
        version: of TensorRT.
        plugins: names that its registry knows; a node of that name without a function is then computed by ``expand``.
    """

    __name__ = "tensorrt"

    class ILogger:
        pass

    class IProfiler:
        pass

    class IDebugListener:
        pass

    class BuilderFlag:
        TF32 = "TF32"

    class NetworkDefinitionCreationFlag:
        STRONGLY_TYPED = 1

    class ComputeCapability:
        CURRENT = "CURRENT"

    class CudaGraphStrategy:
        WHOLE_GRAPH_CAPTURE = "WHOLE_GRAPH_CAPTURE"

    class DynamicShapesKernelSpecializationStrategy:
        EAGER = "EAGER"

    class LayerInformationFormat:
        JSON = "JSON"

    def __init__(self, host, version="10.9.0"):
        self.host, self.__version__ = host, version
        self.parsed, self.cleared, self.loaded = [], [], []
        self.refuse = ""  # what the parser says to everything
        self.expand = None  # how to compute a node without a function
        self.open = True
        self.num_profiles = 2  # of each engine

    # --- running -------------------------------------------------------------------------------------------------

    class SerializationFlag:
        EXCLUDE_WEIGHTS = "EXCLUDE_WEIGHTS"
        INCLUDE_REFIT = "INCLUDE_REFIT"

    def Refitter(self, engine, logger):
        return Refitter(engine)

    def OnnxParserRefitter(self, refitter, logger):
        def refit_from_bytes(data):
            refitter.given = {tensor.name: tensor for tensor in onnx.load_model_from_string(data).graph.initializer}
            return not self.refuse

        error = SimpleNamespace(desc=lambda: self.refuse)
        return SimpleNamespace(
            refit_from_bytes=refit_from_bytes, num_errors=1 if self.refuse else 0, get_error=lambda index: error
        )

    def Runtime(self, logger):
        self.runtime = SimpleNamespace(deserialize_cuda_engine=lambda data: Engine(self, data) if self.open else None)
        return self.runtime

    # --- building ------------------------------------------------------------------------------------------------

    def Builder(self, logger):
        return SimpleNamespace(
            create_network=lambda flags: Network(flags),
            create_builder_config=lambda: SimpleNamespace(
                clear_flag=self.cleared.append, set_compute_capability=lambda name, index: True
            ),
            build_serialized_network=lambda network, config: network.serialized(),
        )

    def OnnxParser(self, network, logger):
        def parse(data):
            self.parsed.append(data)
            model = onnx.load_model_from_string(data)
            network.data = data
            network.get_input, network.get_output = (
                lambda index, values=values: SimpleNamespace(
                    name=values[index].name,
                    dtype=SimpleNamespace(name=NAMES[values[index].type.tensor_type.elem_type]),
                    shape=tuple(d.dim_value for d in values[index].type.tensor_type.shape.dim),
                )
                for values in (model.graph.input, model.graph.output)
            )
            return not self.refuse

        error = SimpleNamespace(desc=lambda: self.refuse)
        return SimpleNamespace(parse=parse, num_errors=1, get_error=lambda index: error)

    def get_plugin_registry(self):
        """Takes one library, like the real one: a second one's plugins are registered already."""
        return SimpleNamespace(
            load_library=lambda path: None if self.loaded else self.loaded.append(path) or path,
            get_creator=lambda name, version, space: name if self.loaded else None,
            all_creators=[SimpleNamespace(name="SRU", plugin_namespace="scconv")] if self.loaded else [],
        )


class Network(SimpleNamespace):
    """A network that the parser fills."""

    def __init__(self, flags):
        super().__init__(flags=flags, debug=[])

    def mark_debug(self, tensor):
        self.debug.append(tensor.name)
        return True

    def serialized(self):
        """The plan's bytes: the model, with what was marked."""
        if not self.debug:
            return self.data
        return marked(onnx.load_model_from_string(self.data), self.debug).SerializeToString()


def _write(memory, content):
    memory[...] = content[0]


class Engine:
    device_memory_size_v2 = 1000

    def __init__(self, module, data):
        model = onnx.load_model_from_string(bytes(data))
        if module.expand is not None:
            model = module.expand(model)
        self.module, self.model, self.nodes = module, model, model.graph.node
        self.refittable = any(entry.key == "refittable" for entry in model.metadata_props)
        self.debug = [n for p in model.metadata_props if p.key == MARKED for n in p.value.split("\n")]
        self.hidden = set()  # debug tensors that the listener is never shown
        inner = onnx.ModelProto()
        inner.CopyFrom(model)
        inner.graph.output.extend(onnx.ValueInfoProto(name=name) for name in self.debug)
        self.inside = runner_of(inner, RuntimeOptions(optimization="basic")) if self.debug else None
        self.data = _HALVES.get(precision_of(model), "FLOAT")
        self.types = {v.name: NAMES[v.type.tensor_type.elem_type] for v in (*model.graph.input, *model.graph.output)}

    @cached_property
    def runner(self):
        """Not for an engine without weights."""
        return runner_of(self.model, RuntimeOptions(optimization="basic"))

    def create_serialization_config(self):
        flags = {"EXCLUDE_WEIGHTS"}  # as of a stripped engine
        return SimpleNamespace(flags=flags, clear_flag=flags.discard, set_flag=flags.add)

    def serialize_with_config(self, config):
        """Refittable if asked for."""
        assert "EXCLUDE_WEIGHTS" not in config.flags
        del self.model.metadata_props[:]
        if "INCLUDE_REFIT" in config.flags:
            self.model.metadata_props.add(key="refittable", value="yes")
        return self.model.SerializeToString()

    @property
    def num_layers(self):
        return len(self.nodes)

    def create_engine_inspector(self):
        return SimpleNamespace(
            get_layer_information=lambda index, form: (
                f'{{"{form}": "{self.nodes[index].op_type} {self.nodes[index].name}"}}'
            )
        )

    def create_execution_context(self, *config):
        self.configured = config
        return Context(self)

    def create_runtime_config(self):
        return SimpleNamespace()

    def get_tensor_location(self, name):
        return SimpleNamespace(name="DEVICE")


class Refitter:
    """Missing are the weights that the engine lacks (a stripped one), not those that nobody gave."""

    def __init__(self, engine):
        self.engine, self.given = engine, {}

    def get_missing_weights(self):
        own = self.engine.model.graph.initializer
        return [tensor.name for tensor in own if not tensor.raw_data and tensor.name not in self.given]

    def refit_cuda_engine(self):
        for tensor in self.engine.model.graph.initializer:
            if tensor.name in self.given:
                tensor.CopyFrom(self.given[tensor.name])
        return True


class Context:
    def __init__(self, engine):
        self.engine, self.addresses, self.shapes = engine, {}, {}
        self.executions = 0
        self.profiler = None  # told 1 ms for the first node of the first run, and one more for each further node or run
        self.profiles = [0]  # of the first context; the last one is in use
        self.listener, self.watched = None, set()

    def set_optimization_profile_async(self, index, stream):
        """Drop the shapes, as another profile does."""
        self.engine.module.host.launch(stream, lambda: None)
        self.profiles.append(index)
        self.shapes = {}
        return index < self.engine.module.num_profiles

    def set_debug_listener(self, listener):
        assert isinstance(listener, Module.IDebugListener)
        self.listener = listener
        return True

    def set_tensor_debug_state(self, name, on):
        if name not in self.engine.debug:
            return False
        (self.watched.add if on else self.watched.discard)(name)
        return True

    def _show(self, stream):
        """Call the listener with memory that holds the tensor during the call only, in the stream's turn."""
        host = self.engine.module.host
        found = self.engine.inside.run({n: self._read(n, self.shapes[n]) for n in self.engine.runner.inputs})
        for name in sorted(self.watched - self.engine.hidden):
            kind = self.engine.data
            value = to_bfloat16(found[name]) if kind == "BF16" else found[name].astype(_STORED[kind])
            with Buffer(host.cuda, value.nbytes) as memory:
                content = [value]
                host.launch(stream, partial(_write, at(memory.address, value.shape, value.dtype), content))
                place, dtype = SimpleNamespace(name="DEVICE"), SimpleNamespace(name=kind)
                address = _capsule(memory.address, None, None)
                self.listener.process_debug_tensor(address, place, dtype, value.shape, name, stream)
                content[:] = [np.zeros_like(value)]  # what a copy gets that nobody waited for
                host.cuda.call("cudaStreamSynchronize", stream)

    def set_input_shape(self, name, shape):
        self.shapes[name] = shape
        return True

    def get_tensor_shape(self, name):
        zeros = {n: np.zeros(self.shapes[n], self._numpy(n)) for n in self.engine.runner.inputs}
        return self.engine.runner.run(zeros)[name].shape

    def set_tensor_address(self, name, address):
        self.addresses[name] = address
        return True

    def execute_async_v3(self, stream):
        shapes = dict(self.shapes)

        def kernel():
            self.executions += 1
            fed = {n: self._read(n, shapes[n]) for n in self.engine.runner.inputs}
            for name, value in self.engine.runner.run(fed).items():
                kind = self.engine.types[name]
                at(self.addresses[name], value.shape, _STORED[kind])[...] = (
                    to_bfloat16(value) if kind == "BF16" else value
                )
            if self.profiler is not None:
                for index, node in enumerate(self.engine.nodes):
                    self.profiler.report_layer_time(node.name or node.op_type, float(self.executions + index))

        self.engine.module.host.launch(stream, kernel)
        if self.watched:
            self._show(stream)
        return True

    def _numpy(self, name):
        return np.float32 if self.engine.types[name] == "BF16" else _STORED[self.engine.types[name]]

    def _read(self, name, shape):
        kind = self.engine.types[name]
        stored = at(self.addresses[name], shape, _STORED[kind]).copy()
        return from_bfloat16(stored) if kind == "BF16" else stored
