"""Fusions of CRUs in a graph: two paths, weighted by a softmax over the channel means of both.

As public code writes it, the two halves of ``softmax(mean(cat(y1, y2))) * cat(y1, y2)`` are added up. *In halves*, the
same without that concatenation: ``s1, s2 = split(softmax(cat(mean(y1), mean(y2))))`` and ``y = s1 * y1 + s2 * y2``.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from scconv_deploy.graph.contract import MODULE, STANDARD_DOMAINS

_PASSED_ON = ("Split", "Slice", "Gather", "Squeeze", "Unsqueeze", "Reshape")


@dataclass(frozen=True, eq=False)
class Fusion:
    """A fusion of two paths of C channels.

    Attributes:
        first, second: the parts that a path is concatenated of.
        mean: node of a mean, which shows its spelling.
        nodes: its nodes, the Add first.
    """

    first: tuple[ir.Value, ...]
    second: tuple[ir.Value, ...]
    channels: int
    mean: ir.Node
    nodes: tuple[ir.Node, ...]


def read_concatenated(add: ir.Node) -> Fusion | str | None:
    """The fusion that ends in an Add, as public code writes it; why a candidate is none; None for any other Add."""
    halves = [_half(value) for value in add.inputs]
    if halves[0] is None or halves[1] is None:
        return None
    product, first, one = halves[0]
    other, second, two = halves[1]
    softmax, weighted = _factors(product)
    if product is not other or {first, second} != {0, 1} or softmax is None or weighted is None:
        return None
    concat = weighted.producer()
    if not along_channels(softmax, -1):
        return f"its softmax runs along axis {attribute(softmax, 'axis', -1)}, expected the channels"
    mean = node_before(softmax)
    if mean is None or mean_of(mean) is not weighted:
        return "its softmax is not over the means of the features that it weights"
    if concat is not None and operator(concat) == "Conv":
        return None  # one convolution computes both paths
    if concat is None or operator(concat) != "Concat" or not along_channels(concat, 0):
        return "its features are no concatenation along the channels"
    sizes = [channels(part) for part in concat.inputs]
    total = channels(weighted)
    if total is None or None in sizes:
        return "its number of channels is not known"
    ends = [sum(size for size in sizes[: count + 1] if size is not None) for count in range(len(sizes))]
    if total // 2 not in ends:
        return f"no border of its concatenation lies at {total // 2}, half of its channels"
    pooling = mean_nodes(mean)
    inside = [add, softmax, *pooling, concat, one, two, *filter(None, [product.producer()])]
    means = (node.outputs[0] for node in pooling)
    values = (weighted, *means, softmax.outputs[0], product, *one.outputs, *two.outputs)
    if needed := needed_elsewhere(values, inside):
        return needed
    parts = [part for part in concat.inputs if part is not None]
    border = ends.index(total // 2) + 1
    return Fusion(tuple(parts[:border]), tuple(parts[border:]), total // 2, mean, tuple(inside))


def _half(value: ir.Value | None) -> tuple[ir.Value, int, ir.Node] | None:
    """(tensor, 0 or 1, node) if a value is the first or the second half of a tensor's channels."""
    node = None if value is None else value.producer()
    if node is None or value is None or operator(node) not in ("Split", "Slice") or node.inputs[0] is None:
        return None
    if is_split_in_halves(node):
        return node.inputs[0], value.index() or 0, node
    total = channels(node.inputs[0])
    if operator(node) != "Slice" or total is None or total % 2:
        return None
    bounds = [constant(given) for given in node.inputs[1:]]
    if len(bounds) < 3 or any(bound is None or bound.size != 1 for bound in bounds):
        return None
    start, end, axis, *step = [int(bound[0]) for bound in bounds if bound is not None]
    shape = node.inputs[0].shape
    if shape is None or axis % len(shape) != 1 or step not in ([], [1]):
        return None
    here = (start % total if start < 0 else start, min(end % total if end < 0 else end, total))
    order = [(0, total // 2), (total // 2, total)]
    return (node.inputs[0], order.index(here), node) if here in order else None


def _factors(product: ir.Value) -> tuple[ir.Node | None, ir.Value | None]:
    """(Softmax, other factor) of a product with a softmax."""
    node = product.producer()
    if node is None or operator(node) != "Mul":
        return None, None
    for weight, weighted in (node.inputs, node.inputs[::-1]):
        softmax = None if weight is None else weight.producer()
        if softmax is not None and operator(softmax) == "Softmax":
            return softmax, weighted
    return None, None


def read_halves(add: ir.Node) -> Fusion | None:
    """The fusion that ends in this Add, if it is one in halves."""
    products = [_producer(value, "Mul") for value in add.inputs]
    if operator(add) != "Add" or products[0] is None or products[1] is None:
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
    if softmax is None or concat is None or len(concat.inputs) != 2 or not is_of_channels(softmax, concat):
        return None
    means = [None if value is None else value.producer() for value in concat.inputs]
    if [None if mean is None else mean_of(mean) for mean in means] != [y1, y2]:
        return None
    nodes = (add, *products, split, softmax, concat, *means)
    size = channels(y1)
    if size is None or means[0] is None:
        return None
    return Fusion((y1,), (y2,), size, means[0], tuple(node for node in nodes if node is not None))


def _weighted(product: ir.Node) -> tuple[ir.Node, int, ir.Value] | None:
    """(Split, which of its outputs, path) of a product of a weight and a path."""
    for weight, path in (product.inputs, product.inputs[::-1]):
        split = _producer(weight, "Split")
        of_softmax = split is not None and _producer(split.inputs[0], "Softmax") is not None
        if split is not None and of_softmax and path is not None and weight is not None:
            return split, weight.index() or 0, path
    return None


def mean_of(node: ir.Node) -> ir.Value | None:
    """x if the node is ``mean(x)`` over all axes behind the channels, which stay with size 1; else None.

    torch.export writes the mean of a signal between an Unsqueeze and a Squeeze.
    """
    x = node.inputs[0] if node.inputs else None
    if x is None or operator(node) == "GlobalAveragePool":
        return x
    if operator(node) == "Squeeze":
        return _mean_of_planes(node)
    axes = constant(node.inputs[1]) if operator(node) == "ReduceMean" and len(node.inputs) > 1 else None
    if axes is None or x.shape is None or attribute(node, "keepdims", 1) != 1:
        return None
    rank = len(x.shape)
    return x if sorted(int(axis) % rank for axis in axes) == list(range(2, rank)) else None


def _mean_of_planes(squeeze: ir.Node) -> ir.Value | None:
    mean = node_before(squeeze)
    if mean is None or operator(mean) not in ("ReduceMean", "GlobalAveragePool"):
        return None
    unsqueeze = _producer(mean_of(mean), "Unsqueeze")
    if unsqueeze is None:
        return None
    x = unsqueeze.inputs[0]
    removed, added = (constant(node.inputs[1]) if len(node.inputs) > 1 else None for node in (squeeze, unsqueeze))
    if x is None or x.shape is None or removed is None or added is None:
        return None
    rank = len(x.shape) + len(added)
    taken, given = ({int(axis) % rank for axis in axes} for axes in (removed, added))
    return x if taken == given and not {0, 1} & given else None


def mean_like(mean: ir.Node, op: Any, path: ir.Value) -> ir.Value:
    """The mean of a path by a rewriter's builder, spelled as another mean."""
    if operator(mean) == "GlobalAveragePool":
        return op.GlobalAveragePool(path)
    if operator(mean) == "ReduceMean":
        return op.ReduceMean(path, mean.inputs[1], keepdims=1)
    axes = np.arange(2, 3 if path.shape is None else len(path.shape))
    return op.ReduceMean(path, op.initializer(ir.tensor(axes), name=f"{path.name}.axes"), keepdims=1)


def mean_nodes(node: ir.Node) -> list[ir.Node]:
    """The nodes of a mean: itself, and those between an Unsqueeze and a Squeeze."""
    nodes = [node]
    while operator(nodes[0]) == "Squeeze" or (len(nodes) == 2 and operator(nodes[1]) == "Squeeze"):
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
    if operator(node) != "Split" or len(node.outputs) != 2 or not along_channels(node, 0):
        return False
    sizes = constant(node.inputs[1]) if len(node.inputs) > 1 and node.inputs[1] is not None else None
    if sizes is not None:
        return int(sizes[0]) == int(sizes[1])
    total = channels(node.inputs[0])
    return len(node.inputs) < 2 and total is not None and total % 2 == 0


def softmax_behind(value: ir.Value | None) -> ir.Node | None:
    """The Softmax whose result a value is, or a part of it in another shape."""
    node = None if value is None else value.producer()
    while node is not None and operator(node) in _PASSED_ON:
        node = node_before(node)
    return node if node is not None and operator(node) == "Softmax" else None


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


def operator(node: ir.Node) -> str:
    """Type of a node of ONNX's own domain; "" for any other, whose name says nothing of what it computes."""
    return node.op_type if node.domain in STANDARD_DOMAINS else ""


def attribute(node: ir.Node, name: str, default: int) -> int:
    """An integer attribute of a node."""
    return node.attributes[name].as_int() if name in node.attributes else default


def _producer(value: ir.Value | None, kind: str) -> ir.Node | None:
    node = None if value is None else value.producer()
    return node if node is not None and node.op_type == kind and operator(node) else None
