"""Invariants of every file with SRU nodes, restored after a simplifier, rewriter or converter.

- An SRU's parameters are initializers of its own, called ``SITE.cut``, ``SITE.sign`` and so on: simplifiers merge equal
  tensors, and then a tool that quantises a BatchNorm's weight quantises a sign.
- The function for groups that straddle channels comes first: NVIDIA's parser keys functions by name alone and takes the
  first, and that body is right for whole groups too.
- SRU outputs have their type and shape in ``value_info``: a runtime that cannot infer a function's output loses
  fusions.
- The IR version is one that runtimes in the field read.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from itertools import count

import onnx

from scconv_deploy.graph.contract import DOMAIN, IR_VERSION, PARAMETERS, STRADDLE
from scconv_deploy.graph.unknown import with_inner


def tidy(model: onnx.ModelProto) -> None:
    """Restore the invariants of a model in place; a tidy model is not changed."""
    nodes = [node for node in with_inner(model.graph.node) if node.domain == DOMAIN]
    if not nodes:
        return
    model.ir_version = min(model.ir_version, IR_VERSION)
    _own_parameters(model.graph, nodes)
    _describe_outputs(model.graph, nodes)
    straddling_first(model)


def straddling_first(model: onnx.ModelProto) -> None:
    """Put the functions for groups that straddle channels before all others, in place."""
    functions = list(model.functions)
    wanted = sorted(functions, key=lambda f: not (f.domain == DOMAIN and f.overload == STRADDLE))
    if wanted != functions:
        del model.functions[:]
        model.functions.extend(wanted)


def _own_parameters(graph: onnx.GraphProto, nodes: list[onnx.NodeProto]) -> None:
    stored = {tensor.name: tensor for tensor in graph.initializer}
    fixed = {value.name for value in (*graph.input, *graph.output)}
    everything = list(with_inner(graph.node))
    reads = Counter(name for node in everything for name in node.input)
    reads_here = Counter(name for node in nodes for name in node.input[1:])
    places: list[tuple[onnx.NodeProto, int, str, onnx.TensorProto]] = []
    kept: set[str] = set()
    for node in nodes:
        for index, (formal, name) in enumerate(zip(PARAMETERS[node.op_type], node.input[1:], strict=False), 1):
            wanted = f"{node.name or node.output[0]}.{formal.removeprefix('sru__')}"
            value = _constant(graph, stored, name)
            if name in stored and reads[name] == 1 and name not in fixed and _is_called(name, wanted):
                kept.add(name)
            elif value is not None:
                places.append((node, index, wanted, onnx.TensorProto.FromString(value.SerializeToString())))
    replaced = {node.input[index] for node, index, _, _ in places}
    unused = {name for name in replaced & set(stored) if reads[name] == reads_here[name]} - fixed
    for index in reversed([i for i, tensor in enumerate(graph.initializer) if tensor.name in unused]):
        del graph.initializer[index]
    taken = (fixed | set(stored) | {name for node in everything for name in node.output}) - unused
    for node, index, wanted, value in places:
        value.name = node.input[index] = next(name for name in _names(wanted) if name not in taken)
        taken.add(value.name)
        graph.initializer.append(value)


def _is_called(name: str, wanted: str) -> bool:
    """Whether a name is the wanted one, or it with a number because another tensor has it."""
    return name == wanted or re.fullmatch(rf"{re.escape(wanted)}#\d+", name) is not None


def _names(wanted: str) -> Iterator[str]:
    yield wanted
    yield from (f"{wanted}#{number}" for number in count(2))


def _constant(graph: onnx.GraphProto, stored: dict[str, onnx.TensorProto], name: str) -> onnx.TensorProto | None:
    """The tensor behind a name: an initializer or a Constant, either behind Identity nodes; None if it is computed."""
    producers = {node.output[0]: node for node in graph.node if node.op_type in ("Identity", "Constant")}
    while name in producers and producers[name].op_type == "Identity":
        name = producers[name].input[0]
    if name in stored:
        return stored[name]
    if name in producers:
        return next((a.t for a in producers[name].attribute if a.name == "value"), None)
    return None


def _describe_outputs(graph: onnx.GraphProto, nodes: list[onnx.NodeProto]) -> None:
    """Write down y's type and shape, which are those of x."""
    known = {value.name: value for value in (*graph.input, *graph.value_info, *graph.output)}
    here = {output for node in graph.node for output in node.output}
    for node in nodes:
        x, y = node.input[0], node.output[0]
        if y in here and x in known and y not in known:
            known[y] = onnx.ValueInfoProto()
            known[y].CopyFrom(known[x])
            known[y].name = y
            graph.value_info.append(known[y])
