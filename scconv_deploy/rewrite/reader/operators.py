"""Meaning of each ONNX operator's output from the meanings of its inputs.

Every function returns None where no SRU has such a combination. Sums and products are read in either operand order.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from scconv_deploy.gate.variant import Comparison
from scconv_deploy.rewrite.reader import shape_operators
from scconv_deploy.rewrite.reader.call import Call, pair_of, scalar
from scconv_deploy.rewrite.reader.meaning import (
    Centred,
    Constant,
    Crossed,
    Deviation,
    GroupMean,
    Groups,
    Half,
    Input,
    Known,
    Mask,
    Normalized,
    Part,
    Shape,
    Sigmoid,
    SoftMask,
    Squares,
    Step,
)

_FLOAT = 1


def apply(call: Call) -> list[Known] | None:
    """Meanings of a node's outputs; None if no SRU has such a node."""
    if call.operator == "Split":
        return shape_operators.split(call)
    found = _OPERATORS[call.operator](call) if call.operator in _OPERATORS else None
    return None if found is None else [found]


def _channels(value: Constant, shape: Shape) -> tuple[float, ...] | None:
    """The C numbers of a float32 constant that broadcasts to ``[N, C, *]`` and varies by channel only; else None."""
    array = value.value
    rank = len(shape)
    if array.ndim > rank or array.dtype != np.float32:
        return None
    array = array.reshape((1,) * (rank - array.ndim) + array.shape)
    if array.shape[0] != 1 or math.prod(array.shape[2:]) != 1 or array.shape[1] not in (1, shape[1]):
        return None
    return tuple(float(v) for v in np.broadcast_to(array.reshape(-1), (shape[1],)))


def _grouped(value: Known | None) -> Known | None:
    """x as groups: of a signal ``[N, C, L]`` with a group for each channel, the groups' shape is x's own."""
    return Groups(value.shape) if isinstance(value, Input) and len(value.shape) > 2 else value


def _per_group(shape: Shape, groups: Shape) -> bool:
    """Whether a statistic of this shape broadcasts to its own group."""
    return len(shape) == len(groups) and shape[:2] == groups[:2] and set(shape[2:]) in ({1}, set())


def _step(kind: str, data: Normalized, constant: Constant, shape: Shape) -> Known | None:
    values = _channels(constant, shape)
    if values is None or data.shape != shape:
        return None
    step: Step = ("multiply", values) if kind == "multiply" else ("add", values)
    return replace(data, steps=(*data.steps, step))


def _multiply(call: Call) -> Known | None:
    a, b = call.inputs[0], call.inputs[1]
    if isinstance(a, Centred) and a == b:
        return Squares(a.shape)
    if pair := pair_of(call, Deviation, Constant):
        return _scale(pair[0], scalar(pair[1]))
    if pair := pair_of(call, Centred, Deviation):
        return _normalize(*pair) if pair[1].inverse else None
    if pair := pair_of(call, Normalized, Constant):
        return _step("multiply", *pair, call.sample)
    if pair := pair_of(call, Mask, Sigmoid):
        gate, r = pair
        return SoftMask(gate.decision, False) if gate.number and not gate.opened and gate.sigmoid == r else None
    if (pair := pair_of(call, Mask, Input) or pair_of(call, Mask, Normalized)) and pair[0].number:
        gate, data = pair
        return Part(gate.decision, gate.opened, False, data) if data.shape == gate.shape else None
    if pair := pair_of(call, SoftMask, Input):
        mask, data = pair
        return Part(mask.gate, mask.opened, True, data)
    return None


def _scale(deviation: Deviation, factor: float | None) -> Known | None:
    if factor is None or factor <= 0 or deviation.rooted or deviation.eps_var:
        return None
    return replace(deviation, per_square=deviation.per_square * factor)


def _divide(call: Call) -> Known | None:
    a, b = call.inputs[0], call.inputs[1]
    if isinstance(a, Deviation) and (divisor := scalar(b)):
        return _scale(a, 1 / divisor)
    if isinstance(a, Centred) and isinstance(b, Deviation) and not b.inverse:
        return _normalize(a, b)
    if scalar(a) == 1 and isinstance(b, Deviation) and b.rooted and not b.inverse:
        return replace(b, inverse=True)
    return None


