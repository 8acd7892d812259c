"""The verdict: healthy artifacts pass, and the report says what was seen."""

import json
import math

import numpy as np
import onnx
import torch
from onnx import helper, numpy_helper
from torch import nn

from scconv_deploy.gate.recognize import recognize
from scconv_deploy.gate.swap import swap
from scconv_deploy.graph import instrument
from scconv_deploy.graph.file import serialize
from scconv_deploy.model.prepare import reference_from_module
from scconv_deploy.records.parity import Link
from scconv_deploy.verification.samples import Sample
from scconv_deploy.workflows.export import ExportOptions, export_to_ir
from tests import wild
from tests.verification.judging import Calls, check_of, export_of, initializer, judge


def test_a_healthy_artifact_passes(tiny_reference, model):
    report = judge(tiny_reference[0], model)
    assert report
    assert report.verdict == "passed"
    assert report.failures == ()
    assert [link.status for link in report.links] == ["passed", "passed", "not run", "not run"]
    assert [sru.site for sru in report.srus] == ["a.SRU", "b.SRU", "c", "a.SRU#2"]
    for sru in report.srus:
        assert sru.static.status == "passed"
        assert (
            sru.teacher_forced.gates == (2 + 1 + 8 + 7) * 16 * 8 * 8
        )  # the example, the ends of the batch, an odd one
        assert sru.teacher_forced.unexplained == 0
        assert 0.1 < sru.open_share < 0.9
    assert {o.name for o in report.outputs} == {"logits", "features"}
    for output in report.outputs:
        assert output.floor_measured
        assert output.replay_ratio <= 8
        assert 2**-24 <= output.noise_floor < 1e-5
    assert len(report.samples) == 4
    assert len(report.artifact_sha256) == 64


def test_report_is_json_with_the_promised_fields(tiny_reference, model):
    document = json.loads(json.dumps(judge(tiny_reference[0], model).as_json(), allow_nan=False))
    assert document["verdict"] == "passed"
    assert document["schema_version"] == 1
    forced = document["srus"][0]["teacher_forced"]
    assert (forced["gates"], forced["flips"], forced["unexplained"]) == ((2 + 1 + 8 + 7) * 16 * 8 * 8, 0, 0)
    assert document["tolerances"]["replay_multiple"]["value"] == 4
    assert all(document["tolerances"][name]["reason"] for name in document["tolerances"])
    assert document["provenance"]["torch"] == torch.__version__


def test_a_link_is_judged_by_its_checks():
    from scconv_deploy.records.parity import Check

    passed, failed, skipped = (Check("c", s, s) for s in ("passed", "failed", "not run"))
    assert Link.of("l", [passed, failed, skipped]).status == "failed"
    assert Link.of("l", [skipped, passed]).status == "passed"
    assert Link.of("l", [skipped]).status == "not run"


def test_healthy_exports_of_many_seeds_pass():
    """It does not cry wolf: seeds, batch sizes and scales on one network."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 32, 3, padding=1), wild.randomize(wild.OriginalScConv(32)), nn.ReLU()).eval()
    reference, log = reference_from_module(net, torch.randn(2, 3, 12, 12))
    model = onnx.load_model_from_string(serialize(export_to_ir(reference, ExportOptions(mask_form="where"), log)))
    images = [torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(seed)) for seed in range(4)]
    samples = [Sample("drawn", {"input": scale * image}) for image in images for scale in (1e-2, 1.0, 50.0)]
    report = judge(reference, model, samples)
    assert report, report.failures
    assert report.srus[0].teacher_forced.gates == 12 * 2 * 32 * 144


def test_recognition_and_swap_are_what_the_reference_holds(tiny_reference):
    reference = tiny_reference[0]
    again = recognize(reference.model, reference.signature.args, reference.signature.kwargs)
    assert [f.path for f in again.srus] == [f.path for f in reference.recognition.srus]
    assert set(dict(swap(reference.model, again).named_modules())) == set(dict(reference.swapped.named_modules()))


def test_outputs_of_indices_and_masks_are_counted():
    torch.manual_seed(0)
    net = Calls(lambda net, x: {"index": net.a(x).argmax(1), "mask": net.a(x) > 0, "y": net.a(x)}).eval()
    reference, model = export_of(net)
    report = judge(reference, model)
    assert report, report.failures
    assert {o.name: o.noise_floor for o in report.outputs if o.name != "y"} == {"index": 1e-4, "mask": 1e-4}
    tensor = next(t for t in model.graph.initializer if t.name == "conv.bias")
    tensor.CopyFrom(numpy_helper.from_array(-numpy_helper.to_array(tensor), tensor.name))
    failures = " ".join(judge(reference, model).failures)
    assert "index: replay error" in failures
    assert "gates of no known SRU, same input" in failures  # in the replay the mask is PyTorch's


def test_infinities_of_the_reference_are_no_fault():
    torch.manual_seed(0)
    net = Calls(lambda net, x: net.a(x).masked_fill(x < 0, -math.inf)).eval()
    reference, model = export_of(net)
    report = judge(reference, model)
    assert report, report.failures
    assert len(report.outputs) == 1


def test_parameters_may_be_constants_behind_an_identity(tiny_reference, model):
    tensor = initializer(model, "a.SRU", 1)
    old = tensor.name
    value = numpy_helper.to_array(tensor).copy()
    model.graph.initializer.remove(tensor)
    constant = helper.make_node("Constant", [], ["held"], value=numpy_helper.from_array(value))
    for index, node in enumerate((constant, helper.make_node("Identity", ["held"], [old]))):
        model.graph.node.insert(index, node)
    assert judge(tiny_reference[0], model)
    value[0] = np.nextafter(value[0], np.float32(np.inf))
    model.graph.node[0].CopyFrom(helper.make_node("Constant", [], ["held"], value=numpy_helper.from_array(value)))
    assert "cut differs in 1" in check_of(judge(tiny_reference[0], model), "static").reason


def test_an_initializer_may_have_any_name(tiny_reference, model):
    old = instrument.sites(model)["a.SRU"].input[1]
    initializer(model, "a.SRU", 1).name = "open"
    for node in model.graph.node:
        node.input[:] = ["open" if name == old else name for name in node.input]
    assert judge(tiny_reference[0], model)
