"""Activations that are one operator in PyTorch and several nodes in ONNX, by the formula of those.

Where their result is small, it is what the rounding of larger numbers leaves: silu(-10) is off by a thousandth of
itself in ONNX Runtime, whose sigmoid is right to 3e-8.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def _gelu(x: Tensor, approximate: str = "none") -> Tensor:
    if approximate == "none":
        return x * (0.5 * (1 + torch.erf(x * 0.5**0.5)))
    return 0.5 * x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)))


def _elu(x: Tensor, alpha: float = 1.0, scale: float = 1.0, input_scale: float = 1.0) -> Tensor:
    return scale * torch.where(x > 0, x, alpha * ((x * input_scale).exp() - 1))


def _glu(x: Tensor, dim: int = -1) -> Tensor:
    half, gate = x.chunk(2, dim)
    return half * torch.sigmoid(gate)


def _log_sigmoid(x: Tensor) -> tuple[Tensor, Tensor]:
    return torch.log(torch.sigmoid(x)), x.new_empty(0)


FORMULAS: dict[str, Callable[..., Any]] = {
    "elu": _elu,
    "expm1": lambda x: x.exp() - 1,
    "gelu": _gelu,
    "glu": _glu,
    "log1p": lambda x: torch.log(1 + x),
    "log_sigmoid_forward": _log_sigmoid,
    "silu": lambda x: x * torch.sigmoid(x),
}
"""By the name of the operator, without the underscore of one that works in place."""
