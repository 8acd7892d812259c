"""Float arithmetic that stays float32 because its result becomes an index, a decision, a coordinate or the like.

float16 has 11 bits: it counts to 2048 only, moves a pixel of a large image to its neighbour, and rounds away the z of a
gate, which is of the order 1/C. So each such result is followed back through element-wise, shape and reducing
operators, until the data of the network: products with many terms, SRUs, and the sums of residual connections. Those
are rounded to half like all data; everything after them stays float32.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import onnx_ir as ir

from scconv_deploy.graph.contract import DOMAIN
from scconv_deploy.precision.float32 import all_nodes, graphs_of, is_tensor

_LAYERS = {
    "Conv", "ConvTranspose", "DeformConv", "Gemm", "MatMul", "Einsum", "LSTM", "GRU", "RNN", "Attention",
}  # fmt: skip
_FEWEST_TERMS = 5
"""Fewest terms of a product that counts as a layer. Fewer are a change of coordinates (a rotation, a homography)."""

_REDUCING = ("Reduce", "Global", "ArgM", "Shape", "Size")

COORDINATES: dict[str, tuple[int, ...]] = {
    "Resize": (1, 2), "Upsample": (1,), "GridSample": (1,), "AffineGrid": (0,), "RoiAlign": (1,), "MaxRoiPool": (1,),
    "Range": (0, 1, 2), "OneHot": (0, 1),
}  # fmt: skip
"""Indices of float inputs that are coordinates, sizes or counts, by operator."""

_STEPS = {"Floor", "Ceil", "Round", "Sign", "Mod", "Bernoulli"}
_PERIODIC = {"Sin", "Cos", "Tan"}
_OF_NO_VALUE = {"Shape", "Size", "SequenceLength", "OptionalHasElement"}  # independent of the values
_WIDE = {ir.DataType.FLOAT, ir.DataType.DOUBLE}


@dataclass(frozen=True, eq=False)
class Protected:
    """Nodes and graph inputs that stay in float32 because of their use, with the reasons.

    Attributes:
        nodes: of the main graph and of all graphs in it.
        inputs: of the main graph.
    """

    nodes: dict[ir.Node, str]
    inputs: dict[ir.Value, str]


def protected(model: ir.Model) -> Protected:
    """Find the nodes and values of a graph that must stay in float32.

    Args:
        model: from :func:`.float32.typed_float32`.
    """
    nodes = all_nodes(model)
    walk = _Walk(nodes)
    for node in nodes:
        reason, inputs = _needs(node)
        if reason:
            walk.back(inputs, f"{reason} ({node.op_type} {node.name or node.outputs[0].name})")
    found = {node: reason for node in nodes if (reason := _own(node))}
    given = {value: walk.values[value] for value in model.graph.inputs if value in walk.values}
    return Protected(found | walk.nodes, given)


def _own(node: ir.Node) -> str:
    """The reason if a node itself must compute in float32, else empty."""
    if node.op_type in ("Cast", "Resize", "GridSample", "Upsample", "OneHot") or node.domain != "":
        return ""  # coordinates have types of their own there
    return _needs(node)[0]


def _needs(node: ir.Node) -> tuple[str, list[ir.Value]]:
    """Why a node needs inputs in float32, and which; empty if it does not."""
    floats = [value for value in node.inputs if value is not None and _carries_floats(value)]
    if not floats or graphs_of(node):
        return "", []
    if node.domain == DOMAIN:
        return "its result is a parameter of a gate", [v for v in node.inputs[1:] if v is not None]
    if node.domain == "":
        if node.op_type in COORDINATES:
            at = COORDINATES[node.op_type]
            places = [v for i, v in enumerate(node.inputs) if i in at and v is not None and _carries_floats(v)]
            return ("its result is a coordinate or a size", places) if places else ("", [])
        if node.op_type in _STEPS:
            return "its result goes into a step function", floats
        if node.op_type in _PERIODIC:
            return "its result is an angle", floats
        if node.op_type in _OF_NO_VALUE:
            return "", []
    others = [v for v in node.outputs if v.name and not _carries_floats(v) and (v.uses() or v.is_graph_output())]
    kind = next((value.dtype for value in others if value.dtype is not None), None)
    if kind is None:
        foreign = others and node.domain != ""
        return ("its result goes into an operator that is not known", floats) if foreign else ("", [])
    if kind == ir.DataType.BOOL:
        return "its result is a decision", floats
    return "its result is an index or a count", floats


def _carries_floats(value: ir.Value) -> bool:
    """Whether a value is a tensor, a sequence or an optional of float32 or float64."""
    return value.dtype in _WIDE


class _Walk:
    """Backward walk from values to the nodes that compute them; collected in :attr:`nodes` and :attr:`values`."""

    def __init__(self, nodes: list[ir.Node]) -> None:
        self.nodes: dict[ir.Node, str] = {}
        self.values: dict[ir.Value, str] = {}
        self._owners = {graph: node for node in nodes for graph in graphs_of(node)}
        self._trunk = _residual_sums(nodes)

    def back(self, values: Iterable[ir.Value], reason: str) -> None:
        stack = [value for value in values if _carries_floats(value)]
        while stack:
            value = stack.pop()
            self.values.setdefault(value, reason)
            node = value.producer()
            if node is None:
                node = self._owners.get(value.graph) if value.is_graph_input() and value.graph is not None else None
            if node is None or node in self.nodes or is_layer(node) or node in self._trunk:
                continue
            self.nodes[node] = reason
            results = [output for graph in graphs_of(node) for output in graph.outputs]
            stack += [v for v in (*node.inputs, *results) if v is not None and _carries_floats(v)]


def is_layer(node: ir.Node) -> bool:
    """Whether a node's results are data of the network: a product with many terms, or an operator of another domain."""
    if node.domain != "":
        return True
    if node.op_type not in _LAYERS:
        return False
    weight = node.inputs[1] if node.op_type in ("MatMul", "Gemm") else None
    if weight is None or weight.shape is None or len(weight.shape) < 2:
        return True
    attribute = node.attributes.get("transB")
    transposed = attribute is not None and attribute.as_int() == 1
    terms = weight.shape[-1 if transposed else -2]
    return not isinstance(terms, int) or terms >= _FEWEST_TERMS


def _residual_sums(nodes: list[ir.Node]) -> set[ir.Node]:
    """Sums of data that feed a layer: the residual connections."""
    fresh: set[ir.Value] = set()  # data: results of layers, and of element-wise operators on them
    for node in nodes:
        comes_from_data = not node.op_type.startswith(_REDUCING) and any(v in fresh for v in node.inputs)
        if is_layer(node) or comes_from_data:
            fresh.update(output for output in node.outputs if _carries_floats(output))
    going: set[ir.Value] = set()  # values that reach a layer
    for node in reversed(nodes):
        if is_layer(node) or any(output in going for output in node.outputs):
            going.update(value for value in node.inputs if value is not None and is_tensor(value))
    return {
        node
        for node in nodes
        if node.op_type in ("Add", "Sum") and node.outputs[0] in going and all(v in fresh for v in node.inputs)
    }
