import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.rewrite import naive

BOTH = "y = Mul(m, x) z = Mul(k, x)"
HEAD = "g (float[N] x) => ({outputs}) <float t = {{0.25}}, float one = {{1}}> {{ {body} }}"


def graph(body, outputs="float[N] y"):
    return naive.parse(HEAD.format(body=body, outputs=outputs))


FORMS = {
    "cast": "c = Greater(x, t) m = Cast<to = 1>(c) y = Mul(m, x)",
    "other order": "c = Greater(x, t) m = Cast<to = 1>(c) y = Mul(x, m)",
    "not": "c = Greater(x, t) n = Not(c) m = Cast<to = 1>(n) y = Mul(m, x)",
    "remainder": "c = Greater(x, t) m = Cast<to = 1>(c) k = Sub(one, m) y = Mul(x, k)",
    "not of not": "c = Less(t, x) n = Not(c) k = Not(n) m = Cast<to = 1>(k) y = Mul(m, x)",
}


@pytest.mark.parametrize("form", FORMS)
def test_products_become_selections(form):
    proto = graph(FORMS[form])
    result, applied = naive.rewritten(proto, "where")
    assert applied.changed == {"mask arithmetic": ["y"]}
    assert [n.op_type for n in result.graph.node] in (["Greater", "Where"], ["Less", "Where"])
    x = naive.noise(100)
    np.testing.assert_array_equal(naive.run(result, x), naive.run(proto, x))


@pytest.mark.parametrize("pair", [("Greater", "LessOrEqual"), ("GreaterOrEqual", "Less")])
def test_complementary_comparisons_become_one(pair):
    body = f"a = {pair[0]}(x, t) b = {pair[1]}(x, t) m = Cast<to = 1>(a) k = Cast<to = 1>(b) {BOTH}"
    proto = graph(body, "float[N] y, float[N] z")
    result, _ = naive.rewritten(proto, "where")
    assert sorted(n.op_type for n in result.graph.node) == [pair[0], "Where", "Where"]
    x = naive.noise(100)
    np.testing.assert_array_equal(naive.run(result, x), naive.run(proto, x))


def test_comparisons_with_other_thresholds_stay_two():
    body = f"a = Greater(x, t) b = LessOrEqual(x, one) m = Cast<to = 1>(a) k = Cast<to = 1>(b) {BOTH}"
    result, _ = naive.rewritten(graph(body, "float[N] y, float[N] z"), "where")
    assert sorted(n.op_type for n in result.graph.node) == ["Greater", "LessOrEqual", "Where", "Where"]


@pytest.mark.parametrize(
    ("proto", "reason"),
    [
        (graph("w = Neg(x) c = Greater(x, w) m = Cast<to = 1>(c) y = Mul(m, x)"),
         "its mask compares two tensors; only thresholds are rewritten"),
        (graph("i = Cast<to = 7>(x) m = Cast<to = 1>(i) y = Mul(m, x)"), None),  # no mask at all: not a candidate
    ],
)  # fmt: skip
def test_refused(proto, reason):
    result, applied = naive.rewritten(proto, "where")
    assert "Where" not in [n.op_type for n in result.graph.node]
    assert [miss.reason for miss in applied.near_misses] == ([reason] if reason else [])


def test_the_form_multiply_leaves_products_alone():
    _, applied = naive.rewritten(graph(FORMS["cast"]), "multiply")
    assert not applied


def test_a_mask_that_is_an_output_stays_one():
    proto = graph(FORMS["cast"], "float[N] y, float[N] m")
    result, _ = naive.rewritten(proto, "where")
    assert [o.name for o in result.graph.output] == ["y", "m"]
    x = naive.noise(50)
    np.testing.assert_array_equal(naive.run(result, x), naive.run(proto, x))


@settings(max_examples=20, deadline=None)
@given(form=st.sampled_from(sorted(FORMS)), seed=st.integers(0, 1000), shift=st.floats(-2, 2))
def test_equal_on_any_finite_input_and_idempotent(form, seed, shift):
    proto = graph(FORMS[form])
    result, _ = naive.rewritten(proto, "where")
    x = naive.noise(64, seed=seed) + shift
    np.testing.assert_array_equal(naive.run(result, x), naive.run(proto, x))
    assert not naive.rewritten(result, "where")[1]
