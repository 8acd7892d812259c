"""Activations that half cannot hold: found by running the float32 model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
import onnx
from onnx import TensorProto, helper

from scconv_deploy.verification.runners.onnxruntime import OnnxRuntimeRunner

_PREFIX = "scconv_range::"


def activations_beyond(
    model: onnx.ModelProto, samples: Iterable[Mapping[str, np.ndarray]], largest: float
) -> dict[str, float]:
    """The float tensors of the main graph whose largest absolute value on the samples is above a limit.

    Each tensor is reduced to one number inside the graph, so that memory does not grow with the number of tensors.

    Args:
        samples: input arrays by name.
        largest: the limit, for example 65504 for float16.

    Returns:
        tensor -> its largest absolute value (NaN counts as infinite), the largest first.

    Raises:
        ModelError: ONNX Runtime cannot run the model.
    """
    watched = _float_tensors(model)
    found = dict.fromkeys(watched, 0.0)
    with OnnxRuntimeRunner(_with_ranges(model, watched)) as runner:
        for sample in samples:
            outputs = runner.run(sample)
            for name in watched:
                value = float(outputs[_PREFIX + name])
                found[name] = max(found[name], float("inf") if np.isnan(value) else value)
    beyond = {name: value for name, value in found.items() if value > largest}
    return dict(sorted(beyond.items(), key=lambda item: -item[1]))


def _float_tensors(model: onnx.ModelProto) -> list[str]:
    inferred = onnx.shape_inference.infer_shapes(model).graph
    values = [*inferred.value_info, *inferred.output]
    floats = {v.name for v in values if v.type.tensor_type.elem_type == TensorProto.FLOAT}
    return [name for node in model.graph.node for name in node.output if name in floats]


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
