"""The exact cut against PyTorch's own gate."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from scconv_deploy.errors import ModelError
from scconv_deploy.gate.cut import open_by_cut, tau
from scconv_deploy.gate.gate import Gate
from scconv_deploy.gate.variant import VARIANTS

HARD = VARIANTS["groupbn-hard"]


def neighbour(value, direction):
    return float(np.nextafter(np.float32(value), np.float32(direction)))


@pytest.mark.parametrize("comparison", [">=", ">"])
@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.6, 0.95])
def test_tau_is_the_smallest_float_that_passes(threshold, comparison):
    def passes(z):
        r = torch.sigmoid(torch.full((64,), z))
        return bool((r >= threshold if comparison == ">=" else r > threshold).all())

    value = tau(threshold, comparison)
    assert passes(value)
    assert not passes(neighbour(value, -math.inf))


def test_tau_of_half_is_negative_for_inclusive_and_positive_for_strict():
    assert -3e-7 < tau(0.5, ">=") < 0 < tau(0.5, ">") < 3e-7


def test_tau_of_thresholds_that_nothing_decides():
    assert tau(0.0, ">=") == -math.inf
    assert tau(1.0, ">") == math.inf
    assert 10 < tau(1.0, ">=") < 20  # sigmoid rounds to exactly 1 there


def variants():
    for base in VARIANTS.values():
        for weighting in ("sum", "softmax"):
            for comparison in (">=", ">"):
                yield replace(base, weighting=weighting, comparison=comparison)


@pytest.mark.parametrize("variant", variants(), ids=str)
@pytest.mark.parametrize("threshold", [0.5, 0.501])
def test_no_unexplained_flip_against_the_formula(variant, threshold):
    variant = replace(variant, threshold=threshold)
    generator = torch.Generator().manual_seed(0)
    for mean in (0.0, 20.0):
        gamma = torch.randn(64, generator=generator)
        beta = torch.randn(64, generator=generator) * 0.3
        x = torch.randn(2, 64, 24, 24, generator=generator) + mean
        gate = Gate(variant, gamma, beta)
        count = gate.count_flips(gate.mask(x) != open_by_cut(x, gate.form), x)
        assert count.unexplained == 0
        assert count.ill_conditioned == 0
        # groupbn is the very same arithmetic; nn.GroupNorm is uncentred inside PyTorch
        assert count.flips <= (0 if variant.statistics == "group_batchnorm" and mean == 0 else 4)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    scale=st.floats(1e-3, 1e3),
    offset=st.floats(-3, 3),
    threshold=st.floats(0.45, 0.55),
    weighting=st.sampled_from(["sum", "softmax"]),
)
def test_cut_is_the_gate_for_drawn_parameters(seed, scale, offset, threshold, weighting):
    variant = replace(HARD, num_groups=4, threshold=threshold, weighting=weighting)
    generator = torch.Generator().manual_seed(seed)
    gamma = torch.randn(16, generator=generator)
    beta = offset * torch.randn(16, generator=generator)
    x = scale * torch.randn(2, 16, 12, 12, generator=generator)
    gate = Gate(variant, gamma, beta)
    assert gate.count_flips(gate.mask(x) != open_by_cut(x, gate.form), x).unexplained == 0


def test_gamma_of_zero_is_decided_without_x():
    gamma, beta = torch.tensor([0.0, 1.0, 2.0, -1.0]), torch.tensor([5.0, 0.0, 0.0, 0.0])
    inclusive = Gate(replace(HARD, num_groups=2), gamma, beta)
    # w = gamma / sum = 0, so z = 0 and sigmoid is exactly 0.5: open for >=, closed for >
    assert inclusive.form.sign[0] == 0
    assert inclusive.form.cut[0] == -np.inf
    strict = Gate(replace(HARD, num_groups=2, comparison=">"), gamma, beta)
    assert strict.form.cut[0] == np.inf
    x = torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(1))
    for gate in (inclusive, strict):
        torch.testing.assert_close(open_by_cut(x, gate.form), gate.mask(x), rtol=0, atol=0)


def test_sign_is_that_of_the_gamma_sum_and_of_gamma_for_softmax():
    gamma, beta = torch.tensor([1.0, -3.0, 0.5, 0.25]), torch.zeros(4)
    assert Gate(replace(HARD, num_groups=2), gamma, beta).form.sign.tolist() == [-1, -1, -1, -1]
    softmax = Gate(replace(HARD, num_groups=2, weighting="softmax"), gamma, beta)
    assert softmax.form.sign.tolist() == [1, -1, 1, 1]


def test_cut_by_hand():
    # z = (n * 2 + 1) * (2 / 4); open <=> z >= tau <=> n >= (tau / 0.5 - 1) / 2
    gamma, beta = torch.tensor([2.0, 2.0]), torch.tensor([1.0, 1.0])
    cut = Gate(replace(HARD, num_groups=1), gamma, beta).form.cut
    expected = np.float32((tau(0.5, ">=") / 0.5 - 1) / 2)
    assert cut.tolist() == [expected, expected]
    assert cut.dtype == np.float32


@pytest.mark.parametrize(
    ("gamma", "beta", "word"),
    [
        ([1.0, -1.0], [0.0, 0.0], "sum"),
        ([math.nan, 1.0], [0.0, 0.0], "finite"),
        ([1.0, 1.0], [0.0, math.inf], "finite"),
    ],
)
def test_parameters_without_a_gate_are_refused(gamma, beta, word):
    gate = Gate(replace(HARD, num_groups=1), torch.tensor(gamma), torch.tensor(beta))
    with pytest.raises(ModelError, match=word):
        gate.operator_inputs()
