"""PyTorch's operators whose result is a step of their operands: comparisons, roundings, and what holds them."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

_ATEN = torch.ops.aten
_KINDS: dict[Any, str] = {
    **{getattr(getattr(_ATEN, kind), form): kind
       for kind in ("ge", "gt", "le", "lt", "eq", "ne") for form in ("Tensor", "Scalar")},
    **{getattr(_ATEN, kind).default: kind for kind in ("sign", "round", "floor", "ceil", "trunc")},
    _ATEN.sgn.default: "sign",
}  # fmt: skip
_CASTS = {_ATEN._to_copy.default}
FAKE_QUANTIZE = {
    _ATEN.fake_quantize_per_tensor_affine.default, _ATEN.fake_quantize_per_tensor_affine_cachemask.default,
}  # fmt: skip
"""A mode within another one sees the operator whole, an outer one what it is composed of."""
IN_PLACE: dict[Any, str] = {
    **{getattr(getattr(_ATEN, f"{kind}_"), form): kind
       for kind in ("ge", "gt", "le", "lt", "eq", "ne") for form in ("Tensor", "Scalar")},
    **{getattr(_ATEN, f"{kind}_").default: kind for kind in ("sign", "round", "floor", "ceil", "trunc")},
}  # fmt: skip
QUOTIENTS: dict[Any, str] = {
    _ATEN.floor_divide.default: "floor", _ATEN.floor_divide.Scalar: "floor",
    _ATEN.div.Tensor_mode: "", _ATEN.div.Scalar_mode: "",
}  # fmt: skip
"""Rounded quotients, by their rounding; for div its argument names it."""
REMAINDERS: dict[Any, str] = {
    _ATEN.remainder.Tensor: "floor", _ATEN.remainder.Scalar: "floor",
    _ATEN.fmod.Tensor: "trunc", _ATEN.fmod.Scalar: "trunc",
}  # fmt: skip
APART = {
    _ATEN.threshold.default, _ATEN.hardshrink.default, _ATEN.heaviside.default, _ATEN.frac.default,
    _ATEN.round.decimals,
}  # fmt: skip
"""Operators that compare or round within: exporters take them apart too."""
COMPARISONS = {"ge", "gt", "le", "lt", "eq", "ne"}
"""Kinds whose step is a bool."""


def kind_of(func: Any, args: Any, kwargs: Any, output: Any) -> str | None:
    """Kind of a step; None for steps of integers and for tests for NaN or infinities."""
    floating = isinstance(args[0], Tensor) and args[0].is_floating_point() if args else False
    if func in _CASTS:
        if not floating or output.is_floating_point() or output.is_complex():
            return None
        return "ne" if output.dtype == torch.bool else "trunc"
    if func in QUOTIENTS:
        return (QUOTIENTS[func] or kwargs.get("rounding_mode")) if output.is_floating_point() else None
    kind = _KINDS.get(func) or IN_PLACE.get(func)
    if kind in COMPARISONS and len(args) > 1:
        other = args[1]
        floating = floating or (isinstance(other, Tensor) and other.is_floating_point())
        if other is args[0] or (isinstance(other, float) and not math.isfinite(other)):
            return None
    return kind if floating else None
