"""Random parameters are told from loaded ones, number by number."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

from scconv_deploy.model.initialisation import Draws
from scconv_deploy.model.load import load_with_record
from scconv_deploy.model.spec import ModelSpec


def random_of(build):
    with Draws() as draws:
        model = build()
    return draws.of(model)


def loaded(model):
    with torch.random.fork_rng():
        state = {k: torch.ones_like(v) for k, v in model.state_dict().items()}
    model.load_state_dict(state)
    return model


def seeded():
    torch.manual_seed(5)
    return nn.Linear(3, 4)


def own_generator():
    model = nn.BatchNorm2d(8)
    model.weight = nn.Parameter(torch.randn(8, generator=torch.Generator().manual_seed(0)) * 0.1 + 1)
    return model


def partly_loaded():
    model = nn.Linear(3, 4)
    with torch.no_grad():
        model.weight[1:3] = 1.0
    return model


def rows_loaded():
    model = nn.Linear(3, 4)
    with torch.no_grad():
        model.bias.zero_()
        for row in range(4):
            model.weight[row].copy_(torch.ones(3))
    return model


def assigned():
    model = nn.Linear(3, 4)
    model.load_state_dict({k: torch.ones_like(v) for k, v in model.state_dict().items()}, assign=True)
    return model


def trained():
    model = nn.Linear(3, 4)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    return model


@pytest.mark.parametrize(
    ("build", "random", "names"),
    [
        (lambda: nn.Linear(3, 4), 16, ("weight", "bias")),
        (seeded, 16, ("weight", "bias")),
        (own_generator, 8, ("weight",)),
        (lambda: nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)), 16, ("0.weight", "0.bias")),
        (lambda: copy.deepcopy(nn.Linear(3, 4)), 16, ("weight", "bias")),
        (lambda: nn.Linear(3, 4).half().float(), 16, ("weight", "bias")),
        (lambda: nn.init.trunc_normal_(nn.Linear(3, 4).weight) is None or nn.Linear(3, 4), 16, ("weight", "bias")),
        (partly_loaded, 10, ("weight", "bias")),
        (rows_loaded, 0, ()),
        (lambda: loaded(nn.Linear(3, 4)), 0, ()),
        (assigned, 0, ()),
        (trained, 0, ()),  # a factory that trains leaves nothing to say
        (lambda: nn.ReLU(), 0, ()),
    ],
)  # fmt: skip
def test_what_was_drawn(build, random, names):
    found = random_of(build)
    assert (found.random, found.names) == (random, names)


@pytest.mark.parametrize("init", [nn.init.orthogonal_, nn.init.trunc_normal_, nn.init.kaiming_normal_, nn.init.dirac_])
def test_torchs_initialisations(init):
    def build():
        model = nn.Conv2d(4, 4, 3, bias=False)
        init(model.weight)
        return model

    assert random_of(build).random == (0 if init is nn.init.dirac_ else 144)


def test_an_address_that_is_used_again_is_not_random():
    def build():
        for _ in range(50):
            torch.randn(12)  # freed at once; its memory is taken by the next tensor of that size
        model = nn.Linear(3, 4, bias=False)
        model.weight = nn.Parameter(torch.from_numpy(np.ones((4, 3), np.float32)) * 2)
        return model

    assert random_of(build).random == 0


def test_the_line():
    torch.manual_seed(3)
    assert str(random_of(lambda: nn.Linear(40, 40))) == "random initialisation (seed 3): 1,640 of 1,640 parameters"


NET = """
import torch
from torch import nn

def make():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))

def pretrained():
    model = make()
    model.load_state_dict(torch.load("w.pt"))
    return model

def traces():
    model = make().eval()
    torch.jit.trace(model, torch.ones(1, 3, 8, 8))
    return model
"""


@pytest.fixture
def net(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "random_net.py").write_text(NET)
    yield "random_net.py"
    import sys

    sys.modules.pop("random_net", None)


def record_of(source, **spec):
    return load_with_record(ModelSpec(source, **spec))[1]


def test_a_factory_that_loads_its_own_weights_is_not_random(net, tmp_path):
    model, record = load_with_record(ModelSpec(f"{net}:make", seed=4))
    assert record.applied == ("weights: random initialisation (seed 4): 112 of 120 parameters",)
    assert record.notice == ""
    torch.save(model.state_dict(), "w.pt")
    assert record_of(f"{net}:pretrained").applied == ()
    torch.save({k: v for k, v in model.state_dict().items() if k != "0.bias"}, "half.pt")
    record = record_of(f"{net}:make", weights=tmp_path / "half.pt", strict=False)
    assert record.random.names == ("0.bias",)
    assert record.notice.endswith(
        "6 of 7 tensors loaded; missing: 1 (0.bias); random initialisation (seed 0): 4 of 120 parameters, in 1 (0.bias)"
    )


def test_a_factory_that_traces_is_built_all_the_same(net):
    model, record = load_with_record(ModelSpec(f"{net}:traces"))
    assert model[0].out_channels == 4
    assert record.random.random == 0  # it could not be watched, so nothing is said


def test_watching_changes_no_number(net):
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    model, _ = load_with_record(ModelSpec(f"{net}:make"))
    assert torch.equal(model[0].weight, plain[0].weight)
