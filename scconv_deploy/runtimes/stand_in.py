"""Float32 stand-in of a half model, for runtimes that lack the type: it rounds each value where the half model does.

Each operator computes in float32 and its result is rounded to half once, as on hardware with float32 accumulators. The
model stands in for the arithmetic, not for a runtime: a runtime that fuses operators rounds less often, one that
accumulates in half rounds more coarsely.
"""

from __future__ import annotations

from collections.abc import Mapping

import onnx
import onnx.inliner
from onnx import TensorProto, helper, numpy_helper

from scconv_deploy.graph.types import graphs_of

_HALF = (TensorProto.FLOAT16, TensorProto.BFLOAT16)
_TYPES = ("to", "dtype", "output_datatype")  # attributes that hold an element type
_PREFIX = "scconv_round::"


def stand_in(model: onnx.ModelProto) -> onnx.ModelProto:
    """Make the float32 stand-in of a half model.

    Args:
        model: from :func:`scconv_deploy.precision.half.to_half`; it is not changed.

    Returns:
        A model with the same names whose inputs, outputs and operators are float32; functions are inlined. Two casts
        behind each value that was half round it, in subgraphs too.
    """
    inlined = onnx.shape_inference.infer_shapes(onnx.inliner.inline_local_functions(model))
    _graph_in_float(inlined.graph, {})
    return inlined


def _graph_in_float(graph: onnx.GraphProto, renamed: Mapping[str, str]) -> None:
    """Change a graph and its subgraphs to float32.

    Args:
        renamed: input of this graph or an outer one -> name of its rounded value.
    """
    halves = _half_values(graph)
    for tensor in graph.initializer:
        _to_float(tensor)
    nodes, inner = [], dict(renamed)
    for value in graph.input:
        inner.pop(value.name, None)
        if value.name in halves:
            inner[value.name] = f"{_PREFIX}{value.name}"
            nodes += _rounding(value.name, inner[value.name], halves[value.name])
    for node in graph.node:
        node.input[:] = [inner.get(name, name) for name in node.input]
        for body in graphs_of(node).values():
            _graph_in_float(body, inner)
        nodes += _in_float(node, halves)
    copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del graph.node[:], graph.value_info[:]
    graph.node.extend(copies)
    for value in (*graph.input, *graph.output):
        if value.name in halves:
            value.type.tensor_type.elem_type = TensorProto.FLOAT


def _half_values(graph: onnx.GraphProto) -> dict[str, int]:
    """Types of all half values that are no initializers, by name."""
    constants = {tensor.name for tensor in graph.initializer} - {value.name for value in graph.input}
    found = {v.name: v.type.tensor_type.elem_type for v in (*graph.input, *graph.value_info, *graph.output)}
    return {name: kind for name, kind in found.items() if kind in _HALF and name not in constants}


def _in_float(node: onnx.NodeProto, halves: Mapping[str, int]) -> list[onnx.NodeProto]:
    """Change a node to float32; return it and the nodes that round its outputs."""
    for attribute in node.attribute:
        if attribute.type == onnx.AttributeProto.TENSOR:
            _to_float(attribute.t)
        elif attribute.name in _TYPES and attribute.i in _HALF and attribute.type == onnx.AttributeProto.INT:
            attribute.i = TensorProto.FLOAT
    roundings = []
    for index, name in enumerate(node.output):
        if name in halves:
            node.output[index] = f"{_PREFIX}{name}::exact"
            roundings += _rounding(node.output[index], name, halves[name])
    return [node, *roundings]


def _rounding(name: str, rounded: str, kind: int) -> list[onnx.NodeProto]:
    half = f"{_PREFIX}{rounded}::half"
    return [
        helper.make_node("Cast", [name], [half], to=kind),
        helper.make_node("Cast", [half], [rounded], to=TensorProto.FLOAT),
    ]


def _to_float(tensor: onnx.TensorProto) -> None:
    if tensor.data_type in _HALF:
        array = numpy_helper.to_array(tensor).astype("float32")
        tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
