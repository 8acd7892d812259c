"""Select by a mask instead of multiplying with it: ``Mul(Cast(c), x) -> Where(c, x, 0)``.

For any thresholded mask, not only an SRU's: c is a comparison, or the Not of one. Also, in either operand order::

    Mul(Cast(Not(c)), x)      -> Where(c, 0, x)
    Mul(Sub(1, Cast(c)), x)   -> Where(c, 0, x)
    Mul(Cast(c'), x)          -> Where(c, 0, x)     where the graph also holds c, the complement of the comparison c'

Equal on finite input, except for the sign of a zero (0 * -x is -0). On NaN and infinity the forms differ: a closed mask
keeps them in the product and gives 0 in the selection, and the complement of a comparison is open for NaN. So this rule
runs only where the mask form ``where`` was asked for.

Refused: a condition that is no comparison with one constant number, data that would be broadcast to the mask, and mask
and data of different types.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
from onnxscript.rewriter import MatchResult, RewriterContext, RewriteRuleClassBase

from scconv_deploy.rewrite.reader.region import COMPARISONS

NAME = "mask arithmetic"
_COMPLEMENT = {
    "GreaterOrEqual": "Less",
    "Less": "GreaterOrEqual",
    "Greater": "LessOrEqual",
    "LessOrEqual": "Greater",
}
_FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE)


class _SelectByMask(RewriteRuleClassBase):
    """Base of the two patterns; ``mask_first`` says whether the mask is the product's first factor."""

    def __init__(self, mask_first: bool) -> None:
        super().__init__(NAME, remove_nodes=False)  # masks are shared
        self._mask_first = mask_first

    def _product(self, op: Any, mask: Any, data: Any) -> Any:
        return op.Mul(mask, data, _outputs=["y"]) if self._mask_first else op.Mul(data, mask, _outputs=["y"])

    def check(self, context: Any, condition: ir.Value, mask: ir.Value, data: ir.Value, **_: Any) -> MatchResult:
        result = MatchResult()
        if condition.dtype not in (None, ir.DataType.BOOL):
            return result.fail()  # a Cast of data
        compared = condition.producer()
        while compared is not None and compared.op_type == "Not":
            compared = _producer(compared.inputs[0])
        if compared is None or compared.op_type not in COMPARISONS:
            return result.fail()
        if not any(_is_number(value) for value in compared.inputs):
            return result.fail("its mask compares two tensors; only thresholds are rewritten", [condition])
        if mask.dtype not in _FLOATS or mask.dtype != data.dtype:
            return result.fail(f"its mask is {mask.dtype} and its data {data.dtype}, expected one float type", [mask])
        return result

    def rewrite(self, op: RewriterContext, condition: ir.Value, data: ir.Value, y: ir.Value, **_: Any) -> ir.Value:
        closed = self._inverted
        node = condition.producer()
        while node is not None and node.op_type == "Not" and node.inputs[0] is not None:
            condition, closed = node.inputs[0], not closed
            node = condition.producer()
        twin = _complement(node)
        if twin is not None:
            condition, closed = twin, not closed
        if data.dtype is None:
            raise ValueError("rewrite() follows check()")
        zero = op.initializer(ir.tensor(np.zeros((), data.dtype.numpy()), dtype=data.dtype), name=f"{y.name}.closed")
        return op.Where(condition, zero, data) if closed else op.Where(condition, data, zero)

    _inverted = False


class SelectByCast(_SelectByMask):
    """Rule for ``Mul(Cast(c), x)``."""

    def pattern(self, op: Any, condition: Any, data: Any) -> Any:
        return self._product(op, op.Cast(condition, _allow_other_attributes=True, _outputs=["mask"]), data)


class SelectByRemainder(_SelectByMask):
    """Rule for ``Mul(Sub(1, Cast(c)), x)``."""

    _inverted = True

    def pattern(self, op: Any, condition: Any, data: Any, one: Any) -> Any:
        cast = op.Cast(condition, _allow_other_attributes=True)
        return self._product(op, op.Sub(one, cast, _outputs=["mask"]), data)

    def check(self, context: Any, one: ir.Value, **values: Any) -> MatchResult:  # type: ignore[override]
        if not _is_number(one, 1):
            return MatchResult().fail()
        return super().check(context, **values)


def _producer(value: ir.Value | None) -> ir.Node | None:
    return None if value is None else value.producer()


def _is_number(value: ir.Value | None, number: float | None = None) -> bool:
    constant = None if value is None else ir.convenience.get_const_tensor(value)
    if constant is None or constant.size == 0:
        return False
    values = constant.numpy().reshape(-1)
    return bool((values == (values[0] if number is None else number)).all())


def _complement(comparison: ir.Node | None) -> ir.Value | None:
    """Output of the complementary comparison of the same two tensors, wherever it stands; the graph is sorted later."""
    if comparison is None or comparison.op_type not in ("Less", "LessOrEqual"):  # one of a pair stays
        return None
    first, second = comparison.inputs
    for node in (use.node for use in first.uses()) if first is not None else ():
        opposite = node.op_type == _COMPLEMENT[comparison.op_type] and node.graph is comparison.graph
        if opposite and node.inputs[0] is first and _equal(node.inputs[1], second):
            return node.outputs[0]
    return None


def _equal(a: ir.Value | None, b: ir.Value | None) -> bool:
    """Whether two values are the same or equal constants; exporters write a threshold once per comparison."""
    if a is b:
        return True
    constants = [None if v is None else ir.convenience.get_const_tensor(v) for v in (a, b)]
    if constants[0] is None or constants[1] is None:
        return False
    return np.array_equal(constants[0].numpy(), constants[1].numpy())


RULES = tuple(rule.rule(first) for rule in (SelectByCast, SelectByRemainder) for first in (True, False))
