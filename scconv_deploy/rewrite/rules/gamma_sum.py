"""Fold a sum that was unrolled into one node per channel: ``Add(Add(g[0], g[1]), ...) -> ReduceSum(g)``.

Python's ``sum(gamma)`` iterates over a tensor, and exporters write every step of it. Where gamma is a constant,
onnxsim folds them all; this rule is for a computed gamma. The terms are ``Gather(g, i)``, or ``Squeeze`` of
``Slice(g, i, i + 1)`` or of the outputs of ``Split(g)``, along axis 0, with or without the 0 that Python starts from.

The order of the sum changes, and with it the rounding. Refused: fewer than three terms, and terms that are not all
entries of one tensor in their order.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
from onnxscript.rewriter import MatchResult, RewriterContext, RewriteRuleClassBase

NAME = "gamma sum"
_FEWEST = 3


class GammaSum(RewriteRuleClassBase):
    """Rule of this module."""

    def __init__(self) -> None:
        super().__init__(NAME, remove_nodes=False)

    def pattern(self, op: Any, left: Any, right: Any) -> Any:
        return op.Add(left, right, _outputs=["y"])

    def check(self, context: Any, y: ir.Value, **_: Any) -> MatchResult:
        result = MatchResult()
        if any(use.node.op_type == "Add" and use.idx == 0 for use in y.uses()):
            return result.fail()  # not the last one of the chain
        terms = _terms(y)
        if len(terms) < _FEWEST or _entry(terms[0]) is None:
            return result.fail()
        source, length = _entry(terms[0])[0], _length(terms[0])  # type: ignore[index]
        entries = [_entry(term) for term in terms]
        if any(e is None or e[0] is not source for e in entries):
            return result.fail("it adds up entries of several tensors", [y])
        if [e[1] for e in entries if e is not None] != list(range(length)):
            return result.fail(f"it adds up {len(terms)} entries, not each of the {length} in their order", [y])
        return result

    def rewrite(self, op: RewriterContext, y: ir.Value, **_: Any) -> ir.Value:
        entry = _entry(_terms(y)[0])
        if entry is None:
            raise ValueError("rewrite() follows check()")
        axis = op.initializer(ir.tensor(np.zeros(1, dtype=np.int64)), name=f"{y.name}.axis")
        return op.ReduceSum(entry[0], axis, keepdims=0)


def _terms(y: ir.Value) -> list[ir.Value]:
    """Terms of a chain of additions in their order, without a constant 0 at the start."""
    terms: list[ir.Value] = []
    node = y.producer()
    while node is not None and node.op_type == "Add" and None not in node.inputs:
        left, right = node.inputs
        if left is None or right is None:
            break
        terms.append(right)
        y, node = left, left.producer()
        if node is not None and node.op_type == "Add" and len(left.uses()) > 1:
            break
    constant = ir.convenience.get_const_tensor(y)
    if constant is None or constant.size != 1 or constant.numpy().reshape(-1)[0] != 0:
        terms.append(y)
    return terms[::-1]


def _entry(term: ir.Value) -> tuple[ir.Value, int] | None:
    """(g, i) if the term is ``g[i]`` along axis 0; else None."""
    node = term.producer()
    if node is not None and node.op_type == "Gather" and _attribute(node, "axis") == 0 and node.inputs[0] is not None:
        index = None if node.inputs[1] is None else ir.convenience.get_const_tensor(node.inputs[1])
        return None if index is None or index.shape.rank() != 0 else (node.inputs[0], int(index.numpy()))
    if node is None or node.op_type != "Squeeze" or node.inputs[0] is None or not _squeezes_first_axis(node):
        return None
    taken = node.inputs[0].producer()
    if taken is None or not taken.inputs or taken.inputs[0] is None:
        return None
    if taken.op_type == "Split" and _attribute(taken, "axis") == 0:
        return taken.inputs[0], list(taken.outputs).index(node.inputs[0])
    start = _sliced(taken) if taken.op_type == "Slice" else None
    return None if start is None else (taken.inputs[0], start)


def _sliced(node: ir.Node) -> int | None:
    """i if the node is ``g[i : i + 1]`` along axis 0; else None."""
    constants = [None if v is None else ir.convenience.get_const_tensor(v) for v in node.inputs[1:]]
    if len(constants) < 3 or any(c is None or c.size != 1 for c in constants):
        return None
    start, end, axis, *step = [int(c.numpy().reshape(-1)[0]) for c in constants if c is not None]
    return start if start >= 0 and end == start + 1 and axis == 0 and step in ([], [1]) else None


def _length(term: ir.Value) -> int:
    """Number of entries of g; 0 if unknown."""
    node = term.producer()
    if node is not None and node.op_type == "Squeeze" and node.inputs[0] is not None:
        node = node.inputs[0].producer()
    source = None if node is None else node.inputs[0]
    size = source.shape[0] if source is not None and source.shape else 0
    return size if isinstance(size, int) else 0


def _squeezes_first_axis(node: ir.Node) -> bool:
    axes = ir.convenience.get_const_tensor(node.inputs[1]) if len(node.inputs) > 1 and node.inputs[1] else None
    return axes is not None and axes.numpy().tolist() == [0]


def _attribute(node: ir.Node, name: str) -> int:
    return node.attributes[name].as_int() if name in node.attributes else 0


RULES = (GammaSum.rule(),)
