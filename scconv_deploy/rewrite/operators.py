"""What each ONNX operator makes of the meanings of its inputs.

Every function takes and returns meanings and gives None where an SRU has no use for the combination. A product, a sum
and an equality test of meanings do not know which operand came first, so neither do the rules.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from scconv_deploy.gate.variant import Comparison
from scconv_deploy.rewrite.meaning import (
    Centred,
    Constant,
    Crossed,
    Crossing,
    Deviation,
    Gate,
    GroupMean,
    Groups,
    Half,
    Input,
    Known,
    Normalized,
    Part,
    Shape,
    Sigmoid,
    SoftMask,
    Squares,
    Step,
)

_FLOAT = 1


@dataclass(frozen=True)
class Call:
    """A node with the meanings of its inputs (None: left out) and its attributes as Python values."""

    operator: str
    inputs: Sequence[Known | None]
    attributes: Mapping[str, Any]
    sample: Shape
    outputs: int = 1

    def integers(self, index: int, attribute: str) -> list[int] | None:
        """What newer opsets take as an input and older ones as an attribute."""
        if len(self.inputs) > index and isinstance(given := self.inputs[index], Constant):
            return [int(v) for v in given.value.reshape(-1)]
        value = self.attributes.get(attribute)
        return None if value is None else [int(v) for v in value]


def apply(call: Call) -> list[Known] | None:
    """The meanings of a node's outputs; None if an SRU has no such node."""
    if call.operator == "Split":
        return _split(call)
    found = _OPERATORS[call.operator](call) if call.operator in _OPERATORS else None
    return None if found is None else [found]


def _scalar(value: Known | None) -> float | None:
    """The number that a constant holds in every place."""
    return value.number if isinstance(value, Constant) else None


def _channels(value: Constant, shape: Shape) -> tuple[float, ...] | None:
    """One number per channel of a constant that broadcasts to ``[N, C, H, W]`` and is the same elsewhere."""
    array = value.value
    if array.ndim > 4 or array.dtype != np.float32:
        return None
    array = array.reshape((1,) * (4 - array.ndim) + array.shape)
    if array.shape[0] != 1 or array.shape[2:] != (1, 1) or array.shape[1] not in (1, shape[1]):
        return None
    return tuple(float(v) for v in np.broadcast_to(array.reshape(-1), (shape[1],)))


def _per_group(shape: Shape, groups: Shape) -> bool:
    """Whether a statistic of this shape meets its own group when it is broadcast over the groups."""
    return len(shape) == len(groups) and shape[:2] == groups[:2] and set(shape[2:]) in ({1}, set())


def _pair(call: Call, first: type, second: type) -> tuple[Any, Any] | None:
    """The two inputs, the one of the first type first."""
    a, b = call.inputs[0], call.inputs[1]
    if isinstance(a, first) and isinstance(b, second):
        return a, b
    if isinstance(b, first) and isinstance(a, second):
        return b, a
    return None


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
    if pair := _pair(call, Deviation, Constant):
        return _scale(pair[0], _scalar(pair[1]))
    if pair := _pair(call, Centred, Deviation):
        return _normalize(*pair) if pair[1].inverse else None
    if pair := _pair(call, Normalized, Constant):
        return _step("multiply", *pair, call.sample)
    if pair := _pair(call, Gate, Sigmoid):
        gate, r = pair
        return SoftMask(gate.decision, False) if gate.number and not gate.opened and gate.sigmoid == r else None
    if (pair := _pair(call, Gate, Input) or _pair(call, Gate, Normalized)) and pair[0].number:
        gate, data = pair
        return Part(gate.decision, gate.opened, False, data) if data.shape == gate.shape else None
    if pair := _pair(call, SoftMask, Input):
        mask, data = pair
        return Part(mask.gate, mask.opened, True, data)
    return None


def _scale(deviation: Deviation, factor: float | None) -> Known | None:
    if factor is None or factor <= 0 or deviation.rooted or deviation.eps_var:
        return None
    return replace(deviation, per_square=deviation.per_square * factor)


def _divide(call: Call) -> Known | None:
    a, b = call.inputs[0], call.inputs[1]
    if isinstance(a, Deviation) and (divisor := _scalar(b)):
        return _scale(a, 1 / divisor)
    if isinstance(a, Centred) and isinstance(b, Deviation) and not b.inverse:
        return _normalize(a, b)
    if _scalar(a) == 1 and isinstance(b, Deviation) and b.rooted and not b.inverse:
        return replace(b, inverse=True)
    return None