def _normalize(centred: Centred, deviation: Deviation) -> Known | None:
    whole = deviation.shape == centred.shape or _per_group(deviation.shape, centred.shape)
    if not deviation.rooted or not whole:
        return None
    return Normalized(centred.shape, centred.shape[1], replace(deviation, shape=(), inverse=False))


def _add(call: Call) -> Known | None:
    if pair := pair_of(call, Deviation, Constant):
        deviation, eps = pair[0], scalar(pair[1])
        if eps is None or eps < 0 or deviation.inverse:
            return None
        if deviation.rooted:
            return replace(deviation, eps_std=deviation.eps_std + eps)
        return replace(deviation, eps_var=deviation.eps_var + eps)
    if pair := pair_of(call, Normalized, Constant):
        return _step("add", *pair, call.sample)
    if pair := pair_of(call, Mask, SoftMask):
        gate, mask = pair
        same = gate.number and gate.opened and not mask.opened and mask.gate == gate.decision
        return SoftMask(mask.gate, True) if same else None
    if pair := pair_of(call, Half, Half):
        return _cross(*pair)
    return None


def _cross(a: Half, b: Half) -> Known | None:
    first, second = (a, b) if a.part.opened else (b, a)
    fits = first.part.opened and not second.part.opened and first.index != second.index
    same = first.part == replace(second.part, opened=True)
    return Crossed(first.part, second.part, first.index) if fits and same else None


def _subtract(call: Call) -> Known | None:
    a, b = call.inputs[0], call.inputs[1]
    if isinstance(b, GroupMean) and isinstance(a := _grouped(a), Groups):
        return Centred(a.shape) if _per_group(b.shape, a.shape) else None
    if scalar(a) == 1 and isinstance(b, Mask) and b.number:
        return b.complement
    if isinstance(b, Part) and b.opened and not b.soft and a == b.data:
        return replace(b, opened=False)
    return None


def _power(call: Call) -> Known | None:
    base, exponent = call.inputs[0], scalar(call.inputs[1])
    if isinstance(base, Centred) and exponent == 2:
        return Squares(base.shape)
    return _root_of(base) if exponent == 0.5 else None


def _root(call: Call) -> Known | None:
    return _root_of(call.inputs[0])


def _root_of(value: Known | None) -> Known | None:
    if isinstance(value, Deviation) and not value.rooted and not value.inverse:
        return replace(value, rooted=True)
    return None


def _reciprocal(call: Call) -> Known | None:
    value = call.inputs[0]
    return replace(value, inverse=True) if isinstance(value, Deviation) and value.rooted else None


def _reduce(call: Call) -> Known | None:
    value = _grouped(call.inputs[0])
    squares = call.operator == "ReduceSumSquare"
    if not isinstance(value, (Groups, Squares, Centred)) or isinstance(value, Centred) != squares:
        return None
    rank, axes = len(value.shape), call.integers(1, "axes")
    if axes is None or sorted(a % rank for a in axes) != list(range(2, rank)):
        return None
    shape = value.shape[:2] + ((1,) * (rank - 2) if call.attributes.get("keepdims", 1) else ())
    if isinstance(value, Groups):
        return GroupMean(shape) if call.operator == "ReduceMean" else None
    elements = math.prod(value.shape[2:])
    return Deviation(shape, 1 / elements if call.operator == "ReduceMean" else 1.0)


def _identity(call: Call) -> Known | None:
    return call.inputs[0]


def _cast(call: Call) -> Known | None:
    value = call.inputs[0]
    to_float = call.operator == "CastLike" or call.attributes.get("to") == _FLOAT
    if not to_float:
        return None
    return replace(value, number=True) if isinstance(value, Mask) else value


def _instance_normalization(call: Call) -> Known | None:
    (value, scale, shift) = (_grouped(call.inputs[0]), *call.inputs[1:3])
    if not isinstance(value, Groups) or scalar(scale) != 1 or scalar(shift) != 0:
        return None
    deviation = Deviation((), 1 / math.prod(value.shape[2:]), eps_var=_epsilon(call), rooted=True)
    return Normalized(value.shape, value.shape[1], deviation)


def _epsilon(call: Call) -> float:
    return float(call.attributes.get("epsilon", 1e-5))


