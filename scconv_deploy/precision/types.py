"""The types of a model's data, and what each can hold."""

from __future__ import annotations

from typing import Literal

import ml_dtypes
import numpy as np
import onnx
from onnx import TensorProto

HalfPrecision = Literal["fp16", "bf16"]
Precision = Literal["fp32", "fp16", "bf16"]
IoTypes = Literal["float32", "half"]

NUMPY: dict[HalfPrecision, np.dtype] = {"fp16": np.dtype(np.float16), "bf16": np.dtype(ml_dtypes.bfloat16)}
ELEMENT: dict[HalfPrecision, int] = {"fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}
UNIT_ROUNDOFF: dict[HalfPrecision, float] = {"fp16": 2.0**-11, "bf16": 2.0**-8}
LARGEST: dict[HalfPrecision, float] = {"fp16": 65504.0, "bf16": float(ml_dtypes.finfo(ml_dtypes.bfloat16).max)}
FIRST_OPSET: dict[HalfPrecision, int] = {"fp16": 18, "bf16": 22}
"""From which the operators of a network take the type: ONNX gives Conv and the poolings bfloat16 with opset 22."""


def precision_of(model: onnx.ModelProto) -> Precision:
    """The type of a model's data: half as soon as an input, an output, a weight or a cast of its graph is."""
    graph = model.graph
    kinds = {value.type.tensor_type.elem_type for value in (*graph.input, *graph.output)}
    kinds |= {tensor.data_type for tensor in graph.initializer}
    kinds |= {a.i for node in graph.node if node.op_type == "Cast" for a in node.attribute if a.name == "to"}
    return next((name for name, kind in ELEMENT.items() if kind in kinds), "fp32")


def data_type(precision: Precision) -> np.dtype:
    """Its NumPy type."""
    return np.dtype(np.float32) if precision == "fp32" else NUMPY[precision]
