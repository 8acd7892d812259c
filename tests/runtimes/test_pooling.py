"""Pools of all windows at once, against PyTorch's, and ONNX Runtime's where PyTorch has no such pool."""

from __future__ import annotations

import numpy as np
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper

from scconv_deploy.runtimes.onnx_reference import OnnxReferenceRunner


def model(operator, dims, outputs=1, kind=TensorProto.FLOAT, **attributes):
    """One pool of ``x`` ``[N, C, *sizes]``."""
    names = ["y", "indices"][:outputs]
    node = helper.make_node(operator, ["x"], names, **attributes)
    open_axes = [None] * (dims + 2)
    values = [helper.make_tensor_value_info("y", kind, open_axes)]
    values += [helper.make_tensor_value_info(name, TensorProto.INT64, open_axes) for name in names[1:]]
    graph = helper.make_graph([node], "g", [helper.make_tensor_value_info("x", kind, open_axes)], values)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 22)])


def pooled(operator, x, **attributes):
    return OnnxReferenceRunner(model(operator, x.ndim - 2, **attributes)).run({"x": x})["y"]


def drawn(*shape):
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


SHAPES = {
    "halved": {"kernel_size": 2, "stride": 2},
    "overlapping, padded": {"kernel_size": 3, "stride": 2, "padding": 1},
    "sides that differ": {"kernel_size": (3, 2), "stride": (1, 3), "padding": (1, 0)},
    "one more window, in part": {"kernel_size": 3, "stride": 2, "ceil_mode": True},
    "the last would begin in the padding": {"kernel_size": 2, "stride": 3, "padding": 1, "ceil_mode": True},
    "one window": {"kernel_size": (8, 11)},
}


def attributes_of(kernel_size, stride=None, padding=0, ceil_mode=False):
    def both(value):
        return [value] * 2 if isinstance(value, int) else list(value)

    return {
        "kernel_shape": both(kernel_size), "strides": both(kernel_size if stride is None else stride),
        "pads": both(padding) * 2, "ceil_mode": int(ceil_mode),
    }  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("sizes", [(8, 11), (9, 12), (12, 16)])
def test_they_are_pytorchs(shape, sizes):
    x, options = drawn(2, 3, *sizes), SHAPES[shape]
    given = attributes_of(**options)
    expected = torch.nn.functional.max_pool2d(torch.from_numpy(x), **options).numpy()
    np.testing.assert_array_equal(pooled("MaxPool", x, **given), expected)
    for included in (False, True):
        expected = torch.nn.functional.avg_pool2d(torch.from_numpy(x), **options, count_include_pad=included).numpy()
        found = pooled("AveragePool", x, **given, count_include_pad=int(included))
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("sizes", [(20,), (5, 6, 7)])
def test_signals_and_volumes(sizes):
    x, pool = drawn(1, 2, *sizes), len(sizes)
    average, largest = (getattr(torch.nn.functional, f"{name}_pool{pool}d") for name in ("avg", "max"))
    given = {"kernel_shape": [3] * pool, "strides": [2] * pool}
    np.testing.assert_allclose(
        pooled("AveragePool", x, **given), average(torch.from_numpy(x), 3, 2).numpy(), rtol=1e-5, atol=1e-6
    )
    expected = largest(torch.from_numpy(x), 3, 2, dilation=2).numpy()
    np.testing.assert_array_equal(pooled("MaxPool", x, **given, dilations=[2] * pool), expected)


@pytest.mark.parametrize("operator", ["AveragePool", "MaxPool"])
@pytest.mark.parametrize("auto_pad", ["SAME_UPPER", "SAME_LOWER", "VALID"])
def test_pads_that_the_operator_finds_itself(operator, auto_pad):
    x = drawn(1, 2, 9, 12)
    for kernel, strides in (([3, 3], [1, 1]), ([2, 4], [2, 3])):
        proto = model(operator, 2, kernel_shape=kernel, strides=strides, auto_pad=auto_pad)
        proto.ir_version = 10
        session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
        found = OnnxReferenceRunner(proto).run({"x": x})["y"]
        np.testing.assert_allclose(found, session.run(None, {"x": x})[0], rtol=1e-6, atol=1e-7)


def test_averages_are_of_float64_and_have_the_inputs_type():
    x = np.full((1, 1, 64, 64), 1e-8)
    x[0, 0, 0, 0] = 1.0
    found = pooled("AveragePool", x, kernel_shape=[64, 64], kind=TensorProto.DOUBLE)
    assert found.dtype == np.float64
    assert found[0, 0, 0, 0] == pytest.approx((1 + 4095e-8) / 4096, rel=1e-12)
    half = pooled("AveragePool", x.astype(np.float16), kernel_shape=[64, 64], kind=TensorProto.FLOAT16)
    assert half.dtype == np.float16


def test_the_largest_of_whole_numbers_and_of_negative_ones():
    x = -np.arange(1, 17, dtype=np.int8).reshape(1, 1, 4, 4)
    given = {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1, 1, 1, 1]}
    found = pooled("MaxPool", x, kind=TensorProto.INT8, **given)
    assert found.tolist() == [[[[-1, -2], [-5, -6]]]]
    np.testing.assert_array_equal(pooled("MaxPool", x.astype(np.float32), **given), found)


def test_nan_stays():
    x = drawn(1, 1, 4, 4)
    x[0, 0, 1, 1] = np.nan
    for operator in ("AveragePool", "MaxPool"):
        found = pooled(operator, x, kernel_shape=[2, 2], strides=[2, 2])
        assert np.isnan(found).reshape(-1).tolist() == [True, False, False, False]


def test_indices_are_those_of_the_specifications_interpreter():
    x = drawn(1, 2, 6, 6)
    proto = model("MaxPool", 2, outputs=2, kernel_shape=[2, 2], strides=[2, 2])
    found = OnnxReferenceRunner(proto).run({"x": x})
    expected, indices = torch.nn.functional.max_pool2d(torch.from_numpy(x), 2, return_indices=True)
    np.testing.assert_array_equal(found["y"], expected.numpy())
    np.testing.assert_array_equal(found["indices"] % 36, indices.numpy())
