"""NaN and Inf among a model's weights: named where the output depends on them, a note where it does not."""

import pytest
import torch
from torch import nn

from scconv_deploy.errors import ModelError
from scconv_deploy.model.prepare import reference_from_module
from tests import wild


class Net(nn.Module):
    """A convolution and an SRU, and a parameter and a mask that may or may not matter."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.sru = wild.OriginalSRU(8, 4)
        self.unused = nn.Parameter(torch.zeros(5))
        self.register_buffer("mask", torch.tensor([0.0, float("-inf")]))

    def forward(self, x):
        y = self.sru(self.norm(self.conv(x)))
        return y, torch.softmax(torch.zeros(2) + self.mask, 0)


def reference(change):
    model = Net().eval()
    with torch.no_grad():
        change(model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    try:
        return reference_from_module(model, torch.ones(2, 3, 6, 6))
    finally:
        for name, tensor in model.state_dict().items():  # it was tried without them, and put back
            torch.testing.assert_close(tensor, before[name], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        ("sru.gn.gamma", float("nan"), "sru.gn.gamma holds NaN in 1 of 8 values"),  # the gate makes zeros of it
        ("sru.gn.beta", float("nan"), "sru.gn.beta holds NaN in 1 of 8 values"),
        ("conv.weight", float("nan"), "conv.weight holds NaN in 1 of 216 values"),
        ("norm.running_var", float("nan"), "norm.running_var holds NaN in 1 of 8 values"),
        ("conv.bias", float("inf"), "conv.bias holds Inf in 1 of 8 values"),
    ],
)
def test_what_the_output_depends_on_is_named(path, value, words):
    def change(model):
        tensor = model.get_parameter(path) if "running" not in path else model.get_buffer(path)
        tensor.view(-1)[0] = value

    with pytest.raises(ModelError) as error:
        reference(change)
    assert words in str(error.value)
    assert "Check the checkpoint" in str(error.value)


def test_what_it_does_not_depend_on_is_a_note():
    found, log = reference(lambda model: model.unused.fill_(float("nan")))
    assert [sru.path for sru in found.recognition.srus] == ["sru"]
    skipped = dict(next(record for record in log.records if record.name == "recognize").skipped)
    assert skipped["unused"] == "holds NaN in 5 of 5 values"
    assert skipped["mask"] == "holds Inf in 1 of 2 values"  # a mask's infinity is legitimate


def test_an_sru_whose_gamma_is_infinite_is_left_alone_by_name():
    found, _ = reference(lambda model: model.sru.gn.gamma[0].fill_(float("inf")))
    assert found.recognition.srus == ()
    assert "gn.gamma holds Inf (1 of 8 values)" in found.recognition.refused[0].reason
