"""The CPU kernels against PyTorch: gates one by one, outputs to the bit, the same bytes on every path."""

from __future__ import annotations

import ctypes
from dataclasses import replace

import pytest
import torch

from scconv_deploy.errors import ConfigurationError, IntegrityError
from scconv_deploy.gate.flips import compare_outputs, relative_l2
from scconv_deploy.gate.gate import Gate
from scconv_deploy.gate.variant import VARIANTS
from scconv_deploy.graph.contract import OPERATORS
from scconv_deploy.trt_plugins.build import SOURCES
from scconv_deploy.trt_plugins.cpu.library import LANES, TYPES, CpuParams, SruCpuLibrary
from tests.exporters.tensorrt.engines import elf_library

CLOSE = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
"""Relative L2 of SRUNorm's and SRUSoft's values: rounding of the type."""
BITS = {torch.float32: torch.int32, torch.float16: torch.int16, torch.bfloat16: torch.int16}
HARD = VARIANTS["groupbn-hard"]
SHAPES = {
    "whole groups": ((2, 16, 9, 7), 4),
    "several blocks a group": ((2, 16, 40, 36), 2),
    "odd number of groups": ((3, 12, 7, 7), 3),
    "one group": ((1, 8, 50, 50), 1),
    "groups that straddle": ((2, 24, 4, 6), 16),
    "groups that straddle, odd": ((2, 6, 5, 5), 5),
    "one pixel": ((2, 8, 1, 1), 2),
    "several threads": ((3, 128, 27, 26), 8),
    "several threads, fewer pairs than processors": ((1, 4, 300, 230), 2),
}


def draw(shape, seed=0, mean=0.0):
    generator = torch.Generator().manual_seed(seed)
    gamma, beta = (torch.randn(shape[1], generator=generator) for _ in range(2))
    return torch.randn(shape, generator=generator) + mean, gamma, beta


def run(library: SruCpuLibrary, x, gate: Gate, **how):
    v = gate.variant
    parameters = list(gate.operator_inputs().values())
    settings = {"num_groups": v.num_groups, "ddof": v.ddof, "eps_var": v.eps_var, "eps_std": v.eps_std}
    return library.sru(x, parameters, op=OPERATORS.index(v.operator), **settings, **how)


def widths(library: SruCpuLibrary) -> list[int]:
    """Those that this processor has."""
    return [lanes for lanes in LANES if lanes <= library.lanes]


def variant_of(name, shape, groups):
    variant = replace(VARIANTS[name], num_groups=groups)
    if shape[1] % groups and variant.statistics == "group_norm":  # torch.nn.GroupNorm refuses
        variant = replace(variant, statistics="unbiased_variance")
    return variant


def check(library, x, gamma, beta, variant):
    """Gates and values against PyTorch's formula in float32; flips that rounding does not explain are none."""
    gate, wide = Gate(variant, gamma, beta), x.float()
    y = run(library, x, gate)
    if x.dtype == torch.float32:
        count, distance = compare_outputs(y, gate.apply(x), x, gate)
        assert count.unexplained == 0
        assert distance < CLOSE[x.dtype]
        return count.flips
    assert y.dtype == x.dtype
    assert relative_l2(y.float(), gate.apply(wide)) < CLOSE[x.dtype]
    return 0


@pytest.mark.parametrize("sizes", SHAPES)
@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_on_every_path(cpu_library, name, sizes):
    shape, groups = SHAPES[sizes]
    x, gamma, beta = draw(shape)
    check(cpu_library, x, gamma, beta, variant_of(name, shape, groups))


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("sizes", SHAPES)
def test_any_width_and_number_of_threads_gives_the_same_bytes(cpu_library, sizes, dtype):
    (shape, groups), found = SHAPES[sizes], {}
    x, gamma, beta = draw(shape, mean=0.5)
    for name in VARIANTS:
        gate = Gate(variant_of(name, shape, groups), gamma, beta)
        for lanes in widths(cpu_library):
            for threads in (1, 3):
                y = run(cpu_library, x.to(dtype), gate, lanes=lanes, threads=threads)
                expected = found.setdefault(name, y)
                assert torch.equal(y.view(BITS[dtype]), expected.view(BITS[dtype]))


def test_a_sample_has_the_same_bytes_wherever_it_stands_in_a_batch(cpu_library):
    x, gamma, beta = draw((5, 32, 28, 28))
    gate = Gate(replace(HARD, num_groups=4), gamma, beta)
    assert torch.equal(run(cpu_library, x, gate)[3:4], run(cpu_library, x[3:4], gate))


@pytest.mark.parametrize("mean", [30.0, 1000.0, -1e5])
def test_a_large_mean_over_a_small_deviation(cpu_library, mean):
    x, gamma, beta = draw((4, 16, 40, 40), mean=mean)
    check(cpu_library, x, gamma, beta, replace(HARD, num_groups=4))


