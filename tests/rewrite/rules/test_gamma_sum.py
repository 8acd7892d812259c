import numpy as np
import pytest

from tests.rewrite import naive


def unrolled(order=(0, 1, 2, 3), start="zero"):
    """Python's sum over the entries of a tensor, as an exporter unrolls it."""
    entries = " ".join(f"i{i} = Constant<value_int = {i}>() g{i} = Gather<axis = 0>(x, i{i})" for i in range(4))
    body, last = "", start
    for step, index in enumerate(order):
        name = "y" if step == len(order) - 1 else f"s{step}"
        body += f" {name} = Add({last}, g{index})"
        last = name
    return naive.parse(f"g (float[4, 1, 1] x) => (float[1, 1] y) <float zero = {{0}}> {{ {entries} {body} }}")


def test_an_unrolled_sum_becomes_one_node():
    proto = unrolled()
    result, applied = naive.rewritten(proto)
    assert applied.changed == {"gamma sum": ["y"]}
    assert [n.op_type for n in result.graph.node] == ["ReduceSum"]
    x = naive.noise(4, 1, 1)
    np.testing.assert_allclose(naive.run(result, x), naive.run(proto, x), rtol=1e-6)
    assert not naive.rewritten(result)[1]


@pytest.mark.parametrize("step", [1, 2])
def test_entries_that_are_slices(step):
    """torch.export's: ``Squeeze(Slice(g, i, i + 1))``; with a step over the end it is another thing to the reader."""
    axis = "<int64[1] axis = {0}, int64[1] step = {" + str(step) + "}, "
    ends = ", ".join(f"int64[1] e{i} = {{{i}}}" for i in range(5))
    entries = " ".join(f"s{i} = Slice(x, e{i}, e{i + 1}, axis, step) g{i} = Squeeze(s{i}, axis)" for i in range(4))
    sums = "a = Add(g0, g1) b = Add(a, g2) y = Add(b, g3)"
    proto = naive.parse(f"g (float[4, 1, 1] x) => (float[1, 1] y) {axis}{ends}> {{ {entries} {sums} }}")
    result, applied = naive.rewritten(proto)
    assert applied.changed == ({"gamma sum": ["y"]} if step == 1 else {})
    x = naive.noise(4, 1, 1)
    np.testing.assert_allclose(naive.run(result, x), naive.run(proto, x), rtol=1e-6)


@pytest.mark.parametrize("order", [(0, 1, 2), (0, 2, 1, 3), (0, 1, 1, 3)])
def test_other_sums_are_left_alone_with_the_reason(order):
    proto = unrolled(order)
    result, applied = naive.rewritten(proto)
    assert not applied.changed
    assert f"it adds up {len(order)} entries, not each of the 4 in their order" == applied.near_misses[0].reason
    x = naive.noise(4, 1, 1)
    np.testing.assert_array_equal(naive.run(result, x), naive.run(proto, x))
