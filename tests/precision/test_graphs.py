"""Every graph that ONNX allows comes out valid and right: graphs in nodes, shared constants, sequences, any name."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from scconv_deploy.errors import ModelError
from scconv_deploy.precision.float32 import as_ir
from scconv_deploy.precision.half import HalfOptions, converted
from tests.precision.made import assert_same, halved, parsed, run, types

RNG = np.random.default_rng(0)
FLOAT, HALF, INT64 = TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.INT64
X = RNG.normal(size=(2, 8)).astype(np.float32)
W = RNG.normal(size=(8, 8)).astype(np.float32)
K = np.float32(3)

IF = """g (float[n, 8] x, bool c) => (float[n, 8] y) {
    h = MatMul (x, w)
    y = If (c) <then_branch = a () => (float[n, 8] p) {
                    q = Mul (h, k)
                    p = If (c) <then_branch = d () => (float[n, 8] r) { r = Sub (q, h) },
                                else_branch = e () => (float[n, 8] r) { r = Identity (q) }> },
                else_branch = b () => (float[8] p) { p = Constant <value = float[8] {1, 2, 3, 4, 5, 6, 7, 8}> () }>
}"""
LOOP = """g (float[n, 8] x, int64 turns) => (float[n, 8] y, float[m, n, 8] all) {
    h = Mul (x, k)
    y, all = Loop (turns, , h) <body = t (int64 i, bool on, float[n, 8] v) => (bool go, float[n, 8] u, float[n, 8] s) {
        go = Identity (on)  t = MatMul (v, w)  u = Mul (t, half)  s = Add (u, h) }>
}"""
SCAN = """g (float[8] start, float[n, 8] x) => (float[8] last, float[n, 8] y) {
    h = Relu (x)
    last, y = Scan <num_scan_inputs = 1, body = one (float[8] v, float[8] r) => (float[8] u, float[8] s) {
        t = Mul (v, half)  u = Add (t, r)  s = Mul (u, k) }> (start, h)
}"""


@pytest.mark.parametrize("io", ["float32", "half"])
def test_graphs_inside_nodes_are_converted_and_float32_at_their_ends(io):
    model = parsed(IF, w=W, k=K)
    half, conversion = halved(model, io=io)
    assert types(half) == {"w": HALF, "k": HALF}
    assert conversion.half == 4  # MatMul, Mul, Sub, Identity; a Constant that a branch gives out is none
    for c in (True, False):
        assert_same(model, half, x=X, c=np.array(c))
    model = parsed(LOOP, w=W, k=K, half=np.float32(0.5))
    half, _ = halved(model, io=io)
    for turns in (0, 1, 5):
        assert_same(model, half, x=X, turns=np.array(turns))
    model = parsed(SCAN, k=K, half=np.float32(0.5))
    half, _ = halved(model, io=io)
    assert_same(model, half, x=X, start=np.ones(8, np.float32))


def test_constants_of_a_branch():
    model = parsed(
        "g (float[n, 8] x, bool c) => (float[n, 8] y) { y = If (c) <then_branch = a () => (float[n, 8] p) {"
        " two = Constant <value_float = 2.0> ()  far = Constant <value_float = 100000.0> ()  q = Mul (x, two)"
        " r = Mul (q, far)  p = Div (r, far) }, else_branch = b () => (float[n, 8] p) {"
        " two = Constant <value_float = 3.0> ()  p = Mul (x, two) }> }"
    )
    half, conversion = halved(model)
    assert conversion.half == 2  # one in each branch
    assert_same(model, half, x=X, c=np.array(True))
    assert_same(model, half, x=X, c=np.array(False))


def test_a_constant_that_a_shape_and_the_data_read():
    model = parsed(
        'g (float[1, 2, 4, 4] x) => (float[1, 2, 8, 8] y) { r = Relu (x)  u = Resize <mode = "nearest"> (r, , s)'
        "  two = Gather (s, at)  y = Mul (u, two) }",
        s=np.float32([1, 1, 2, 2]), at=np.int64(3),
    )  # fmt: skip
    half, _ = halved(model)
    assert types(half) == {"s": FLOAT, "at": INT64, "s_half": HALF}
    assert_same(model, half, x=RNG.normal(size=(1, 2, 4, 4)).astype(np.float32))


def test_weights_that_are_inputs_too():
    text = "g (float[n, 8] x, float[8, 8] w, float k) => (float[n, 8] y) { h = MatMul (x, w)  y = Mul (h, k) }"
    model = parsed(text, w=W, k=K)
    half, _ = halved(model)  # all of them: an old exporter's habit
    assert [value.name for value in half.graph.input] == ["x"]
    assert types(half) == {"w": HALF, "k": HALF}
    assert_same(model, half, x=X)
    some = parsed(text.replace("float[8, 8] w, ", ""), w=W, k=K)
    half, _ = halved(some)  # one of them: a default that a caller may override
    assert [value.name for value in half.graph.input] == ["x", "k"]
    assert types(half) == {"w": HALF, "k": FLOAT}
    assert_same(some, half, x=X)
    assert_same(some, half, x=X, k=np.array(7, np.float32))
    half, _ = halved(some, io="half")
    assert types(half) == {"w": HALF, "k": HALF}
    assert_same(some, half, x=X)


def test_sequences_and_optionals_stay_float32():
    model = parsed(
        "g (float[2, 8] x) => (float[2, 4] y, float[2, 8] z) { h = MatMul (x, w)  q = SplitToSequence <axis = 1> (h, n)"
        "  e = SequenceAt (q, i)  y = Mul (e, k)  o = Optional (h)  g = OptionalGetElement (o)  z = Mul (g, k) }",
        w=W, k=K, n=np.int64(4), i=np.int64(1),
    )  # fmt: skip
    half, conversion = halved(model)
    assert {name for name, _ in conversion.kept} == {"q", "e", "o", "g"}
    assert conversion.half == 3
    assert_same(model, half, x=X)


def test_a_sequence_that_leaves_the_graph():
    model = parsed("g (float[2, 8] x) => (seq(float[2, 4]) q) { h = MatMul (x, w)"
                   "  q = SplitToSequence <axis = 1> (h, n) }",
                   w=W, n=np.int64(4))  # fmt: skip
    half, _ = halved(model)
    for found, expected in zip(run(half, x=X)[0], run(model, x=X)[0], strict=True):
        np.testing.assert_allclose(found, expected, rtol=2e-2, atol=2e-3)


def test_names_that_the_converter_would_take_are_taken():
    model = parsed(
        "g (float[n, 8] x) => (float[n, 8] y, float[n, 8] x_half) { w_half = MatMul (x, w)"
        "  x_half_half = Softmax (w_half)  cast_x_half = Mul (x_half_half, w_half_float)  x_half = Add (cast_x_half, x)"
        "  y = Pow (w_half, k) }",
        w=W, k=K, w_half_float=K,
    )  # fmt: skip
    for i, node in enumerate(model.graph.node):
        node.name = ["cast_x_half", "", "/layer1/a:b", "cast_x_half_1", ""][i]
    for io in ("float32", "half"):
        half, _ = halved(model, io=io)
        names = [name for node in half.graph.node for name in node.output]
        assert len(set(names)) == len(names)
        assert [v.name for v in half.graph.output] == ["y", "x_half"]
        assert_same(model, half, x=X)


def test_empty_and_equal_names_of_nodes_do_not_mix_up_what_is_kept():
    model = parsed("g (float[n, 8] x) => (float[n, 8] y) { h = Softmax (x)  r = Mul (h, k)  y = Pow (r, k) }", k=K)
    for node in model.graph.node:
        node.name = "same"
    half, conversion = halved(model)
    assert [reason.split(":")[0] for _, reason in conversion.kept] == ["Softmax", "Pow"]
    assert types(half) == {"k": FLOAT, "k_half": HALF}


def test_outputs_that_are_inputs_initializers_or_given_twice():
    model = parsed("g (float[n, 8] x) => (float[n, 8] x, float[8, 8] w, float[n, 8] y) { y = MatMul (x, w) }", w=W)
    model.graph.output.append(model.graph.output[2])
    for io in ("float32", "half"):
        half, _ = halved(model, io=io)
        assert [v.name for v in half.graph.output] == ["x", "w", "y", "y"]
        assert_same(model, half, x=X)


def test_what_makes_floats_of_nothing():
    model = parsed(
        "g (float[n, 8] x, int64[1] n) => (float[n, 8] y) { h = MatMul (x, w)  z = ConstantOfShape (n)"
        "  o = ConstantOfShape <value = float[1] {2.5}> (n)  c = Constant <value_float = 1.5> ()"
        "  e = EyeLike <dtype = 1> (h)  l = CastLike (n, h)  a = Add (h, z)  b = Mul (a, o)  d = Mul (b, c)"
        "  f = Add (d, e)  y = Mul (f, l) }",
        w=W,
    )
    half, conversion = halved(model)
    assert [name for name, _ in conversion.kept] == ["e"]
    assert_same(model, half, x=X, n=np.int64([8]))


def test_random_numbers_keep_the_type_that_their_attribute_says():
    model = parsed(
        "g (float[2, 8] x) => (float[2, 8] y) { r = RandomNormal <shape = [2, 8], scale = 0.0001, mean = 2.0> ()"
        "  u = RandomUniformLike <low = 1.0, high = 1.0001> (x)  s = Mul (x, r)  y = Mul (s, u) }"
    )
    half, _ = halved(model)
    assert_same(model, half, x=X)


def test_unoptimised_exports_and_their_functions():
    """Constants as nodes, Identity, functions of torch's domains with a default attribute that the call leaves out."""
    model = parsed(
        "g (float[n, 8] x) => (float[n, 8] y) { i = Identity (x)  h = MatMul (i, w)  y = Identity (h) }", w=W
    )
    body = helper.make_node("LeakyRelu", ["a"], ["b"])
    reference = onnx.AttributeProto(name="alpha", ref_attr_name="slope", type=onnx.AttributeProto.FLOAT)
    body.attribute.append(reference)
    function = helper.make_function(
        "pkg.onnxscript.torch_lib", "aten_leaky", ["a"], ["b"], [body], [helper.make_opsetid("", 18)],
        attribute_protos=[helper.make_attribute("slope", 0.25)],
    )  # fmt: skip
    model.functions.append(function)
    model.graph.node[2].CopyFrom(helper.make_node("aten_leaky", ["h"], ["y"], domain="pkg.onnxscript.torch_lib"))
    model.opset_import.append(helper.make_opsetid("pkg.onnxscript.torch_lib", 1))
    half, conversion = halved(model)
    assert not half.functions
    assert conversion.half == 3
    (y,), h = run(half, x=X), X @ W
    np.testing.assert_allclose(y, np.where(h > 0, h, 0.25 * h), rtol=1e-2, atol=1e-2)


