"""Quantisers in the form that TensorRT reads: signed codes around 0, no integer operators, biases in float."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper

from scconv_deploy.graph.types import QUANTIZERS, quantization_of


def why_not_for_tensorrt(model: onnx.ModelProto) -> str:
    """The reason why TensorRT cannot read a model's quantisers, naming the first one; "" if it can.

    TensorRT and TensorRT-RTX have signed int8 without zero points (uint8 is for DLA alone), and Q/DQ alone.
    """
    if "integer operators" in quantization_of(model):
        kinds = (node.op_type for node in model.graph.node)
        first = next((kind for kind in kinds if kind.startswith("QLinear") or kind.endswith("Integer")), "")
        return f"the model computes with integer operators ({first}), and TensorRT has QuantizeLinear pairs alone"
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type in QUANTIZERS and (found := _asymmetry(node, stored)):
            return f"{node.op_type} {node.name or node.output[0]} {found}, and TensorRT has signed int8 around 0"
    return ""


def _asymmetry(node: onnx.NodeProto, stored: dict[str, onnx.TensorProto]) -> str:
    """What is not symmetric in a quantiser; "" if nothing is, or its zero point is no initializer."""
    has_zero = len(node.input) > 2 and node.input[2] != ""
    zero = stored.get(node.input[2]) if has_zero else None
    codes = stored.get(node.input[0]) if node.op_type == "DequantizeLinear" else zero
    typed = any(attribute.name == "output_dtype" and attribute.i for attribute in node.attribute)
    by_default = node.op_type == "QuantizeLinear" and not has_zero and not typed
    if by_default or any(tensor is not None and tensor.data_type == TensorProto.UINT8 for tensor in (zero, codes)):
        return "has unsigned codes"
    return "has a zero point" if zero is not None and numpy_helper.to_array(zero).any() else ""


def with_float_biases(model: onnx.ModelProto) -> bool:
    """Replace int32 constants behind a DequantizeLinear, in place, by the float constants that it computes.

    ONNX Runtime's tools store biases so; TensorRT's DequantizeLinear takes no int32. Returns whether there was one.
    """
    graph = model.graph
    stored = {tensor.name: tensor for tensor in graph.initializer}
    found = []
    for node in graph.node:
        codes = stored.get(node.input[0]) if node.op_type == "DequantizeLinear" else None
        scale = stored.get(node.input[1]) if codes is not None else None
        if codes is None or scale is None or codes.data_type != TensorProto.INT32 or len(codes.dims) > 1:
            continue
        if (
            len(node.input) > 2
            and (zero := stored.get(node.input[2])) is not None
            and numpy_helper.to_array(zero).any()
        ):
            continue
        steps = numpy_helper.to_array(scale)
        value = numpy_helper.to_array(codes).astype(steps.dtype) * steps
        graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(value), node.output[0]))
        found.append(node)
    for node in found:
        graph.node.remove(node)
    return bool(found)
