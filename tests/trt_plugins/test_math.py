"""The kernels' arithmetic on the CPU against PyTorch: gates one by one, outputs to the bit or to rounding."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from scconv_deploy.gate.flips import relative_l2
from scconv_deploy.gate.gate import Gate
from scconv_deploy.gate.variant import VARIANTS
from tests.tolerances import ONE_SRU
from tests.trt_plugins.reference import CHANNELS_LAST, LINEAR, SPLIT

LAYOUTS = pytest.mark.parametrize("layout", [LINEAR, CHANNELS_LAST])
EXTRA = {
    "softmax": replace(VARIANTS["groupbn-hard"], weighting="softmax"),
    "strict": replace(VARIANTS["groupbn-hard"], comparison=">"),
    "biased": replace(VARIANTS["groupbn-hard"], statistics="biased_deviation"),
    "unbiased variance": replace(VARIANTS["groupnorm-soft"], statistics="unbiased_variance"),
    "soft inclusive": replace(VARIANTS["groupnorm-soft"], comparison=">="),
}
ALL = VARIANTS | EXTRA


def draw(shape, seed=0, mean=0.0):
    generator = torch.Generator().manual_seed(seed)
    gamma, beta = (torch.randn(shape[1], generator=generator) for _ in range(2))
    return torch.randn(shape, generator=generator) + mean, gamma, beta


def check(reference, x, gamma, beta, variant, **how):
    """Flips against PyTorch, and y against PyTorch's with these gates; the count."""
    gate, wide = Gate(variant, gamma, beta), x.float()
    y, opened = reference.sru(x, gate.operator_inputs(), variant, **how)
    count = gate.count_flips(opened != gate.mask(wide), wide)
    assert count.unexplained == 0
    expected = gate.apply(wide, opened)
    if variant.operator == "SRU":
        assert torch.equal(y, expected.to(x.dtype))  # masks and one sum: to the bit
    else:
        assert (
            relative_l2(y.float(), expected) < {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}[x.dtype]
        )
    return count


@LAYOUTS
@pytest.mark.parametrize("name", ALL)
def test_every_variant_in_either_order_of_summation(reference, name, layout):
    variant = replace(ALL[name], num_groups=4)
    x, gamma, beta = draw((2, 16, 40, 36))
    assert check(reference, x, gamma, beta, variant, layout=layout).flips <= 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", VARIANTS)
def test_narrow_data_has_the_gates_of_its_values_in_fp32(reference, name, dtype):
    variant = replace(VARIANTS[name], num_groups=4)
    x, gamma, beta = draw((2, 16, 28, 28))
    check(reference, x.to(dtype), gamma, beta, variant)


@pytest.mark.parametrize("threshold", [0.3, 0.4999, 0.5001, 0.7])
@pytest.mark.parametrize("name", VARIANTS)
def test_other_thresholds(reference, name, threshold):
    variant = replace(VARIANTS[name], num_groups=4, threshold=threshold)
    x, gamma, beta = draw((2, 16, 24, 24))
    check(reference, x, 4 * gamma, beta, variant)


@pytest.mark.parametrize("mean", [30.0, 1000.0, -1e5])
@LAYOUTS
def test_a_large_mean_over_a_small_deviation(reference, mean, layout):
    variant = replace(VARIANTS["groupbn-hard"], num_groups=4)
    x, gamma, beta = draw((4, 16, 40, 40), mean=mean)
    check(reference, x, gamma, beta, variant, layout=layout)


@pytest.mark.parametrize("name", ["groupbn-hard-normalized", "groupnorm-soft"])
@LAYOUTS
def test_values_keep_what_the_rounded_mean_lost(reference, name, layout):
    """At a mean of 1e5 deviations PyTorch's own fp32 mean is off by a hundredth of one, so float64 is the ruler."""
    variant = replace(VARIANTS[name], num_groups=4)
    x, gamma, beta = draw((2, 16, 40, 40), mean=1e5)
    gate = Gate(variant, gamma, beta)
    y, opened = reference.sru(x, gate.operator_inputs(), variant, layout)
    expected = gate.apply(x.double(), opened)
    assert relative_l2(y, expected) < 1e-6
    assert relative_l2(gate.apply(x, opened), expected) > 1e-6


