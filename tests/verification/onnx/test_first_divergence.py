"""The first departing tensor is found by looking at all of them, in order: bisection would name another one."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import nn

from scconv_deploy.graph.file import serialize
from scconv_deploy.model.prepare import reference_from_module
from scconv_deploy.records import tolerances
from scconv_deploy.runtimes.onnxruntime import RuntimeOptions
from scconv_deploy.verification.onnx.artifact_checks import ArtifactChecks
from scconv_deploy.verification.onnx.first_divergence import first_divergence, first_of, first_value, module_outputs
from scconv_deploy.verification.reference.pytorch import TorchReference
from scconv_deploy.verification.reference.run import ReferenceRun
from scconv_deploy.verification.ruler import AgainstNoise
from scconv_deploy.verification.samples import noise_samples
from scconv_deploy.workflows.export import ExportOptions, export_to_ir
from tests.verification.judging import checks_by_hand

FAULT = 1e-2
"""Of the weights of a convolution: ten thousand times what any order of summation does to its output."""
LIFT = 1e7
"""Added behind it: relative to the sum the fault is then 1e-9, a hundredth of float32's own rounding."""


class Lifted(nn.Module):
    """ReLU of x plus a large constant: what is wrong in x is far below the rounding of the sum."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("by", torch.tensor([LIFT]))

    def forward(self, x):
        return torch.relu(x) + self.by  # without the ReLU the sum would go into the bias of the convolution before it


class Absorbing(nn.Sequential):
    """Convolutions, the data lifted behind the first one, so that an error of it vanishes there."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.lift = nn.Conv2d(4, 4, 3, padding=1, bias=False), Lifted()
        self.second, self.third = (nn.Conv2d(4, 4, 3, padding=1, bias=False) for _ in range(2))
        self.last = nn.Conv2d(4, 4, 1)


@pytest.fixture(scope="module")
def absorbing():
    """(reference, bytes of its model.onnx)."""
    torch.manual_seed(0)
    image = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    reference, log = reference_from_module(Absorbing().eval(), image)
    return reference, serialize(export_to_ir(reference, ExportOptions(), log))


ORDER = ["first", "lift", "second", "third", "last"]


@pytest.mark.parametrize(
    ("place", "beyond", "named"), [("first", [1, 0, 0, 0, 0], "last"), ("third", [0, 0, 0, 1, 1], "third")]
)
def test_the_place_of_a_fault(absorbing, place, beyond, named):
    reference, content = absorbing
    model = onnx.load_model_from_string(content)
    (weight,) = [t for t in model.graph.initializer if t.name == f"{place}.weight"]
    weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight) * (1 + FAULT), weight.name))
    source, options = TorchReference(reference), RuntimeOptions(threads=1)
    with ArtifactChecks(source, model, tolerances.table(), options) as checks:
        checks.add(source.run(noise_samples(reference.signature, 0)[0]))
    places = {value: path for value, (path, _) in module_outputs(model).items()}
    assert list(places.values()) == ORDER
    run = checks.replay.worst_run
    departs = [bool(first_of(source, model, run, checks, options, [value])) for value in places]
    assert departs == [bool(one) for one in beyond]  # behind the lift a fault of the first is within the tolerance
    assert ORDER[bisected(departs)] == named
    assert f"({place})" in first_divergence(source, model, checks, options)


def bisected(departs):
    """Where bisection ends that takes them to be sorted."""
    low, high = 0, len(departs) - 1
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if departs[middle] else (middle + 1, high)
    return low


def test_half_departs_where_it_was_compared_with_half(absorbing):
    """Its modules are rounded a hundred times farther from PyTorch's than float32's noise: no place of a fault."""
    checks = checks_by_hand(data=np.float16)
    checks.replay.worst_run = ReferenceRun("x", {}, {}, {}, {}, {}, {})
    for name, module, error in (("a", "first", 1e-3), ("b", "third", 1e-1)):
        checks.replay.layers.keep(name, module, AgainstNoise(error, 1e-3, "largest_floor.float16", 0.25))
    model = onnx.load_model_from_string(absorbing[1])
    assert module_outputs(model)
    found = first_value(TorchReference(absorbing[0]), model, checks, RuntimeOptions(threads=1))
    assert found.startswith("b (third)")


def test_an_index_of_a_half_file_keeps_its_own_limit(absorbing):
    """Of its type, not of the data's: between the two it has departed, and the other way round it has not."""
    checks = checks_by_hand(tolerances.table({"replay_multiple": 2, "half_multiple": 9}), np.float16)
    checks.replay.worst_run = ReferenceRun("x", {}, {}, {}, {}, {}, {})
    checks.replay.outputs["index"] = AgainstNoise(4e-3, 1e-3, "largest_floor.index", 1e-2)
    model = onnx.load_model_from_string(absorbing[1])
    arguments = (TorchReference(absorbing[0]), model, checks, RuntimeOptions(threads=1))
    assert first_value(*arguments).startswith("index")
    checks.replay.outputs["index"] = AgainstNoise(1e-3, 1e-3, "largest_floor.index", 1e-2)
    assert first_value(*arguments) == ""