def test_sparse_initializers_are_filled_in():
    model = parsed("g (float[n, 8] x) => (float[n, 8] y) { y = MatMul (x, w) }")
    values = numpy_helper.from_array(np.float32([2, 3]), "w")
    indices = numpy_helper.from_array(np.int64([1, 14]), "at")
    model.graph.sparse_initializer.append(helper.make_sparse_tensor(values, indices, [8, 8]))
    half, _ = halved(model)
    dense = np.zeros(64, np.float32)
    dense[[1, 14]] = 2, 3
    np.testing.assert_allclose(run(half, x=X)[0], X @ dense.reshape(8, 8), rtol=2e-3, atol=1e-3)


def test_unsorted_nodes_are_sorted():
    model = parsed("g (float[n, 8] x) => (float[n, 8] y) { h = MatMul (x, w)  y = Mul (h, k) }", w=W, k=K)
    expected = run(model, x=X)[0]
    model.graph.node.append(model.graph.node[0])
    del model.graph.node[0]
    half, _ = halved(model)
    np.testing.assert_allclose(run(half, x=X)[0], expected, rtol=2e-2, atol=2e-2)


def test_foreign_operators_and_what_follows_them_stay_float32_by_name():
    model = parsed("g (float[n, 8] x) => (float[n, 8] y) { h = MatMul (x, w)  g = Gelu (h)  y = Mul (g, k) }", w=W, k=K)
    model.graph.node[1].domain = "com.microsoft"
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    half, conversion = halved(model)
    assert dict(conversion.kept) == {
        "g": "Gelu: the domain com.microsoft is not known to take half", "y": "Mul: the type of g is not known",
    }  # fmt: skip
    assert_same(model, half, x=X)


