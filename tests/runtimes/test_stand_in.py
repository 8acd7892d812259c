"""The stand-in rounds where the half model rounds, and nowhere else."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from onnx import TensorProto, numpy_helper

from scconv_deploy.precision.half import HalfOptions, to_half
from scconv_deploy.runtimes.onnxruntime import OnnxRuntimeRunner
from scconv_deploy.runtimes.stand_in import stand_in

DTYPES = {"fp16": np.float16, "bf16": ml_dtypes.bfloat16}
RNG = np.random.default_rng(0)


def halved(text, precision, io="float32", **initializers):
    model = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : 22]> {text}')
    model.graph.initializer.extend(numpy_helper.from_array(v, k) for k, v in initializers.items())
    return ir.to_proto(to_half(ir.from_proto(model), HalfOptions(precision, io)).model)


@pytest.mark.parametrize("precision", DTYPES)
@pytest.mark.parametrize("io", ["float32", "half"])
def test_each_step_is_rounded(precision, io):
    """y = (x + k) * k by hand in NumPy, to the bit; in float32 throughout it would come out otherwise."""
    k, x = RNG.normal(size=64).astype(np.float32), RNG.normal(size=(3, 64)).astype(np.float32)
    model = halved("g (float[n, 64] x) => (float[n, 64] y) { h = Add (x, k)  y = Mul (h, k) }", precision, io, k=k)

    def rounded(values):
        return values.astype(DTYPES[precision]).astype(np.float32)

    expected = rounded(rounded(rounded(x) + rounded(k)) * rounded(k))
    copy = stand_in(model)
    onnx.checker.check_model(copy, full_check=True)
    y = OnnxRuntimeRunner(copy).run({"x": x})["y"]
    np.testing.assert_array_equal(y, expected)
    assert np.abs(y - (x + k) * k).max() > 1e-4
    assert {t.data_type for t in model.graph.initializer} != {TensorProto.FLOAT}  # the original is as it was


def test_what_is_kept_in_float32_is_not_rounded_before_it_is_read():
    model = halved(
        "g (float[n, 64] x) => (float[n, 64] y) { h = Softmax (x)  s = Exp (h)  y = Add (s, k) }", "fp16",
        k=np.ones(64, np.float32),
    )  # fmt: skip
    x = RNG.normal(size=(2, 64)).astype(np.float32)
    h = torch.softmax(torch.from_numpy(x), 1).numpy()
    expected = (np.exp(h).astype(np.float16).astype(np.float32) + 1).astype(np.float16).astype(np.float32)
    y = OnnxRuntimeRunner(stand_in(model)).run({"x": x})["y"]
    assert np.mean(y != expected) < 0.03  # another last bit of exp is seldom another half number


def test_it_does_what_pytorch_does_in_half():
    """PyTorch's own float16 and bfloat16 kernels as judges of a whole layer, SRUs aside."""
    torch.manual_seed(0)
    conv, x = torch.nn.Conv2d(8, 8, 3), torch.randn(2, 8, 6, 6)
    text = "g (float[n, 8, 6, 6] x) => (float[n, 8, 4, 4] y) { h = Conv (x, w, b)  y = Relu (h) }"
    weights = {"w": conv.weight.detach().numpy(), "b": conv.bias.detach().numpy()}
    for precision, dtype in (("fp16", torch.float16), ("bf16", torch.bfloat16)):
        y = OnnxRuntimeRunner(stand_in(halved(text, precision, **weights))).run({"x": x.numpy()})["y"]
        with torch.no_grad():
            expected = torch.relu(conv.to(dtype)(x.to(dtype))).float().numpy()
        conv.float().load_state_dict({"weight": torch.tensor(weights["w"]), "bias": torch.tensor(weights["b"])})
        error = np.linalg.norm(y - expected) / np.linalg.norm(expected)
        assert error < {"fp16": 2.0**-11, "bf16": 2.0**-8}[precision]


def test_the_functions_of_srus_are_rounded_too(tiny_bytes):
    model = ir.to_proto(
        to_half(ir.from_proto(onnx.load_model_from_string(tiny_bytes[0])), HalfOptions("fp16", "half")).model
    )
    copy = stand_in(model)
    assert not copy.functions
    image = RNG.normal(size=(2, 3, 16, 16)).astype(np.float32)
    found = OnnxRuntimeRunner(copy).run({"image": image})
    direct = OnnxRuntimeRunner(model).run({"image": image.astype(np.float16)})
    for name, y in direct.items():
        assert found[name].dtype == np.float32
        np.testing.assert_array_equal(found[name], found[name].astype(np.float16))
        assert np.linalg.norm(found[name] - y) / np.linalg.norm(y) < 5e-3


def test_graphs_inside_nodes_are_rounded_too():
    """A branch by hand in NumPy, to the bit; names that the stand-in might take for its own are taken."""
    k, x = RNG.normal(size=64).astype(np.float32), RNG.normal(size=(3, 64)).astype(np.float32)
    text = """g (float[n, 64] x, bool c) => (float[n, 64] y) {
        h__rounded = Add (x, k)
        y = If (c) <then_branch = a () => (float[n, 64] p) { q = Mul (h__rounded, k)  p = Add (q, h__rounded) },
                    else_branch = b () => (float[n, 64] p) { p = Identity (h__rounded) }>
    }"""

    def rounded(values):
        return values.astype(np.float16).astype(np.float32)

    h = rounded(rounded(x) + rounded(k))
    expected = {True: rounded(rounded(h * rounded(k)) + h), False: h}
    for io in ("float32", "half"):
        copy = stand_in(halved(text, "fp16", io, k=k))
        onnx.checker.check_model(copy, full_check=True)
        for c, y in expected.items():
            np.testing.assert_array_equal(OnnxRuntimeRunner(copy).run({"x": x, "c": np.array(c)})["y"], y)
    assert np.abs(expected[True] - ((x + k) * k + x + k)).max() > 1e-4
