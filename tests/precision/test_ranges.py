"""Activations beyond half's range, by name."""

import numpy as np
import onnx.parser

from scconv_deploy.precision.ranges import activations_beyond

MODEL = onnx.parser.parse_model(
    '<ir_version: 10, opset_import: ["" : 18]> g (float[n, 2] x, int64[1] i) => (float[n, 2] y)'
    "<float k = {1000}> { a = Mul (x, k)  b = Mul (a, k)  c = Cast <to = 1> (i)  y = Add (b, c) }"
)


def test_tensors_beyond_the_limit_the_largest_first():
    samples = [{"x": np.float32([[v, -2 * v]]), "i": np.int64([0])} for v in (1e-3, 0.1, 1e-2)]
    assert activations_beyond(MODEL, samples, 65504) == {"b": 200000.0, "y": 200000.0}
    assert activations_beyond(MODEL, samples[:1], 65504) == {}


def test_not_a_number_is_beyond():
    found = activations_beyond(MODEL, [{"x": np.float32([[np.nan, 0]]), "i": np.int64([0])}], 65504)
    assert found == dict.fromkeys("aby", float("inf"))
