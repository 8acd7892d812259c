"""Recognition: code we did not write is recognised by what it does, and look-alikes are left alone with a reason."""

import copy
import re
import threading

import pytest
import torch
from torch import nn

from scconv_deploy.errors import ModelError
from scconv_deploy.gate.recognize import recognize
from scconv_deploy.gate.swap import _same, swap, swap_reachable
from scconv_deploy.nn import SRU, ScConv
from tests import wild
from tests.tolerances import SAME_ARITHMETIC

SHAPE = (2, 32, 10, 10)


def example(shape=SHAPE, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def found_in(module, shape=SHAPE):
    model = nn.Sequential(wild.randomize(module) if not hasattr(module, "keep") else module.eval())
    return model, recognize(model, (example(shape),), {})


RECOGNISED = {
    "original": (wild.OriginalSRU(32), "groupbn-hard", ">=", 16),
    "original, 4 groups": (wild.OriginalSRU(32, 4), "groupbn-hard", ">=", 4),
    "normalized": (wild.NormalizedSRU(32), "groupbn-hard-normalized", ">=", 4),
    "soft": (wild.SoftSRU(32), "groupnorm-soft", ">", 4),
    "softmax, float masks, reshape, other names": (wild.SoftmaxSRU(32), "groupbn-hard-softmax", ">=", 16),
    "strict": (wild.StrictSRU(32), "groupbn-hard-strict", ">", 16),
    "biased deviation": (wild.BiasedSRU(32), "groupstd-hard", ">=", 16),
    "unbiased variance": (wild.manual_sru(32, 4, 1e-5, ddof=1, in_variance=True), "groupvar-hard", ">=", 4),
    "literal eps 1e-6": (wild.manual_sru(32, 4, 1e-6, ddof=0, in_variance=True), "groupnorm-hard-inclusive", ">=", 4),
    "literal eps 1e-8": (wild.manual_sru(32, 4, 1e-8), "groupbn-hard", ">=", 4),
    "literal eps 1e-3": (wild.manual_sru(32, 4, 1e-3), "groupbn-hard", ">=", 4),
    "literal 12 groups": (wild.manual_sru(24, 12, 1e-10), "groupbn-hard", ">=", 12),
    "far from its boundary": (wild.far_out(wild.OriginalSRU(32)), "groupbn-hard", ">=", 16),
    "far from its boundary, strict": (wild.far_out(wild.StrictSRU(32)), "groupbn-hard-strict", ">", 16),
    "ours": (SRU(32), "groupbn-hard", ">=", 16),
    "ours, torch_gn": (SRU(32, torch_gn=True), "groupnorm-hard-inclusive", ">=", 16),
    "ours, soft": (SRU(32, variant="groupnorm-soft"), "groupnorm-soft", ">", 4),
}


@pytest.mark.parametrize("name", RECOGNISED)
def test_variant_is_decided_by_behaviour(name):
    module, variant, comparison, groups = RECOGNISED[name]
    shape = (2, next(module.parameters()).numel(), 10, 10)
    model, recognition = found_in(module, shape)
    assert recognition.refused == ()
    (found,) = recognition.srus
    assert (found.path, found.gate.variant.name) == ("0", variant)
    assert (found.gate.variant.comparison, found.gate.variant.num_groups) == (comparison, groups)
    if name.startswith("literal eps"):
        assert found.gate.variant.eps == float(name.removeprefix("literal eps "))
    x = example(shape, seed=5) * 3 + 1
    torch.testing.assert_close(swap(model, recognition)(x), model(x), **SAME_ARITHMETIC)


def test_untrained_parameters_are_recognised_too():
    torch.manual_seed(0)
    model = nn.Sequential(wild.OriginalSRU(32)).eval()  # beta exactly 0
    (found,) = recognize(model, (example(),), {}).srus
    assert found.gate.variant.name == "groupbn-hard"
    torch.manual_seed(0)
    model = nn.Sequential(wild.StrictSRU(32)).eval()
    (found,) = recognize(model, (example(),), {}).srus
    assert found.gate.variant.comparison == ">"


def test_another_threshold_and_groups_that_straddle_channels():
    _, recognition = found_in(wild.OriginalSRU(24, 16, gate_treshold=0.502), (2, 24, 8, 8))
    (found,) = recognition.srus
    assert (found.gate.variant.threshold, found.gate.variant.num_groups) == (0.502, 16)


def test_a_threshold_in_a_buffer():
    module = wild.OriginalSRU(32)
    del module.gate_treshold
    module.register_buffer("gate_treshold", torch.tensor(0.498))
    _, recognition = found_in(module)
    (found,) = recognition.srus
    assert found.gate.variant.threshold == pytest.approx(0.498)


@pytest.mark.parametrize("cls", [wild.ProjectingSRU, wild.ProjectedSRU])
def test_a_1x1_inside_the_sru(cls):
    width = (16, 32) if cls is wild.ProjectingSRU else (32, 32)
    model, recognition = found_in(cls(*width), (2, width[0], 8, 8))
    (found,) = recognition.srus
    assert found.conv_place == ("before" if cls is wild.ProjectingSRU else "after")
    x = example((2, width[0], 8, 8), 3)
    torch.testing.assert_close(swap(model, recognition)(x), model(x), **SAME_ARITHMETIC)


@pytest.mark.parametrize("place", ["before", "after"])
def test_the_comparison_is_known_behind_a_1x1_too(place):
    """Both comparisons give the same values on any noise: only inputs made for the gate tell them apart."""
    cls = wild.ProjectingSRU if place == "before" else wild.ProjectedSRU
    for strict, comparison in ((False, ">="), (True, ">")):
        module = cls(32, 32)
        module.strict = strict
        _, recognition = found_in(module, (2, 32, 8, 8))
        (found,) = recognition.srus
        assert found.gate.variant.comparison == comparison


def test_a_1x1_that_is_not_called_is_no_way_around_the_probes():
    module = wild.ProjectingSRU(32, 32)
    conv = module.proj
    module.project = lambda x: nn.functional.conv2d(x, conv.weight, conv.bias)
    _, recognition = found_in(module, (2, 32, 8, 8))
    (refusal,) = recognition.refused
    assert "cannot be probed" in refusal.reason


REFUSED = {
    "uncrossed": (wild.UncrossedSRU(32), "not an SRU"),
    "inverted": (wild.InvertedSRU(32), "not an SRU"),
    "values clamped far out": (wild.ClampedSRU(32), "gates differ|values differ"),
    "forward hooks": (wild.hooked(wild.OriginalSRU(32)), "hooks"),
    "writes into its input": (wild.InPlaceSRU(32), "writes into its input"),
    "counts its calls in a buffer": (wild.CountingSRU(32), "changes its buffer calls"),
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
    torch.testing.assert_close(swap(model, recognition)(example(seed=4)), model(example(seed=4)), **SAME_ARITHMETIC)


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
    torch.testing.assert_close(swapped(example(seed=2)), model(example(seed=2)), **SAME_ARITHMETIC)
    assert type(model.first) is wild.OriginalSRU  # the user's model is not changed


class Caller(nn.Module):
    """Calls its SRU as the argument says."""

    def __init__(self, call):
        super().__init__()
        self.sru = wild.randomize(wild.OriginalSRU(32))
        self.conv = nn.Conv2d(32, 32, 3, padding=1)  # so that it is no candidate itself
        self.call = call

    def forward(self, x):
        return self.call(self.sru, self.conv(x))


def test_any_call_with_more_than_a_tensor_is_a_reason():
    class Switchable(wild.OriginalSRU):
        def forward(self, x, hard=True):
            return super().forward(x) if hard else x

    model = Caller(lambda sru, x: sru(sru(x), hard=False))
    model.sru = wild.randomize(Switchable(32))
    (refusal,) = recognize(model.eval(), (example(),), {}).refused
    assert "not called with one tensor" in refusal.reason


def test_what_a_swap_cannot_reach_is_left_alone():
    model = Caller(lambda sru, x: x)
    sru = model.sru
    model.call = lambda _, x: sru(x)  # a reference of its own
    model.eval()
    recognition = recognize(model, (example(),), {})
    assert len(recognition.srus) == 1
    kept, swapped = swap_reachable(model, recognition, lambda m: m(example()))
    assert (kept.srus, kept.refused[0].path) == ((), "sru")
    assert "cannot reach" in kept.refused[0].reason
    assert type(swapped.sru) is wild.OriginalSRU


def test_a_model_without_srus_is_not_run_again():
    runs = []
    model = nn.Sequential(nn.Conv2d(4, 4, 1)).eval()
    kept, swapped = swap_reachable(model, recognize(model, (torch.ones(1, 4, 2, 2),), {}), runs.append)
    assert (kept.srus, kept.refused, runs) == ((), (), [])
    assert torch.equal(swapped(torch.ones(1, 4, 2, 2)), model(torch.ones(1, 4, 2, 2)))


def test_what_does_not_run_swapped_is_left_alone():
    class Watcher(nn.Module):
        def __init__(self):
            super().__init__()
            self.good, self.bad = (wild.randomize(wild.OriginalSRU(32), seed) for seed in (0, 1))

        def forward(self, x):
            if type(self.bad) is not wild.OriginalSRU:
                raise TypeError("bad must be an OriginalSRU")
            return self.bad(self.good(x))

    model = Watcher().eval()
    kept, swapped = swap_reachable(model, recognize(model, (example(),), {}), lambda m: m(example()))
    assert [found.path for found in kept.srus] == ["good"]
    assert "TypeError: bad must be" in kept.refused[0].reason
    torch.testing.assert_close(swapped(example()), model(example()), **SAME_ARITHMETIC)


def test_a_model_that_computes_something_else_by_the_type_is_left_alone():
    model = Caller(lambda sru, x: sru(x) if type(sru) is wild.OriginalSRU else 2 * sru(x)).eval()
    kept, swapped = swap_reachable(model, recognize(model, (example(),), {}), lambda m: m(example()))
    assert kept.srus == ()
    assert "may look at its type" in kept.refused[0].reason
    assert torch.equal(swapped(example()), model(example()))


class Talkative(wild.OriginalSRU):
    def strength(self):
        return self.gn.gamma.abs().sum()

    @property
    def doubled(self):
        return 2 * self.gate_treshold


READS = {
    "a parameter": lambda sru, x: sru(x) * sru.gn.gamma.sum(),
    "an attribute": lambda sru, x: sru(x) + sru.gate_treshold,
    "its class": lambda sru, x: sru(x) if isinstance(sru, wild.OriginalSRU) else x,
    "its children": lambda sru, x: sru(x) * sum(p.sum() for child in sru.children() for p in child.parameters()),
    "its names": lambda sru, x: sru(x) * len([name for name, _ in sru.named_parameters() if "gn.gamma" in name]),
    "a child": lambda sru, x: sru(x) + sru.gn(x),
    "a method": lambda sru, x: sru(x) * sru.strength() + sru.doubled,
    "its forward": lambda sru, x: sru.forward(x) + sru(x=x),
}


@pytest.mark.parametrize("read", READS.values(), ids=READS)
def test_a_parent_may_read_what_its_sru_holds(read):
    model = Caller(read)
    model.sru = wild.randomize(Talkative(32))
    model.eval()
    recognition, swapped = swap_reachable(model, recognize(model, (example(),), {}), lambda m: m(example()))
    assert [found.path for found in recognition.srus] == ["sru"]
    assert type(swapped.sru).__name__ == "SwappedSRU"
    torch.testing.assert_close(swapped(example()), model(example()), **SAME_ARITHMETIC)


def test_a_copy_of_a_swapped_model_has_tensors_of_its_own():
    model = Caller(lambda sru, x: sru(x) * sru.gn.gamma.sum()).eval()
    swapped = swap(model, recognize(model, (example(),), {}))
    double = copy.deepcopy(swapped).double()
    assert double.sru.gn.gamma.dtype == double(example().double()).dtype == torch.float64
    assert double.sru.gate.gamma.data_ptr() != swapped.sru.gate.gamma.data_ptr() == model.sru.gn.gamma.data_ptr()
    assert model.sru.gn.gamma.dtype == swapped.sru.gn.gamma.dtype == torch.float32
    assert swapped.sru.gn.gamma is model.sru.gn.gamma
    with pytest.raises(AttributeError):
        swapped.sru.nothing  # noqa: B018


def test_what_cannot_be_copied_is_said():
    model = Caller(lambda sru, x: sru(x)).eval()
    recognition = recognize(model, (example(),), {})
    model.lock = threading.Lock()
    with pytest.raises(ModelError, match="cannot be copied: TypeError"):
        swap(model, recognition)


def test_the_example_is_not_written_into():
    class InPlace(Caller):
        def forward(self, x):
            return self.sru(x.mul_(2))

    x = example()
    assert len(recognize(InPlace(None).eval(), (x,), {}).srus) == 1
    assert torch.equal(x, example())


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


@pytest.mark.parametrize(
    ("found", "expected", "same"),
    [
        (torch.tensor([1.0, torch.nan]), torch.tensor([1.0, torch.nan]), True),
        (torch.ones(2), torch.ones(2, dtype=torch.float64), False),
        (torch.ones(2), torch.ones(1, 2), False),
        (torch.eye(2).to_sparse(), torch.eye(2).to_sparse(), True),
        (torch.eye(2).to_sparse(), torch.eye(2), False),
        (torch.eye(2).to_sparse(), torch.eye(2).mul(2).to_sparse(), False),
        (torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8), torch.ones(2), False),
        ([torch.ones(2), 3], [torch.ones(2), 4], False),
        ([torch.ones(2), "a"], [torch.ones(2), "a"], True),
        (torch.ones(2), 1.0, False),
    ],
)
def test_outputs_are_compared_whatever_they_are(found, expected, same):
    assert _same(found, expected) is same
