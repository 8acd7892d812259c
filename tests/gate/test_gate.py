"""The rounding bound: wide enough for rounding, too narrow for a fault."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from scconv_deploy.gate import cut
from scconv_deploy.gate.cut import open_by_cut
from scconv_deploy.gate.gate import Gate
from scconv_deploy.gate.variant import VARIANTS
from scconv_deploy.records.gates import FlipCount

HARD = replace(VARIANTS["groupbn-hard"], num_groups=4)


def case(variant=HARD, mean=0.0, seed=0, beta_scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    gamma = torch.randn(32, generator=generator)
    beta = torch.randn(32, generator=generator) * beta_scale
    x = torch.randn(4, 32, 32, 32, generator=generator) + mean
    return x, Gate(variant, gamma, beta)


@pytest.mark.parametrize("mean", [0.0, 30.0, 1000.0])
@pytest.mark.parametrize("name", VARIANTS)
def test_float64_statistics_only_flip_what_rounding_explains(name, mean):
    """Exact statistics are as far from PyTorch's as any honest runtime can be."""
    variant = replace(VARIANTS[name], num_groups=4)
    x, gate = case(variant, mean)
    count = gate.count_flips(gate.mask(x) != open_by_cut(x.double(), gate.form), x)
    assert count.unexplained == 0
    assert count.gates == x.numel()


def test_bound_is_a_few_units_in_the_last_place():
    x, gate = case()
    found = gate.margins(x)
    assert 2.0**-24 < float(np.median(found.bound)) < 100 * 2.0**-24
    assert not found.ill.any()


FAULTS = {
    "inverted": lambda x, form: ~open_by_cut(x, form),
    "tau moved by 1e-3": lambda x, form: open_by_cut(x, replace(form, cut=form.cut + np.float32(1e-3))),
    "biased deviation": lambda x, form: open_by_cut(x, replace(form, ddof=0, eps_std=0.0)),
    "eps 1e-5": lambda x, form: open_by_cut(x, replace(form, eps_std=1e-5)),
    "wrong groups": lambda x, form: open_by_cut(x, replace(form, num_groups=8)),
}


@pytest.mark.parametrize("name", FAULTS)
def test_faults_are_unexplained(name):
    # beta of order 1, for with beta = 0 the cut is nearly 0 and s hardly matters
    x, gate = case(beta_scale=1.0)
    # small groups, for the biased deviation to differ by 1e-3; a small deviation, for eps to matter
    x = 1e-3 * x[:, :, :6, :6].contiguous()
    assert gate.count_flips(gate.mask(x) != FAULTS[name](x, gate.form), x).unexplained > 0


def test_flips_are_counted_by_kind():
    x, gate = case()
    found = gate.margins(x)
    differs = torch.zeros_like(x, dtype=torch.bool)
    far = torch.from_numpy(np.abs(found.margin) > 1e3 * found.bound).nonzero()[:3]
    for index in far:
        differs[tuple(index)] = True
    count = gate.count_flips(differs, x)
    assert (count.flips, count.unexplained, count.ill_conditioned) == (3, 3, 0)
    assert count.largest_margin > 0
    assert count.channels == len({int(i[1]) for i in far})
    assert gate.count_flips(torch.zeros_like(differs), x) == FlipCount(x.numel())


def test_ill_conditioned_groups_are_counted_apart():
    x, gate = case()
    x[0, :8] = 3.7  # one group of constants: PyTorch's own mean of it is not 3.7
    differs = torch.zeros_like(x, dtype=torch.bool)
    differs[0, 0, 0, :5] = True
    count = gate.count_flips(differs, x)
    assert (count.flips, count.unexplained, count.ill_conditioned) == (0, 0, 5)


def test_a_margin_that_is_not_a_number_is_unexplained():
    x, gate = case()
    x[0, 0, 0, 0] = float("nan")
    differs = torch.zeros_like(x, dtype=torch.bool)
    differs[0, 0, 0, 0] = True
    assert gate.count_flips(differs, x).unexplained == 1


def test_sum_over_samples():
    total = FlipCount(10, 2, 1, 0, 2, 0.5) + FlipCount(20, 1, 0, 3, 1, 0.75)
    assert total == FlipCount(30, 3, 1, 3, 2, 0.75)


def test_parameters_come_in_any_shape_and_without_gradients():
    gamma = torch.nn.Parameter(torch.arange(1.0, 9.0).reshape(8, 1, 1))
    gate = Gate(HARD, gamma, torch.zeros(8, 1, 1, dtype=torch.float64))
    assert gate.channels == 8
    assert (gate.gamma.shape, gate.beta.dtype) == ((8,), torch.float32)
    x = torch.randn(1, 8, 4, 4, generator=torch.Generator().manual_seed(0))
    assert not gate.apply(x).requires_grad
    assert torch.equal(gate.weight, torch.arange(1.0, 9.0) / 36)
    assert gate.form is gate.form


@pytest.mark.parametrize("name", VARIANTS)
def test_a_files_own_weight_is_that_of_its_mask_its_cut_and_its_operator(name):
    x, own = case(replace(VARIANTS[name], num_groups=4, threshold=0.52))  # at 0.5 the weight hardly matters
    of_file = Gate(own.variant, own.gamma, own.beta, own.weight * 1.01)
    beta = own.beta.double() * of_file.weight.double()
    a = own.gamma.double() * of_file.weight.double()
    tau = cut.tau(own.variant.threshold, own.variant.comparison)
    np.testing.assert_array_equal(of_file.form.cut, (a.sign() * (tau - beta) / a).float().numpy())
    assert of_file.count_flips(open_by_cut(x, of_file.form) != of_file.mask(x), x).unexplained == 0
    assert own.count_flips(open_by_cut(x, of_file.form) != own.mask(x), x).unexplained > 0  # it is another gate
    if own.variant.operator == "SRUSoft":
        assert torch.equal(of_file.operator_inputs()["shift"], beta.float())
