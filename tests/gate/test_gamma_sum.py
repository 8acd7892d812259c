"""Whose sum: Python's order and torch's are two variants, and near-cancelling gammas tell them apart."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from scconv_deploy.gate.cut import open_by_cut
from scconv_deploy.gate.gamma_sum import sum_in_order
from scconv_deploy.gate.gate import Gate
from scconv_deploy.gate.probes import mirrored, near_threshold
from scconv_deploy.gate.recognize import recognize
from scconv_deploy.gate.swap import swap
from scconv_deploy.gate.variant import VARIANTS, GateVariant, from_normalized, gate_weight, normalize
from scconv_deploy.nn import SRU
from tests.gate.plain import Choices, PlainSRU

HARD = replace(VARIANTS["groupbn-hard"], threshold=0.47)
OF_TORCH = replace(HARD, weighting="torch_sum")


def drawn(seed, channels=32):
    return torch.randn(channels, generator=torch.Generator().manual_seed(seed))


def apart(gamma):
    """How far another order of the sum is from Python's, relatively; torch's own order is each processor's."""
    ours = gate_weight(gamma, "sum")
    return float(((gate_weight(gamma, "torch_sum") - ours) / ours).abs().max())


def near_cancelling(count, least=2e-6, channels=32):
    """Gammas for which this processor's two sums differ by more than ``least``."""
    found, seed = [], 0
    while len(found) < count:
        gamma = drawn(seed, channels)
        if apart(gamma) > least:
            found.append(gamma)
        seed += 1
    return found


@pytest.mark.parametrize("channels", [1, 2, 3, 7, 16, 24, 32, 64, 100, 256, 1024])
def test_the_sum_is_pythons_to_the_bit(channels):
    for seed in range(30):
        gamma = drawn(seed, channels).reshape(-1, 1, 1)
        expected = sum(gamma).reshape(())
        assert torch.equal(sum_in_order(gamma.reshape(-1)), expected)
        doubled = gamma.double()
        assert torch.equal(sum_in_order(doubled.reshape(-1)), sum(doubled).reshape(()))
    with_gradient = gamma.reshape(-1).clone().requires_grad_()
    total = sum_in_order(with_gradient)
    assert torch.equal(total.detach(), expected)
    total.backward()
    assert torch.equal(with_gradient.grad, torch.ones(channels))


def test_a_tensor_without_numbers_is_summed_as_one():
    """A model runs on shapes alone too, on which its declared sizes are checked; sum() of it is not its numbers."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        total = sum_in_order(torch.ones(8))
        assert SRU(8, 4)(torch.randn(2, 8, 4, 4)).shape == (2, 8, 4, 4)
    assert total.shape == ()


def test_ours_computes_what_the_original_code_computes():
    """Bit for bit, soft gates included, where the sum nearly cancels."""
    x = torch.randn(2, 32, 6, 6, generator=torch.Generator().manual_seed(0))
    for index, gamma in enumerate(near_cancelling(20)):
        for soft in (False, True):
            theirs = PlainSRU(Choices(groups=4, soft=soft, threshold=0.47, beta=0.0))
            ours = SRU(
                32, variant=GateVariant("group_batchnorm", "sum", ">=", "soft" if soft else "hard", "x", 4, 1e-10, 0.47)
            )
            with torch.no_grad():
                theirs.gamma.copy_(gamma.reshape(-1, 1, 1))
                ours.gn.gamma.copy_(gamma.reshape(-1, 1, 1))
            assert torch.equal(ours.eval()(x), theirs(x)), index


def test_the_cut_is_that_of_the_variants_own_order():
    """In some hundred near-cancelling draws no gate differs beyond rounding; with the other order's cut, some do."""
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(1, 32, 8, 8, generator=generator)
    beta = torch.randn(32, generator=torch.Generator().manual_seed(1)) * 0.3
    wrong = 0
    for gamma in near_cancelling(150):
        for variant, other in ((HARD, OF_TORCH), (OF_TORCH, HARD)):
            gate = Gate(variant, gamma, beta)
            x = near_threshold(base, gate, generator)  # some between the two boundaries
            expected = gate.mask(x)
            assert gate.count_flips(open_by_cut(x, gate.form) != expected, x).unexplained == 0
            crossed = open_by_cut(x, Gate(other, gamma, beta).form) != expected
            wrong += gate.count_flips(crossed, x).unexplained
    assert wrong > 100