def test_bounds_beyond_half_bound_nothing():
    model = parsed("g (float[n, 8] x) => (float[n, 8] y) { h = MatMul (x, w)  y = Clip (h, low, high) }",
                   w=W, low=np.float32(0), high=np.float32(3.4e38))  # fmt: skip
    half, conversion = halved(model)
    assert conversion.kept == ()
    assert_same(model, half, x=X)


def test_masks_of_the_largest_negative_number_stay_float32_to_the_softmax():
    model = parsed(
        "g (float[n, 8] x, float[n, 8] m) => (float[n, 8] y) { h = MatMul (x, w)  i = Sub (one, m)  v = Mul (i, lowest)"
        "  s = Add (h, v)  r = Reshape (s, shape)  p = Softmax (r)  y = MatMul (p, w) }",
        w=W, one=np.float32(1), lowest=np.float32(-3.4e38), shape=np.int64([-1, 8]),
    )  # fmt: skip
    half, conversion = halved(model)
    assert dict(conversion.kept) == {
        "v": "Mul: the constant lowest overflows half: 3.4e+38", "s": "Add: its values may be as large as those of v",
        "r": "Reshape: its values may be as large as those of s", "p": "Softmax: exponentials and their sum",
    }  # fmt: skip
    assert_same(model, half, rtol=2**-7, x=X, m=(RNG.random((2, 8)) < 0.7).astype(np.float32))