def test_statistics_hold_where_a_groups_channels_lie_far_apart(cpu_library):
    x, gamma, beta = draw((2, 16, 48, 48))
    x += 1e3 * torch.arange(16.0).reshape(1, -1, 1, 1) ** 2  # blocks lie thousands of their own deviations apart
    check(cpu_library, x, gamma, beta, replace(HARD, num_groups=2))


def test_statistics_hold_where_a_blocks_mean_is_guessed_badly(cpu_library):
    """It is guessed from four of a block's 64 rows of 32 elements, of which each quarter begins with one."""
    x, _, _ = draw((2, 16, 32, 64))  # each channel is a block
    x.view(2, 16, 4, 512)[..., :32] += torch.linspace(30, 1000, 16).reshape(1, 16, 1, 1)
    parameters = [torch.full((16,), -torch.inf), torch.zeros(16), torch.ones(16), torch.zeros(16)]  # y is n
    y = cpu_library.sru(x, parameters, op=1, num_groups=16, ddof=1, eps_var=0.0, eps_std=0.0).double()
    group = x.double().flatten(2)
    n = ((group - group.mean(-1, keepdim=True)) / group.std(-1, keepdim=True)).reshape(x.shape)
    far = n.abs() > 1  # where the mean's own rounding is small; sums about the guess are off by 1.7e-6
    assert ((y - n).abs() / n.abs())[far].max() < 4 * 2.0**-24


@pytest.mark.parametrize("pixels", [1, 3, 5, 7, 31, 45, 2048, 2055])
def test_a_constant_group_lies_at_its_mean_exactly(cpu_library, pixels):
    """x - mean is 0 and s is eps_std, so that a cut of 0 is reached and any larger one is not."""
    value = torch.rand(1, 256, 1, 1, generator=torch.Generator().manual_seed(pixels)) + 0.1
    cut, sign = torch.tensor([0.0, 1e-3, -1e-3, 0.0]).repeat(64), torch.ones(256)
    x = value.expand(1, 256, 1, pixels)
    y = cpu_library.sru(x, [cut, sign], op=0, num_groups=256, ddof=0, eps_var=0.0, eps_std=1e-10)
    opened = (cut <= 0).reshape(1, 256, 1, 1)
    weighted, rest = x * opened, x * ~opened
    assert torch.equal(y, torch.cat((weighted[:, :128] + rest[:, 128:], weighted[:, 128:] + rest[:, :128]), dim=1))


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("pixels", range(1, 40))
def test_every_tail_of_a_row(cpu_library, pixels, dtype):
    x, gamma, beta = draw((2, 8, 1, pixels), seed=pixels)
    check(cpu_library, x.to(dtype), gamma, beta, replace(VARIANTS["groupnorm-soft"], num_groups=2))


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_ends_where_pytorch_puts_it(cpu_library, value, name, dtype):
    x, gamma, beta = draw((2, 16, 6, 6))
    x[0, 3, 2, 2] = value
    gate = Gate(replace(VARIANTS[name], num_groups=4), gamma, beta)
    y = run(cpu_library, x.to(dtype), gate).float()
    expected = gate.apply(x.to(dtype).float())
    torch.testing.assert_close(y, expected, rtol=2 * CLOSE[dtype], atol=2 * CLOSE[dtype], equal_nan=True)


