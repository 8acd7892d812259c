"""What ends in an index, a decision or a coordinate stays float32; what is only data does not."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto

from tests.precision.made import assert_same, halved, parsed, run, types

RNG = np.random.default_rng(0)
X = RNG.normal(size=(2, 8)).astype(np.float32)
W = RNG.normal(size=(8, 8)).astype(np.float32)
TABLE = RNG.normal(size=(5000, 4)).astype(np.float32)
ROWS = np.arange(2030, 2070)
ONE = np.float32(1)


def kept(conversion):
    return dict(conversion.kept)


@pytest.mark.parametrize(
    "middle",
    [
        "f = Cast <to = 1> (id)  g = Mul (f, one)  i = Cast <to = 7> (g)",
        "f = Cast <to = 1> (id)  a = Add (f, one)  g = Sub (a, one)  r = Floor (g)  i = Cast <to = 6> (r)",
        "f = Cast <to = 1> (id)  d = Cast <to = 11> (f)  e = Cast <to = 1> (d)  g = Mul (e, one)"
        "  i = Cast <to = 7> (g)",
        "f = Cast <to = 1> (id)  s = ReduceMax <keepdims = 1> (f)  m = Min (f, s)  i = Cast <to = 7> (m)",
        "f = Cast <to = 1> (id)  q = SequenceConstruct (f)  e = SequenceAt (q, z)  g = Mul (e, one)"
        "  i = Cast <to = 7> (g)",
        "f = Cast <to = 1> (id)  g = If (c) <then_branch = a () => (float[n] p) { p = Mul (f, one) },"
        " else_branch = b () => (float[n] p) { p = Neg (f) }>  i = Cast <to = 7> (g)",
        "f = Cast <to = 1> (id)  two = Constant <value_int = 2> ()  g = Loop (two, , f) <body = b (int64 k, bool on,"
        " float[n] v) => (bool go, float[n] u) { go = Identity (on)  u = Mul (v, one) }>  i = Cast <to = 7> (g)",
    ],
)  # fmt: skip
def test_indices_are_exact(middle):
    """The data, the rows of the table, are half all the same."""
    model = parsed(
        f"g (int64[n] id, bool c) => (float[n, 4] y) {{ {middle}  y = Gather (t, i) }}",
        t=TABLE, one=ONE, z=np.int64(0),
    )  # fmt: skip
    half, conversion = halved(model)
    assert types(half)["t"] == TensorProto.FLOAT16
    assert kept(conversion)["f"] in (
        "Cast: its result is an index or a count (Cast i)",
        "Cast: its result goes into a step function (Floor r)",
    )
    (y,) = run(half, id=ROWS, c=np.array(True))
    np.testing.assert_array_equal(y, TABLE[ROWS].astype(np.float16).astype(np.float32))


def test_an_index_that_is_data_too_is_computed_once_in_float32():
    model = parsed("g (float[n] x) => (float[n, 4] y, float[n] z) { g = Mul (x, one)  i = Cast <to = 7> (g)"
                   "  y = Gather (t, i)  z = Mul (g, k) }", t=TABLE, one=ONE, k=np.float32(2**-4))  # fmt: skip
    for io in ("float32", "half"):
        half, _ = halved(model, io=io)
        assert [v.type.tensor_type.elem_type for v in half.graph.input] == [TensorProto.FLOAT]  # an index, too
        assert_same(model, half, x=ROWS.astype(np.float32))


def test_inputs_that_are_indices_stay_float32_where_the_others_are_half():
    model = parsed("g (float[n] x, float[n, 4] z) => (float[n, 4] y) { i = Cast <to = 7> (x)  r = Gather (t, i)"
                   "  y = Add (r, z) }", t=TABLE)  # fmt: skip
    half, conversion = halved(model, io="half")
    assert [v.type.tensor_type.elem_type for v in half.graph.input] == [TensorProto.FLOAT, TensorProto.FLOAT16]
    assert kept(conversion) == {"x": "input: its result is an index or a count (Cast i)"}
    assert_same(model, half, x=ROWS.astype(np.float32), z=np.ones((len(ROWS), 4), np.float32))


def test_sizes_from_float_arithmetic():
    model = parsed(
        "g (float[1, 1, n, 1] x) => (float[1, 1, m, 1] y, float[1, 1, k, 1] z) { s = Shape (x)  f = Cast <to = 1> (s)"
        "  g = Mul (f, one)  e = Cast <to = 7> (g)  b = Expand (tiny, e)  y = Add (b, x)"
        '  u = Mul (scale, scale)  z = Resize <mode = "nearest"> (x, , u) }',
        one=ONE, tiny=np.zeros((1, 1, 1, 1), np.float32), scale=np.float32([1, 1, 1.0005, 1]),
    )  # fmt: skip
    half, conversion = halved(model)
    assert kept(conversion)["u"] == "Mul: its result is a coordinate or a size (Resize z)"
    for size in (2049, 4099):
        assert_same(model, half, x=RNG.normal(size=(1, 1, size, 1)).astype(np.float32))


def test_coordinates_of_a_grid_and_of_regions():
    """2000 pixels wide: half would place a pixel on its neighbour; the image itself is half."""
    model = parsed(
        "g (float[1, 1, 1, 2000] x, float[1, 1, n, 2] at, float[r, 4] boxes) => (float[1, 1, 1, n] y, "
        'float[r, 1, 1, 1] z) { h = Mul (x, k)  a = Mul (at, one)'
        '  y = GridSample <mode = "nearest", align_corners = 1> (h, a)'
        "  b = Mul (boxes, one)  z = RoiAlign <output_height = 1, output_width = 1, sampling_ratio = 1> (h, b, zero) }",
        opset=20, k=np.float32(0.5), one=ONE, zero=np.zeros(3, np.int64),
    )  # fmt: skip
    half, conversion = halved(model)
    assert set(kept(conversion)) == {"a", "b", "z"}
    x = np.arange(2000, dtype=np.float32).reshape(1, 1, 1, 2000) % 50
    at = np.zeros((1, 1, 64, 2), np.float32)
    at[..., 0] = np.arange(1801, 1865) / 999.5 - 1
    boxes = np.float32([[1800 + i, 0, 1801 + i, 1] for i in (1, 2, 4)])
    assert_same(model, half, x=x, at=at, boxes=boxes)


def test_the_argument_of_a_sine_is_an_angle():
    model = parsed("g (int64[n] t) => (float[n, 8] y) { f = Cast <to = 1> (t)  u = Unsqueeze (f, last)"
                   "  a = Mul (u, freq)  s = Sin (a)  y = MatMul (s, w) }",
                   last=np.int64([1]), freq=np.float32(10.0 ** -np.arange(8)), w=W)  # fmt: skip
    half, conversion = halved(model)
    assert kept(conversion)["a"] == "Mul: its result is an angle (Sin s)"
    assert_same(model, half, t=np.arange(900, 999))


GATE = """g (float[n, 8] x) => (float[n, 8] y) {
    h = MatMul (x, w)  m = ReduceMean <axes = [1]> (h)  c = Sub (h, m)  z = Mul (c, tiny)  r = Sigmoid (z)
    o = GreaterOrEqual (r, t)  f = Cast <to = 1> (o)  g = Mul (h, f)  y = MatMul (g, w)
}"""


def test_a_gate_of_any_form_is_decided_in_float32_on_the_data():
    """sigmoid(z) of a z of the order 1e-4: half knows one value between 0.4995 and 0.5005."""
    weight = np.eye(8, dtype=np.float32)  # so that h is the same in both
    text = GATE.replace("ReduceMean <axes = [1]> (h)", "ReduceMean (h, axes)")
    model = parsed(text, w=weight, tiny=np.float32(1e-4), t=np.float32(0.5), axes=np.int64([1]))
    half, conversion = halved(model)
    assert {n for n, reason in conversion.kept} == {"m", "c", "z", "r", "o"}
    assert kept(conversion)["z"] == "Mul: its result is a decision (GreaterOrEqual o)"
    x = RNG.normal(size=(64, 8)).astype(np.float16).astype(np.float32)
    (expected,), (y,) = run(model, x=x), run(half, x=x)
    assert ((y == 0) == (expected == 0)).all()
    assert_same(model, half, x=x)


def test_a_decision_on_the_residual_stream_does_not_swallow_the_network():
    text = "g (float[n, 8] x) => (float[n, 8] y) { h0 = MatMul (x, w)"
    for i in range(4):
        text += f"  n{i} = Mul (h{i}, k)  b{i} = MatMul (n{i}, w)  c{i} = Relu (b{i})  h{i + 1} = Add (h{i}, c{i})"
    text += "  v = Mul (h4, k)  o = Greater (v, t)  q = Where (o, v, h4)  y = MatMul (q, w) }"
    half, conversion = halved(parsed(text, w=W / 3, k=np.float32(0.5), t=np.float32(0.1)))
    assert set(kept(conversion)) == {"v", "o"}
    assert conversion.half == 1 + 4 * 4 + 2
    onnx.checker.check_model(half, full_check=True)


def test_a_short_product_is_a_change_of_coordinates():
    text = "g (float[n, 3] p, float[n, 8] x) => (int64[n, 2] i, int64[n, 8] j) { a = MatMul (p, m)  b = Mul (a, one)"\
           "  i = Cast <to = 7> (b)  c = MatMul (x, w)  d = Mul (c, one)  j = Cast <to = 7> (d) }"  # fmt: skip
    model = parsed(text, m=np.float32([[1, 0], [0, 1], [1, 3]]), one=ONE, w=np.eye(8, dtype=np.float32))
    half, conversion = halved(model)
    assert set(kept(conversion)) == {"a", "b", "d"}
    points = np.stack([ROWS, ROWS + 1, np.ones_like(ROWS)], 1).astype(np.float32)
    assert_same(model, half, p=points, x=np.tile(np.float32([2, 5, 7, 1, 0, 3, 4, 6]), (len(ROWS), 1)))


def test_the_mean_of_positions():
    """A soft ArgMax: the positions are the weights of a product."""
    model = parsed("g (float[n, 5000] x) => (int64[n, 1] i) { p = Softmax (x)  c = MatMul (p, at)"
                   "  i = Cast <to = 7> (c) }", at=np.arange(5000, dtype=np.float32).reshape(5000, 1))  # fmt: skip
    half, conversion = halved(model)
    assert kept(conversion)["c"] == "MatMul: the constant at holds integers that half rounds: up to 4999"
    x = np.zeros((3, 5000), np.float32)
    x[np.arange(3), [2049, 3001, 4999]] = 60
    assert_same(model, half, x=x)
    assert run(half, x=x)[0].ravel().tolist() == [2049, 3001, 4999]


def test_masks_of_positions_cost_nothing():
    model = parsed(
        "g (float[n, 8] x, int64[n, 8] m) => (float[n, 8] y) { h = MatMul (x, w)  c = Equal (m, zero)"
        "  v = Where (c, none, h)  s = Softmax (v)  y = MatMul (s, w) }",
        w=W, zero=np.int64(0), none=np.float32(-np.inf),
    )  # fmt: skip
    _, conversion = halved(model)
    assert set(kept(conversion)) == {"s"}


def test_parameters_of_a_gate_that_the_graph_computes_stay_exact(tiny_bytes):
    """Behind Identity or arithmetic, as an unoptimised export has them."""
    model = onnx.load_model_from_string(tiny_bytes[0])
    node = next(n for n in model.graph.node if n.domain == "scconv")
    cut = node.input[1]
    node.input[1] = "behind"
    place = list(model.graph.node).index(node)
    model.graph.node.insert(place, onnx.helper.make_node("Identity", [cut], ["behind"], name="same"))
    half, conversion = halved(model)
    assert kept(conversion)["same"].startswith("Identity: its result is a parameter of a gate (")
    before = {t.name: t.raw_data for t in model.graph.initializer}
    assert {t.name: t.raw_data for t in half.graph.initializer}[cut] == before[cut]