def _normalize(centred: Centred, deviation: Deviation) -> Known | None:
    whole = deviation.shape == centred.shape or _per_group(deviation.shape, centred.shape)
    if not deviation.rooted or not whole:
        return None
    return Normalized(centred.shape, centred.shape[1], replace(deviation, shape=(), inverse=False))


def _add(call: Call) -> Known | None:
    if pair := _pair(call, Deviation, Constant):
        deviation, eps = pair[0], _scalar(pair[1])
        if eps is None or eps < 0 or deviation.inverse:
            return None
        if deviation.rooted:
            return replace(deviation, eps_std=deviation.eps_std + eps)
        return replace(deviation, eps_var=deviation.eps_var + eps)
    if pair := _pair(call, Normalized, Constant):
        return _step("add", *pair, call.sample)
    if pair := _pair(call, Gate, SoftMask):
        gate, mask = pair
        same = gate.number and gate.opened and not mask.opened and mask.gate == gate.decision
        return SoftMask(mask.gate, True) if same else None
    if pair := _pair(call, Half, Half):
        return _cross(*pair)
    return None


def _cross(a: Half, b: Half) -> Known | None:
    first, second = (a, b) if a.part.opened else (b, a)
    fits = first.part.opened and not second.part.opened and first.index != second.index
    same = first.part == replace(second.part, opened=True)
    return Crossed(first.part, second.part, first.index) if fits and same else None


def _subtract(call: Call) -> Known | None:
    a, b = call.inputs[0], call.inputs[1]
    if isinstance(a, Groups) and isinstance(b, GroupMean):
        return Centred(a.shape) if _per_group(b.shape, a.shape) else None
    if _scalar(a) == 1 and isinstance(b, Gate) and b.number:
        return b.complement
    if isinstance(b, Part) and b.opened and not b.soft and a == b.data:
        return replace(b, opened=False)
    return None


def _power(call: Call) -> Known | None:
    base, exponent = call.inputs[0], _scalar(call.inputs[1])
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
    value = call.inputs[0]
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


def _reshape(call: Call) -> Known | None:
    value, wanted = call.inputs[0], call.inputs[1]
    if not isinstance(wanted, Constant) or value is None:
        return None
    return _reshaped(value, [int(v) for v in wanted.value], bool(call.attributes.get("allowzero", 0)), call.sample)


def _reshaped(value: Known, target: list[int], allow_zero: bool, sample: Shape) -> Known | None:
    shape = [value.shape[i] if size == 0 and not allow_zero else size for i, size in enumerate(target)]
    if -1 in shape:
        rest = math.prod(size for size in shape if size != -1)
        if not rest or math.prod(value.shape) % rest:
            return None
        shape[shape.index(-1)] = math.prod(value.shape) // rest
    new = tuple(shape)
    if math.prod(new) != math.prod(value.shape) or new == value.shape:
        return value if new == value.shape else None
    if isinstance(value, (Input, Groups)):
        if new == sample:
            return Input(new)
        fits = len(new) > 2 and new[0] == sample[0] and not math.prod(sample) % (new[0] * new[1])
        return Groups(new) if fits else None
    if isinstance(value, Normalized) and not value.steps and new == sample:
        return replace(value, shape=new)
    if isinstance(value, (GroupMean, Deviation)) and new[:2] == value.shape[:2] and set(new[2:]) in ({1}, set()):
        return replace(value, shape=new)
    return None


def _unsqueeze(call: Call) -> Known | None:
    value, axes = call.inputs[0], call.integers(1, "axes")
    if not isinstance(value, (GroupMean, Deviation)) or axes is None:
        return None
    rank = len(value.shape) + len(axes)
    return replace(value, shape=value.shape[:2] + (1,) * (rank - 2)) if min(a % rank for a in axes) >= 2 else None


def _squeeze(call: Call) -> Known | None:
    value, axes = call.inputs[0], call.integers(1, "axes")
    if not isinstance(value, (GroupMean, Deviation)) or axes is None or min(a % len(value.shape) for a in axes) < 2:
        return None
    return replace(value, shape=value.shape[: len(value.shape) - len(axes)])


def _expand(call: Call) -> Known | None:
    value, wanted = call.inputs[0], call.inputs[1]
    if value is None or isinstance(value, Constant) or not isinstance(wanted, Constant):
        return None
    try:
        shape = np.broadcast_shapes(value.shape, tuple(int(v) for v in wanted.value))
    except ValueError:
        return None
    if shape == value.shape:
        return value
    if not isinstance(value, (GroupMean, Deviation)) or len(shape) != len(value.shape):
        return None
    return replace(value, shape=shape) if shape[:2] == value.shape[:2] else None


