"""Noise for a file's inputs reaches as far as its graph lets it, and is what the file can run."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx.parser
import pytest
from onnx import numpy_helper

from scconv_deploy.errors import ModelError
from scconv_deploy.graph import inputs
from scconv_deploy.runtimes.onnxruntime import OnnxRuntimeRunner, lazily


def parsed(text, **initializers):
    model = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : 18]> {text}')
    model.graph.initializer.extend(numpy_helper.from_array(np.asarray(v), k) for k, v in initializers.items())
    return model


def samples(model, seed):
    return inputs.samples(model, seed, lazily(model))


def test_an_array_of_noise_is_seeded_and_of_its_type():
    def drawn(shape, dtype, seed):
        return inputs.random_array(shape, np.dtype(dtype), np.random.default_rng(seed))

    first = drawn((3, 4), "float16", 5)
    np.testing.assert_array_equal(first, np.random.default_rng(5).standard_normal((3, 4)).astype(np.float16))
    np.testing.assert_array_equal(first, drawn((3, 4), "float16", 5))
    assert (first != drawn((3, 4), "float16", 6)).any()
    for dtype in ("int64", "uint8", "bool"):
        assert (found := drawn([50], dtype, 0)).dtype == dtype
        assert set(np.unique(found)) == {0, 1}
    assert np.unique(drawn((50,), ml_dtypes.bfloat16, 0)).size > 40


TABLE = np.zeros((5000, 4), np.float32)
ROWS = (
    "g (int64[n] id) => (float[n, 4] y) { f = Cast <to = 1> (id)  g = Mul (f, k)  i = Cast <to = 7> (g)"
    "  y = Gather (t, i) }"
)


def test_indices_reach_to_the_end_of_their_table_and_open_axes_to_sizes_beyond_half():
    found = samples(parsed(ROWS, k=np.float32(1), t=TABLE), 0)
    assert [sample["id"].shape for sample in found.values()] == [(2,), (67,), (4099,)]
    ids = np.concatenate([sample["id"] for sample in found.values()])
    assert (ids.min() >= 0, 4900 < ids.max() < 5000) == (True, True)
    again = samples(parsed(ROWS, k=np.float32(1), t=TABLE), 0)
    assert all((again[name]["id"] == sample["id"]).all() for name, sample in found.items())
    assert (samples(parsed(ROWS, k=np.float32(1), t=TABLE), 1)["seeded noise"]["id"] != ids[:2]).any()


def test_indices_that_the_model_refuses_are_drawn_smaller():
    found = samples(parsed(ROWS, k=np.float32(3), t=TABLE), 0)
    ids = np.concatenate([sample["id"] for sample in found.values()])
    assert 800 < ids.max() < 1667  # three times that is the table's end
    assert len(found) == 3


def test_floats_that_end_in_an_index_are_indices_from_the_second_sample_on():
    model = parsed("g (float[n] x) => (float[n, 4] y) { i = Cast <to = 7> (x)  y = Gather (t, i) }", t=TABLE)
    first, second, _ = (sample["x"] for sample in samples(model, 0).values())
    assert np.abs(first).max() < 10
    assert 2048 < second.max() < 5000
    assert (second == np.round(second)).all()


def test_sizes_are_few_masks_are_bits_and_steps_in_time_are_many():
    model = parsed(
        "g (int64[1] k, int64[n, m] mask, int64[n] t, uint8[n, 8] image, bool[n] b, float[n, 8] x) => (float[n, z] y) {"
        "  v, i = TopK <axis = 1> (x, k)  f = Cast <to = 1> (mask)  s = ReduceSum <keepdims = 0> (f)"
        "  u = Cast <to = 1> (t)  d = ReduceMax <keepdims = 0> (u)  p = Cast <to = 1> (image)"
        "  q = ReduceMax <keepdims = 0> (p)  e = Add (s, d)  r = Add (e, q)  w = Add (v, r)  c = Cast <to = 1> (b)"
        "  o = ReduceMax <keepdims = 0> (c)  y = Add (w, o) }"
    )
    found = samples(model, 0)
    for sample in found.values():
        assert 1 <= sample["k"][0] <= 5
        assert set(np.unique(sample["mask"])) == {0, 1}
        assert len({len(sample[name]) for name in ("mask", "t", "image", "b", "x")}) == 1  # one size a symbol
    large = found["more seeded noise"]
    assert large["t"].max() > 2048
    assert large["image"].max() > 200
    assert set(np.unique(large["b"])) == {False, True}


def test_a_mask_that_is_compared_takes_zeros_and_many():
    model = parsed("g (int64[n, 8] m, float[n, 8] x) => (float[n, 8] y) { c = Equal (m, z)  y = Where (c, z1, x) }",
                   z=np.int64(0), z1=np.float32(0))  # fmt: skip
    mask = samples(model, 0)["more seeded noise"]["m"]
    assert 0.05 < np.mean(mask == 0) < 0.3
    assert mask.max() > 2048


def test_sizes_that_the_model_takes():
    """A network that halves and doubles takes multiples of 4; a large image is bounded by its elements."""
    model = parsed(
        "g (float[n, 3, h, w] x) => (float[n, 3, a, b] y) { p = AveragePool <kernel_shape = [4, 4], strides = [4, 4]>"
        ' (x)  u = Resize <mode = "nearest"> (p, , s)  y = Add (u, x) }',
        s=np.float32([1, 1, 4, 4]),
    )  # fmt: skip
    found = samples(model, 0)
    shapes = [sample["x"].shape for sample in found.values()]
    assert shapes == [(2, 3, 64, 64), (9, 3, 48, 48), (1, 3, 64, 320)]
    for sample in found.values():
        OnnxRuntimeRunner(model).run(sample)
    assert (inputs.noise(model, 0, lazily(model))["x"] == found["seeded noise"]["x"]).all()


def test_closed_axes_give_two_samples():
    found = samples(parsed("g (float[2, 4] x) => (float[2, 4] y) { y = Relu (x) }"), 0)
    first, second = (sample["x"] for sample in found.values())
    assert first.shape == second.shape == (2, 4)
    assert (first != second).all()


def test_indices_inside_branches_count():
    model = parsed(
        "g (int64[n] id, bool c) => (float[n, 4] y) { y = If (c) <then_branch = a () => (float[n, 4] p) {"
        " p = Gather (t, id) }, else_branch = b () => (float[n, 4] p) { p = Gather (u, id) }> }",
        t=TABLE, u=TABLE[:3000],
    )  # fmt: skip
    assert 2500 < samples(model, 0)["more seeded noise"]["id"].max() < 3000


def test_what_has_no_noise_is_named():
    with pytest.raises(ModelError, match="Input s takes strings"):
        samples(parsed("g (string[n] s) => (string[n] y) { y = Identity (s) }"), 0)
    with pytest.raises(ModelError, match="Input s is no tensor of a known rank"):
        samples(parsed("g (seq(float[n]) s, int64 i) => (float[n] y) { y = SequenceAt (s, i) }"), 0)
