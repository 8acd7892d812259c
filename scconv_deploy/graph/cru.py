"""Fusions of CRUs in a graph: two paths, weighted by a softmax over the channel means of both.

As public code writes it, the two halves of ``softmax(mean(cat(y1, y2))) * cat(y1, y2)`` are added up. *In halves*, the
same without that concatenation: ``s1, s2 = split(softmax(cat(mean(y1), mean(y2))))`` and ``y = s1 * y1 + s2 * y2``.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from scconv_deploy.graph.contract import MODULE

_PASSED_ON = ("Split", "Slice", "Gather", "Squeeze", "Unsqueeze", "Reshape")


@dataclass(frozen=True, eq=False)
class Halves:
    """A fusion in halves: its paths, each ``[N, C, *]``, and its nodes."""

    y1: ir.Value
    y2: ir.Value
    nodes: tuple[ir.Node, ...]


def read_halves(add: ir.Node) -> Halves | None:
    """The fusion that ends in this Add, if it is one in halves."""
    products = [_producer(value, "Mul") for value in add.inputs]
    if add.op_type != "Add" or products[0] is None or products[1] is None:
        return None
    weighted = [_weighted(product) for product in products if product is not None]
    if weighted[0] is None or weighted[1] is None:
        return None
    split, first, path = weighted[0]
    other, second, other_path = weighted[1]
    if split is not other or {first, second} != {0, 1} or not is_split_in_halves(split):
        return None
    y1, y2 = (path, other_path) if first == 0 else (other_path, path)
    softmax = _producer(split.inputs[0], "Softmax")
    concat = None if softmax is None else _producer(softmax.inputs[0], "Concat")
    if softmax is None or concat is None or len(concat.inputs) != 2 or not (is_of_channels(softmax, concat)):
        return None
    means = [None if value is None else value.producer() for value in concat.inputs]
    if [None if mean is None else mean_of(mean) for mean in means] != [y1, y2]:
        return None
    nodes = (add, *products, split, softmax, concat, *means)
    return Halves(y1, y2, tuple(node for node in nodes if node is not None))


def fusion_of_path(value: ir.Value) -> Halves | None:
    """The fusion in halves of which this value is a path."""
    for product in (use.node for use in value.uses() if use.node.op_type == "Mul"):
        for add in (use.node for use in product.outputs[0].uses() if use.node.op_type == "Add"):
            fusion = read_halves(add)
            if fusion is not None and (fusion.y1 is value or fusion.y2 is value):
                return fusion
    return None


def _weighted(product: ir.Node) -> tuple[ir.Node, int, ir.Value] | None:
    """(Split, which of its outputs, path) of a product of a weight and a path."""
    for weight, path in (product.inputs, product.inputs[::-1]):
        split = _producer(weight, "Split")
        if split is not None and path is not None and weight is not None:
            return split, weight.index() or 0, path
    return None


def mean_of(node: ir.Node) -> ir.Value | None:
    """x if the node is ``mean(x)`` over all axes behind the channels, which stay with size 1; else None.

    torch.export writes the mean of a signal between an Unsqueeze and a Squeeze.
    """
    x = node.inputs[0] if node.inputs else None
    if x is None or node.op_type == "GlobalAveragePool":
        return x
    if node.op_type == "Squeeze":
        return _mean_of_planes(node)
    axes = constant(node.inputs[1]) if node.op_type == "ReduceMean" and len(node.inputs) > 1 else None
    if axes is None or x.shape is None or attribute(node, "keepdims", 1) != 1:
        return None
    rank = len(x.shape)
    return x if sorted(int(axis) % rank for axis in axes) == list(range(2, rank)) else None


def _mean_of_planes(squeeze: ir.Node) -> ir.Value | None:
    mean = node_before(squeeze)
    if mean is None or mean.op_type not in ("ReduceMean", "GlobalAveragePool"):
        return None
    unsqueeze = _producer(mean_of(mean), "Unsqueeze")
    if unsqueeze is None:
        return None
    removed, added = constant(squeeze.inputs[1]), constant(unsqueeze.inputs[1])
    if removed is None or added is None or not np.array_equal(removed, added):
        return None
    return None if {0, 1} & set(removed.tolist()) else unsqueeze.inputs[0]


def mean_nodes(node: ir.Node) -> list[ir.Node]:
    """The nodes of a mean: itself, and those between an Unsqueeze and a Squeeze."""
    nodes = [node]
    while nodes[0].op_type == "Squeeze" or (len(nodes) == 2 and nodes[1].op_type == "Squeeze"):
        before = node_before(nodes[0])
        if before is None:
            break
        nodes.insert(0, before)
    return nodes


def is_of_channels(softmax: ir.Node, concat: ir.Node) -> bool:
    """Whether a Softmax and a Concat both run along the channels, axis 1."""
    return along_channels(softmax, -1) and along_channels(concat, 0)


def along_channels(node: ir.Node, default: int) -> bool:
    """Whether a node's ``axis`` is 1, perhaps counted from the end."""
    axis = attribute(node, "axis", default)
    shape = next((value.shape for value in (*node.outputs, *node.inputs) if value is not None and value.shape), None)
    return axis == 1 or (axis < 0 and shape is not None and axis + len(shape) == 1)


