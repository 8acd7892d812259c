"""Gates read from outputs: every one of the four ways that a pair can stand is found."""

from dataclasses import replace

import pytest
import torch

from scconv_deploy.gate.flips import changed_gates, compare_outputs
from scconv_deploy.gate.gate import Gate
from scconv_deploy.gate.variant import VARIANTS

SHAPE = (2, 16, 5, 5)


@pytest.mark.parametrize("name", VARIANTS)
def test_changed_gates_are_found_and_the_values_still_compared(name):
    variant = replace(VARIANTS[name], num_groups=4)
    generator = torch.Generator().manual_seed(0)
    x, gamma, beta = (torch.randn(s, generator=generator) for s in (SHAPE, (16,), (16,)))
    gate = Gate(variant, gamma, beta)
    expected = gate.apply(x)
    flips = torch.rand(SHAPE, generator=generator) < 0.2
    half = flips[:, :8].sum() + flips[:, 8:].sum()
    assert (flips[:, :8] & flips[:, 8:]).any()  # both of a pair
    y = gate.apply(x, gate.mask(x) ^ flips)
    found, distance = changed_gates(y, expected, x, gate)
    assert torch.equal(found, flips)
    assert distance < 1e-6
    count, _ = compare_outputs(y, expected, x, gate)
    assert (count.flips, count.gates) == (int(half), y.numel())
    assert count.unexplained > 0.9 * count.flips
    _, distance = changed_gates(y * 1.001, expected, x, gate)
    assert distance == pytest.approx(1e-3, rel=0.05)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", VARIANTS)
def test_in_half_precision_rounding_is_no_changed_gate(name, dtype):
    variant = replace(VARIANTS[name], num_groups=4)
    generator = torch.Generator().manual_seed(0)
    x, gamma, beta = (torch.randn(s, generator=generator) for s in ((2, 16, 40, 40), (16,), (16,)))
    gate, x = Gate(variant, gamma, beta), x.to(dtype).float()
    expected = gate.apply(x)
    found, distance = changed_gates(expected.to(dtype), expected, x, gate)
    assert not found.any()
    assert 1e-5 < distance < 2 * torch.finfo(dtype).eps
    flips = torch.rand(x.shape, generator=generator) < 0.2
    y = gate.apply(x, gate.mask(x) ^ flips).to(dtype)
    found, _ = changed_gates(y, expected, x, gate)
    assert (found == flips).float().mean() > (0.995 if dtype == torch.float16 else 0.96)


def test_equal_outputs_have_no_changed_gate():
    x, gate = torch.ones(SHAPE), Gate(VARIANTS["groupbn-hard"], torch.ones(16), torch.zeros(16))
    found, distance = changed_gates(x, x, x, gate)
    assert (bool(found.any()), distance) == (False, 0.0)


def test_nan_is_no_agreement():
    variant = replace(VARIANTS["groupbn-hard"], num_groups=4)
    x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    gate = Gate(variant, torch.ones(16), torch.zeros(16))
    expected = gate.apply(x)
    y = expected.clone()
    y[0, 0, 0, 0] = torch.nan
    assert not changed_gates(y, expected, x, gate)[1] <= 1e-6


def test_a_changed_gate_of_tiny_data_is_seen_where_a_mask_lets_x_through():
    """Next to a threshold of 0.5 data are 1e-8 deviations from the mean; where they are computed, rounding hides it."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(SHAPE, generator=generator)
    x[:, :, 0] *= 1e-9
    flips = torch.zeros(SHAPE, dtype=torch.bool)
    flips[:, :8, 0] = True
    seen = {}
    for name in ("groupbn-hard", "groupnorm-soft"):
        gate = Gate(replace(VARIANTS[name], num_groups=4), torch.ones(16), torch.zeros(16))
        y = gate.apply(x, gate.mask(x) ^ flips)
        found, distance = changed_gates(y, gate.apply(x), x, gate)
        assert distance < 1e-6
        seen[name] = found
    assert torch.equal(seen["groupbn-hard"], flips)
    assert not seen["groupnorm-soft"].any()