def _group_normalization(call: Call) -> Known | None:
    value, scale, shift = call.inputs[:3]
    groups = int(call.attributes.get("num_groups", 0))
    if not isinstance(value, Input) or not isinstance(scale, Constant) or not isinstance(shift, Constant):
        return None
    c = value.shape[1]
    if groups < 1 or c % groups or scale.value.size not in (groups, c) or shift.value.size != scale.value.size:
        return None
    per_channel = [np.repeat(t.value.reshape(-1), c // t.value.size) for t in (scale, shift)]  # opset 18: per group
    gamma, beta = (tuple(float(v) for v in t) for t in per_channel)
    deviation = Deviation((), groups / math.prod(value.shape[1:]), eps_var=_epsilon(call), rooted=True)
    return Normalized(value.shape, groups, deviation, (("multiply", gamma), ("add", beta)))


def _sigmoid(call: Call) -> Known | None:
    value = call.inputs[0]
    return Sigmoid(value) if isinstance(value, Normalized) and value.shape == call.sample else None


# r OP t: the gate's comparison, and whether r OP t is true where the gate is open
_COMPARISONS: dict[str, tuple[Comparison, bool]] = {
    "GreaterOrEqual": (">=", True),
    "Greater": (">", True),
    "Less": (">=", False),
    "LessOrEqual": (">", False),
}
MIRRORED = {
    "GreaterOrEqual": "LessOrEqual",
    "LessOrEqual": "GreaterOrEqual",
    "Greater": "Less",
    "Less": "Greater",
}
"""``a OP b`` is ``b MIRRORED[OP] a``."""


def _compare(call: Call) -> Known | None:
    a, b = call.inputs[0], call.inputs[1]
    operator = call.operator
    if isinstance(b, Sigmoid):
        a, b, operator = b, a, MIRRORED[operator]
    threshold = scalar(b)
    if not isinstance(a, Sigmoid) or threshold is None:
        return None
    comparison, opened = _COMPARISONS[operator]
    return Mask(a, comparison, threshold, opened)


def _not(call: Call) -> Known | None:
    value = call.inputs[0]
    return value.complement if isinstance(value, Mask) and not value.number else None


def _where(call: Call) -> Known | None:
    gate, chosen, other = call.inputs[:3]
    if not isinstance(gate, Mask) or gate.number or chosen is None or other is None:
        return None
    if not gate.opened:
        chosen, other = other, chosen
    decision = gate.decision
    if any(isinstance(v, Normalized) and v.shape != gate.shape for v in (chosen, other)):
        return None
    if isinstance(other, Sigmoid) and isinstance(chosen, Constant) and other == gate.sigmoid:
        one, zero = chosen.is_filled_with(1), chosen.is_filled_with(0)
        return SoftMask(decision, one) if one or zero else None
    if isinstance(chosen, Constant) and isinstance(other, Constant):
        if chosen.is_filled_with(1) and other.is_filled_with(0):
            return replace(decision, number=True)
        if chosen.is_filled_with(0) and other.is_filled_with(1):
            return replace(decision, opened=False, number=True)
    if isinstance(chosen, (Input, Normalized)) and isinstance(other, Constant) and other.is_filled_with(0):
        return Part(decision, True, False, chosen)
    if isinstance(other, (Input, Normalized)) and isinstance(chosen, Constant) and chosen.is_filled_with(0):
        return Part(decision, False, False, other)
    return None


_OPERATORS: dict[str, Callable[[Call], Known | None]] = {
    "Mul": _multiply, "Div": _divide, "Add": _add, "Sub": _subtract, "Pow": _power, "Sqrt": _root,
    "Reciprocal": _reciprocal, "ReduceMean": _reduce, "ReduceSum": _reduce, "ReduceSumSquare": _reduce,
    "Identity": _identity, "Cast": _cast, "CastLike": _cast, "InstanceNormalization": _instance_normalization,
    "GroupNormalization": _group_normalization, "Sigmoid": _sigmoid, "GreaterOrEqual": _compare,
    "Greater": _compare, "Less": _compare, "LessOrEqual": _compare, "Not": _not, "Where": _where,
    **shape_operators.OPERATORS,
}  # fmt: skip
