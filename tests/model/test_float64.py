"""The noise in float64, some rows at a time: the same as all at once; rows that depend on one another stay together."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from scconv_deploy.model import float64
from scconv_deploy.model.float64 import Float64Replay
from scconv_deploy.model.prepare import reference_from_module
from scconv_deploy.model.replay import record_gates
from tests import wild


class Rows(nn.Module):
    """An SRU between two functions of the batch."""

    def __init__(self, before=lambda x: x, after=lambda x: x):
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 3)
        self.sru = wild.randomize(wild.OriginalSRU(16, 4))
        self.before, self.after = before, after

    def forward(self, image):
        return self.after(self.sru(self.conv(self.before(image))))


def noise_of(model, monkeypatch, elements_at_once, rows=7):
    """(Noise, sizes of the batches that ran in float64)."""
    monkeypatch.setattr(float64, "_ELEMENTS_AT_ONCE", elements_at_once)
    torch.manual_seed(0)
    reference, _ = reference_from_module(model.eval(), torch.randn(rows, 3, 10, 10))
    tensors = reference.signature.tensors
    outputs, gates = record_gates(reference.swapped, reference.signature, tensors)
    replay, sizes = Float64Replay(reference.swapped, reference.signature), []
    replay.model.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    return replay.noise(tensors, outputs, gates), sizes


def model(**functions):
    torch.manual_seed(0)
    return Rows(**functions)


ROW = 16 * 8 * 8


def test_parts_add_up_to_the_whole(monkeypatch):
    whole, sizes = noise_of(model(), monkeypatch, 10**9)
    assert sizes == [7]
    parts, sizes = noise_of(model(), monkeypatch, 3 * ROW)
    assert sizes == [2, 2, 3, 1]  # and the last row once more, alone
    assert 1e-9 < whole.at_gates["sru"] < 1e-6
    assert parts.at_gates["sru"] == pytest.approx(whole.at_gates["sru"], rel=1e-9)
    assert torch.allclose(parts.outputs["output"], whole.outputs["output"], rtol=1e-12)
    _, sizes = noise_of(model(), monkeypatch, 1)
    assert sizes == [1] * 7 + [2]  # rows that ran alone are tried beside another


class Places(nn.Module):
    """A parameter for each place in the batch, cut to the batch's size."""

    def __init__(self):
        super().__init__()
        self.register_buffer("shift", torch.arange(8.0).reshape(8, 1, 1, 1))

    def forward(self, x):
        return x + self.shift[: len(x)]


DEPENDENT = {
    "a mean over the batch": lambda: model(before=lambda x: x - x.mean(0, keepdim=True)),
    "a hundred-millionth of it": lambda: model(before=lambda x: x - 1e-8 * x.mean(0, keepdim=True)),
    "rows in another order": lambda: model(after=lambda y: y.roll(1, 0)),
    "a parameter for each place": lambda: model(before=Places()),
    "a fixed batch": lambda: model(after=lambda y: y.reshape(7, -1)),
    "rows folded into channels": lambda: model(after=lambda y: y.sum(0)),
}


@pytest.mark.parametrize("name", DEPENDENT)
def test_rows_that_depend_on_one_another_stay_together(monkeypatch, name):
    whole, _ = noise_of(DEPENDENT[name](), monkeypatch, 10**9)
    found, sizes = noise_of(DEPENDENT[name](), monkeypatch, 3 * ROW)
    assert sizes[-1] == 7
    assert found.at_gates == whole.at_gates
    assert torch.equal(found.outputs["output"], whole.outputs["output"])


def test_it_is_tried_once(monkeypatch):
    monkeypatch.setattr(float64, "_ELEMENTS_AT_ONCE", 3 * ROW)
    net = model().eval()
    reference, _ = reference_from_module(net, torch.randn(7, 3, 10, 10))
    tensors = reference.signature.tensors
    outputs, gates = record_gates(reference.swapped, reference.signature, tensors)
    replay, sizes = Float64Replay(reference.swapped, reference.signature), []
    replay.model.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    for _ in range(2):
        replay.noise(tensors, outputs, gates)
    assert sizes == [2, 2, 3, 1, 2, 2, 3]
