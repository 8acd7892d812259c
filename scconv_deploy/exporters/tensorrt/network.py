"""Parse a model with TensorRT: form of the model, plugins, refusals, and the layers and SRUs of the network."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any

from scconv_deploy.errors import BuildError, UsageError
from scconv_deploy.exporters.tensorrt.options import BuildOptions
from scconv_deploy.exporters.tensorrt.plugin_choice import architectures_of
from scconv_deploy.exporters.tensorrt.plugin_probe import require_plugins
from scconv_deploy.exporters.tensorrt.source import Form, GraphFacts, NetworkSource
from scconv_deploy.graph.contract import DOMAIN, PLUGIN_NAMESPACE, PLUGIN_VERSION
from scconv_deploy.runtimes.tensorrt.engine import DebugTensor, EngineLayer, EngineSRU, EngineTensor
from scconv_deploy.runtimes.tensorrt.plugin_library import load_once
from scconv_deploy.runtimes.tensorrt.versions import FUNCTIONS_BEHIND_PLUGINS, release
from scconv_deploy.system.backends import BACKENDS, Backend
from scconv_deploy.system.environment import sha256_of
from scconv_deploy.trt_plugins.elf import SharedLibrary, read_library

_READ_AS_STANDARD = {("com.microsoft", "QuantizeLinear"), ("com.microsoft", "DequantizeLinear")}
"""Operators of ONNX Runtime's tools that mean ONNX's own of the same name."""

_UNDEFINED = "Define it by a model-local function, or give its plugin with --plugin."
_ASSERTION = re.compile(r"^Assertion failed: (?:.*?: (?=[A-Z]))?")
_CALLED_FROM = re.compile(r"\| (.+) \(SRU(?:Norm|Soft)?\)")


def form_for(version: str, backend: Backend, plugin: bool, registered: bool = False) -> Form:
    """The form of a model that this version reads right.

    Before 10.7, TensorRT prefers a function over a plugin: with a plugin the functions are left out, without one they
    are inlined, for it binds their inputs wrongly. Every other version takes the model as it is.

    Args:
        plugin: whether the engine shall have the plugin.
        registered: whether the process has a plugin in its registry, be it for another engine; a parser would take it.
    """
    if backend == "tensorrt-rtx" or release(version) >= FUNCTIONS_BEHIND_PLUGINS:
        return "inlined" if registered and not plugin else "whole"
    return "plugin" if plugin else "inlined"


def load_plugin(module: ModuleType, options: BuildOptions, source: NetworkSource) -> str:
    """Load the plugin library through the registry, and look there for what the model needs.

    Returns:
        its SHA-256.

    Raises:
        UsageError: no such file.
        MissingRuntimeError: this release of TensorRT-RTX takes no plugins.
        IntegrityError: it is no shared library, or truncated.
        BuildError: the registry refuses it, or it holds no creator for one of the model's operators.
    """
    path = options.plugin
    if path is None or not path.is_file():
        raise UsageError(f"--plugin {path} does not exist.", "Build it with scconv-deploy plugin build.")
    digest = sha256_of(path)
    _check_gpu_code(path, read_library(path), options)
    if options.backend == "tensorrt-rtx" and source.facts.srus:
        require_plugins(module, path, lambda: source.read("whole"))
    if refused := load_once(module, path):
        raise BuildError(
            f"{BACKENDS[options.backend].title} cannot load the plugin {path}: {refused}.",
            "Check it with scconv-deploy plugin check; one process takes one build of it.",
        )
    registry = module.get_plugin_registry()
    for operator in sorted({node.operator for node in source.facts.srus}):
        if registry.get_creator(operator, PLUGIN_VERSION, PLUGIN_NAMESPACE) is None:
            raise BuildError(
                f"{path} was loaded, but the registry has no creator {PLUGIN_NAMESPACE}::{operator} "
                f"version {PLUGIN_VERSION}.",
                "Build the plugin of this scconv-deploy: scconv-deploy plugin build.",
            )
    return digest


def _check_gpu_code(path: Path, library: SharedLibrary, options: BuildOptions) -> None:
    """Refuse a plugin without code for a GPU that the engine is for (UsageError)."""
    for wanted in architectures_of(options) if library.cubins or library.ptx else ():
        if not library.serves(f"{wanted[:-1]}.{wanted[-1]}"):
            raise UsageError(
                f"--plugin {path} has no code for sm_{wanted}, which the engine is for: it holds {library.code}.",
                f"scconv-deploy plugin build --arch {wanted}, or --plugin auto.",
            )


def parse(module: ModuleType, network: Any, logger: Any, data: bytes, facts: GraphFacts, options: BuildOptions) -> Any:
    """Fill a network from a model's bytes; the parser must live as long as the network.

    Raises:
        UsageError: a plugin is registered that could make TensorRT-RTX's parser end the process.
        BuildError: an operator that the library lacks, by name, or its refusal.
    """
    backend = options.backend
    if backend == "tensorrt-rtx" and options.plugin is None:
        _refuse_creators(module, facts)
    _refuse_namesakes(module, facts, backend)
    parser = module.OnnxParser(network, logger)
    if not parser.parse(data):
        raise _refusal(parser, facts, backend)
    return parser


def _refuse_creators(module: ModuleType, facts: GraphFacts) -> None:
    """Refuse foreign plugins with the name of an operator of the model: the parser takes them, or ends the process.

    SRUs are no concern: without a plugin of ours they are inlined, see :func:`form_for`.
    """
    used = {kind for domain, kind in facts.operators if domain != DOMAIN}
    registered = {creator.name for creator in module.get_plugin_registry().all_creators}
    if clash := sorted(used & registered):
        raise UsageError(
            f"A plugin named {clash[0]!r} is registered in this process; TensorRT-RTX's parser would take it for the "
            "operator of that name, or end the process.",
            "Build in a process that loaded none.",
        )


def _refuse_namesakes(module: ModuleType, facts: GraphFacts, backend: Backend) -> None:
    """Refuse undefined operators: the parser ignores the domain, so com.acme::Relu becomes ONNX's Relu (measured)."""
    registered = {creator.name for creator in module.get_plugin_registry().all_creators}
    for domain, kind in facts.undefined:
        if kind not in registered and (domain, kind) not in _READ_AS_STANDARD:
            raise BuildError(f"{BACKENDS[backend].title} has no operator {domain}::{kind}.", _UNDEFINED)


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
            remedy = _UNDEFINED
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
    why = "no plugin was given (--plugin)"
    if options.plugin is not None:
        why = "the parser took the function although the plugin is registered"
    return tuple(
        EngineSRU(node.name, "plugin", f"plugin layer {node.name}", 1)
        if node.name in plugins
        else EngineSRU(node.name, "expanded", why, counts[node.name])
        for node in facts.srus
    )


