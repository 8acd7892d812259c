"""Activations beyond half's range or below it, by name."""

import numpy as np
import onnx.parser
import onnx_ir as ir
import pytest
from onnx import numpy_helper

from scconv_deploy.precision.half import HalfOptions, to_half
from scconv_deploy.verification.checks.half_range import RangeWatch

MODEL = onnx.parser.parse_model(
    '<ir_version: 10, opset_import: ["" : 18]> g (float[n, 2] x, int64[1] i) => (float[n, 2] y)'
    "<float k = {1000}> { a = Mul (x, k)  b = Mul (a, k)  d = Exp (b)  c = Cast <to = 1> (i)  y = Add (b, c) }"
)


def parsed(text, **initializers):
    model = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : 18]> {text}')
    model.graph.initializer.extend(numpy_helper.from_array(np.asarray(v), k) for k, v in initializers.items())
    return model


def watched(model, *feeds, precision="fp16", opset=18):
    float32_model = onnx.ModelProto()
    float32_model.CopyFrom(model)
    float32_model.opset_import[0].version = opset
    half = ir.to_proto(to_half(ir.from_proto(float32_model), HalfOptions(precision)).model)
    found = RangeWatch(float32_model, half, precision)
    for feed in feeds:
        found.add(feed)
    return found


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


def test_what_float32_itself_holds_is_no_overflow():
    """A mask of -inf, or NaN that came in: said, and not blamed on half."""
    for value, kind in ((np.nan, "NaN"), (-np.inf, "infinity")):
        found = watched(MODEL, {"x": np.float32([[value, 0.01]]), "i": np.int64([0])})
        assert found.beyond == {}
        assert found.not_finite == dict.fromkeys("aby", kind)
        assert {name: found.largest[name] for name in "ab"} == pytest.approx({"a": 10.0, "b": 10000.0})
        check = found.check(lambda name: "", "")
        assert (check.status, f"the float32 model itself has {kind} in a" in check.reason) == ("passed", True)


UNDER = parsed(
    "g (float[n, 64] x) => (float[n, 64] y) { h = Mul (x, s)  v = Mul (h, h)  w = Mul (v, t)  y = Mul (w, t) }",
    s=np.float32(2**-13), t=np.float32(2**13),
)  # fmt: skip


def test_values_that_vanish_are_named_and_leave_the_verdict_to_the_outputs():
    x = np.random.default_rng(0).normal(size=(2, 64)).astype(np.float32)
    found = watched(UNDER, {"x": x})
    assert found.vanishing == pytest.approx({"v": float(((x * 2**-13) ** 2).max())}, rel=1e-6)
    check = found.check({"v": "head.square"}.get, "")
    assert check.status == "passed"
    assert "vanishing in fp16: v (head.square) (at most 8.1e-08)" in check.reason
    assert "--keep" in check.reason
    assert watched(UNDER, {"x": x}, precision="bf16", opset=22).vanishing == {}


def test_small_numbers_beside_large_ones_do_not_vanish():
    x = np.full((1, 64), 1e-6, np.float32)
    x[0, 0] = 1e5  # its square is 149
    assert watched(UNDER, {"x": x}).vanishing == {}
    x[:] = 0
    assert watched(UNDER, {"x": x}).vanishing == {}


BRANCHES = """g (float[n, 2] x, bool c, int64 turns) => (float[n, 2] y, float[n, 2] z) {
    h = Relu (x)
    y = If (c) <then_branch = a () => (float[n, 2] p) { q = Mul (h, k)  p = Mul (q, k) },
                else_branch = b () => (float[n, 2] p) { q = Neg (h)  p = Mul (q, one) }>
    z = Loop (turns, , h) <body = turn (int64 i, bool on, float[n, 2] v) => (bool more, float[n, 2] w) {
        more = Identity (on)  u = Mul (v, k)  w = Abs (u) }>
}"""


def test_graphs_inside_nodes_are_watched_too():
    model = parsed(BRANCHES, k=np.float32(1000), one=np.float32(1))
    x = np.float32([[0.5, 2.0]])
    taken = watched(model, {"x": x, "c": np.array(True), "turns": np.array(2)})
    assert (taken.largest["q"], taken.largest["u"]) == (2000.0, 2e6)
    assert set(taken.beyond) == {"p", "u", "w"}
    other = watched(model, {"x": x, "c": np.array(False), "turns": np.array(0)})
    assert (other.largest["q"], other.largest["u"], other.beyond) == (2.0, 0.0, {})
