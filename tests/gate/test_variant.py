"""The specification in PyTorch, against user code written without it and against numbers by hand."""

from dataclasses import replace

import pytest
import torch

from scconv_deploy.errors import ConfigurationError
from scconv_deploy.gate.gate import Gate
from scconv_deploy.gate.variant import VARIANTS, GateVariant, check_groups, cross_reconstruct
from tests import wild
from tests.tolerances import SAME_ARITHMETIC


@pytest.mark.parametrize(
    ("module", "variant"),
    [
        (wild.OriginalSRU(32), VARIANTS["groupbn-hard"]),
        (wild.NormalizedSRU(32), VARIANTS["groupbn-hard-normalized"]),
        (wild.SoftSRU(32), VARIANTS["groupnorm-soft"]),
        (wild.SoftmaxSRU(32), replace(VARIANTS["groupbn-hard"], weighting="softmax")),
        (wild.StrictSRU(32), replace(VARIANTS["groupbn-hard"], comparison=">")),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, torch.nn.Module) else "",
)
def test_formula_is_the_published_code(module, variant):
    module = wild.randomize(module)
    x = torch.randn(2, 32, 10, 10, generator=torch.Generator().manual_seed(0))
    # a gate that differed would move an output by the size of the data; 1e-6 is rounding
    torch.testing.assert_close(Gate(variant, *module.parameters()).apply(x), module(x), **SAME_ARITHMETIC)


def test_cross_reconstruct_crosses_the_halves():
    x1 = torch.arange(4.0).reshape(1, 4, 1, 1)
    x2 = 10 * torch.arange(4.0).reshape(1, 4, 1, 1)
    assert cross_reconstruct(x1, x2).flatten().tolist() == [0 + 20, 1 + 30, 2 + 0, 3 + 10]


def test_a_given_mask_replaces_the_gates():
    x = torch.randn(1, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    gate = Gate(replace(VARIANTS["groupbn-hard"], num_groups=2), torch.ones(4), torch.zeros(4))
    everything = torch.ones_like(x, dtype=torch.bool)
    torch.testing.assert_close(gate.apply(x, everything), x, rtol=0, atol=0)
    crossed = torch.cat([x[:, 2:], x[:, :2]], 1)
    torch.testing.assert_close(gate.apply(x, ~everything), crossed, rtol=0, atol=0)


def test_soft_keeps_a_share_of_what_is_closed():
    variant = replace(VARIANTS["groupnorm-soft"], num_groups=1, threshold=0.999)
    x = torch.randn(1, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    gamma, beta = torch.ones(2), torch.zeros(2)
    gate = Gate(variant, gamma, beta)
    assert not gate.mask(x).any()
    r = torch.sigmoid(torch.nn.functional.group_norm(x, 1, gamma, beta, 1e-5) * 0.5)
    half = (r * x)[:, :1] + (r * x)[:, 1:]
    torch.testing.assert_close(gate.apply(x), torch.cat([half, half], 1))


def test_threshold_is_inclusive_or_strict():
    # a constant group: n is 0, z is 0, sigmoid is exactly 0.5
    x = torch.zeros(1, 4, 2, 2)
    variant = replace(VARIANTS["groupbn-hard"], num_groups=2)
    assert Gate(variant, torch.ones(4), torch.zeros(4)).mask(x).all()
    assert not Gate(replace(variant, comparison=">"), torch.ones(4), torch.zeros(4)).mask(x).any()


def test_names_and_operators():
    names = {name: (v.name, v.operator, v.ddof) for name, v in VARIANTS.items()}
    assert names == {
        "groupbn-hard": ("groupbn-hard", "SRU", 1),
        "groupbn-hard-normalized": ("groupbn-hard-normalized", "SRUNorm", 1),
        "groupnorm-soft": ("groupnorm-soft", "SRUSoft", 0),
    }
    assert replace(VARIANTS["groupbn-hard"], weighting="softmax").name == "groupbn-hard-softmax"
    assert replace(VARIANTS["groupbn-hard"], comparison=">").name == "groupbn-hard-strict"
    assert replace(VARIANTS["groupnorm-soft"], comparison=">=").name == "groupnorm-soft-inclusive"


def test_eps_goes_where_the_statistics_put_it():
    group_bn, group_norm = VARIANTS["groupbn-hard"], VARIANTS["groupnorm-soft"]
    assert (group_bn.eps_var, group_bn.eps_std) == (0.0, 1e-10)
    assert (group_norm.eps_var, group_norm.eps_std) == (1e-5, 0.0)


def test_soft_on_normalised_data_has_no_operator():
    with pytest.raises(ConfigurationError, match="not one of the three operators"):
        GateVariant("group_norm", "sum", ">", "soft", "normalized", 4, 1e-5)


@pytest.mark.parametrize(
    ("channels", "groups", "elements", "words"),
    [
        (8, 0, None, ["num_groups is 0"]),
        (8, 16, None, ["8 channels", "num_groups 16"]),
        (24, 16, 24 * 3 * 3, ["216", "num_groups 16"]),
        (16, 16, 16, ["16 groups", "one element"]),
    ],
)
def test_sizes_without_a_gate_are_refused_with_their_numbers(channels, groups, elements, words):
    with pytest.raises(ConfigurationError) as error:
        check_groups(channels, groups, elements)
    for word in words:
        assert word in str(error.value)
