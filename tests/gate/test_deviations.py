"""Small deviations from the known variants: identified as what they are, or left alone; never fused as another one."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from scconv_deploy.gate.flips import compare_outputs
from scconv_deploy.gate.recognize import recognize
from scconv_deploy.gate.swap import swap
from tests.gate.plain import Choices, PlainSRU

SMALL = Choices(channels=8, groups=4)
SAME_SUMS = {"python": {"sum"}, "torch": {"sum", "torch_sum"}, "mean": {"sum", "torch_sum"}, "softmax": {"softmax"}}


def recognised(choices, shape, seed=0):
    module = PlainSRU(choices, seed)
    model = nn.Sequential(module)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed + 1))
    return model, recognize(model, (x,), {})


def inputs(shape, seed=7):
    """Of every scale that float32's squares allow, with and without a mean, constant, and with groups that are zero."""
    generator = torch.Generator().manual_seed(seed)
    for exponent in (-14, -12, -10, -8, -6, -5, -4, -3, -2, -1, 0, 2, 4):
        x = torch.randn(shape, generator=generator) * 10.0**exponent
        yield x
        yield x + 3 * 10.0**exponent
        yield x.relu()
    yield torch.zeros(shape)
    yield torch.full(shape, 2.0)


def assert_it_is_what_it_computes(model, recognition, shapes):
    """Every gate as the module has it, and values to 1e-6, on inputs that recognition has not seen."""
    (found,) = recognition.srus
    module, swapped = found.module, swap(model, recognition)
    for shape in shapes:
        for x in inputs(shape):
            with torch.no_grad():
                expected, y = module(x), swapped(x)
            count, distance = compare_outputs(expected, y, x, found.gate)
            assert count.unexplained == 0, (found.gate.variant, shape, float(x.std()))
            assert distance <= 1e-6 or not y.any(), (found.gate.variant, shape, float(x.std()), distance)


def is_named_right(variant, choices):
    uses_variance = choices.eps_in_variance or choices.group_norm
    return (
        variant.weighting in SAME_SUMS[choices.weight]
        and variant.comparison == choices.comparison
        and variant.threshold == choices.threshold
        and variant.fusion == ("soft" if choices.soft else "hard")
        and variant.data == ("normalized" if choices.normalized else "x")
        and (variant.num_groups, variant.eps) == (choices.groups, choices.eps)
        and variant.ddof == (0 if choices.group_norm else choices.ddof)
        and bool(variant.eps_var) == uses_variance
    )


KNOWN = {
    "original": Choices(),
    "strict": Choices(comparison=">"),
    "normalized": Choices(normalized=True),
    "torch's GroupNorm, soft": Choices(group_norm=True, eps=1e-5, soft=True, comparison=">"),
    "unbiased variance": Choices(eps_in_variance=True, eps=1e-5),
    "biased variance by hand": Choices(eps_in_variance=True, eps=1e-5, ddof=0),
    "biased deviation": Choices(ddof=0),
    "softmax": Choices(weight="softmax"),
    "large eps": Choices(eps=1e-3),
}


FEW = [((1, 1), 4, 0.0), ((1, 1), 4, 0.3), ((1, 2), 8, 0.3), ((2, 2), 8, 0.3), ((1, 2), 2, 0.0), ((1, 1), 1, 0.3)]
"""Size, groups, beta."""


@pytest.mark.parametrize(
    ("name", "size", "groups", "beta"),
    [(name, *few) for n, name in enumerate(KNOWN) for few in (FEW[0], FEW[1 + n % 5], FEW[1 + (n + 2) % 5])],
)
def test_groups_of_few_elements(size, groups, beta, name):
    """Groups of 2, 4 and 8: the right variant, to the last word. Two elements without beta say the least: all variants.

    Of the other sizes each variant has two, by turns.
    """
    choices = replace(KNOWN[name], channels=8, groups=groups, beta=beta)
    shape = (1, 8, *size)
    model, recognition = recognised(choices, shape)
    assert recognition.refused == ()
    assert is_named_right(recognition.srus[0].gate.variant, choices), recognition.srus[0].gate.variant
    assert_it_is_what_it_computes(model, recognition, [shape, (3, *shape[1:])])


