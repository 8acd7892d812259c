"""Fuse the two paths of a CRU without a concatenation of 2C channels.

Before, as public code writes it, with a Split or two Slices at C::

    z = Concat(y1, y2);  p = Softmax(mean(z)) * z;  y = p[:, :C] + p[:, C:]

After: ``s1, s2 = Split(Softmax(Concat(mean(y1), mean(y2))))`` and ``y = s1 * y1 + s2 * y2``. Every number is computed
from the same numbers in the same order, so the result is equal to the bit unless a runtime takes another kernel for a
mean.

Refused, with the reason: a softmax along another axis, or over the two paths of each channel (the paper's Eq. 8, which
concatenates nothing); weights that are not of the features' own means; halves between which no border of the
concatenation lies; and a fusion whose tensors other nodes need.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from onnxscript.rewriter import MatchResult, RewriterContext, RewriteRuleClassBase

from scconv_deploy.graph.cru import (
    along_channels,
    attribute,
    channels,
    constant,
    is_split_in_halves,
    mean_nodes,
    mean_of,
    needed_elsewhere,
    node_before,
    read_halves,
    softmax_behind,
    with_channels,
)

NAME = "cru halves"
_PAIRWISE = "its softmax runs over the two paths of each channel (the paper's Eq. 8): it concatenates no features"


class FuseHalves(RewriteRuleClassBase):
    """Rule of this module."""

    def __init__(self) -> None:
        super().__init__(NAME, remove_nodes=False)

    def pattern(self, op: Any, first: Any, second: Any) -> Any:
        return op.Add(first, second, _outputs=["y"])

    def check(self, context: Any, y: ir.Value, **_: Any) -> MatchResult:
        result = MatchResult()
        add = y.producer()
        reading = None if add is None else _read(add)
        if reading is None:
            return result.fail()  # any other Add is no candidate
        return result.fail(reading, [y]) if isinstance(reading, str) else result

    def rewrite(self, op: RewriterContext, y: ir.Value, **_: Any) -> ir.Value:
        add = y.producer()
        reading = None if add is None else _read(add)
        if not isinstance(reading, _Fusion):
            raise ValueError("rewrite() follows check()")
        paths = []
        for parts in (reading.first, reading.second):
            if len(parts) == 1:
                paths.append(parts[0])
            else:
                paths.append(with_channels(op.Concat(*parts, axis=1), parts[0], reading.channels))
        y1, y2 = paths
        means = [with_channels(_mean(op, reading.mean, path), path, reading.channels, pooled=True) for path in paths]
        both = with_channels(op.Concat(*means, axis=1), y1, 2 * reading.channels, pooled=True)
        weights = with_channels(op.Softmax(both, axis=1), y1, 2 * reading.channels, pooled=True)
        s1, s2 = op.Split(weights, axis=1, num_outputs=2, _outputs=2)
        weighted = []
        for share, path in ((s1, y1), (s2, y2)):
            with_channels(share, path, reading.channels, pooled=True)
            weighted.append(with_channels(op.Mul(share, path), path, reading.channels))
        return op.Add(*weighted)


@dataclass(frozen=True, eq=False)
class _Fusion:
    """A fusion as public code writes it: the parts of each path, its number of channels C, and the node of the mean."""

    first: tuple[ir.Value, ...]
    second: tuple[ir.Value, ...]
    channels: int
    mean: ir.Node


def _mean(op: RewriterContext, mean: ir.Node, path: ir.Value) -> ir.Value:
    """The mean of a path, as the file spells it."""
    if mean.op_type == "GlobalAveragePool":
        return op.GlobalAveragePool(path)
    if mean.op_type == "ReduceMean":
        return op.ReduceMean(path, mean.inputs[1], keepdims=1)
    axes = np.arange(2, 3 if path.shape is None else len(path.shape))
    return op.ReduceMean(path, op.initializer(ir.tensor(axes), name=f"{path.name}.axes"), keepdims=1)


def _read(add: ir.Node) -> _Fusion | str | None:
    """The fusion that ends in an Add; why a candidate is none; None for any other Add."""
    halves = [_half(value) for value in add.inputs]
    if halves[0] is None or halves[1] is None:
        return _other_fusion(add)
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
    if concat is None or concat.op_type != "Concat" or not along_channels(concat, 0):
        return "its features are no concatenation along the channels"
    sizes = [channels(part) for part in concat.inputs]
    total = channels(weighted)
    if total is None or None in sizes:
        return "its number of channels is not known"
    ends = [sum(size for size in sizes[: count + 1] if size is not None) for count in range(len(sizes))]
    if total // 2 not in ends:
        return f"no border of its concatenation lies at {total // 2}, half of its channels"
    pooling = mean_nodes(mean)
    inside = {softmax, *pooling, concat, product.producer(), one, two, add}
    means = (node.outputs[0] for node in pooling)
    values = (weighted, *means, softmax.outputs[0], product, *one.outputs, *two.outputs)
    if needed := needed_elsewhere(values, inside):
        return needed
    parts = [part for part in concat.inputs if part is not None]
    border = ends.index(total // 2) + 1
    return _Fusion(tuple(parts[:border]), tuple(parts[border:]), total // 2, mean)


def _half(value: ir.Value | None) -> tuple[ir.Value, int, ir.Node] | None:
    """(tensor, 0 or 1, node) if a value is the first or the second half of a tensor's channels."""
    node = None if value is None else value.producer()
    if node is None or value is None or node.op_type not in ("Split", "Slice") or node.inputs[0] is None:
        return None
    if is_split_in_halves(node):
        return node.inputs[0], value.index() or 0, node
    total = channels(node.inputs[0])
    if node.op_type != "Slice" or total is None or total % 2:
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
    if node is None or node.op_type != "Mul":
        return None, None
    for weight, weighted in (node.inputs, node.inputs[::-1]):
        softmax = None if weight is None else weight.producer()
        if softmax is not None and softmax.op_type == "Softmax":
            return softmax, weighted
    return None, None


def _other_fusion(add: ir.Node) -> str | None:
    """Why a sum of two products with parts of one softmax over means is not rewritten; None for any other sum."""
    products = [None if value is None else value.producer() for value in add.inputs]
    softmaxes = []
    for product in products:
        factors = product.inputs if product is not None and product.op_type == "Mul" else ()
        softmaxes.append(next((found for found in map(softmax_behind, factors) if found is not None), None))
    if softmaxes[0] is None or softmaxes[0] is not softmaxes[1] or read_halves(add) is not None:
        return None
    joined = node_before(softmaxes[0])
    if joined is None or joined.op_type != "Concat" or not all(_is_mean(value) for value in joined.inputs):
        return None
    return _PAIRWISE


def _is_mean(value: ir.Value | None) -> bool:
    node = None if value is None else value.producer()
    while node is not None and node.op_type in ("Unsqueeze", "Reshape"):
        node = node_before(node)
    return node is not None and node.op_type in ("GlobalAveragePool", "ReduceMean") and mean_of(node) is not None


RULES = (FuseHalves.rule(),)