def test_a_gate_on_its_boundary_is_open(reference):
    variant = replace(VARIANTS["groupbn-hard"], num_groups=4)
    x = torch.zeros(1, 8, 3, 3)  # each element is its group's mean
    sign, cut = torch.tensor([1.0, -1.0, 0.0, 1.0] * 2), torch.tensor([0.0, 0.0, -torch.inf, 1.0] * 2)
    _, opened = reference.sru(x, {"cut": cut, "sign": sign}, variant)
    assert opened[0, :, 0, 0].tolist() == [True, True, True, False] * 2


def test_gamma_zero_and_both_signs(reference):
    variant = replace(VARIANTS["groupbn-hard"], num_groups=4)
    x, gamma, beta = draw((2, 16, 12, 12))
    gamma[::3] = 0.0
    gamma[1] = -gamma[1].abs()
    softmax = replace(variant, weighting="softmax")  # gamma / sum(gamma) gives every channel the same sign
    assert set(Gate(softmax, gamma, beta).operator_inputs()["sign"].tolist()) == {-1.0, 0.0, 1.0}
    assert Gate(softmax, gamma, beta).operator_inputs()["cut"].isinf().any()
    for each in (variant, softmax):
        assert check(reference, x, gamma, beta, each).flips == 0


@pytest.mark.parametrize(
    ("channels", "groups", "size"), [(24, 16, (4, 4)), (6, 4, (5, 6)), (12, 3, (7, 7)), (10, 5, (3, 4))]
)
@pytest.mark.parametrize("name", VARIANTS)
def test_groups_that_straddle_channels_or_have_no_partner(reference, name, channels, groups, size):
    variant = replace(VARIANTS[name], num_groups=groups)
    if channels % groups and variant.statistics == "group_norm":  # torch.nn.GroupNorm refuses
        variant = replace(variant, statistics="unbiased_variance")
    x, gamma, beta = draw((3, channels, *size))
    assert reference.plan(x.shape, groups).algorithm == SPLIT
    check(reference, x, gamma, beta, variant)


@pytest.mark.parametrize("pixels", range(1, 20))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_every_tail_of_a_row(reference, pixels, dtype):
    variant = replace(VARIANTS["groupnorm-soft"], num_groups=4)
    x, gamma, beta = draw((2, 24, 1, pixels))
    for layout in (LINEAR, CHANNELS_LAST):
        check(reference, x.to(dtype), gamma, beta, variant, layout=layout)


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_ends_where_pytorch_puts_it(reference, name, value):
    variant = replace(VARIANTS[name], num_groups=4)
    x, gamma, beta = draw((2, 16, 6, 6))
    x[0, 3, 2, 2] = value
    gate = Gate(variant, gamma, beta)
    y, opened = reference.sru(x, gate.operator_inputs(), variant)
    expected = gate.apply(x)
    assert torch.equal(opened, gate.mask(x))
    assert torch.equal(y.isnan(), expected.isnan())
    assert not opened[0, :4].any()  # the whole group is closed
    torch.testing.assert_close(y, expected, equal_nan=True, **ONE_SRU)


def test_ill_conditioned_groups_are_counted_apart(reference):
    variant = replace(VARIANTS["groupbn-hard"], num_groups=4)
    x, gamma, beta = draw((2, 16, 30, 30))
    x[0, :4] = 3.7
    count = check(reference, x, gamma, beta, variant)
    assert count.flips == 0
    _, opened = reference.sru(x, Gate(variant, gamma, beta).operator_inputs(), variant)
    # a constant less its own mean is 0: what the formula says, whatever a rounded mean would
    zero = Gate(variant, gamma, beta).form.cut[:4] <= 0
    assert torch.equal(opened[0, :4], torch.as_tensor(zero).reshape(4, 1, 1).expand(4, 30, 30))


def test_rectified_input_in_long_groups(reference):
    """Where ONNX Runtime's naive sums flipped gates: mean and deviation alike, a group of 200,000 elements."""
    variant = replace(VARIANTS["groupbn-hard"], num_groups=4)
    x, gamma, beta = draw((1, 64, 112, 112))
    for layout in (LINEAR, CHANNELS_LAST):
        assert check(reference, x.relu(), gamma, beta, variant, layout=layout).flips <= 2


@pytest.mark.parametrize("divisor", [1, 2, 3, 5, 7, 49, 196, 3136, 65537, 2**30 - 1, 2**30])
def test_division_by_multiplication_is_exact(reference, divisor):
    for n in (0, 1, divisor - 1, divisor, divisor + 1, 7 * divisor - 1, 2**31 - 1, *range(12345, 2**31, 99999989)):
        if n < 2**31:
            assert reference.quotient(n, divisor) == n // divisor
