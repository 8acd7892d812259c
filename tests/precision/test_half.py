"""Half precision: what is converted, what stays, and that both compute the same but for rounding."""

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import onnxruntime
import pytest
from onnx import TensorProto, numpy_helper

from scconv_deploy.errors import ModelError, UsageError
from scconv_deploy.graph import instrument
from scconv_deploy.graph.file import check
from scconv_deploy.precision.half import HalfOptions, to_half

RNG = np.random.default_rng(0)


def parsed(text, **initializers):
    model = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : 18]> {text}')
    model.graph.initializer.extend(numpy_helper.from_array(v, k) for k, v in initializers.items())
    return model


def converted(model, precision="fp16", **options):
    conversion = to_half(ir.from_proto(model), HalfOptions(precision, **options))
    proto = ir.to_proto(conversion.model)
    check(proto)
    return proto, conversion


def run(model, **arrays):
    return onnxruntime.InferenceSession(model.SerializeToString()).run(None, arrays)


def types(model):
    return {t.name: TensorProto.DataType.Name(t.data_type) for t in model.graph.initializer}


MLP = "g (float[n, 8] x) => (float[n, 4] y) { h = MatMul (x, w1)  r = Relu (h)  y = MatMul (r, w2) }"


def mlp():
    w1, w2 = (RNG.normal(size=s).astype(np.float32) for s in ((8, 16), (16, 4)))
    return parsed(MLP, w1=w1, w2=w2)


def test_weights_and_data_become_half_inputs_and_outputs_stay():
    model = mlp()
    half, conversion = converted(model)
    assert types(half) == {"w1": "FLOAT16", "w2": "FLOAT16"}
    assert [n.op_type for n in half.graph.node] == ["Cast", "MatMul", "Relu", "MatMul", "Cast"]
    assert (conversion.half, conversion.casts, conversion.kept) == (3, 2, ())
    assert [(v.name, v.type.tensor_type.elem_type) for v in (*half.graph.input, *half.graph.output)] == [
        ("x", TensorProto.FLOAT), ("y", TensorProto.FLOAT),
    ]  # fmt: skip
    x = RNG.normal(size=(3, 8)).astype(np.float32)
    (expected,), (y,) = run(model, x=x), run(half, x=x)
    assert 0 < np.abs(y - expected).max() < 2**-11 * 8 * np.abs(expected).max()


def test_half_inputs_and_outputs_save_the_casts():
    half, conversion = converted(mlp(), io="half")
    assert conversion.casts == 0
    assert half.graph.input[0].type.tensor_type.elem_type == TensorProto.FLOAT16
    (y,) = run(half, x=np.ones((1, 8), np.float16))
    assert y.dtype == np.float16


def test_the_gate_stays_in_float32(tiny_bytes):
    model = onnx.load_model_from_string(tiny_bytes[0])
    half, _ = converted(model)
    kinds = types(half)
    for site, node in instrument.sites(half).items():
        assert {kinds[name] for name in node.input[1:]} == {"FLOAT"}, site
    assert kinds["stem.weight"] == "FLOAT16"
    before = {t.name: t.raw_data for t in model.graph.initializer}
    after = {t.name: t.raw_data for t in half.graph.initializer}
    for node in instrument.sites(model).values():
        assert [after[n] for n in node.input[1:]] == [before[n] for n in node.input[1:]]
    assert [f.SerializeToString() for f in half.functions] == [f.SerializeToString() for f in model.functions]
    image = RNG.normal(size=(2, 3, 16, 16)).astype(np.float32)
    for y, expected in zip(run(half, image=image), run(model, image=image), strict=True):
        assert np.linalg.norm(y - expected) / np.linalg.norm(expected) < 0.02


def test_one_cast_for_many_readers_and_kept_operators():
    model = parsed(
        "g (float[n, 8] x) => (float[n, 8] a, float[n, 8] b)"
        "{ h = Relu (x)  s = Softmax (h)  t = Softmax (h)  a = Add (s, h)  b = Mul (t, h) }"
    )
    half, conversion = converted(model)
    assert [name for name, _ in conversion.kept] == ["s", "t"]
    assert "exponentials" in conversion.kept[0][1]
    ops = [n.op_type for n in half.graph.node]
    assert (ops.count("Cast"), conversion.casts) == (6, 6)  # x; h up once; s and t down; a and b up
    x = RNG.normal(size=(2, 8)).astype(np.float32)
    for y, expected in zip(run(half, x=x), run(model, x=x), strict=True):
        np.testing.assert_allclose(y, expected, rtol=4e-3, atol=1e-4)


CONSTANTS = {
    "overflows": (np.float32([1e5, 1]), "overflows half: 1e+05"),
    "vanishes": (np.float32([1e-10, 1e-10]), "vanishes in half: 1e-10"),
    "mostly below the smallest": (np.float32([3e-8, 5e-8]), "vanishes in half"),
}


