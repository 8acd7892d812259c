"""Data types of a model (float32, float16, bfloat16, quantised), and their numeric limits."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator
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
SMALLEST: dict[HalfPrecision, float] = {"fp16": 2.0**-14, "bf16": 2.0**-126}
"""The smallest normal number: below it digits are lost."""

FIRST_OPSET: dict[HalfPrecision, int] = {"fp16": 18, "bf16": 22}
"""First opset whose operators take the type: Conv and the poolings take bfloat16 since opset 22."""


PRECISION = "scconv_deploy.precision"
"""Metadata of a converted model: the conversion's options as JSON, among them ``precision``."""


def precision_of(model: onnx.ModelProto) -> Precision:
    """Precision of the model's data: by its metadata if it holds that type at all, else the type of most weights.

    A float32 model with one half tensor counts as a float32 model with a fault. So does one whose metadata call it half
    although it holds no half tensor.
    """
    stated = next((entry.value for entry in model.metadata_props if entry.key == PRECISION), "")
    try:
        precision = json.loads(stated or "{}").get("precision")
    except (ValueError, AttributeError):  # another tool's metadata
        precision = None
    if precision in ELEMENT and half_in(model) == precision:
        return precision
    kinds: Counter[int] = Counter()
    for graph in all_graphs(model.graph):
        for tensor in graph.initializer:
            kinds[tensor.data_type] += math.prod(tensor.dims)
    if not kinds:
        kinds.update(v.type.tensor_type.elem_type for v in (*model.graph.input, *model.graph.output))
    float_elements = kinds[TensorProto.FLOAT]
    return next((name for name, kind in ELEMENT.items() if kinds[kind] > float_elements), "fp32")


def half_in(model: onnx.ModelProto) -> HalfPrecision | None:
    """The half type of any input, output, weight or cast in a model's graphs; None without one."""
    kinds: set[int] = set()
    for graph in all_graphs(model.graph):
        kinds |= {value.type.tensor_type.elem_type for value in (*graph.input, *graph.output)}
        kinds |= {tensor.data_type for tensor in graph.initializer}
        kinds |= {a.i for node in graph.node if node.op_type == "Cast" for a in node.attribute if a.name == "to"}
    return next((name for name, kind in ELEMENT.items() if kind in kinds), None)


def all_graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """A graph and those that its nodes hold, at any depth."""
    yield graph
    for node in graph.node:
        for body in graphs_of(node).values():
            yield from all_graphs(body)


def graphs_of(node: onnx.NodeProto) -> dict[str, onnx.GraphProto]:
    """The graphs that a node holds, by attribute: the branches of If, the bodies of Loop and Scan."""
    return {a.name: a.g for a in node.attribute if a.type == onnx.AttributeProto.GRAPH}


def data_type(precision: Precision) -> np.dtype:
    """NumPy dtype of a precision."""
    return np.dtype(np.float32) if precision == "fp32" else NUMPY[precision]


QUANTIZERS = ("QuantizeLinear", "DequantizeLinear")
_INTEGER_OPERATORS = ("DynamicQuantizeLinear", "ConvInteger", "MatMulInteger")
_STORED = {
    TensorProto.INT8: "int8", TensorProto.UINT8: "int8", TensorProto.INT16: "int16", TensorProto.UINT16: "int16",
    TensorProto.INT4: "int4", TensorProto.UINT4: "int4", TensorProto.FLOAT8E4M3FN: "float8",
    TensorProto.FLOAT8E5M2: "float8", TensorProto.FLOAT8E4M3FNUZ: "float8", TensorProto.FLOAT8E5M2FNUZ: "float8",
}  # fmt: skip


def quantization_of(model: onnx.ModelProto) -> str:
    """Quantisation of a model: ``int8 (Q/DQ)`` with pairs of quantisers, ``int8 (integer operators)``, or "".

    Quantisers of any domain count: ONNX Runtime's tools write those of ``com.microsoft`` too. The data between them are
    of the type that :func:`precision_of` gives.
    """
    nodes = [node for graph in (model.graph, *model.functions) for node in graph.node]
    pairs = [node for node in nodes if node.op_type in QUANTIZERS]
    integer = [n for n in nodes if n.op_type in _INTEGER_OPERATORS or n.op_type.startswith("QLinear")]
    if not pairs and not integer:
        return ""
    read = {name for node in (*pairs, *integer) for name in node.input}
    kinds = {_STORED[t.data_type] for t in model.graph.initializer if t.name in read and t.data_type in _STORED}
    return f"{' and '.join(sorted(kinds)) or 'int8'} ({'integer operators' if integer else 'Q/DQ'})"


def has_unsigned_codes(model: onnx.ModelProto) -> bool:
    """Whether a quantiser of a model's main graph makes uint8 codes, which TensorRT does not take."""
    stored = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    zeros = [node.input[2] for node in model.graph.node if node.op_type == "QuantizeLinear" and len(node.input) > 2]
    return any(stored.get(name) == TensorProto.UINT8 for name in zeros)


def described_precision(model: onnx.ModelProto) -> str:
    """Type of a model's data for people: ``fp32``, ``int8 (Q/DQ)``, ``int8 (Q/DQ, for CPUs) on fp16``."""
    quantization, between = quantization_of(model), precision_of(model)
    if has_unsigned_codes(model):
        quantization = quantization.replace("Q/DQ", "Q/DQ, for CPUs")
    return f"{quantization} on {between}" if quantization and between != "fp32" else quantization or between