def is_split_in_halves(node: ir.Node) -> bool:
    """Whether a node splits the channels into two halves."""
    if node.op_type != "Split" or len(node.outputs) != 2 or not along_channels(node, 0):
        return False
    sizes = constant(node.inputs[1]) if len(node.inputs) > 1 and node.inputs[1] is not None else None
    if sizes is not None:
        return int(sizes[0]) == int(sizes[1])
    total = channels(node.inputs[0])
    return len(node.inputs) < 2 and total is not None and total % 2 == 0


def softmax_behind(value: ir.Value | None) -> ir.Node | None:
    """The Softmax whose result a value is, or a part of it in another shape."""
    node = None if value is None else value.producer()
    while node is not None and node.op_type in _PASSED_ON:
        node = node_before(node)
    return node if node is not None and node.op_type == "Softmax" else None


def needed_elsewhere(values: Iterable[ir.Value], inside: Collection[ir.Node | None]) -> str:
    """The reason if a value is an output of the graph, or nodes that are not inside read it; else empty."""
    for value in values:
        if value.is_graph_output():
            return f"its {value.name} is an output of the graph"
        others = [use.node for use in value.uses() if use.node not in inside]
        if others:
            return f"its {value.name} is also needed by {others[0].name or others[0].op_type}"
    return ""


def node_before(node: ir.Node) -> ir.Node | None:
    """The node that computes the first input."""
    value = node.inputs[0] if node.inputs else None
    return None if value is None else value.producer()


def module_of(node: ir.Node) -> str:
    """Path of the CRU that a node belongs to, or the name of its first output if the file does not say."""
    return node.metadata_props.get(MODULE) or node.outputs[0].name or node.op_type


def channels(value: ir.Value | None) -> int | None:
    """Size of axis 1; None if it is not known."""
    shape = None if value is None else value.shape
    size = shape[1] if shape is not None and len(shape) > 2 else None
    return size if isinstance(size, int) else None


def with_channels(value: ir.Value, like: ir.Value, size: int, *, pooled: bool = False) -> ir.Value:
    """The value, with the type and shape of another one of ``size`` channels; all further axes 1 if pooled."""
    if like.dtype is not None:
        value.dtype = like.dtype
    if like.shape is not None:
        batch, _, *further = like.shape
        value.shape = ir.Shape([batch, size, *([1] * len(further) if pooled else further)])
    return value


def constant(value: ir.Value | None) -> np.ndarray | None:
    """A constant's entries as a vector; None if the value is computed."""
    tensor = None if value is None else ir.convenience.get_const_tensor(value)
    return None if tensor is None else tensor.numpy().reshape(-1)


def attribute(node: ir.Node, name: str, default: int) -> int:
    """An integer attribute of a node."""
    return node.attributes[name].as_int() if name in node.attributes else default


def _producer(value: ir.Value | None, operator: str) -> ir.Node | None:
    node = None if value is None else value.producer()
    return node if node is not None and node.op_type == operator else None
