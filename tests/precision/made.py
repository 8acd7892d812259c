"""Small float32 models for the converter, their half forms, and both run in ONNX Runtime."""

from __future__ import annotations

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import onnxruntime
from onnx import numpy_helper

from scconv_deploy.graph.file import check
from scconv_deploy.precision.float32 import as_ir
from scconv_deploy.precision.half import Conversion, HalfOptions, to_half


def parsed(text: str, opset: int = 18, **initializers) -> onnx.ModelProto:
    """A model from ONNX text; arrays by name are its initializers."""
    model = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : {opset}]> {text}')
    model.graph.initializer.extend(numpy_helper.from_array(np.asarray(v), k) for k, v in initializers.items())
    return model


def halved(model: onnx.ModelProto, precision="fp16", **options) -> tuple[onnx.ModelProto, Conversion]:
    """Its half form, which passes the full checker."""
    conversion = to_half(as_ir(model), HalfOptions(precision, **options))
    proto = ir.to_proto(conversion.model)
    check(proto)
    return proto, conversion


def run(model: onnx.ModelProto, **arrays) -> list[np.ndarray]:
    """Its outputs in ONNX Runtime; floats are given in the type that the model takes."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 4, 1
    session = onnxruntime.InferenceSession(model.SerializeToString(), options)
    halves = {value.name for value in session.get_inputs() if value.type == "tensor(float16)"}
    return session.run(None, {k: v.astype(np.float16) if k in halves else v for k, v in arrays.items()})


def assert_same(model: onnx.ModelProto, half: onnx.ModelProto, rtol: float = 2**-9, **arrays) -> None:
    """Outputs equal but for half's rounding (relative L2); integers and decisions equal to the last."""
    for expected, found in zip(run(model, **arrays), run(half, **arrays), strict=True):
        assert found.shape == expected.shape
        if expected.dtype.kind == "f":
            error = np.linalg.norm(found.astype(np.float64) - expected)
            assert error <= rtol * np.linalg.norm(expected), (error, found, expected)
        else:
            np.testing.assert_array_equal(found, expected)


def types(model: onnx.ModelProto) -> dict[str, int]:
    """The types of its initializers."""
    return {tensor.name: tensor.data_type for tensor in model.graph.initializer}