@pytest.mark.parametrize("name", ["original", "strict", "unbiased variance", "normalized"])
def test_groups_of_one_element_are_left_alone(name):
    _, recognition = recognised(replace(KNOWN[name], channels=8, groups=8), (1, 8, 1, 1))
    assert recognition.srus == ()
    (refusal,) = recognition.refused
    assert "one element" in refusal.reason


def test_a_module_that_takes_only_its_own_size_is_tried_there():
    class Fixed(PlainSRU):
        def forward(self, x):
            return super().forward(x.view(1, 8, 1, 1))

    for name in ("original", "biased deviation"):
        choices = replace(KNOWN[name], channels=8, groups=4)
        model = nn.Sequential(Fixed(choices))
        (found,) = recognize(model, (torch.ones(1, 8, 1, 1),), {}).srus
        assert is_named_right(found.gate.variant, choices), found.gate.variant


def test_a_module_that_is_another_one_at_another_size_is_left_alone():
    class Switching(PlainSRU):
        def forward(self, x):
            return super().forward(x) if x.shape[-1] == 1 else x * 2

    model = nn.Sequential(Switching(SMALL))
    recognition = recognize(model, (torch.ones(1, 8, 1, 1),), {})
    assert recognition.srus == ()


DEVIATIONS = {
    "weight of |gamma|": Choices(weight="absolute"),
    "gamma over the sum of |gamma|": Choices(weight="of absolutes"),
    "squares": Choices(weight="squares"),
    "gamma over its length": Choices(weight="length"),
    "sigmoid of gamma": Choices(weight="sigmoid"),
    "no weight": Choices(weight="one"),
    "gamma twice": Choices(gamma_power=2),
    "no gamma": Choices(gamma_power=0),
    "beta twice": Choices(beta_factor=2.0),
    "beta half": Choices(beta_factor=0.5),
    "straight": Choices(cross="straight"),
    "crossed the other way": Choices(cross="other way"),
    "not crossed": Choices(cross="none"),
    "soft on normalised data": Choices(soft=True, normalized=True),
}


@pytest.mark.parametrize("name", DEVIATIONS)
def test_other_gates_are_left_alone(name):
    _, recognition = recognised(replace(DEVIATIONS[name], channels=8, groups=4), (2, 8, 6, 6))
    assert recognition.srus == ()
    assert recognition.refused[0].reason


@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    choices=st.builds(
        Choices,
        channels=st.just(8),
        groups=st.sampled_from([1, 2, 4]),
        eps=st.sampled_from([1e-12, 1e-10, 1e-8, 1e-5, 1e-3, 3e-7]),
        ddof=st.sampled_from([0, 1]),
        eps_in_variance=st.booleans(),
        weight=st.sampled_from(["python", "torch", "mean", "softmax", "absolute"]),
        comparison=st.sampled_from([">=", ">"]),
        threshold=st.sampled_from([0.5, 0.45, 0.502, 0.55]),
        soft=st.booleans(),
        mask=st.sampled_from(["product", "where"]),
        beta=st.sampled_from([0.0, 0.3, 2.0]),
        beta_factor=st.sampled_from([1.0, 1.0, 1.001]),
        group_norm=st.booleans(),
    ),
    seed=st.integers(0, 99),
    size=st.sampled_from([(1, 1), (1, 2), (3, 2), (6, 6)]),
)
def test_what_is_drawn_is_identified_or_left_alone(choices, seed, size):
    shape = (2, 8, *size)
    if 8 * size[0] * size[1] // choices.groups < 2:
        return
    model, recognition = recognised(choices, shape, seed)
    if recognition.srus:
        assert_it_is_what_it_computes(model, recognition, [shape, (2, 8, 5, 4)])