@pytest.mark.parametrize("name", CONSTANTS)
def test_constants_that_half_cannot_hold_stay(name):
    value, words = CONSTANTS[name]
    model = parsed("g (float[n, 2] x) => (float[n, 2] y) { h = Relu (x)  z = Mul (h, k)  y = Mul (z, g) }",
                   k=value, g=np.float32([2, 3]))  # fmt: skip
    half, conversion = converted(model)
    assert types(half) == {"k": "FLOAT", "g": "FLOAT16"}
    ((kept, reason),) = conversion.kept
    assert kept == "z"
    assert "the constant k" in reason
    assert words in reason


def test_a_few_small_numbers_in_a_tensor_are_rounded_not_kept():
    half, conversion = converted(
        parsed("g (float[n, 2] x) => (float[n, 2] y) { y = Mul (x, k) }", k=np.float32([1e-9, 1]))
    )
    assert (types(half), conversion.kept) == ({"k": "FLOAT16"}, ())


def test_a_constant_that_both_types_read_is_there_twice():
    model = parsed(
        "g (float[n, 2] x) => (float[n, 2] y, float[n, 2] z) { y = Mul (x, k)  z = Pow (x, k) }",
        k=np.float32([1, 2]),
    )
    half, _ = converted(model)
    assert types(half) == {"k": "FLOAT", "k_half": "FLOAT16"}
    x = np.float32([[1.5, 2.5]])
    for y, expected in zip(run(half, x=x), run(model, x=x), strict=True):
        np.testing.assert_allclose(y, expected, rtol=2e-3)


def test_fixed_float_inputs_and_integer_paths_are_left():
    model = parsed(
        "g (float[1, 2, 4, 4] x) => (float[1, 2, 8, 8] y, int64[4] shape)"
        '{ h = Relu (x)  y = Resize <mode = "nearest"> (h, , scales)  shape = Shape (h) }',
        scales=np.float32([1, 1, 2, 2]),
    )
    half, _ = converted(model)
    assert types(half) == {"scales": "FLOAT"}
    x = RNG.normal(size=(1, 2, 4, 4)).astype(np.float32)
    (y, shape), (expected, _) = run(half, x=x), run(model, x=x)
    np.testing.assert_allclose(y, expected, rtol=1e-3)
    assert shape.tolist() == [1, 2, 4, 4]


def test_keep_by_weight_and_by_node_and_a_pattern_that_matches_nothing():
    for pattern in ("w1", "h"):
        half, conversion = converted(mlp(), keep=(pattern,))
        assert types(half) == {"w1": "FLOAT", "w2": "FLOAT16"}
        assert conversion.kept == (("h", f"MatMul: kept by '{pattern}'"),)
    with pytest.raises(UsageError, match=r"'layer9\.\*' matches no node or weight"):
        converted(mlp(), keep=("layer9.*",))


def test_converting_twice_is_refused():
    half, _ = converted(mlp())
    with pytest.raises(ModelError, match="w1 is FLOAT16: this model is in half precision already"):
        converted(half)


def test_bfloat16_needs_an_opset_that_has_it():
    conv = "g (float[1, 2, 4, 4] x) => (float[1, 2, 4, 4] y) { y = Conv <kernel_shape = [1, 1]> (x, w) }"
    weight = RNG.normal(size=(2, 2, 1, 1)).astype(np.float32)
    with pytest.raises(ModelError, match="has opset 18; bf16 needs 22") as caught:
        converted(parsed(conv, w=weight), "bf16")  # every convolution would stay in float32
    assert "--opset 22" in caught.value.remedy
    newer = parsed(conv, w=weight)
    newer.opset_import[0].version = 22
    half, conversion = converted(newer, "bf16")
    assert (conversion.kept, types(half)) == ((), {"w": "BFLOAT16"})


MEANS = """g (float[n, 4, h, w] a, float[n, 4, h, w] b) => (float[n, k, o, p] y{output}) {{
    m = GlobalAveragePool (a)  q = GlobalAveragePool (b)  c = Concat <axis = 1> (m, q)  s = Softmax <axis = 1> (c)
    d = Concat <axis = 1> (a, b)  y = Mul (s, d) }}"""


@pytest.mark.parametrize("is_output", [False, True])
def test_means_that_are_joined_for_a_softmax_are_not_rounded_in_between(is_output):
    model = parsed(MEANS.format(output=", float[n, k, o, p] c" if is_output else ""))
    half, conversion = converted(model)
    kept = [name for name, reason in conversion.kept if reason.startswith("Concat: it joins values of float32")]
    producers = {name: node.op_type for node in half.graph.node for name in node.output}
    joined = next(node for node in half.graph.node if node.output[0].startswith("c"))
    assert bool(kept) == (not is_output)
    assert {producers[name] for name in joined.input} == ({"Cast"} if is_output else {"GlobalAveragePool"})
    x = RNG.normal(size=(1, 4, 5, 5)).astype(np.float32)
    assert np.abs(run(half, a=x, b=x)[0] - run(model, a=x, b=x)[0]).max() < 2**-11
