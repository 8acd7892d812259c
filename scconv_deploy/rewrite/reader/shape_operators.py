"""Meanings of the outputs of operators that only move elements; see :mod:`.operators`."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from scconv_deploy.rewrite.reader.call import Call
from scconv_deploy.rewrite.reader.meaning import (
    Constant,
    Crossed,
    Crossing,
    Deviation,
    GroupMean,
    Groups,
    Half,
    Input,
    Known,
    Normalized,
    Part,
    Shape,
)


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


def split(call: Call) -> list[Known] | None:
    """The two halves of masked data; None for any other split."""
    value = call.inputs[0]
    if not isinstance(value, Part) or call.attributes.get("axis", 0) % len(value.shape) != 1 or call.outputs != 2:
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
    if axes[0] % len(value.shape) != 1 or (steps or [1]) != [1] or channels % 2:
        return None
    start, stop, _ = slice(starts[0], ends[0]).indices(channels)
    halves = {(0, channels // 2): 0, (channels // 2, channels): 1}
    return Half(value, halves[start, stop]) if (start, stop) in halves else None


def _concat(call: Call) -> Known | None:
    if len(call.inputs) != 2 or call.attributes.get("axis", 0) % len(call.sample) != 1:
        return None
    a, b = call.inputs
    if not isinstance(a, Crossed) or not isinstance(b, Crossed) or (a.index, b.index) != (0, 1):
        return None
    return Crossing(a.open_part, a.closed_part) if a.open_part == b.open_part else None


OPERATORS: dict[str, Callable[[Call], Known | None]] = {
    "Reshape": _reshape, "Unsqueeze": _unsqueeze, "Squeeze": _squeeze, "Expand": _expand, "Slice": _slice,
    "Concat": _concat,
}  # fmt: skip
"""Function by operator; without Split, which has several outputs."""