@pytest.mark.parametrize("order", ["python", "torch"])
@pytest.mark.parametrize("threshold", [0.45, 0.5])
def test_none_is_refused_or_taken_for_another(order, threshold):
    """Several SRUs of one network, as found by search: the variant, its order, and no gate changed."""
    gammas = near_cancelling(4, 1e-6)
    choices = Choices(groups=16, weight=order, threshold=threshold, beta=0.0)
    model = nn.Sequential(*(PlainSRU(choices) for _ in gammas))
    with torch.no_grad():
        for module, gamma in zip(model, gammas, strict=True):
            module.gamma.copy_(gamma.reshape(-1, 1, 1))
    x = torch.randn(1, 32, 8, 8, generator=torch.Generator().manual_seed(2))
    recognition = recognize(model, (x,), {})
    assert recognition.refused == ()
    expected = replace(
        VARIANTS["groupbn-hard"], threshold=threshold, weighting="sum" if order == "python" else "torch_sum"
    )
    assert [found.gate.variant for found in recognition.srus] == [expected] * len(gammas)
    assert torch.equal(swap(model, recognition)(x), model(x))


@pytest.mark.parametrize("threshold", [0.5, 0.45])
@pytest.mark.parametrize("shape", [(8, 32, 8, 8), (4, 32, 3, 5), (2, 32, 7)])
def test_mirrored_noise_tells_the_orders_apart(threshold, shape):
    """Its groups sum to 0 to the bit; with t = 0.5 and beta = 0 nothing else lies between the two boundaries."""
    (gamma,) = near_cancelling(1)
    variant = replace(VARIANTS["groupbn-hard"], threshold=threshold)
    ours, theirs = (Gate(replace(variant, weighting=w), gamma, torch.zeros(32)) for w in ("sum", "torch_sum"))
    base = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    x = mirrored(base, ours, theirs, torch.Generator().manual_seed(4))
    assert x.shape == shape
    assert float(x.reshape(shape[0], 16, -1).sum(dim=2).abs().max()) == 0.0
    assert float((ours.mask(x) != theirs.mask(x)).float().mean()) > 0.02


def test_orders_that_agree_to_the_bit_have_the_plain_name():
    module = PlainSRU(Choices(weight="torch", groups=4))
    with torch.no_grad():
        module.gamma.copy_(torch.arange(1.0, 33.0).reshape(-1, 1, 1) / 32)  # exact in any order
    x = torch.randn(1, 32, 8, 8, generator=torch.Generator().manual_seed(2))
    (found,) = recognize(nn.Sequential(module), (x,), {}).srus
    assert (found.gate.variant.weighting, found.gate.variant.label) == ("sum", "groupbn-hard")


def test_a_scripted_sum_is_torchs():
    """TorchScript takes the builtin for aten::sum."""

    class Scripted(nn.Module):
        def __init__(self, gamma):
            super().__init__()
            self.gamma, self.beta = nn.Parameter(gamma.reshape(-1, 1, 1)), nn.Parameter(torch.zeros(32, 1, 1))

        def forward(self, x):
            y = x.reshape(x.shape[0], 16, -1)
            y = ((y - y.mean(2, True)) / (y.std(2, keepdim=True) + 1e-10)).reshape(x.shape) * self.gamma + self.beta
            opened = torch.sigmoid(y * (self.gamma / sum(self.gamma))) >= 0.5
            a, b = (opened * x).chunk(2, 1), ((~opened) * x).chunk(2, 1)
            return torch.cat([a[0] + b[1], a[1] + b[0]], 1)

    (gamma,) = near_cancelling(1, 1e-5)
    model = nn.Sequential(torch.jit.script(Scripted(gamma).eval()))
    x = torch.randn(2, 32, 8, 8, generator=torch.Generator().manual_seed(2))
    (found,) = recognize(model, (x,), {}).srus
    assert str(found.gate.variant) == "groupbn-hard (G=16, eps=1e-10, t=0.5, >=, torch.sum)"


def test_a_sum_of_zero_is_said():
    module = PlainSRU(Choices(groups=4))
    with torch.no_grad():
        module.gamma.copy_(torch.tensor([1.0, -1.0]).repeat(16).reshape(-1, 1, 1))
    x = torch.randn(1, 32, 8, 8, generator=torch.Generator().manual_seed(2))
    (refusal,) = recognize(nn.Sequential(module), (x,), {}).refused
    assert "sum(gamma) is 0" in refusal.reason


def test_the_float64_ruler_divides_by_float32s_sum():
    """How the sum was rounded is part of the model: it is no noise of a run."""
    (gamma,) = near_cancelling(1, 1e-5)
    module = PlainSRU(Choices(groups=4, soft=True, threshold=0.47))
    with torch.no_grad():
        module.gamma.copy_(gamma.reshape(-1, 1, 1))
    model = nn.Sequential(module)
    x = torch.randn(2, 32, 8, 8, generator=torch.Generator().manual_seed(2))
    exact = copy.deepcopy(swap(model, recognize(model, (x,), {}))).double()
    x64, gamma64 = x.double(), gamma.double()
    normalized = normalize(x64, gamma64, module.beta.detach().double(), exact[0].gate.variant)
    ours, other = gate_weight(gamma, "sum").double(), gate_weight(gamma64, "sum")
    assert torch.equal(exact(x64), from_normalized(x64, normalized, ours, exact[0].gate.variant))
    assert not torch.equal(exact(x64), from_normalized(x64, normalized, other, exact[0].gate.variant))
