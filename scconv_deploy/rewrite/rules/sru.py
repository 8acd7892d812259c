"""Fuse an SRU into one node of the domain ``scconv``.

Before, as any exporter writes it (decomposed deviation, InstanceNormalization or GroupNormalization)::

    gn = n * gamma + beta;  r = Sigmoid(gn * w);  x1 = Cast(r >= t) * x;  x2 = Cast(r < t) * x
    y  = Concat(x1[:C/2] + x2[C/2:], x1[C/2:] + x2[:C/2])

After: ``y = scconv::SRU(x, cut, sign)``, ``SRUNorm`` where the mask multiplies gn, ``SRUSoft`` where it is
``where(open, 1, r)``. The algebra is that of :mod:`scconv_deploy.gate.cut`. The operator takes ``[N, C, H, W]``; inputs
of another rank are reshaped before and after it, see :mod:`scconv_deploy.gate.planes`.

Refused, with the reason: anything that :mod:`..reader` cannot read as an SRU; parameters that define no gate; and an
SRU whose sigmoid, masks or masked data other nodes need, because the file would then decide one gate twice.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import onnx_ir as ir
from onnxscript.rewriter import MatchResult, RewriterContext, RewriteRuleClassBase

from scconv_deploy.errors import ModelError
from scconv_deploy.graph.contract import DOMAIN, DOMAIN_VERSION, SITE, VARIANT, WEIGHT
from scconv_deploy.graph.nodes import variant_attributes
from scconv_deploy.rewrite.reader.region import SRUReading, find_sigmoid, is_thresholded, quantizer_inside, read_sru
from scconv_deploy.rewrite.reader.variant import UnreadableError

NAME = "sru"
NOTE = "scconv.note"
END = "scconv.end"
"""Temporary metadata of a new node, until it has its name: the notes, and the name of the SRU's output."""


class FuseSRU(RewriteRuleClassBase):
    """Rule of this module."""

    def __init__(self) -> None:
        super().__init__(NAME, remove_nodes=False)  # shared constants and statistics may stay

    def pattern(self, op: Any, lower: Any, upper: Any) -> Any:
        return op.Concat(lower, upper, _allow_other_attributes=True, _outputs=["y"])

    def check(self, context: Any, y: ir.Value, **_: Any) -> MatchResult:
        result = MatchResult()
        concat = y.producer()
        sigmoid = None if concat is None else find_sigmoid(concat)
        if concat is None or sigmoid is None:
            return result.fail()  # any other Concat is no candidate
        try:
            reading = read_sru(concat, sigmoid)
            reading.gate.operator_inputs()
        except UnreadableError as error:
            return result.fail(f"{error.reason} (at {error.node})" if error.node else error.reason, [sigmoid])
        except ModelError as error:
            return result.fail(error.message, [sigmoid])
        needed = _needed_elsewhere(reading, concat)
        return result.fail(needed, [sigmoid]) if needed else result

    def rewrite(self, op: RewriterContext, y: ir.Value, **_: Any) -> ir.Value:
        concat = y.producer()
        sigmoid = None if concat is None else find_sigmoid(concat)
        if concat is None or sigmoid is None:
            raise ValueError("rewrite() follows check()")
        reading = read_sru(concat, sigmoid)
        site = concat.metadata_props.get(SITE) or concat.name or y.name or NAME
        inputs = [
            op.initializer(ir.tensor(value.contiguous().numpy()), name=f"{site}.{name}")
            for name, value in reading.gate.operator_inputs().items()
        ]
        shape = y.shape or reading.x.shape
        if shape is None:
            raise ValueError("read_sru() needs a shape")
        planes, back = _as_planes(op, reading.x, len(shape), site)
        # getattr, because op.op() takes other arguments in each version of onnxscript
        variant = reading.gate.variant
        fused = getattr(op, variant.operator)(
            planes, *inputs, **variant_attributes(variant), _domain=DOMAIN, _version=DOMAIN_VERSION
        )
        node = fused.producer()
        if node is None:
            raise ValueError("the rewriter made no node")
        for value in (planes, fused) if planes is not reading.x else (fused,):
            value.shape = shape if len(shape) == 4 else _shape_of_planes(shape)
            value.dtype = reading.x.dtype
        node.name = site
        node.metadata_props.update(
            {SITE: site, VARIANT: variant.label, NOTE: "; ".join(reading.notes), END: y.name or ""}
        )
        if reading.gate.file_weight is not None:
            node.metadata_props[WEIGHT] = "of the file"
        return back(fused)


def _as_planes(
    op: RewriterContext, x: ir.Value, rank: int, site: str
) -> tuple[ir.Value, Callable[[ir.Value], ir.Value]]:
    """x as ``[N, C, H, W]`` (unchanged at rank 4), and a function that brings such a value back to x's rank."""
    if rank == 4:
        return x, lambda y: y
    if rank < 4:
        axes = op.initializer(ir.tensor(np.array([2, 3][: 4 - rank], np.int64)), name=f"{site}.axes")
        return op.Unsqueeze(x, axes), lambda y: op.Squeeze(y, axes)
    front = op.initializer(ir.tensor(np.array([0, 0, -1], np.int64)), name=f"{site}.front")
    shape = op.Concat(front, op.Shape(x, start=rank - 1), axis=0)
    return op.Reshape(x, shape), lambda y: op.Reshape(y, op.Shape(x))


def _shape_of_planes(shape: ir.Shape) -> ir.Shape:
    n, c, *rows, last = list(shape) if len(shape) > 2 else [*shape, 1]
    known = [size for size in rows if isinstance(size, int)]
    return ir.Shape([n, c, math.prod(known) if len(known) == len(rows) else None, last])


def _needed_elsewhere(reading: SRUReading, concat: ir.Node) -> str:
    """The reason if other nodes read one of the gate's tensors; else empty."""
    inside = {id(node) for node in reading.region}
    for value in reading.gate_values:
        if value.is_graph_output():
            return f"its {value.name} is an output of the graph"
        others = [use.node for use in value.uses() if id(use.node) not in inside]
        if others:
            return f"its {value.name} is also needed by {others[0].name or others[0].op_type}"
    return ""


def read_all(model: ir.Model) -> dict[str, SRUReading]:
    """All readable SRUs of the main graph by the name of their output; the graph is not changed."""
    found = {}
    for node in model.graph:
        sigmoid = find_sigmoid(node) if node.op_type == "Concat" else None
        if sigmoid is not None and node.outputs[0].name:
            try:
                found[node.outputs[0].name] = read_sru(node, sigmoid)
            except UnreadableError:
                continue  # the rule says why
    return found


def uncrossed_gates(model: ir.Model, reported: set[int]) -> Iterator[tuple[str, str]]:
    """Thresholded sigmoids that belong to no Concat: (node, why they are no SRU).

    Args:
        reported: ids of the sigmoids whose refusal is reported already.
    """
    for node in ir.traversal.RecursiveGraphIterator(model.graph):
        if not is_thresholded(node) or id(node) in reported:
            continue
        inside = node.graph is not model.graph
        reason = "no Concat of two crossed halves follows its threshold"
        if inside:
            reason = "it is inside a subgraph; rules are applied to the main graph"
        elif (quantizer := quantizer_inside(node)) is not None:
            name = quantizer.name or "a QuantizeLinear"
            reason = f"{name} quantises its gates, or what they open; rewrite the float model"
        yield node.name or node.outputs[0].name or "Sigmoid", reason


RULES = (FuseSRU.rule(),)
