"""Compute a CRU by two convolutions: both squeezes as one, and both paths as one.

Before, with u and l the squeezed channels::

    a, b = Split(x);  u = Conv1x1(a);  l = Conv1x1(b)
    z = Concat(GWC(u) + PWC1(u), PWC2(l), l);  y = the two halves of Softmax(mean(z)) * z, added up

After: ``z = Conv(Conv1x1(x))``, both of two groups where u and l are of one size, else with zeros between them. The
weights of the second are those of GWC as a dense kernel with PWC1 at its centre, and ``[PWC2; I]`` at the centre
(:func:`scconv_deploy.graph.merged.paths`). Equal but for the rounding of one sum of weights, and of the order of sums.

Fewer bytes and fewer kernels, but more multiplications: the lower path's 1x1 becomes a kernel of GWC's size. So it is
for TensorRT, where memory decides; in ONNX Runtime on the CPU it is slower.

Refused, with the reason: convolutions that are not a CRU's (a stride, a dilation, other padding, a bias besides GWC's),
weights that the graph computes or that are not float32, and tensors that other nodes need. What is no fusion at all is
said by the rule for halves.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from onnxscript.rewriter import MatchResult, RewriterContext, RewriteRuleClassBase

from scconv_deploy.graph import merged
from scconv_deploy.graph.cru import (
    Fusion,
    along_channels,
    attribute,
    channels,
    mean_like,
    needed_elsewhere,
    operator,
    read_concatenated,
    read_halves,
    with_channels,
)

NAME = "cru merged"


class MergeConvolutions(RewriteRuleClassBase):
    """Rule of this module."""

    def __init__(self) -> None:
        super().__init__(NAME, remove_nodes=False)

    def pattern(self, op: Any, first: Any, second: Any) -> Any:
        return op.Add(first, second, _outputs=["y"])

    def check(self, context: Any, y: ir.Value, **_: Any) -> MatchResult:
        result = MatchResult()
        add = y.producer()
        fusion = None if add is None else read_halves(add) or read_concatenated(add)
        if not isinstance(fusion, Fusion):
            return result.fail()
        reading = _read(fusion)
        return result.fail(reading, [y]) if isinstance(reading, str) else result

    def rewrite(self, op: RewriterContext, y: ir.Value, **_: Any) -> ir.Value:
        add = y.producer()
        fusion = None if add is None else read_halves(add) or read_concatenated(add)
        cru = _read(fusion) if isinstance(fusion, Fusion) else None
        if not isinstance(fusion, Fusion) or not isinstance(cru, _Convolutions):
            raise ValueError("rewrite() follows check()")
        squeeze = _initializer(op, "squeeze", cru.squeezes)
        paths = _initializer(op, "paths", [cru.gwc, cru.pwc1, *([cru.pwc2] if cru.pwc2 is not None else [])])
        inputs = [paths] if len(cru.gwc.inputs) < 3 else [paths, _initializer(op, "bias", [cru.gwc], index=2)]
        total, kernel = channels(cru.x), _ints(cru.gwc, "kernel_shape")
        weight = [value.const_value.numpy() for value in (squeeze, paths) if value.const_value is not None]
        if total is None or kernel is None:
            raise ValueError("rewrite() follows check()")
        groups = merged.groups_of(weight[0], total)
        squeezed = op.Conv(cru.x, squeeze, kernel_shape=[1] * len(kernel), group=groups)
        with_channels(squeezed, cru.u, len(weight[0]))
        groups = merged.groups_of(weight[1], len(weight[0]))
        pads = [size // 2 for size in kernel] * 2
        z = op.Conv(squeezed, *inputs, kernel_shape=kernel, pads=pads, group=groups)
        with_channels(z, cru.u, 2 * fusion.channels)
        mean = with_channels(mean_like(fusion.mean, op, z), z, 2 * fusion.channels, pooled=True)
        weights = with_channels(op.Softmax(mean, axis=1), z, 2 * fusion.channels, pooled=True)
        product = with_channels(op.Mul(weights, z), z, 2 * fusion.channels)
        halves = op.Split(product, axis=1, num_outputs=2, _outputs=2)
        return op.Add(*(with_channels(half, z, fusion.channels) for half in halves))


@dataclass(frozen=True, eq=False)
class _Convolutions:
    """The convolutions of a CRU, its input and its squeezed upper channels."""

    x: ir.Value
    u: ir.Value
    squeezes: tuple[ir.Node, ir.Node]
    gwc: ir.Node
    pwc1: ir.Node
    pwc2: ir.Node | None


def _read(fusion: Fusion) -> _Convolutions | str:
    """The convolutions before a fusion, or why they are not a CRU's."""
    added = fusion.first[0].producer() if len(fusion.first) == 1 else None
    upper = [None if value is None else value.producer() for value in added.inputs] if added is not None else []
    pair = [node for node in upper if node is not None and operator(node) == "Conv"]
    if added is None or operator(added) != "Add" or len(pair) != 2 or pair[0].inputs[0] is not pair[1].inputs[0]:
        return "its upper path is no sum of two convolutions of one tensor"
    gwc, pwc1 = pair if _is_pointwise(pair[1]) else pair[::-1]
    if not _is_pointwise(pwc1) or not _keeps_the_size(gwc):
        return "its upper path is no sum of a convolution that keeps the size and a 1x1 without a bias"
    lower = _lower(fusion)
    if lower is None:
        return "its lower path is no 1x1 convolution without a bias, followed by that convolution's input"
    pwc2, low, joined = lower
    up = gwc.inputs[0]
    squeezes = [None if value is None else value.producer() for value in (up, low)]
    first, second = squeezes
    if first is None or second is None or not _is_pointwise(first) or not _is_pointwise(second):
        return "its squeezes are no 1x1 convolutions without a bias"
    split = None if first.inputs[0] is None else first.inputs[0].producer()
    if split is None or operator(split) != "Split" or len(split.outputs) != 2 or not along_channels(split, 0):
        return "its squeezes are not of the two parts of one tensor"
    if [first.inputs[0], second.inputs[0]] != list(split.outputs) or split.inputs[0] is None or up is None:
        return "its squeezes are not of the two parts of one tensor, in their order"
    nodes = {split, first, second, gwc, pwc1, added, *([pwc2] if pwc2 else []), *([joined] if joined else [])}
    last = fusion.nodes[0]
    inside = [node for node in (*nodes, *fusion.nodes) if node is not last]
    if needed := needed_elsewhere((value for node in inside for value in node.outputs), {*inside, last}):
        return needed
    for node in (first, second, gwc, pwc1, *([pwc2] if pwc2 else [])):
        for value in node.inputs[1:]:
            constant = None if value is None else ir.convenience.get_const_tensor(value)
            if constant is None or constant.dtype != ir.DataType.FLOAT:
                return f"the weights {value.name if value else ''} are no float32 constant"
    if channels(split.inputs[0]) is None:
        return "its number of channels is not known"
    wide = channels(low) if pwc2 is None else _rows(pwc2) + (channels(low) or 0)
    if {_rows(gwc), _rows(pwc1), wide} != {fusion.channels}:
        return "its convolutions do not give as many channels as its paths have"
    weights = [value for node in (first, second, gwc, pwc1, pwc2) if node is not None for value in node.inputs[1:]]
    if any("," in (value.name or "") for value in weights if value is not None):
        return "the names of its weights hold a comma, which separates the parts of a merged weight"
    return _Convolutions(split.inputs[0], up, (first, second), gwc, pwc1, pwc2)


