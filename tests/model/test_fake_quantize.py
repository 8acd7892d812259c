"""Fake quantisation in the user's module: which calls and additions are rounded, and what is refused."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from scconv_deploy.errors import ModelError
from scconv_deploy.model import steps
from scconv_deploy.model.fake_quantize import fake_quantize, fake_quantized, unprovable
from scconv_deploy.model.prepare import reference_from_module
from scconv_deploy.records.quantization import LayerPlan, Levels, QuantizationPlan, SkipPlan, gate_of

COARSE, FINE = Levels(0.5), Levels(0.25)
UNSIGNED = Levels(0.25, 100, signed=False)


class Twice(nn.Module):
    """A convolution that is called twice, two additions in one forward, and one in place."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 2, 1, bias=False)
        self.scale = nn.Parameter(torch.ones(2, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.scale  # one operand is a parameter: no addition of data
        a = self.conv(x)
        b = self.conv(a) + a
        b += x
        return b


@pytest.fixture(scope="module")
def reference():
    torch.manual_seed(0)
    return reference_from_module(Twice().eval(), torch.randn(1, 2, 4, 4))[0]


def run(reference, plan: QuantizationPlan) -> Tensor:
    found = fake_quantized(reference, plan)
    (y,) = found.signature.call(found.model, found.signature.tensors).values()
    (again,) = found.signature.call(found.model, found.signature.tensors).values()
    (swapped,) = found.signature.call(found.swapped, found.signature.tensors).values()
    assert torch.equal(y, again), "calls are counted anew in each run"
    assert torch.equal(y, swapped)
    return y


def expected(reference, first: Levels | None, second: Levels | None, skips: dict[int, Levels]) -> Tensor:
    model, (x,) = reference.model, reference.signature.tensors.values()
    weight = model.conv.weight.detach()
    scales = weight.abs().amax((1, 2, 3)) / 127
    weight = torch.fake_quantize_per_channel_affine(weight, scales, torch.zeros(2, dtype=torch.int32), 0, -128, 127)

    def rounded(value: Tensor, levels: Levels | None) -> Tensor:
        return value if levels is None else fake_quantize(value, levels)

    x = x + model.scale.detach()
    a = nn.functional.conv2d(rounded(x, first), weight)
    b = nn.functional.conv2d(rounded(a, second), weight) + rounded(a, skips.get(1))
    return b + rounded(x, skips.get(2))


def layer(reference, *inputs: Levels | None) -> LayerPlan:
    scales = (reference.model.conv.weight.detach().abs().amax((1, 2, 3)) / 127).tolist()
    return LayerPlan("conv", inputs, tuple(scales))


def test_each_call_has_its_own_levels(reference):
    for inputs in ((COARSE, FINE), (None, COARSE), (FINE, None), (UNSIGNED, COARSE)):
        plan = QuantizationPlan((layer(reference, *inputs),))
        assert torch.equal(run(reference, plan), expected(reference, *inputs, {}))


def test_additions_are_counted_where_both_operands_are_data(reference):
    skips = (SkipPlan("", 1, 1, COARSE), SkipPlan("", 2, 1, FINE))
    plan = QuantizationPlan((layer(reference, None, None),), skips)
    assert torch.equal(run(reference, plan), expected(reference, None, None, {1: COARSE, 2: FINE}))
    second = QuantizationPlan((layer(reference, None, None),), skips[1:])
    assert torch.equal(run(reference, second), expected(reference, None, None, {2: FINE}))


def test_codes_are_recorded_as_gates_of_these_names(reference):
    plan = QuantizationPlan((layer(reference, COARSE, UNSIGNED),), (SkipPlan("", 1, 1, FINE),))
    found = fake_quantized(reference, plan)
    tensors = found.signature.tensors
    with steps.recording(found.model, tensors) as recorded:
        (y,) = found.signature.call(found.model, tensors).values()
    assert list(recorded.decided) == [gate_of("conv", 1), gate_of("conv", 2), gate_of("", 1)]
    codes = recorded.decided["conv::code"]
    (x,) = tensors.values()
    assert torch.equal(codes, torch.round((x + reference.model.scale.detach()) / COARSE.scale))
    moved = recorded.decided | {gate: recorded.decided[gate] + 1 for gate in ("conv::code", "conv::code#2")}
    with steps.recording(found.model, tensors, decided=moved) as again:
        (other,) = found.signature.call(found.model, tensors).values()
    assert list(again.decided) == list(recorded.decided), "what follows from a given code is data too"
    assert not torch.equal(other, y)


def test_what_the_model_lacks_is_named(reference):
    with pytest.raises(ModelError, match="no module stem, which the file quantises"):
        fake_quantized(reference, QuantizationPlan((LayerPlan("stem", (COARSE,), (1.0, 1.0)),)))
    with pytest.raises(ModelError, match="The file has 3 scales for 2 output channels"):
        fake_quantized(reference, QuantizationPlan((LayerPlan("conv", (COARSE,), (1.0,) * 3),)))
    with pytest.raises(ModelError, match="makes no addition number 5"):
        run(reference, QuantizationPlan((layer(reference, None),), (SkipPlan("", 5, 0, COARSE),)))


class Own(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 1


def test_why_a_layer_cannot_be_fake_quantised():
    hooked = nn.Conv2d(2, 2, 1)
    hooked.register_forward_hook(lambda *_: None)
    model = nn.ModuleDict({"conv": nn.Conv2d(2, 4, 1), "own": Own(2, 2, 1), "relu": nn.ReLU(), "hooked": hooked,
                           "fc": nn.Linear(4, 2), "bn": nn.BatchNorm2d(4)})  # fmt: skip
    nn.init.uniform_(model["bn"].weight, 0.5, 1.5)
    weight = model["conv"].weight.detach()
    folded = weight * (model["bn"].weight.detach() / (1 + 1e-5) ** 0.5).reshape(-1, 1, 1, 1)
    assert unprovable(model, "conv", "", weight.numpy()) == ""
    assert unprovable(model, "fc", "", model["fc"].weight.detach().numpy()) == ""
    assert "are not those of conv in PyTorch, bit for bit" in unprovable(model, "conv", "bn", weight.numpy())
    assert "are not those of conv" in unprovable(model, "conv", "", folded.numpy())
    assert "its weights are [4, 1, 1, 1], those of conv in PyTorch [4, 2, 1, 1]" in unprovable(
        model, "conv", "", weight[:, :1].numpy()
    )
    assert unprovable(model, "own", "", weight.numpy()) == (
        "own is a Own in PyTorch, which computes more than its base class"
    )
    assert "with hooks" in unprovable(model, "hooked", "", weight.numpy())
    assert unprovable(model, "relu", "", weight.numpy()) == "relu is a ReLU in PyTorch, no Conv and no Linear"
    assert unprovable(model, "stem", "", weight.numpy()) == "PyTorch has no module stem"


class Remainder(nn.Module):
    """A gate on a remainder, which jumps where its quotient is rounded."""

    def forward(self, x: Tensor) -> Tensor:
        return (torch.fmod(x, 0.5) > 0.1) * x


def test_gates_behind_a_remainder_that_was_decided_otherwise_are_seen():
    model, tensors = Remainder(), {"x": torch.linspace(0.01, 3, 64)}
    with steps.recording(model, tensors) as recorded:
        model(tensors["x"])
    moved = {name: value + (name.endswith("trunc")) for name, value in recorded.decided.items()}
    with steps.recording(model, tensors, decided=moved) as again:
        model(tensors["x"])
    assert list(again.decided) == list(recorded.decided) == ["model::trunc", "model::gt"]


class Weighted(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.add(x, x * x, alpha=2)


def test_a_weighted_operand_is_rounded_after_its_weight():
    """As an exporter writes it: multiplied, quantised, added."""
    x = torch.linspace(-1, 1, 9).reshape(1, 1, 3, 3)
    made = reference_from_module(Weighted().eval(), x)[0]
    y = run(made, QuantizationPlan(skips=(SkipPlan("", 1, 1, COARSE),)))
    assert torch.equal(y, x + fake_quantize(2 * x * x, COARSE))