def mark_srus(network: Any, facts: GraphFacts) -> tuple[DebugTensor, ...]:
    """Mark the input and the output of each SRU as debug tensors; returns the ends that can be read.

    The parser keeps the names of the graph's tensors, whether an SRU became a plugin or layers. A tensor that it
    dropped, or that the library refuses to mark, is left out. Two SRUs may share a tensor. The network's own inputs and
    outputs can be read without a mark; TensorRT-RTX does not build with an input marked (measured in 1.7.1).
    """
    layers = [network.get_layer(index) for index in range(network.num_layers)]
    inner = {(t := layer.get_output(i)).name: t for layer in layers for i in range(layer.num_outputs)}
    outer = {network.get_input(i).name for i in range(network.num_inputs)}
    outer |= {network.get_output(i).name for i in range(network.num_outputs)}
    ends = [
        end
        for sru in facts.srus
        for end in (DebugTensor(sru.x, sru.name, "x"), DebugTensor(sru.y, sru.name, "y"))
        if end.name in inner or end.name in outer
    ]
    marked = {name: name in outer or network.mark_debug(inner[name]) for name in dict.fromkeys(e.name for e in ends)}
    return tuple(end for end in ends if marked[end.name])


def tensors_of(network: Any) -> tuple[tuple[EngineTensor, ...], tuple[EngineTensor, ...]]:
    """A network's inputs and outputs."""
    inputs = [network.get_input(i) for i in range(network.num_inputs)]
    outputs = [network.get_output(i) for i in range(network.num_outputs)]
    described = [[EngineTensor(t.name, t.dtype.name, tuple(t.shape)) for t in side] for side in (inputs, outputs)]
    return tuple(described[0]), tuple(described[1])
