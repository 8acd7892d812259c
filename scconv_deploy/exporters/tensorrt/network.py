"""Parse a model with TensorRT: form of the model, plugins, refusals, and the layers and SRUs of the network."""

from __future__ import annotations

import re
from collections import Counter
from types import ModuleType
from typing import Any

from scconv_deploy.errors import BuildError, UsageError
from scconv_deploy.exporters.tensorrt.options import BuildOptions
from scconv_deploy.exporters.tensorrt.source import Form, GraphFacts
from scconv_deploy.graph.contract import PLUGIN_NAMESPACE, PLUGIN_VERSION
from scconv_deploy.runtimes.tensorrt.engine import EngineLayer, EngineSRU, EngineTensor
from scconv_deploy.runtimes.tensorrt.plugin_library import load_once
from scconv_deploy.runtimes.tensorrt.versions import FUNCTIONS_BEHIND_PLUGINS, release
from scconv_deploy.system.backends import BACKENDS, Backend
from scconv_deploy.system.environment import sha256_of

_READ_AS_STANDARD = {("com.microsoft", "QuantizeLinear"), ("com.microsoft", "DequantizeLinear")}
"""Operators of ONNX Runtime's tools that mean ONNX's own of the same name."""

_ASSERTION = re.compile(r"^Assertion failed: (?:.*?: (?=[A-Z]))?")
_CALLED_FROM = re.compile(r"\| (.+) \(SRU(?:Norm|Soft)?\)")


def form_for(version: str, backend: Backend, plugin: bool) -> Form:
    """The form of a model that a library version reads correctly.

    TensorRT before 10.7 prefers a function to a plugin, and binds inputs of functions wrongly. So with a plugin the
    functions are left out, and without one they are inlined. Every other version takes the model as it is.
    """
    if backend == "tensorrt-rtx" or release(version) >= FUNCTIONS_BEHIND_PLUGINS:
        return "whole"
    return "plugin" if plugin else "inlined"


def load_plugin(module: ModuleType, options: BuildOptions, facts: GraphFacts) -> str:
    """Load the plugin library into the registry, and check that it has all creators that the model needs.

    Returns:
        its SHA-256.

    Raises:
        UsageError: no such file.
        IntegrityError: the file is no shared library, or truncated.
        BuildError: the registry refuses it, or it has no creator for one of the model's operators.
    """
    path = options.plugin
    if path is None or not path.is_file():
        raise UsageError(f"--plugin {path} does not exist.", "Build it with scconv-deploy plugin build.")
    digest = sha256_of(path)
    if refused := load_once(module, path):
        raise BuildError(
            f"TensorRT cannot load the plugin {path}: {refused}.",
            "Check it with scconv-deploy plugin check; one process takes one build of it.",
        )
    registry = module.get_plugin_registry()
    for operator in sorted({node.operator for node in facts.srus}):
        if registry.get_creator(operator, PLUGIN_VERSION, PLUGIN_NAMESPACE) is None:
            raise BuildError(
                f"{path} was loaded, but the registry has no creator {PLUGIN_NAMESPACE}::{operator} "
                f"version {PLUGIN_VERSION}.",
                "Build the plugin of this scconv-deploy: scconv-deploy plugin build.",
            )
    return digest


def parse(module: ModuleType, network: Any, logger: Any, data: bytes, facts: GraphFacts, backend: Backend) -> Any:
    """Fill a network from a model's bytes; the parser must live as long as the network.

    Raises:
        UsageError: a registered plugin would crash TensorRT-RTX's parser.
        BuildError: the library lacks an operator, which the message names, or refuses the model.
    """
    if backend == "tensorrt-rtx":
        _refuse_creators(module, facts)
    _refuse_namesakes(module, facts, backend)
    parser = module.OnnxParser(network, logger)
    if not parser.parse(data):
        raise _refusal(parser, facts, backend)
    return parser


def _refuse_creators(module: ModuleType, facts: GraphFacts) -> None:
    """Refuse registered plugins with the name of an operator of the model: they crash TensorRT-RTX's parser.

    The parser then opens libtensorrt_rtx.so, and ends the process, because its wheel ships libtensorrt_rtx.so.1 only.
    With the shorter name present the builder takes the plugin (measured in 1.7.1); nothing here provides it yet.
    """
    used = {kind for _, kind in facts.operators}
    registered = {creator.name for creator in module.get_plugin_registry().all_creators}
    if clash := sorted(used & registered):
        raise UsageError(
            f"A plugin named {clash[0]!r} is registered in this process, and would crash TensorRT-RTX's parser.",
            "Build in a process that has not loaded a plugin.",
        )