def _identity(call: Call) -> Known | None:
    return call.inputs[0]


def _cast(call: Call) -> Known | None:
    value = call.inputs[0]
    to_float = call.operator == "CastLike" or call.attributes.get("to") == _FLOAT
    if not to_float:
        return None
    return replace(value, number=True) if isinstance(value, Gate) else value


def _instance_normalization(call: Call) -> Known | None:
    value, scale, shift = call.inputs[:3]
    if not isinstance(value, Groups) or _scalar(scale) != 1 or _scalar(shift) != 0:
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
    _, c, h, w = value.shape
    if groups < 1 or c % groups or scale.value.size not in (groups, c) or shift.value.size != scale.value.size:
        return None
    per_channel = [np.repeat(t.value.reshape(-1), c // t.value.size) for t in (scale, shift)]  # opset 18: one a group
    gamma, beta = (tuple(float(v) for v in t) for t in per_channel)
    deviation = Deviation((), groups / (c * h * w), eps_var=_epsilon(call), rooted=True)
    return Normalized(value.shape, groups, deviation, (("multiply", gamma), ("add", beta)))


def _sigmoid(call: Call) -> Known | None:
    value = call.inputs[0]
    return Sigmoid(value) if isinstance(value, Normalized) and value.shape == call.sample else None


# r OP t: which comparison the gate makes, and on which side of it this is
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
    threshold = _scalar(b)
    if not isinstance(a, Sigmoid) or threshold is None:
        return None
    comparison, opened = _COMPARISONS[operator]
    return Gate(a, comparison, threshold, opened)


def _not(call: Call) -> Known | None:
    value = call.inputs[0]
    return value.complement if isinstance(value, Gate) and not value.number else None


def _where(call: Call) -> Known | None:
    gate, chosen, other = call.inputs[:3]
    if not isinstance(gate, Gate) or gate.number or chosen is None or other is None:
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


def _split(call: Call) -> list[Known] | None:
    value = call.inputs[0]
    if not isinstance(value, Part) or call.attributes.get("axis", 0) % 4 != 1 or call.outputs != 2:
        return None
    channels, sizes = value.shape[1], call.integers(1, "split")
    if channels % 2 or (sizes is not None and sizes != [channels // 2] * 2):
        return None
    return [Half(value, 0), Half(value, 1)]


def _slice(call: Call) -> Known | None:
    value = call.inputs[0]
    starts, ends, axes, steps = (call.integers(i, n) for i, n in enumerate(("starts", "ends", "axes", "steps"), 1))
    if not isinstance(value, Part) or starts is None or ends is None or axes is None or len(axes) != 1:
        return None
    channels = value.shape[1]
    if axes[0] % 4 != 1 or (steps or [1]) != [1] or channels % 2:
        return None
    start, stop, _ = slice(starts[0], ends[0]).indices(channels)
    halves = {(0, channels // 2): 0, (channels // 2, channels): 1}
    return Half(value, halves[start, stop]) if (start, stop) in halves else None


def _concat(call: Call) -> Known | None:
    if len(call.inputs) != 2 or call.attributes.get("axis", 0) % 4 != 1:
        return None
    a, b = call.inputs
    if not isinstance(a, Crossed) or not isinstance(b, Crossed) or (a.index, b.index) != (0, 1):
        return None
    return Crossing(a.open_part, a.closed_part) if a.open_part == b.open_part else None


_OPERATORS: dict[str, Callable[[Call], Known | None]] = {
    "Mul": _multiply, "Div": _divide, "Add": _add, "Sub": _subtract, "Pow": _power, "Sqrt": _root,
    "Reciprocal": _reciprocal, "ReduceMean": _reduce, "ReduceSum": _reduce, "ReduceSumSquare": _reduce,
    "Reshape": _reshape, "Unsqueeze": _unsqueeze, "Squeeze": _squeeze, "Expand": _expand,
    "Identity": _identity, "Cast": _cast, "CastLike": _cast, "InstanceNormalization": _instance_normalization,
    "GroupNormalization": _group_normalization, "Sigmoid": _sigmoid, "GreaterOrEqual": _compare,
    "Greater": _compare, "Less": _compare, "LessOrEqual": _compare, "Not": _not, "Where": _where,
    "Slice": _slice, "Concat": _concat,
}  # fmt: skip