def _lower(fusion: Fusion) -> tuple[ir.Node | None, ir.Value, ir.Node | None] | None:
    """(PWC2, squeezed lower channels, Concat) of the lower path; PWC2 and the Concat are None if there is none."""
    parts, joined = list(fusion.second), None
    node = parts[0].producer()
    if len(parts) == 1 and node is not None and operator(node) == "Concat" and along_channels(node, 0):
        parts, joined = [part for part in node.inputs if part is not None], node
    if len(parts) == 1:
        return None, parts[0], None
    pwc2 = parts[0].producer()
    if len(parts) != 2 or pwc2 is None or not _is_pointwise(pwc2) or pwc2.inputs[0] is not parts[1]:
        return None
    return pwc2, parts[1], joined


def _is_pointwise(node: ir.Node) -> bool:
    """Whether a node is a dense 1x1 convolution without a bias."""
    kernel = _ints(node, "kernel_shape")
    plain = _keeps_the_size(node) and attribute(node, "group", 1) == 1
    return plain and kernel is not None and set(kernel) == {1} and len(node.inputs) == 2


def _keeps_the_size(node: ir.Node) -> bool:
    """Whether a node is a convolution with an odd kernel that keeps the size of its input."""
    kernel = _ints(node, "kernel_shape")
    if operator(node) != "Conv" or kernel is None or not all(size % 2 for size in kernel):
        return False
    padding = node.attributes["auto_pad"].as_string() if "auto_pad" in node.attributes else "NOTSET"
    ones = [_ints(node, name) or [1] for name in ("strides", "dilations")]
    pads = _ints(node, "pads") or [0] * (2 * len(kernel))
    return padding == "NOTSET" and {*ones[0], *ones[1]} == {1} and pads == [size // 2 for size in kernel] * 2


def _rows(node: ir.Node) -> int:
    """Channels that a convolution with constant weights gives."""
    weight = node.inputs[1]
    tensor = None if weight is None else ir.convenience.get_const_tensor(weight)
    return 0 if tensor is None else len(tensor.numpy())


def _ints(node: ir.Node, name: str) -> list[int] | None:
    return list(node.attributes[name].as_ints()) if name in node.attributes else None


def _initializer(op: RewriterContext, kind: str, nodes: Any, index: int = 1) -> ir.Value:
    """A merged weight of these convolutions, named after its parts."""
    values = [node.inputs[index] for node in nodes]
    tensors = [ir.convenience.get_const_tensor(value) for value in values]
    arrays = [tensor.numpy() for tensor in tensors if tensor is not None]
    name = merged.merged_name(kind, [value.name for value in values])
    return op.initializer(ir.tensor(np.ascontiguousarray(merged.MERGES[kind](*arrays))), name=name)


RULES = (MergeConvolutions.rule(),)
