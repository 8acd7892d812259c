"""Weights of a layer that are integers: stored so, or float ones that a QuantizeLinear of the file rounds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx

from scconv_deploy.graph.types import NUMPY
from scconv_deploy.records.quantization import DataType

Constant = Callable[[str], np.ndarray | None]
"""The constant of a name; None if the value is none."""
_LOW, _HIGH = -128, 127


@dataclass(frozen=True, eq=False)
class StoredWeights:
    """Weights of a Conv or Gemm as integers.

    Attributes:
        name: name of the initializer.
        codes: output channels on axis 0.
        scales: of each channel, or a single one, float32; zero points are 0.
        data: type that the scales are stored in.
    """

    name: str
    codes: np.ndarray
    scales: np.ndarray
    data: DataType = "float32"

    @property
    def dequantized(self) -> np.ndarray:
        """float32 ``[C, ...]``."""
        each = (-1, *[1] * (self.codes.ndim - 1))
        return self.codes.astype(np.float32) * self.scales.reshape(each)


def stored_weights(
    layer: onnx.NodeProto, dequantize: onnx.NodeProto, quantize: onnx.NodeProto | None, constant: Constant
) -> StoredWeights | None:
    """Read the weights of a Conv or Gemm; None if they are no constants with one axis of scales and zero points of 0.

    Args:
        layer: the Conv or Gemm.
        dequantize: the DequantizeLinear before its weights.
        quantize: the QuantizeLinear before that; None where the integers are stored.
    """
    scale, codes = constant(dequantize.input[1]), constant((quantize or dequantize).input[0])
    if codes is None or scale is None:
        return None
    transposed = any(a.name == "transB" and a.i for a in layer.attribute)
    channels = 1 if layer.op_type == "Gemm" and not transposed else 0
    if scale.size > 1 and _axis(dequantize) % codes.ndim != channels:
        return None
    name, codes, steps = (quantize or dequantize).input[0], np.moveaxis(codes, channels, 0), scale.astype(np.float32)
    if quantize is not None:
        own = constant(quantize.input[1])
        same = own is not None and own.tobytes() == scale.tobytes() and _axis(quantize) == _axis(dequantize)
        fits = codes.dtype == scale.dtype and scale.size in (1, len(codes)) and bool((steps > 0).all())
        if not same or not fits or _zero(quantize, np.zeros(1, np.uint8), constant) is None:
            return None
        each = steps.reshape(-1, *[1] * (codes.ndim - 1))
        codes = np.clip(np.rint(codes.astype(np.float32) / each), _LOW, _HIGH).astype(np.int8)
    if codes.dtype != np.int8 or _zero(dequantize, np.zeros(1, np.int8), constant) is None:
        return None
    data: Any = scale.dtype.name if scale.dtype in NUMPY.values() else "float32"
    return StoredWeights(name, codes, steps.ravel(), data)


def _axis(node: onnx.NodeProto) -> int:
    return next((int(a.i) for a in node.attribute if a.name == "axis"), 1)


def _zero(node: onnx.NodeProto, default: np.ndarray, constant: Constant) -> np.ndarray | None:
    """Zero points of int8 that are all 0; None for others."""
    given = constant(node.input[2]) if len(node.input) > 2 and node.input[2] else default
    return given if given is not None and given.dtype == np.int8 and not given.any() else None