def test_the_standard_domain_by_its_other_name():
    model = parsed("g (float[n, 8] x) => (float[n, 8] y) { h = MatMul (x, w)  y = Softmax (h) }", w=W)
    model.opset_import[0].domain = "ai.onnx"
    model.graph.node[0].domain = "ai.onnx"
    _, conversion = halved(model)
    assert (conversion.half, dict(conversion.kept)) == (1, {"y": "Softmax: exponentials and their sum"})


def test_a_model_without_anything_to_convert_does_not_call_itself_half():
    model = parsed("g (float[n, 8] x) => (float[n, 8] y) { y = Softmax (x) }")
    conversion = converted(as_ir(model), HalfOptions("fp16"))
    assert (conversion.half, conversion.casts, dict(conversion.model.metadata_props)) == (0, 0, {})


def test_infinite_constants_are_infinite_in_half():
    model = parsed("g (float[n, 8] x, bool[n, 8] m) => (float[n, 8] y) { h = MatMul (x, w)  v = Where (m, h, none)"
                   "  y = Softmax (v) }", w=W, none=np.float32(-np.inf))  # fmt: skip
    half, conversion = halved(model)
    assert types(half) == {"w": HALF, "none": HALF}
    assert [name for name, _ in conversion.kept] == ["y"]
    mask = RNG.random((2, 8)) < 0.7
    assert_same(model, half, rtol=2**-7, x=X, m=mask)
    assert (run(half, x=X, m=mask)[0][~mask] == 0).all()


@pytest.mark.parametrize("op", ["QuantizeLinear", "DynamicQuantizeLinear"])
def test_int8_files_are_refused_by_name(op):
    inner = {
        "QuantizeLinear": "q = QuantizeLinear (h, s, z)  y = DequantizeLinear (q, s, z)",
        "DynamicQuantizeLinear": "q, a, b = DynamicQuantizeLinear (h)  y = DequantizeLinear (q, a, b)",
    }[op]
    model = parsed(f"g (float[n, 8] x) => (float[n, 8] y) {{ h = MatMul (x, w)  {inner} }}",
                   w=W, s=np.float32(0.1), z=np.uint8(128))  # fmt: skip
    with pytest.raises(ModelError, match=rf"q is a {op}: this model is int8 \(Q/DQ\) already"):
        halved(model)


def test_an_opset_that_is_too_low_is_named():
    with pytest.raises(ModelError, match="has opset 13; fp16 needs 18") as caught:
        halved(parsed("g (float[n, 8] x) => (float[n, 8] y) { y = Relu (x) }", opset=13))
    assert "--opset 18" in caught.value.remedy
