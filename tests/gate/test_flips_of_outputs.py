"""Gates read from outputs: every one of the four ways that a pair can stand is found."""

from dataclasses import replace

import pytest
import torch

from scconv_deploy.gate.cut import gate_parameters
from scconv_deploy.gate.flips import changed_gates, compare_outputs
from scconv_deploy.gate.variant import VARIANTS, open_mask, sru

SHAPE = (2, 16, 5, 5)


@pytest.mark.parametrize("name", VARIANTS)
def test_changed_gates_are_found_and_the_values_still_compared(name):
    variant = replace(VARIANTS[name], num_groups=4)
    generator = torch.Generator().manual_seed(0)
    x, gamma, beta = (torch.randn(s, generator=generator) for s in (SHAPE, (16,), (16,)))
    expected = sru(x, gamma, beta, variant)
    flips = torch.rand(SHAPE, generator=generator) < 0.2
    half = flips[:, :8].sum() + flips[:, 8:].sum()
    assert (flips[:, :8] & flips[:, 8:]).any()  # both of a pair
    y = sru(x, gamma, beta, variant, open_mask(x, gamma, beta, variant) ^ flips)
    found, distance = changed_gates(y, expected, x, gamma, beta, variant)
    assert torch.equal(found, flips)
    assert distance < 1e-6
    count, _ = compare_outputs(y, expected, x, gamma, beta, gate_parameters(gamma, beta, variant), variant)
    assert (count.flips, count.gates) == (int(half), y.numel())
    assert count.unexplained > 0.9 * count.flips
    _, distance = changed_gates(y * 1.001, expected, x, gamma, beta, variant)
    assert distance == pytest.approx(1e-3, rel=0.05)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", VARIANTS)
def test_in_half_precision_rounding_is_no_changed_gate(name, dtype):
    variant = replace(VARIANTS[name], num_groups=4)
    generator = torch.Generator().manual_seed(0)
    x, gamma, beta = (torch.randn(s, generator=generator) for s in ((2, 16, 40, 40), (16,), (16,)))
    x = x.to(dtype).float()
    expected = sru(x, gamma, beta, variant)
    found, distance = changed_gates(expected.to(dtype), expected, x, gamma, beta, variant)
    assert not found.any()
    assert 1e-5 < distance < 2 * torch.finfo(dtype).eps
    flips = torch.rand(x.shape, generator=generator) < 0.2
    y = sru(x, gamma, beta, variant, open_mask(x, gamma, beta, variant) ^ flips).to(dtype)
    found, _ = changed_gates(y, expected, x, gamma, beta, variant)
    assert (found == flips).float().mean() > (0.995 if dtype == torch.float16 else 0.96)


def test_equal_outputs_have_no_changed_gate():
    x, gamma, beta = torch.ones(SHAPE), torch.ones(16), torch.zeros(16)
    found, distance = changed_gates(x, x, x, gamma, beta, VARIANTS["groupbn-hard"])
    assert (bool(found.any()), distance) == (False, 0.0)


def test_nan_is_no_agreement():
    variant = replace(VARIANTS["groupbn-hard"], num_groups=4)
    x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    gamma, beta = torch.ones(16), torch.zeros(16)
    expected = sru(x, gamma, beta, variant)
    y = expected.clone()
    y[0, 0, 0, 0] = torch.nan
    assert not changed_gates(y, expected, x, gamma, beta, variant)[1] <= 1e-6