def _refuse_namesakes(module: ModuleType, facts: GraphFacts, backend: Backend) -> None:
    """Refuse undefined operators: the parser ignores the domain, so com.acme::Relu becomes ONNX's Relu (measured)."""
    registered = {creator.name for creator in module.get_plugin_registry().all_creators}
    for domain, kind in facts.undefined:
        if kind not in registered and (domain, kind) not in _READ_AS_STANDARD:
            raise BuildError(f"{BACKENDS[backend].title} has no operator {domain}::{kind}.", _undefined_remedy(backend))


def _undefined_remedy(backend: Backend) -> str:
    if BACKENDS[backend].takes_plugins:
        return "Define it by a model-local function, or give its plugin with --plugin."
    return f"Define it by a model-local function: {BACKENDS[backend].title} gets no plugins here yet."


def _refusal(parser: Any, facts: GraphFacts, backend: Backend) -> BuildError:
    """The error for a refused model: the name of an operator that the parser lacks, else the parser's reason."""
    found = [parser.get_error(index) for index in range(parser.num_errors)]
    for error in found:
        operator = error.node_operator()
        if not operator or not _is_unknown(parser, error):
            continue
        domain = max((domain for domain, kind in facts.operators if kind == operator), default="")  # not the standard's
        if domain in ("", "ai.onnx"):
            remedy = "Export with another --opset, replace it in the model, or run the model in ONNX Runtime."
        else:
            remedy = _undefined_remedy(backend)
        name = f"{domain}::{operator}" if domain else operator
        return BuildError(
            f"{BACKENDS[backend].title} has no operator {name} (node {error.node_name() or '?'}).", remedy
        )
    what = "; ".join(dict.fromkeys(_said(error) for error in found)) or "no reason given"
    remedy = "Change the model there, or run it in ONNX Runtime."
    return BuildError(f"{BACKENDS[backend].title} refuses the model: {what}.", remedy)


def _is_unknown(parser: Any, error: Any) -> bool:
    """Whether the parser lacks the operator; for one that it has, the code "unsupported" refers to this node only."""
    if "Plugin not found" in error.desc() or "creator" in error.desc():
        return True
    return error.code().name == "UNSUPPORTED_NODE" and not parser.supports_operator(error.node_operator())


def _said(error: Any) -> str:
    """The node and the parser's message, without its leading C++ expression."""
    words = " ".join(error.desc().split())
    reason = _ASSERTION.sub("", words).rstrip(".!")
    node = " ".join(f"{error.node_operator()} {error.node_name()}".split())
    return f"{node}: {reason}" if node else reason


def layers_of(network: Any) -> tuple[EngineLayer, ...]:
    """Every layer of a parsed network, before anything is fused."""
    layers = (network.get_layer(index) for index in range(network.num_layers))
    return tuple(
        EngineLayer(layer.name, layer.type.name, tuple(layer.get_output_type(i).name for i in range(layer.num_outputs)))
        for layer in layers
    )


def srus_of(facts: GraphFacts, network: Any, options: BuildOptions) -> tuple[EngineSRU, ...]:
    """Form of each SRU in a parsed network: one plugin layer of its name, or the layers of its function."""
    layers = [network.get_layer(index) for index in range(network.num_layers)]
    plugins = {layer.name for layer in layers if layer.type.name == "PLUGIN_V3"}
    # the parser writes the calls that lead to a layer into its metadata: [ONNX Layer: NODE | SITE (OPERATOR)]
    counts = Counter(found[1] for layer in layers if (found := _CALLED_FROM.search(layer.metadata)))
    library = BACKENDS[options.backend]
    if not library.takes_plugins:
        why = f"{library.title} gets no plugins here yet; its compiler fuses the function's nodes"
    elif options.plugin is None:
        why = "no plugin was given (--plugin)"
    else:
        why = "the parser took the function although the plugin is registered"
    return tuple(
        EngineSRU(node.name, "plugin", f"plugin layer {node.name}", 1)
        if node.name in plugins
        else EngineSRU(node.name, "expanded", why, counts[node.name])
        for node in facts.srus
    )


def tensors_of(network: Any) -> tuple[tuple[EngineTensor, ...], tuple[EngineTensor, ...]]:
    """A network's inputs and outputs."""
    inputs = [network.get_input(i) for i in range(network.num_inputs)]
    outputs = [network.get_output(i) for i in range(network.num_outputs)]
    described = [[EngineTensor(t.name, t.dtype.name, tuple(t.shape)) for t in side] for side in (inputs, outputs)]
    return tuple(described[0]), tuple(described[1])
