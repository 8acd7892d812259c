"""The first departing tensor is found by looking at all of them, in order: bisection would name another one."""

from __future__ import annotations

import onnx
import pytest

from scconv_deploy.verification import tolerances
from scconv_deploy.verification.artifact import ArtifactMeasurement
from scconv_deploy.verification.departure import first_departure, first_of, module_outputs
from scconv_deploy.verification.measure import Measured
from scconv_deploy.verification.runners.onnxruntime import RuntimeOptions
from scconv_deploy.verification.samples import noise_samples
from scconv_deploy.verification.torch_reference import TorchReference
from tests.mutations import MUTATIONS

MISSED = {  # fault: module of the value where it begins, module that bisection names
    "one weight changed by 1e-4 of its norm": ("net.layer2.0.conv2.CRU.GWC", "net.layer2.0.bn2"),
    "the same where a BatchNorm is folded in": ("net.bn1", "net.layer1.0.bn2"),
}


@pytest.mark.parametrize("name", MISSED)
def test_a_fault_that_bisection_would_misplace(exported, name):
    reference, content = exported
    model = onnx.load_model_from_string(content)
    MUTATIONS[name].damage(model, reference.model)
    source, measured, options = TorchReference(reference), Measured(tolerances.table()), RuntimeOptions(threads=1)
    with ArtifactMeasurement(source, model, measured, options) as measurement:
        measurement.run(source.run(noise_samples(reference.signature, 0)[0]))
    places = {value: path for value, (path, _) in module_outputs(model).items()}
    run = measured.worst_run
    departs = [bool(first_of(source, model, run, measured, options, [value])) for value in places]
    assert departs != sorted(departs)  # beyond the tolerance, and within it again further on
    begins, named = MISSED[name]
    assert list(places.values())[departs.index(True)] == begins
    assert list(places.values())[bisected(departs)] == named
    assert f"({begins})" in first_departure(source, model, measured, options)


def bisected(departs):
    """Where bisection ends that takes them to be sorted."""
    low, high = 0, len(departs) - 1
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if departs[middle] else (middle + 1, high)
    return low
