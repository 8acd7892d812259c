"""Compare a sigmoid's argument instead of the sigmoid: ``compare(Sigmoid(z), t) -> compare(z, tau)``.

sigmoid is monotone, so with tau the smallest float32 whose float32 ``torch.sigmoid`` passes (:func:`gate.cut.tau`)::

    r >= t  <=>  z >= tau(t, >=)        r <  t  <=>  z < tau(t, >=)
    r >  t  <=>  z >= tau(t, >)         r <= t  <=>  z < tau(t, >)

Refused: a sigmoid that other nodes need (its rounding could then contradict tau), data that is not float32, and a
threshold that is not one number, or that all sigmoids pass or fail.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import onnx_ir as ir
from onnxscript.rewriter import MatchResult, RewriterContext, RewriteRuleClassBase

from scconv_deploy.gate.cut import tau
from scconv_deploy.gate.variant import Comparison
from scconv_deploy.rewrite.reader.operators import MIRRORED
from scconv_deploy.rewrite.reader.region import COMPARISONS

NAME = "sigmoid threshold"

# r OP t: the comparison of tau, and the operator on z
_ON_ARGUMENT: dict[str, tuple[Comparison, str]] = {
    "GreaterOrEqual": (">=", "GreaterOrEqual"),
    "Greater": (">", "GreaterOrEqual"),
    "Less": (">=", "Less"),
    "LessOrEqual": (">", "Less"),
}


class SigmoidThreshold(RewriteRuleClassBase):
    """Rule of this module for one comparison and operand order.

    Args:
        operator: the comparison, a key of ``_ON_ARGUMENT``.
        sigmoid_first: whether the sigmoid is its first operand.
    """

    def __init__(self, operator: str, sigmoid_first: bool) -> None:
        super().__init__(NAME, remove_nodes=False)  # other comparisons may read the same sigmoid
        self._operator, self._sigmoid_first = operator, sigmoid_first

    def pattern(self, op: Any, z: Any, threshold: Any) -> Any:
        r = op.Sigmoid(z, _outputs=["r"])
        operands = (r, threshold) if self._sigmoid_first else (threshold, r)
        return getattr(op, self._operator)(*operands)

    def check(self, context: Any, z: ir.Value, r: ir.Value, threshold: ir.Value, **_: Any) -> MatchResult:
        result = MatchResult()
        number = _number(threshold)
        if z.dtype not in (None, ir.DataType.FLOAT):
            return result.fail(f"its data is {z.dtype}, expected float32", [r])
        if number is None:
            return result.fail("its threshold is not one constant number", [r])
        if z.dtype is None:
            return result.fail("its data has no known type, expected float32", [r])
        if r.is_graph_output():
            return result.fail(f"its sigmoid {r.name} is an output of the graph", [r])
        others = [use.node for use in r.uses() if use.node.op_type not in COMPARISONS]
        if others:
            return result.fail(f"its sigmoid {r.name} is also needed by {others[0].name or others[0].op_type}", [r])
        if not math.isfinite(self._tau(number)):
            return result.fail(f"its threshold {number:g} decides nothing: all sigmoids lie on one side of it", [r])
        return result

    def rewrite(self, op: RewriterContext, z: ir.Value, threshold: ir.Value, **_: Any) -> ir.Value:
        number, constant = _number(threshold), ir.convenience.get_const_tensor(threshold)
        if number is None or constant is None:
            raise ValueError("rewrite() follows check()")
        value = np.full_like(constant.numpy(), self._tau(number))
        bound = op.initializer(ir.tensor(value), name=f"{z.name}.tau")
        return getattr(op, _ON_ARGUMENT[self._towards_sigmoid][1])(z, bound)

    @property
    def _towards_sigmoid(self) -> str:
        return self._operator if self._sigmoid_first else MIRRORED[self._operator]

    def _tau(self, number: float) -> float:
        return tau(float(str(np.float32(number))), _ON_ARGUMENT[self._towards_sigmoid][0])


def _number(threshold: ir.Value) -> float | None:
    constant = ir.convenience.get_const_tensor(threshold)
    if constant is None or constant.size == 0 or constant.dtype != ir.DataType.FLOAT:
        return None
    values = constant.numpy().reshape(-1)
    return float(values[0]) if (values == values[0]).all() else None


RULES = tuple(SigmoidThreshold.rule(operator, first) for operator in COMPARISONS for first in (True, False))
