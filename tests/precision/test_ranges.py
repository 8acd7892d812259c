"""Activations beyond half's range, by name."""

import numpy as np
import onnx.parser
import onnx_ir as ir

from scconv_deploy.precision.half import HalfOptions, to_half
from scconv_deploy.precision.ranges import RangeWatch

MODEL = onnx.parser.parse_model(
    '<ir_version: 10, opset_import: ["" : 18]> g (float[n, 2] x, int64[1] i) => (float[n, 2] y)'
    "<float k = {1000}> { a = Mul (x, k)  b = Mul (a, k)  d = Exp (b)  c = Cast <to = 1> (i)  y = Add (b, c) }"
)


def watch(*rows):
    half = ir.to_proto(to_half(ir.from_proto(MODEL), HalfOptions("fp16")).model)
    found = RangeWatch(MODEL, half, "fp16")
    for row in rows:
        found.add({"x": np.float32([row]), "i": np.int64([0])})
    return found.beyond


def test_tensors_beyond_the_limit_in_order():
    assert watch((1e-3, -2e-3), (0.1, -0.2), (1e-2, -2e-2)) == {"b": 200000.0, "y": 200000.0}
    assert watch((1e-3, -2e-3)) == {}


def test_what_stays_in_float32_may_be_large():
    assert watch((2e-5, 0.0)) == {}  # exp(20) is 5e8, and Exp is kept


def test_not_a_number_is_beyond():
    assert watch((np.nan, 0)) == dict.fromkeys("aby", float("inf"))
