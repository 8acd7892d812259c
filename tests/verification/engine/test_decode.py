"""Gates read from outputs: against a NumPy SRU in which gates are flipped on purpose."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scconv_deploy.gate.margins import GateForm, decide, margins
from scconv_deploy.graph.contract import OPERATORS
from scconv_deploy.runtimes.tensorrt.runner import from_bfloat16, to_bfloat16
from scconv_deploy.verification.engine.decode import ROUNDOFF, decode
from scconv_deploy.verification.reference.run import Site

TYPES = tuple(ROUNDOFF)


def rounded(values, data):
    values = np.asarray(values, np.float32)
    return from_bfloat16(to_bfloat16(values)) if data == "bfloat16" else values.astype(data).astype(np.float32)


def site_of(operator, channels, groups, seed):
    rng = np.random.default_rng(seed)
    cut = (rng.normal(size=channels) * 0.3).astype(np.float32)
    sign = rng.choice([-1.0, 1.0], channels).astype(np.float32)
    more = {"SRU": (), "SRUNorm": ("gamma", "beta"), "SRUSoft": ("scale", "shift")}[operator]
    parameters = {"cut": cut, "sign": sign} | {n: rng.normal(size=channels).astype(np.float32) for n in more}
    form = GateForm(groups, 1, 0.0, 1e-10, False, cut, sign, np.abs(cut).astype(np.float64))
    return Site("s", "s", operator, operator, parameters, {}, bool(channels % groups), form)


def numpy_sru(x, gates, site, data):
    """The SRU in float32 with the given gates, its data and its output rounded to a type."""
    f32, half = np.float32, x.shape[1] // 2
    d, closed_1, closed_2 = x, np.zeros_like(x), np.ones_like(x)
    if site.operator != "SRU":
        groups = x.reshape(len(x), site.form.num_groups, -1)
        centred = groups - groups.mean(axis=2, keepdims=True)
        s = np.sqrt(np.square(centred).sum(axis=2, keepdims=True) / f32(groups.shape[2] - 1)) + f32(1e-10)
        first, second = (p.reshape(1, -1, 1, 1) for p in list(site.parameters.values())[2:])
        affine = (centred / s).reshape(x.shape) * first + second
        if site.operator == "SRUNorm":
            d = rounded(affine, data)
        else:
            closed_1 = closed_2 = rounded(1 / (1 + np.exp(-affine)), data)
    x1 = rounded(np.where(gates, f32(1), closed_1) * d, data)
    x2 = rounded(np.where(gates, f32(0), closed_2) * d, data)
    return rounded(x1 + np.concatenate([x2[:, half:], x2[:, :half]], axis=1), data)


def drawn(seed, shape, data, mean=0.0):
    return rounded(np.random.default_rng(seed).normal(size=shape) + mean, data)


shapes = st.sampled_from([(1, 8, 3, 3, 4), (2, 16, 5, 4, 4), (1, 24, 4, 4, 16), (3, 4, 1, 7, 1)])


@settings(max_examples=120, deadline=None)
@given(st.sampled_from(OPERATORS), st.sampled_from(TYPES), shapes, st.integers(0, 2**31), st.floats(0, 0.6))
def test_planted_flips_are_read_back(operator, data, sizes, seed, share):
    *shape, groups = sizes
    site, x = site_of(operator, shape[1], groups, seed), drawn(seed, shape, data, mean=0.3)
    expected = decide(x, site.form)
    planted = np.random.default_rng(seed + 1).random(shape) < share
    y = numpy_sru(x, expected ^ planted, site, data)
    found = decode(y, x, site, data)
    assert not found.foreign.any()
    np.testing.assert_array_equal((found.gates != expected)[found.readable], planted[found.readable])
    count = found.count(expected, x, site)
    assert count.gates == found.readable.sum()
    assert count.gates + count.undecidable == x.size
    assert count.flips + count.ill_conditioned == (planted & found.readable).sum()
    assert found.apart < {"float32": 5e-6, "float16": 2.0**-10, "bfloat16": 2.0**-7}[data]


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize(("data", "least"), [("float32", 0.999), ("float16", 0.98), ("bfloat16", 0.85)])
def test_nearly_every_gate_can_be_read(operator, data, least):
    site, x = site_of(operator, 32, 4, 0), drawn(0, (2, 32, 9, 9), data)
    gates = decide(x, site.form)
    found = decode(numpy_sru(x, gates, site, data), x, site, data)
    assert found.readable.mean() > least
    assert found.count(gates, x, site).flips == 0


def test_a_flip_beyond_the_bound_is_unexplained_and_one_within_it_is_not():
    site, x = site_of("SRU", 16, 4, 0), drawn(0, (1, 16, 8, 8), "float32")
    far = np.unravel_index(np.argmax(np.abs(margins(x, site.form).margin)), x.shape)
    # a gate on its threshold: x moved there
    near = (0, 3, 2, 2)
    for _ in range(60):
        found = margins(x, site.form)
        x[near] -= np.float32(found.margin[near] * site.form.sign[3])
    assert np.abs(margins(x, site.form).margin[near]) <= margins(x, site.form).bound[near]
    expected = decide(x, site.form)
    planted = np.zeros(x.shape, bool)
    planted[far] = planted[near] = True
    count = decode(numpy_sru(x, expected ^ planted, site, "float32"), x, site, "float32").count(expected, x, site)
    assert (count.flips, count.unexplained, count.channels) == (2, 1, 2)


def test_what_cannot_be_seen_is_never_agreement():
    site, x = site_of("SRU", 8, 2, 0), drawn(0, (1, 8, 4, 4), "float32")
    x[0, 1] = 0  # a gate over zero; its partner is channel 5
    x[0, 6, 0, 0] = x[0, 2, 0, 0]  # equal data: both open and both closed look the same
    expected = decide(x, site.form)
    gates = expected.copy()
    gates[0, 1] = ~gates[0, 1]
    gates[0, 2, 0, 0] = gates[0, 6, 0, 0] = True
    found = decode(numpy_sru(x, gates, site, "float32"), x, site, "float32")
    assert not found.readable[0, 1].any()
    assert found.readable[0, 5].all()
    assert not found.readable[0, [2, 6], 0, 0].any()
    assert found.count(gates, x, site).undecidable == 16 + 2
    other = gates.copy()  # one open, one closed does show
    other[0, 2, 0, 0] = False
    assert decode(numpy_sru(x, other, site, "float32"), x, site, "float32").readable[0, [2, 6], 0, 0].all()


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("data", TYPES)
def test_values_that_no_gates_explain_are_foreign(operator, data):
    site, x = site_of(operator, 16, 4, 1), drawn(1, (2, 16, 6, 6), data)
    gates = decide(x, site.form)
    y = numpy_sru(x, gates, site, data)
    y[1, 9, 2, 3] += np.float32(0.5) * max(1.0, np.abs(y[1, 9, 2, 3]))
    found = decode(y, x, site, data)
    assert set(zip(*map(tuple, np.nonzero(found.foreign)), strict=True)) == {(1, 9, 2, 3), (1, 1, 2, 3)}
    assert not found.readable[1, [1, 9], 2, 3].any()


def test_halves_that_do_not_cross_are_not_taken_for_gates():
    """y = d for every element is all gates open: unexplained flips. A sum of the wrong channels is foreign."""
    site, x = site_of("SRU", 16, 4, 1), drawn(1, (2, 16, 6, 6), "float32")
    expected = decide(x, site.form)
    count = decode(x, x, site, "float32").count(expected, x, site)
    assert count.unexplained == (~expected).sum()
    shifted = np.roll(np.where(expected, 0, x), 1, axis=1)
    found = decode(np.where(expected, x, 0) + shifted, x, site, "float32")
    assert found.foreign.mean() > 0.3
    assert found.apart > 0.3


@pytest.mark.parametrize("operator", OPERATORS)
def test_nan_is_foreign_and_infinitely_far(operator):
    site, x = site_of(operator, 8, 2, 3), drawn(3, (1, 8, 4, 4), "float32")
    y = numpy_sru(x, decide(x, site.form), site, "float32")
    y[0, 2, 1, 1] = np.nan
    found = decode(y, x, site, "float32")
    assert found.foreign[0, [2, 6], 1, 1].all()
    assert found.foreign.sum() == 2
    assert found.apart == float("inf")


def test_ill_conditioned_groups_are_left_out_where_the_data_rest_on_them():
    site, x = site_of("SRUNorm", 8, 2, 3), drawn(3, (1, 8, 4, 4), "float32")
    x[0, :4] = 3.7  # s is rounding alone there
    y = numpy_sru(x, decide(x, site.form), site, "float32")
    y[0, 0] = 9.0
    found = decode(y, x, site, "float32")
    assert not found.readable.any()  # every pair has a channel in it
    assert not found.foreign.any()
    assert found.apart == 0.0
