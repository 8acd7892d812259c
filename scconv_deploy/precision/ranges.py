"""Activations that half cannot hold: found by running the float32 model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
import onnx
from onnx import TensorProto, helper

from scconv_deploy.precision.types import ELEMENT, LARGEST, HalfPrecision
from scconv_deploy.verification.runners.onnxruntime import OnnxRuntimeRunner, RuntimeOptions

_PREFIX = "scconv_range::"


class RangeWatch:
    """The largest absolute values of what a half model holds in half, in the float32 model that it came from.

    Each tensor is reduced to one number inside the graph, so that memory does not grow with the number of tensors.

    Args:
        single: the float32 model.
        half: the same, converted.
        precision: of it.

    Attributes:
        limit: the largest value of the type.

    Raises:
        ModelError: ONNX Runtime cannot run the float32 model.
    """

    def __init__(
        self,
        single: onnx.ModelProto,
        half: onnx.ModelProto,
        precision: HalfPrecision,
        options: RuntimeOptions = RuntimeOptions(),
    ) -> None:
        self.limit = LARGEST[precision]
        in_half = _of_type(half, ELEMENT[precision]) | _halved_outputs(half, ELEMENT[precision])
        watched = [name for name in _of_type(single, TensorProto.FLOAT) if name in in_half]
        self._largest = dict.fromkeys(watched, 0.0)
        self._runner = OnnxRuntimeRunner(_with_ranges(single, watched), options) if watched else None

    def add(self, inputs: Mapping[str, np.ndarray]) -> None:
        """Run once."""
        found = self._runner.run(inputs) if self._runner is not None else {}
        for name, largest in self._largest.items():
            value = float(found[_PREFIX + name])
            self._largest[name] = max(largest, float("inf") if np.isnan(value) else value)

    @property
    def largest(self) -> dict[str, float]:
        """Tensor -> its largest absolute value (NaN counts as infinite), of those that are watched; in order."""
        return dict(self._largest)

    @property
    def beyond(self) -> dict[str, float]:
        """The same of those that half cannot hold."""
        return {name: value for name, value in self._largest.items() if value > self.limit}


def _of_type(model: onnx.ModelProto, kind: int) -> dict[str, None]:
    """The tensors of this type that the main graph's nodes give, in order."""
    inferred = onnx.shape_inference.infer_shapes(model).graph
    typed = {v.name for v in (*inferred.value_info, *inferred.output) if v.type.tensor_type.elem_type == kind}
    return {name: None for node in model.graph.node for name in node.output if name in typed}


def _halved_outputs(half: onnx.ModelProto, kind: int) -> dict[str, None]:
    """Outputs of the graph that are half under another name, and cast to float32 under their own."""
    typed = _of_type(half, kind)
    outputs = {value.name for value in half.graph.output}
    casts = [node for node in half.graph.node if node.op_type == "Cast" and node.output[0] in outputs]
    return {node.output[0]: None for node in casts if node.input[0] in typed}


def _with_ranges(model: onnx.ModelProto, watched: Iterable[str]) -> onnx.ModelProto:
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    del copy.graph.output[:]
    for name in watched:
        absolute, largest = f"{_PREFIX}{name}::abs", _PREFIX + name
        copy.graph.node.append(helper.make_node("Abs", [name], [absolute]))
        copy.graph.node.append(helper.make_node("ReduceMax", [absolute], [largest], keepdims=0))
        copy.graph.output.append(helper.make_tensor_value_info(largest, TensorProto.FLOAT, []))
    return copy
