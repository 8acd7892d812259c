"""Quantisers of a file: what is understood, and why the others are not."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import helper

from scconv_deploy.graph.quantization import read_quantization
from scconv_deploy.records.quantization import LayerPlan, Levels, SkipPlan
from tests.precision.made import parsed

HEAD = "g (float[1, 2, 4, 4] x, float[1, 2, 4, 4] z) => (float[1, 2, 4, 4] y) "
PAIR = "q = QuantizeLinear(x, s, n) d = DequantizeLinear(q, s, n) "
WEIGHT = "w = DequantizeLinear<axis = 0>(w8, ws, wn) "
STORED = {
    "s": np.float32(0.5), "n": np.int8(0), "s2": np.float32(0.25),
    "w8": np.arange(-2, 2, dtype=np.int8).reshape(2, 2, 1, 1), "ws": np.asarray([0.5, 2.0], np.float32),
    "wn": np.zeros(2, np.int8),
}  # fmt: skip


def read(body: str, module: str = "", **stored):
    model = parsed(HEAD + "{ " + body + " }", **(STORED | stored))
    for tensor in model.graph.initializer:
        if tensor.name == "w8":
            tensor.name = "block.conv.weight_quantized"
    for node in model.graph.node:
        node.input[:] = ["block.conv.weight_quantized" if name == "w8" else name for name in node.input]
        if module and node.op_type == "Add":
            node.metadata_props.add(key="scconv.module", value=module)
    onnx.checker.check_model(model)
    return read_quantization(model)


def test_a_layer_its_weights_and_a_second_call():
    found = read(PAIR + WEIGHT + "a = Conv(d, w) b = Conv(a, w) y = Relu(b)")
    assert found.unknown == {}
    assert found.plan.layers == (LayerPlan("block.conv", (Levels(0.5), None), (0.5, 2.0)),)
    assert list(found.quantizers) == ["block.conv::code"]
    assert np.array_equal(found.layers[0].weights.dequantized.ravel(), [-1.0, -0.5, 0.0, 2.0])


def test_gemm_puts_output_channels_first():
    body = PAIR + "w = DequantizeLinear<axis = 1>(w8, ws, wn) f = Flatten<axis = 1>(x) y2 = Gemm(f, w) y = Relu(x)"
    codes = np.arange(64, dtype=np.int8).reshape(32, 2)
    found = read(body, w8=codes)
    assert np.array_equal(found.layers[0].weights.codes, codes.T)
    wrong = read(body.replace("axis = 1>(w8", "axis = 0>(w8"), w8=codes[:2], ws=STORED["ws"])
    assert list(wrong.unknown.values()) == ["its weights are dequantised otherwise"]


def test_skips_are_counted_among_the_additions_of_data_in_their_module():
    body = PAIR + "one = Add(x, c) two = Add(x, z) three = Add(two, d) y = Relu(three)"
    found = read(body, "block", c=np.ones((2, 1, 1), np.float32))
    assert found.plan.skips == (SkipPlan("block", 2, 1, Levels(0.5)),)
    assert list(found.quantizers) == ["block::code"]


SECOND = "q2 = QuantizeLinear(z, s, n) d2 = DequantizeLinear(q2, s, n) c = Concat<axis = 1>(d, d2) "
UNKNOWN = {
    "another reader": (PAIR + "y = Relu(d)", "Relu reads a quantised value"),
    "two scales": ("q = QuantizeLinear(x, s, n) d = DequantizeLinear(q, s2, n) " + WEIGHT + "y = Conv(d, w)",
                   "its input is quantised otherwise than by a pair with one scale"),
    "weights in float": (PAIR + "y = Conv(d, v)", "its weights are not stored as int8"),
    "a bias": (WEIGHT + "b = DequantizeLinear<axis = 0>(b8, ws, wn) y = Conv(x, w, b)", "its bias is quantised"),
    "both inputs of an Add": (PAIR + "y = Add(d, d)", "Add reads a quantised value"),
    "codes read by others": (PAIR + "e = Cast<to = 1>(q) y = Relu(e)",
                             "its codes are not dequantised for every reader"),
    "an output": (PAIR.replace("d =", "y ="), "an output is quantised"),
    "a Concat read in float": (PAIR + SECOND + "r = Relu(c) y = Relu(x)", "its result is read in float"),
    "a zero point of weights": (PAIR + WEIGHT.replace("wn", "wz") + "y = Conv(d, w)",
                                "its weights are dequantised otherwise"),
}  # fmt: skip


@pytest.mark.parametrize("name", UNKNOWN)
def test_what_has_no_place_is_said(name):
    body, reason = UNKNOWN[name]
    more = {"v": np.ones((2, 2, 1, 1), np.float32), "b8": np.ones(2, np.int8), "wz": np.ones(2, np.int8)}
    found = read(body, **more)
    assert list(found.unknown.values()) == [reason]


def test_a_concat_with_one_scale_changes_nothing():
    body = PAIR + SECOND + "q3 = QuantizeLinear(c, s, n) d3 = DequantizeLinear(q3, s, n) " + WEIGHT
    found = read(body + "y = Conv(d3, w)", w8=np.ones((2, 4, 1, 1), np.int8))
    assert found.unknown == {}
    assert found.joined == {"x": Levels(0.5), "z": Levels(0.5)}
    other = read(body.replace("(c, s, n)", "(c, s2, n)").replace("(q3, s, n)", "(q3, s2, n)") + "y = Conv(d3, w)",
                 w8=np.ones((2, 4, 1, 1), np.int8))  # fmt: skip
    assert list(other.unknown.values()) == ["its inputs and its result have several scales"]


def test_quantisers_in_functions_and_branches_are_named():
    model = parsed(HEAD + "{ y = Relu(x) }")
    body = helper.make_function("t", "F", ["a"], ["b"], [helper.make_node("QuantizeLinear", ["a", "a"], ["b"])],
                                [helper.make_opsetid("", 18)])  # fmt: skip
    model.functions.append(body)
    assert read_quantization(model).unknown == {"t::F": "quantisers in a function"}
