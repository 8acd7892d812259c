"""Recognition: code we did not write is recognised by what it does, and look-alikes are left alone with a reason."""

import re

import pytest
import torch
from torch import nn

from scconv_deploy.gate import recognize, swap
from scconv_deploy.nn import SRU, ScConv
from tests import wild

SHAPE = (2, 32, 10, 10)


def example(shape=SHAPE, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def found_in(module, shape=SHAPE):
    model = nn.Sequential(wild.randomize(module))
    return model, recognize(model, (example(shape),), {})


RECOGNISED = {
    "original": (wild.OriginalSRU(32), "groupbn-hard", ">=", 16),
    "original, 4 groups": (wild.OriginalSRU(32, 4), "groupbn-hard", ">=", 4),
    "normalized": (wild.NormalizedSRU(32), "groupbn-hard-normalized", ">=", 4),
    "soft": (wild.SoftSRU(32), "groupnorm-soft", ">", 4),
    "softmax, float masks, reshape, other names": (wild.SoftmaxSRU(32), "groupbn-hard-softmax", ">=", 16),
    "strict": (wild.StrictSRU(32), "groupbn-hard-strict", ">", 16),
    "ours": (SRU(32), "groupbn-hard", ">=", 16),
    "ours, torch_gn": (SRU(32, torch_gn=True), "groupnorm-hard-inclusive", ">=", 16),
    "ours, soft": (SRU(32, variant="groupnorm-soft"), "groupnorm-soft", ">", 4),
}


@pytest.mark.parametrize("name", RECOGNISED)
def test_variant_is_decided_by_behaviour(name):
    module, variant, comparison, groups = RECOGNISED[name]
    model, recognition = found_in(module)
    assert recognition.refused == ()
    (found,) = recognition.srus
    assert (found.path, found.variant.name) == ("0", variant)
    assert (found.variant.comparison, found.variant.num_groups) == (comparison, groups)
    x = example(seed=5) * 3 + 1
    torch.testing.assert_close(swap(model, recognition)(x), model(x), rtol=1e-6, atol=1e-6)


def test_untrained_parameters_are_recognised_too():
    torch.manual_seed(0)
    model = nn.Sequential(wild.OriginalSRU(32)).eval()  # beta exactly 0
    (found,) = recognize(model, (example(),), {}).srus
    assert found.variant.name == "groupbn-hard"
    torch.manual_seed(0)
    model = nn.Sequential(wild.StrictSRU(32)).eval()
    (found,) = recognize(model, (example(),), {}).srus
    assert found.variant.comparison == ">"


def test_another_threshold_and_groups_that_straddle_channels():
    _, recognition = found_in(wild.OriginalSRU(24, 16, gate_treshold=0.502), (2, 24, 8, 8))
    (found,) = recognition.srus
    assert (found.variant.threshold, found.variant.num_groups) == (0.502, 16)


def test_a_threshold_in_a_buffer():
    module = wild.OriginalSRU(32)
    del module.gate_treshold
    module.register_buffer("gate_treshold", torch.tensor(0.498))
    _, recognition = found_in(module)
    (found,) = recognition.srus
    assert found.variant.threshold == pytest.approx(0.498)


@pytest.mark.parametrize("cls", [wild.ProjectingSRU, wild.ProjectedSRU])
def test_a_1x1_inside_the_sru(cls):
    width = (16, 32) if cls is wild.ProjectingSRU else (32, 32)
    model, recognition = found_in(cls(*width), (2, width[0], 8, 8))
    (found,) = recognition.srus
    assert found.conv_place == ("before" if cls is wild.ProjectingSRU else "after")
    x = example((2, width[0], 8, 8), 3)
    torch.testing.assert_close(swap(model, recognition)(x), model(x), rtol=1e-6, atol=1e-6)


REFUSED = {
    "uncrossed": (wild.UncrossedSRU(32), "not an SRU"),
    "inverted": (wild.InvertedSRU(32), "not an SRU"),
    "biased deviation": (wild.BiasedSRU(32), "gates differ beyond rounding"),
    "LayerNorm2d": (wild.LayerNorm2d(32), "not an SRU"),
    "odd channels": (wild.LayerNorm2d(31), "even number|halves"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_look_alikes_are_left_alone_with_a_reason(name):
    module, reason = REFUSED[name]
    channels = next(module.parameters()).numel()
    model, recognition = found_in(module, (2, channels, 6, 6))
    assert recognition.srus == ()
    (refusal,) = recognition.refused
    assert refusal.path == "0"
    assert re.search(reason, refusal.reason)
    assert type(swap(model, recognition)[0]) is type(module)


def test_a_model_that_is_an_sru_itself():
    model = wild.randomize(wild.OriginalSRU(32))
    recognition = recognize(model, (example(),), {})
    assert [found.path for found in recognition.srus] == ["model"]
    torch.testing.assert_close(swap(model, recognition)(example(seed=4)), model(example(seed=4)), rtol=1e-6, atol=1e-6)


def test_standard_layers_are_no_candidates():
    model = nn.Sequential(nn.Conv2d(32, 32, 1), nn.BatchNorm2d(32), nn.GroupNorm(4, 32)).eval()
    recognition = recognize(model, (example(),), {})
    assert (recognition.srus, recognition.refused) == ((), ())


def test_a_module_called_twice_and_registered_twice():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = wild.randomize(wild.OriginalSRU(32))
            self.again = self.first

        def forward(self, x):
            return self.again(torch.relu(self.first(x)))

    model = Net().eval()
    recognition = recognize(model, (example(),), {})
    (found,) = recognition.srus
    assert found.paths == ("first", "again")
    swapped = swap(model, recognition)
    assert swapped.first is swapped.again
    torch.testing.assert_close(swapped(example(seed=2)), model(example(seed=2)), rtol=1e-6, atol=1e-6)
    assert type(model.first) is wild.OriginalSRU  # the user's model is not changed


def test_a_module_that_never_runs_is_named():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(32, 32, 3)
            self.idle = wild.OriginalSRU(32)

        def forward(self, x):
            return self.conv(x)

    (refusal,) = recognize(Net().eval(), (example(),), {}).refused
    assert (refusal.path, "never called" in refusal.reason) == ("idle", True)


def test_swapped_copy_shares_its_tensors():
    model = nn.Sequential(ScConv(32)).eval()
    swapped = swap(model, recognize(model, (example(),), {}))
    assert swapped[0].CRU.GWC.weight is model[0].CRU.GWC.weight
    assert swapped[0].SRU.gamma is model[0].SRU.gn.gamma


def test_gates_can_be_watched_and_injected():
    model = nn.Sequential(wild.randomize(wild.OriginalSRU(32)))
    swapped = swap(model, recognize(model, (example(),), {}))
    seen = []
    everything = torch.ones(SHAPE, dtype=torch.bool)

    def on_gate(path, x):
        seen.append((path, x))
        return everything

    swapped[0].on_gate = on_gate
    torch.testing.assert_close(swapped(example()), example(), rtol=0, atol=0)
    assert [path for path, _ in seen] == ["0"]
