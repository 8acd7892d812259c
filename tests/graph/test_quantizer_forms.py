"""Quantisers as TensorRT reads them: what it cannot, and biases."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from scconv_deploy.errors import BuildError
from scconv_deploy.exporters.tensorrt.onnx_source import OnnxSource
from scconv_deploy.graph.quantizer_forms import why_not_for_tensorrt, with_float_biases
from scconv_deploy.runtimes.onnxruntime import OnnxRuntimeRunner, RuntimeOptions
from tests.precision.made import parsed

HEAD = "g (float[1, 2, 4, 4] x) => (float[1, 2, 4, 4] y) "
BODY = """{ q = QuantizeLinear (x, s, z) d = DequantizeLinear (q, s, z)
    w = DequantizeLinear <axis = 0> (w8, ws, wz) b = DequantizeLinear <axis = 0> (b32, bs) y = Conv (d, w, b) }"""
STORED = {
    "s": np.float32(0.1), "z": np.int8(0), "w8": np.arange(-2, 2, dtype=np.int8).reshape(2, 2, 1, 1),
    "ws": np.asarray([0.5, 2.0], np.float32), "wz": np.zeros(2, np.int8), "b32": np.asarray([3, -70001], np.int32),
    "bs": np.asarray([0.05, 0.2], np.float32),
}  # fmt: skip


def model(body: str = BODY, **stored):
    made = parsed(HEAD + body, **(STORED | stored))
    onnx.checker.check_model(made)
    return made


def test_biases_become_the_floats_that_their_node_computes():
    before, after = model(), model()
    assert with_float_biases(after)
    assert [n.op_type for n in after.graph.node] == ["QuantizeLinear", "DequantizeLinear", "DequantizeLinear", "Conv"]
    x = {"x": np.linspace(-3, 3, 32, dtype=np.float32).reshape(1, 2, 4, 4)}
    one, other = (OnnxRuntimeRunner(m, RuntimeOptions(optimization="none")).run(x)["y"] for m in (before, after))
    assert np.array_equal(one, other)
    assert not with_float_biases(after)
    assert len(OnnxSource(before).readable.graph.node) == len(before.graph.node) - 1


@pytest.mark.parametrize(
    ("body", "stored", "said"),
    [
        (BODY, {}, ""),
        (BODY, {"z": np.uint8(0)}, "has unsigned codes"),
        (BODY, {"z": np.int8(3)}, "has a zero point"),
        (BODY.replace("s, z", "s"), {}, "has unsigned codes"),  # uint8 where nothing says a type
        (BODY, {"w8": STORED["w8"].view(np.uint8), "wz": np.full(2, 0, np.uint8)}, "has unsigned codes"),
        ("{ q, qs, qz = DynamicQuantizeLinear (x) i = ConvInteger (q, w8, qz) y = Cast <to = 1> (i) }", {},
         "integer operators (ConvInteger)"),
    ],
)  # fmt: skip
def test_what_tensorrt_cannot_read_is_one_line(body, stored, said):
    found = model(body, **stored)
    assert said in why_not_for_tensorrt(found)
    assert bool(why_not_for_tensorrt(found)) == bool(said)
    if said:
        with pytest.raises(BuildError, match="Quantise the float file for it: scconv-deploy quantize"):
            _ = OnnxSource(found).facts
