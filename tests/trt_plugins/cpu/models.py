"""ONNX models of one SRU, with its function, and sessions with and without the library."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper

from scconv_deploy.graph.contract import PARAMETERS, FunctionKey, node_attributes
from scconv_deploy.graph.functions import function_proto

ELEMENTS = {
    "float32": (TensorProto.FLOAT, np.float32),
    "float16": (TensorProto.FLOAT16, np.float16),
    "bfloat16": (TensorProto.BFLOAT16, ml_dtypes.bfloat16),
}
LEVELS = {
    "none": onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL,
    "basic": onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC,
    "all": onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL,
}


def one_sru(operator, shape, groups, data="float32", *, opset=18, function=True, **attributes) -> onnx.ModelProto:
    """x, and parameters as inputs, to y; [N, C, H, W] with open N, H and W."""
    element, channels = ELEMENTS[data][0], shape[1]
    straddle = bool(channels % groups)
    settings = {"ddof": 1, "eps_var": 0.0, "eps_std": 1e-10} | attributes
    node = helper.make_node(
        operator, ["x", *PARAMETERS[operator]], ["y"], domain="scconv", **node_attributes(groups, **settings)
    )
    node.overload = "straddle" if straddle else ""
    given = [helper.make_tensor_value_info("x", element, ["n", channels, "h", "w"])]
    given += [helper.make_tensor_value_info(name, TensorProto.FLOAT, [channels]) for name in PARAMETERS[operator]]
    graph = helper.make_graph([node], "sru", given, [helper.make_tensor_value_info("y", element, None)])
    body = [function_proto(FunctionKey(operator, straddle, "multiply", opset))] if function else []
    opsets = [helper.make_opsetid("", opset), helper.make_opsetid("scconv", 1)]
    return helper.make_model(graph, functions=body, opset_imports=opsets, ir_version=10)


def feed(operator: str, x: np.ndarray, seed: int = 0) -> dict[str, np.ndarray]:
    """x and random parameters of the operator; one channel's gates are fixed (sign 0), one's data inverted."""
    generator, channels = np.random.default_rng(seed), x.shape[1]
    values = {name: generator.standard_normal(channels).astype(np.float32) for name in PARAMETERS[operator]}
    values["sru__cut"] *= 0.7
    values["sru__sign"] = np.sign(values["sru__sign"])
    values["sru__sign"][0] = 0.0
    return {"x": x, **values}


def session(model: onnx.ModelProto, library: Path | None = None, *, threads: int = 1, level: str = "all"):
    """A session on the CPU; with the library's operators where it is given."""
    settings = onnxruntime.SessionOptions()
    settings.log_severity_level = 4
    settings.intra_op_num_threads = threads
    settings.graph_optimization_level = LEVELS[level]
    if library is not None:
        settings.register_custom_ops_library(str(library))
    return onnxruntime.InferenceSession(model.SerializeToString(), settings, providers=["CPUExecutionProvider"])


def outputs(model: onnx.ModelProto, inputs: Mapping[str, np.ndarray], library: Path | None = None, **how) -> np.ndarray:
    """y; for bfloat16, which NumPy lacks, through ONNX Runtime's own values."""
    opened = session(model, library, **how)
    if inputs["x"].dtype != ml_dtypes.bfloat16:
        return opened.run(None, dict(inputs))[0]
    binding = opened.io_binding()
    values = {}
    for name, array in inputs.items():
        kind = TensorProto.BFLOAT16 if array.dtype == ml_dtypes.bfloat16 else TensorProto.FLOAT
        raw = array.view(np.uint16) if kind == TensorProto.BFLOAT16 else array
        values[name] = onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(np.ascontiguousarray(raw), kind)
        binding.bind_ortvalue_input(name, values[name])
    y = np.empty(inputs["x"].shape, np.uint16)
    binding.bind_output("y", "cpu", 0, TensorProto.BFLOAT16, y.shape, y.ctypes.data)
    opened.run_with_iobinding(binding)
    return y.view(ml_dtypes.bfloat16)
