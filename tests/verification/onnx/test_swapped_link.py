"""The first link: PyTorch as given against PyTorch with its SRUs swapped; and the sites that need no node."""

from dataclasses import replace

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from scconv_deploy.gate.gate import Gate
from scconv_deploy.gate.probes import near_threshold
from scconv_deploy.gate.variant import VARIANTS
from scconv_deploy.graph import instrument
from scconv_deploy.graph.file import serialize
from scconv_deploy.model.prepare import reference_from_module
from scconv_deploy.verification.onnx.parity import Reference
from scconv_deploy.workflows.export import ExportOptions, export_to_ir
from tests import wild
from tests.verification.judging import Calls, check_of, export_of, judge


def _with_module(found, module):
    from dataclasses import fields

    from scconv_deploy.gate.recognize import RecognizedSRU

    return RecognizedSRU(**{f.name: getattr(found, f.name) for f in fields(found)} | {"module": module})


def test_a_reference_that_differs_from_its_variant_fails_the_first_link(tiny_reference, model):
    """As if recognition had been fooled: the module as given inverts its gate."""
    reference = tiny_reference[0]
    given = wild.InvertedSRU(16, 4)
    given.load_state_dict(reference.model.a.SRU.state_dict())
    good = reference.model.a.SRU
    found = reference.recognition.srus[0]
    assert found.module is good
    try:
        reference.model.a.SRU = given.eval()
        fooled = replace(reference.recognition, srus=(_with_module(found, given), *reference.recognition.srus[1:]))
        report = judge(Reference("fooled", reference.model, reference.swapped, fooled, reference.signature), model)
    finally:
        reference.model.a.SRU = good
    assert report.links[0].status == "failed"
    assert "unexplained" in report.links[0].reason


def unused_first_call(net, x):
    net.a(x + 1)
    return net.a(x) + net.c(x)


REDUNDANT = {
    "the first call is not used": (unused_first_call, ["a#2", "c"], "no output depends on it"),
    "two equal calls": (lambda net, x: net.a(x) + 2 * net.a(x), ["a"], "a computes the same"),
    "two equal modules": (lambda net, x: net.a(x) + 2 * net.b(x), ["a"], "a computes the same"),
}


@pytest.mark.parametrize("name", REDUNDANT)
def test_sites_that_an_exporter_may_drop_need_no_node(name):
    use, kept, reason = REDUNDANT[name]
    torch.manual_seed(0)
    reference, model = export_of(Calls(use).eval())
    assert list(instrument.sites(model)) == kept
    report = judge(reference, model)
    assert report, report.failures
    statics = {sru.site: sru.static for sru in report.srus}
    (missing,) = (check for check in statics.values() if check.status == "not run")
    assert reason in missing.reason
    assert [site for site, check in statics.items() if check.status == "passed"] == kept


def test_a_model_that_does_other_than_its_modules_fails_the_first_link():
    """Every SRU agrees, the whole does not: as if the parent treated a swapped one otherwise."""
    torch.manual_seed(0)
    net = Calls(lambda net, x: net.a(x)).eval()
    reference, model = export_of(net)
    net.use = lambda net, x: 3 * net.a(x)
    report = judge(reference, model)
    assert check_of(report, "gates").status == "passed"
    assert check_of(report, "whole model").status == "failed"
    assert "swapped against given" in check_of(report, "whole model").reason


def gate_of(module):
    return Gate(replace(VARIANTS["groupbn-hard"], num_groups=4), module.gn.gamma, module.gn.beta)


class Nudged(wild.OriginalSRU):
    """Turns the gates that rounding cannot be sure of."""

    def forward(self, x):
        gate = gate_of(self)
        found = gate.margins(x)
        mask = gate.mask(x) ^ torch.from_numpy(np.abs(found.margin) <= 0.5 * found.bound)
        return wild.cross(mask * x, ~mask * x)


def test_explained_flips_between_given_and_swapped_are_replayed():
    torch.manual_seed(0)
    net = nn.Sequential(wild.randomize(wild.OriginalSRU(16, 4)), nn.Conv2d(16, 4, 1)).eval()
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(2, 16, 8, 8, generator=generator)
    image = near_threshold(base, gate_of(net[0]), generator)
    reference, log = reference_from_module(net, image)
    model = onnx.load_model_from_string(serialize(export_to_ir(reference, ExportOptions(), log)))
    good, given = net[0], wild.randomize(Nudged(16, 4))
    net[0] = given
    found = _with_module(reference.recognition.srus[0], given)
    assert found.module is not good
    nudged = Reference(
        "nudged", net, reference.swapped, replace(reference.recognition, srus=(found,)), reference.signature
    )
    report = judge(nudged, model)
    flips = report.srus[0].swapped
    assert (flips.flips > 0, flips.unexplained) == (True, 0)
    assert report.outputs[0].end_to_end.relative_l2 > 1e-4  # the flips show, free-running
    assert check_of(report, "whole model").status == "passed"
    assert report, report.failures
