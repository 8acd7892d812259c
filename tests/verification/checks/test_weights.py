"""The static link of the weights, against its own definition in plain float64."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from scconv_deploy.graph import merged
from scconv_deploy.verification.checks import weights

LIMIT = 8.0
RNG = np.random.default_rng(0)


def model_of(**arrays):
    tensors = [numpy_helper.from_array(array, name) for name, array in arrays.items()]
    return helper.make_model(helper.make_graph([], "weights", [], [], initializer=tensors))


def check(stored, expected):
    return weights.check(model_of(weight=stored), {"weight": expected}, LIMIT)


def draw(*shape):
    return RNG.normal(size=shape).astype(np.float32)


def folded(weight, factors):
    """As a BatchNorm is folded in: in float32."""
    return weight * factors.astype(np.float32).reshape(-1, *[1] * (weight.ndim - 1))


def plainly(a, b):
    """The definition: the largest distance from the reference times its channel's median ratio, in last places."""
    a, b = (v.reshape(len(v), -1).astype(np.float64) for v in (a, b))
    scaled = np.median(a / b, axis=1, keepdims=True) * b
    return float((np.abs(a - scaled) / (2.0**-23 * np.abs(scaled))).max())


@pytest.mark.parametrize("shape", [(6, 3, 7, 7), (40, 300, 1, 1), (2, 70_000), (5, 1, 3, 3), (64, 2)])
def test_folding_is_measured_as_it_is_defined(shape):
    weight = draw(*shape)
    stored = folded(weight, 1 + RNG.uniform(0.1, 1, shape[0]))
    found = check(stored, weight)
    assert found.status == "passed"
    assert found.quantities[0].value == pytest.approx(plainly(stored, weight), abs=0.6)
    assert 0.2 < found.quantities[0].value < 2


@pytest.mark.parametrize("shape", [(6, 3, 7, 7), (40, 300, 1, 1)])
@pytest.mark.parametrize("place", [0, 5, -1])
def test_one_entry_of_a_folded_weight_is_caught_wherever_it_is(shape, place):
    weight = draw(*shape)
    stored = folded(weight, RNG.uniform(0.5, 2, shape[0]))
    stored.flat[place] *= np.float32(1 + 1e-5)
    found = check(stored, weight)
    assert found.status == "failed"
    assert "weight is" in found.reason
    assert found.quantities[0].value == pytest.approx(1e-5 / 2**-23, rel=0.6)


@pytest.mark.parametrize("place", [0, 3, 100, -1])
def test_the_lowest_bit_of_a_weight_that_was_not_folded_is_caught(place):
    weight = draw(8, 64, 3, 3)
    stored = folded(weight, np.array([1, 0.5, 1, 2, 1, 1, 1, 1.0]))  # powers of two: exact
    assert check(stored, weight).status == "passed"
    stored.view(np.uint32).flat[place] ^= 1
    found = check(stored, weight)
    assert found.status == "failed"
    assert "weight is not the reference's bit for bit" in found.reason


def test_a_pruned_weight_has_its_factor_from_what_is_left():
    weight = draw(16, 128, 3, 3)
    weight[RNG.random(weight.shape) < 0.9] = 0
    weight[3] = 0  # a whole channel
    weight[5], weight[5, 77, 1, 1] = 0, 0.3
    stored = folded(weight, RNG.uniform(0.5, 2, 16))
    assert check(stored, weight).status == "passed"
    for place in ((3, 0, 0, 0), (5, 0, 0, 0)):
        damaged = stored.copy()
        damaged[place] = 1e-6
        assert check(damaged, weight).status == "failed"
    once = weight.copy()  # not folded, and nine of ten entries are zero
    once.view(np.uint32)[np.nonzero(weight)[0][0], np.nonzero(weight)[1][0], np.nonzero(weight)[2][0]] ^= 1
    assert check(once, weight).status == "failed"


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_finite_is_not_the_references(value):
    weight = draw(4, 8)
    stored = folded(weight, np.full(4, 1.5))
    stored[1, 2] = value
    assert check(stored, weight).status == "failed"
    assert check(weight, stored).status == "failed"
    assert check(stored, stored).status == "passed"  # a mask of -inf, say


def test_what_is_not_compared_is_named():
    weight = draw(4, 8)
    model = model_of(a=weight, b=weight.T.copy(), d=weight)
    expected = {"a": weight, "b": weight, "c": weight, "gamma": draw(4, 1, 1), "bias": draw(4)}
    found = weights.check(model, expected, LIMIT)
    assert found.status == "passed"
    assert found.reason == (
        "1 weights are the reference's bit for bit, 0 but for a factor of each channel"
        "; not compared, of another form: b; not compared, not in the file under its name: c"
    )
    assert weights.check(onnx.ModelProto(), expected, LIMIT).status == "not run"


def test_a_reference_in_half_is_compared_too():
    """As of two ONNX files."""
    weight = draw(4, 8).astype(np.float16)
    assert check(weight, weight).status == "passed"
    damaged = weight.copy()
    damaged[1, 2] *= np.float16(1.05)
    assert check(damaged, weight).status == "failed"


def test_merged_weights_of_a_file_against_that_of_a_reference_that_is_merged_itself():
    name, weight = merged.merged_name("squeeze", ["squeeze1.weight", "squeeze2.weight"]), draw(8, 4, 1, 1)
    found = weights.check(model_of(**{name: weight}), {name: weight}, LIMIT)
    assert (found.status, "not compared" in found.reason) == ("passed", False)
    other = weight.copy()
    other.flat[3] *= np.float32(1 + 1e-5)
    assert weights.check(model_of(**{name: other}), {name: weight}, LIMIT).status == "failed"


def test_merged_weights_of_parts_that_the_reference_does_not_know_are_not_compared():
    name = merged.merged_name("bias", ["onnx::Conv_12"])
    found = weights.check(model_of(**{name: draw(8), "w": np.float32([1])}), {"w": np.float32([1])}, LIMIT)
    assert found.status == "passed"
    assert f"not compared, of another form: {name}" in found.reason