@pytest.mark.parametrize("dtype", TYPES)
def test_zeros_keep_their_sign_and_denormals_their_value(cpu_library, dtype):
    """Hard gates only multiply by 1 and 0 and add: the output is PyTorch's to the bit."""
    smallest = torch.finfo(dtype).smallest_normal
    pool = torch.tensor([0.0, -0.0, 1.0, -1.0, smallest / 4, -smallest / 4, smallest, 3.0])
    x = pool[torch.randint(8, (2, 16, 6, 7), generator=torch.Generator().manual_seed(0))].to(dtype)
    _, gamma, beta = draw(x.shape)
    gate = Gate(replace(HARD, num_groups=4), gamma, beta)
    open_mask = gate.mask(x.float())
    x1, x2 = open_mask * x, ~open_mask * x
    expected = torch.cat((x1[:, :8] + x2[:, 8:], x1[:, 8:] + x2[:, :8]), dim=1)
    for lanes in widths(cpu_library):
        assert torch.equal(run(cpu_library, x, gate, lanes=lanes).view(BITS[dtype]), expected.view(BITS[dtype]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_number_of_16_bits_is_read_and_written_as_pytorch_does(cpu_library, dtype):
    """With all gates open y is x: 65,536 numbers through both conversions, but those whose sums overflow."""
    x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype).reshape(1, 2, 2**13, 4)
    x = torch.where(x.float().abs() < 1e30, x, torch.zeros((), dtype=dtype))  # not NaN
    sign, cut = torch.zeros(2), torch.full((2,), -torch.inf)  # always open
    for lanes in widths(cpu_library):
        y = cpu_library.sru(x, [cut, sign], op=0, num_groups=1, ddof=1, eps_var=1.0, eps_std=0.0, lanes=lanes)
        assert torch.equal(y.view(torch.int16)[x != 0], x.view(torch.int16)[x != 0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_values_are_rounded_to_nearest_as_pytorch_does(cpu_library, dtype):
    """SRUNorm's data are gamma * n + beta; of n = 0 they are beta, rounded to the type. All kinds of float32."""
    bits = torch.randint(-(2**31), 2**31, (1 << 14,), generator=torch.Generator().manual_seed(1), dtype=torch.int64)
    values = bits.to(torch.int32).view(torch.float32)
    near = torch.tensor([65519.0, 65520.0, 65536.0, 2.0**-14, 2.0**-24, 2.0**-25, 1.5 * 2.0**-24, 1e-42, -0.0, 3.39e38])
    beta = torch.cat((torch.where(values.isnan(), 0.0, values), near, -near, torch.logspace(-8, 5, 4076)))
    count = len(beta)
    parameters = [torch.full((count,), -torch.inf), torch.zeros(count), torch.zeros(count), beta]
    x = torch.zeros(1, count, 1, 1, dtype=dtype)
    expected = beta.to(dtype).float() + 0.0 * beta.to(dtype).float().roll(count // 2)  # a closed gate on Inf is NaN
    for lanes in widths(cpu_library):
        y = cpu_library.sru(x, parameters, op=1, num_groups=1, ddof=1, eps_var=1.0, eps_std=0.0, lanes=lanes)
        torch.testing.assert_close(y.reshape(-1).float(), expected, rtol=0, atol=0, equal_nan=True)


def test_soft_weights_are_pytorchs_sigmoid_to_a_few_ulp(cpu_library):
    z = torch.cat((torch.linspace(-110, 110, 4001), torch.linspace(-1, 1, 1999), torch.tensor([torch.nan, torch.inf])))
    count = len(z)
    x = torch.ones(1, 2 * count, 1, 1)
    closed = [torch.full((2 * count,), torch.inf), torch.zeros(2 * count), torch.zeros(2 * count)]
    shift = torch.cat((z, torch.full((count,), -torch.inf)))  # the other half adds nothing
    for lanes in widths(cpu_library):
        y = cpu_library.sru(x, [*closed, shift], op=2, num_groups=1, ddof=1, eps_var=1.0, eps_std=0.0, lanes=lanes)
        torch.testing.assert_close(
            y.reshape(-1)[:count], torch.sigmoid(z), rtol=4 * 2.0**-23, atol=1e-37, equal_nan=True
        )


@pytest.mark.parametrize("shape", [(0, 16, 4, 4), (2, 16, 0, 4), (0, 6, 5, 5)])
def test_an_empty_batch_gives_an_empty_batch(cpu_library, shape):
    x, gamma, beta = draw(shape)
    assert run(cpu_library, x, Gate(replace(HARD, num_groups=2), gamma, beta)).shape == shape


@pytest.mark.parametrize(
    ("channels", "groups", "how", "reason"),
    [
        (7, 7, {}, "the number of channels is odd"),
        (8, 3, {}, "C * H * W is not a multiple of num_groups"),
        (8, 0, {}, "num_groups is less than 1"),
        (8, 2, {"lanes": 5}, "lanes is not 0, 4, 8 or 16"),
    ],
)
def test_what_the_function_cannot_compute_is_refused(cpu_library, channels, groups, how, reason):
    settings = {"op": 0, "num_groups": groups, "ddof": 1, "eps_var": 0.0, "eps_std": 1e-10}
    with pytest.raises(ConfigurationError) as refused:
        cpu_library.sru(torch.zeros(2, channels, 5, 5), [torch.zeros(channels)] * 2, **settings, **how)
    assert reason in refused.value.message


def test_the_struct_is_the_headers(cpu_library):
    text = (SOURCES / "cpu" / "sru_cpu.h").read_text()
    body = text[text.index("struct ScconvSruCpuParams {") : text.index("} ScconvSruCpuParams;")]
    names = [line.split(";")[0].split()[-1].lstrip("*") for line in body.splitlines()[1:] if ";" in line]
    assert names == [name for name, _ in CpuParams._fields_]
    assert ctypes.sizeof(CpuParams) == 6 * 8 + 3 * 8 + 8 * 4


def test_other_libraries_are_refused(tmp_path):
    for content in (b"no library", elf_library()):
        (tmp_path / "other.so").write_bytes(content)
        with pytest.raises(IntegrityError, match="plugin build"):
            SruCpuLibrary(tmp_path / "other.so")
