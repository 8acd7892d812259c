"""Build one SRU as an engine of its own and run it. Standard library, NumPy and the library's bindings only.

It also runs on the device; the ONNX model of the SRU comes from :mod:`.sru_models`. It does not use
:func:`.builder.build_plan`, which chooses the form by version and loads the plugin. Here the plugin is loaded already,
and the form must be that of the whole engine: a fused SRU is its node alone, an expanded one is inlined if a plugin is
loaded.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any, Literal

from scconv_deploy.errors import BuildError
from scconv_deploy.runtimes.tensorrt import log as logs
from scconv_deploy.runtimes.tensorrt.cuda import load_cuda
from scconv_deploy.runtimes.tensorrt.engine import EngineArtifact, EngineProfile, EngineTensor
from scconv_deploy.runtimes.tensorrt.plugin_library import is_registered
from scconv_deploy.runtimes.tensorrt.runner import Plan, TensorRTRunner
from scconv_deploy.runtimes.tensorrt.versions import FUNCTIONS_BEHIND_PLUGINS, load_module, release
from scconv_deploy.system.backends import BACKENDS

Form = Literal["function", "plugin", "inlined"]
FORMS: tuple[Form, ...] = ("function", "plugin", "inlined")
"""Forms of one SRU's ONNX model: the node with its function, the node alone, the function's nodes."""


@contextmanager
def lone_sru(engine: EngineArtifact, site: str, models: Mapping[Form, bytes]) -> Iterator[Any]:
    """Build one SRU as the engine's library builds it, with the plugin if the engine got the plugin for it.

    Args:
        engine: the whole one, already opened in this process (which loaded its plugin).
        models: the SRU's ONNX model in each form, one input and one output of static shape.

    Yields:
        Runner of the SRU.

    Raises:
        BuildError: the library refuses the model.
        MissingRuntimeError, ModelError: the SRU's engine cannot run here.
    """
    backend = engine.manifest.backend
    module = load_module(backend)  # type: ignore[arg-type]
    fused = any(sru.site == site and sru.form == "plugin" for sru in engine.manifest.srus)
    form = form_of(module, backend, fused, is_registered(module))
    plan = build_sru(module, backend, site, models[form])
    with TensorRTRunner.of_plan(module, plan, load_cuda()) as runner:
        yield runner


def form_of(module: ModuleType, backend: str, fused: bool, plugin_is_loaded: bool) -> Form:
    """Form that gives the same result as in the whole engine.

    A fused SRU is the node alone: the build fails if the plugin refuses it. An expanded SRU is the node with its
    function, as in the whole model, unless this version would use the plugin or bind the function's inputs wrongly.
    """
    if fused:
        return "plugin"
    behind = backend == "tensorrt-rtx" or release(module.__version__) >= FUNCTIONS_BEHIND_PLUGINS
    return "function" if behind and not plugin_is_loaded else "inlined"


def build_sru(module: ModuleType, backend: str, site: str, model: bytes, compute_capability: str = "CURRENT") -> Plan:
    """Build one SRU: strongly typed and without TF32, like every engine.

    Args:
        compute_capability: target of TensorRT-RTX; this machine's GPU by default.

    Raises:
        BuildError: the library refuses the model.
    """
    log = logs.library_log(module)
    with log.recording() as messages:
        builder = module.Builder(log.logger)
        network = builder.create_network(1 << int(module.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        parser = module.OnnxParser(network, log.logger)
        if not parser.parse(model):
            raise _refusal(backend, site, [parser.get_error(index).desc() for index in range(parser.num_errors)])
        config = builder.create_builder_config()
        config.clear_flag(module.BuilderFlag.TF32)
        if backend == "tensorrt-rtx":
            config.num_compute_capabilities = 1
            config.set_compute_capability(getattr(module.ComputeCapability, compute_capability), 0)
        data = builder.build_serialized_network(network, config)
        if data is None:
            raise _refusal(backend, site, logs.errors(messages))
        given, made = network.get_input(0), network.get_output(0)
        inputs, outputs = (EngineTensor(t.name, t.dtype.name, tuple(t.shape)) for t in (given, made))
        plan = bytes(data)
    del parser  # the network depends on it until here
    profile = EngineProfile(inputs.name, inputs.shape, inputs.shape, inputs.shape)
    return Plan(f"the SRU {site}", backend, plan, (inputs,), (outputs,), (profile,))


def _refusal(backend: str, site: str, reasons: Sequence[str]) -> BuildError:
    reason = " ".join((reasons[0] if reasons else "no reason given").split())
    return BuildError(f"{BACKENDS[backend].title} cannot build the SRU {site} alone: {reason}", "See the reason.")
