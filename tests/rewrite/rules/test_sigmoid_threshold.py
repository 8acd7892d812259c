import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from scconv_deploy.gate.cut import tau
from tests.rewrite import naive

COMPARE = {
    "GreaterOrEqual": torch.ge,
    "Greater": torch.gt,
    "Less": torch.lt,
    "LessOrEqual": torch.le,
}


def graph(operator, threshold=0.5, sigmoid_first=True, body="", outputs="bool[N] y"):
    operands = "r, t" if sigmoid_first else "t, r"
    nodes = f"r = Sigmoid(x) y = {operator}({operands}) {body}"
    return naive.parse(f"g (float[N] x) => ({outputs}) <float t = {{{threshold}}}> {{ {nodes} }}")


def around(threshold):
    """Every float32 near both thresholds, and far ones."""
    centre = np.float32(tau(threshold, ">="))
    steps = [centre]
    for _ in range(300):
        steps.append(np.nextafter(steps[-1], np.float32(10)))
    low = [centre]
    for _ in range(300):
        low.append(np.nextafter(low[-1], np.float32(-10)))
    return np.array([*low, *steps, -3, -1e-3, 0, 1e-3, 3], dtype=np.float32)


@pytest.mark.parametrize("sigmoid_first", [True, False])
@pytest.mark.parametrize("operator", COMPARE)
@pytest.mark.parametrize("threshold", [0.5, 0.3])
def test_decides_as_torch_does_at_every_float_near_the_threshold(operator, sigmoid_first, threshold):
    result, applied = naive.rewritten(graph(operator, threshold, sigmoid_first))
    assert len(applied.changed["sigmoid threshold"]) == 1
    assert [n.op_type for n in result.graph.node] in (["GreaterOrEqual"], ["Less"])
    x = torch.from_numpy(around(threshold))
    r, t = torch.sigmoid(x), torch.tensor(threshold)
    expected = COMPARE[operator](r, t) if sigmoid_first else COMPARE[operator](t, r)
    np.testing.assert_array_equal(naive.run(result, x), expected.numpy())
    assert 0 < expected.sum() < len(x)


@settings(max_examples=20, deadline=None)
@given(threshold=st.floats(0.0625, 0.9375, width=32), operator=st.sampled_from(sorted(COMPARE)))
def test_any_threshold(threshold, operator):
    result, _ = naive.rewritten(graph(operator, threshold))
    x = torch.from_numpy(around(threshold))
    expected = COMPARE[operator](torch.sigmoid(x), torch.tensor(threshold, dtype=torch.float32))
    # torch's scalar tail can round one ulp off its vector path: leave the boundary's own neighbours out
    near = np.abs(x.numpy() - np.float32(tau(threshold, ">="))) < 4 * np.spacing(np.abs(x.numpy()))
    np.testing.assert_array_equal(naive.run(result, x)[~near], expected.numpy()[~near])


@pytest.mark.parametrize(
    ("proto", "reason"),
    [
        (graph("Less", body="z = Neg(r)", outputs="bool[N] y, float[N] z"), "its sigmoid r is also needed by Neg"),
        (graph("Less", outputs="bool[N] y, float[N] r"), "its sigmoid r is an output of the graph"),
        (graph("Less", threshold=1.5), "its threshold 1.5 decides nothing"),
        (naive.parse("g (float[2] x) => (bool[2] y) <float[2] t = {0.5, 0.4}> { r = Sigmoid(x) y = Less(r, t) }"),
         "its threshold is not one constant number"),
        (naive.parse("g (float16[2] x) => (bool[2] y) <float16 t = {14336}> { r = Sigmoid(x) y = Less(r, t) }"),
         "its data is FLOAT16, expected float32"),
    ],
)  # fmt: skip
def test_refused_with_the_reason(proto, reason):
    result, applied = naive.rewritten(proto)
    assert "Sigmoid" in [n.op_type for n in result.graph.node]
    assert not applied.changed
    assert any(reason in miss.reason for miss in applied.near_misses if miss.rule == "sigmoid threshold")


def test_two_thresholds_of_one_sigmoid_share_a_threshold_initializer():
    proto = graph("GreaterOrEqual", body="z = Less(r, t)", outputs="bool[N] y, bool[N] z")
    result, applied = naive.rewritten(proto)
    assert sorted(applied.changed["sigmoid threshold"]) == ["y", "z"]
    assert [n.op_type for n in result.graph.node] == ["GreaterOrEqual", "Less"]
    again, applied = naive.rewritten(result)
    assert not applied
    assert again.graph == result.graph
