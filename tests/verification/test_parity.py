"""The verdict: healthy artifacts pass, damaged ones fail, and the report says where."""

import json
import math
from dataclasses import replace

import numpy as np
import onnx
import pytest
import torch
from onnx import helper, numpy_helper
from torch import nn

from scconv_deploy.errors import UsageError
from scconv_deploy.exporters.onnx import serialize
from scconv_deploy.gate import recognize, swap
from scconv_deploy.pipeline import ExportOptions, export_to_ir, reference_from_module
from scconv_deploy.report.records import Link, StageLog
from scconv_deploy.rewrite.functions import FunctionKey, function_text
from scconv_deploy.verification import instrument
from scconv_deploy.verification.parity import Reference, verify_onnx
from scconv_deploy.verification.samples import Sample, noise_samples
from tests import wild


def judge(reference, model, samples=None):
    data = model.SerializeToString()
    return verify_onnx(
        reference, model, "model.onnx", data, samples or noise_samples(reference.signature, 0), StageLog()
    )


@pytest.fixture
def model(tiny_bytes):
    return onnx.load_model_from_string(tiny_bytes[0])


def check_of(report, name):
    """The check of this name; a failed one first, for there is one replay per output."""
    checks = [c for link in report.links for c in link.checks if c.name == name]
    return min(checks, key=lambda c: c.status != "failed")


def test_a_healthy_artifact_passes(tiny_reference, model):
    report = judge(tiny_reference[0], model)
    assert report
    assert report.verdict == "passed"
    assert report.failures == ()
    assert [link.status for link in report.links] == ["passed", "passed", "not run", "not run"]
    assert [sru.site for sru in report.srus] == ["a.SRU", "b.SRU", "c", "a.SRU#2"]
    for sru in report.srus:
        assert sru.static.status == "passed"
        assert sru.teacher_forced.gates == (2 + 1) * 16 * 8 * 8  # both samples
        assert sru.teacher_forced.unexplained == 0
        assert 0.1 < sru.open_share < 0.9
    assert {o.name for o in report.outputs} == {"logits", "features"}
    for output in report.outputs:
        assert output.floor_measured
        assert output.replay_ratio <= 8
        assert 2**-24 <= output.noise_floor < 1e-5
    assert len(report.samples) == 2
    assert len(report.artifact_sha256) == 64


def test_report_is_json_with_the_promised_fields(tiny_reference, model):
    document = json.loads(json.dumps(judge(tiny_reference[0], model).as_json(), allow_nan=False))
    assert document["verdict"] == "passed"
    assert document["schema_version"] == 1
    forced = document["srus"][0]["teacher_forced"]
    assert (forced["gates"], forced["flips"], forced["unexplained"]) == (3072, 0, 0)
    assert document["tolerances"]["replay_multiple"]["value"] == 8
    assert all(document["tolerances"][name]["reason"] for name in document["tolerances"])
    assert document["provenance"]["torch"] == torch.__version__


# --- faults ------------------------------------------------------------------------------------------------------


def initializer(model, site, index):
    name = instrument.sites(model)[site].input[index]
    return next(t for t in model.graph.initializer if t.name == name)


def scale_cut(model, edit):
    tensor = initializer(model, "a.SRU", 1)
    tensor.CopyFrom(numpy_helper.from_array(edit(numpy_helper.to_array(tensor).copy()), tensor.name))


def edit_body(model, old, new, operator="SRU"):
    key = FunctionKey(operator, False, "multiply", 18)
    text = function_text(key)
    assert text.count(old) == 1
    functions = [f for f in model.functions if f.name != operator]
    del model.functions[:]
    model.functions.extend([*functions, onnx.parser.parse_function(text.replace(old, new))])


def set_attribute(model, name, value):
    node = instrument.sites(model)["a.SRU"]
    kept = [a for a in node.attribute if a.name != name]
    del node.attribute[:]
    node.attribute.extend([*kept, helper.make_attribute(name, value)])


def one_ulp(cut):
    cut[0] = np.nextafter(cut[0], np.float32(np.inf))
    return cut


def swap_outputs(model):
    first, second = (node for node in model.graph.node if node.op_type == "Split" and node.domain == "")
    first.output[0], first.output[1] = first.output[1], first.output[0]
    assert second


def damage_weight(model, relative):
    tensor = next(t for t in model.graph.initializer if t.name == "stem.weight")
    value = numpy_helper.to_array(tensor).copy()
    value.flat[0] += relative * np.linalg.norm(value)
    tensor.CopyFrom(numpy_helper.from_array(value, tensor.name))


FAULTS = {
    "cut one ulp off": (lambda m: scale_cut(m, one_ulp), "static", "cut differs in 1 of 16"),
    "cut moved by 1e-3": (lambda m: scale_cut(m, lambda c: c + np.float32(1e-3)), "teacher-forced gates", "a.SRU"),
    "strict for inclusive": (
        lambda m: edit_body(m, "GreaterOrEqual (", "Greater ("), "static", "function body",
    ),
    "gate inverted": (lambda m: edit_body(m, "GreaterOrEqual (", "Less ("), "teacher-forced gates", "unexplained"),
    "halves not crossed": (
        lambda m: edit_body(m, "value_ints = [1, 0]", "value_ints = [0, 1]"), "replay", "noise floor",
    ),
    "wrong group count": (lambda m: set_attribute(m, "num_groups", 2), "teacher-forced gates", "unexplained"),
    "biased deviation": (lambda m: set_attribute(m, "ddof", 0), "static", "ddof is 0, expected 1"),
    "eps 1e-5 for 1e-10": (lambda m: set_attribute(m, "eps_std", 1e-5), "static", "eps_std"),
    "one weight changed by 1e-4": (lambda m: damage_weight(m, 1e-4), "replay", "noise floor"),
    "plugin namespace lost": (lambda m: set_attribute(m, "plugin_namespace", ""), "static", "plugin_namespace"),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_faults_are_caught_where_they_are(tiny_reference, model, name):
    damage, check, words = FAULTS[name]
    damage(model)
    report = judge(tiny_reference[0], model)
    assert not report
    failed = check_of(report, check)
    assert failed.status == "failed"
    assert words in failed.reason


def test_a_weight_of_the_soft_gate_is_under_the_static_link(tiny_reference, model):
    tensor = initializer(model, "c", 3)
    value = numpy_helper.to_array(tensor).copy()
    value[2] *= np.float32(1 + 1e-6)
    tensor.CopyFrom(numpy_helper.from_array(value, tensor.name))
    assert "c: scale differs in 1 of 16" in check_of(judge(tiny_reference[0], model), "static").reason


def test_a_renamed_node_is_missed(tiny_reference, model):
    instrument.sites(model)["c"].name = "elsewhere"
    reason = check_of(judge(tiny_reference[0], model), "static").reason
    assert "c: the artifact has no node of this name" in reason


def test_nan_in_an_output_is_named_and_not_compared(tiny_reference, model):
    tensor = next(t for t in model.graph.initializer if t.name == "head.bias")
    value = numpy_helper.to_array(tensor).copy()
    value[1] = np.nan
    tensor.CopyFrom(numpy_helper.from_array(value, tensor.name))
    report = judge(tiny_reference[0], model)
    assert "the artifact's output logits" in check_of(report, "finite").reason
    assert [o.name for o in report.outputs] == ["features"]
    json.dumps(report.as_json(), allow_nan=False)


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


def _with_module(found, module):
    from dataclasses import fields

    from scconv_deploy.gate import RecognizedSRU

    return RecognizedSRU(**{f.name: getattr(found, f.name) for f in fields(found)} | {"module": module})


# --- what cannot be run is said ----------------------------------------------------------------------------------


class Float32Only(nn.Module):
    """Cannot run in float64: it makes a float32 tensor of its own."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.register_buffer("unused", torch.zeros(1))

    def forward(self, x):
        return torch.nn.functional.linear(x, self.fc.weight.float(), None)


def test_an_assumed_floor_is_labelled():
    reference, log = reference_from_module(Float32Only().eval(), torch.ones(2, 4))
    model = onnx.load_model_from_string(serialize(export_to_ir(reference, ExportOptions(), log)))
    report = judge(reference, model)
    assert report
    (output,) = report.outputs
    assert (output.floor_measured, output.noise_floor) == (False, 1e-6)
    assert report.stages[-1].skipped[0][0] == "noise floor in float64"


def test_without_nodes_gates_are_not_run_and_the_outputs_decide(tiny_reference, model):
    inlined = onnx.inliner.inline_local_functions(model)
    report = judge(tiny_reference[0], inlined)
    assert check_of(report, "static").status == "not run"
    assert check_of(report, "teacher-forced gates").status == "not run"
    assert report.srus[0].teacher_forced is None
    assert check_of(report, "replay").status == "passed"
    assert report


def test_another_models_artifact_is_refused(tiny_reference, model):
    model.graph.input[0].name = "pixels"
    for node in model.graph.node:
        for index, name in enumerate(node.input):
            if name == "image":
                node.input[index] = "pixels"
    with pytest.raises(UsageError, match="inputs are pixels; the reference's image"):
        judge(tiny_reference[0], model)


def test_non_finite_inputs_are_reported_by_name(tiny_reference, model):
    bad = torch.full((2, 3, 16, 16), math.nan)
    report = judge(tiny_reference[0], model, [Sample("bad", {"image": bad})])
    assert "the input of a.SRU" in check_of(report, "finite").reason


def test_a_link_is_judged_by_its_checks():
    from scconv_deploy.report.records import Check

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
    images = [torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(seed)) for seed in range(12)]
    samples = [Sample("drawn", {"input": scale * image}) for image in images for scale in (1e-2, 1.0, 50.0)]
    report = judge(reference, model, samples)
    assert report, report.failures
    assert report.srus[0].teacher_forced.gates == 36 * 2 * 32 * 144


def test_recognition_and_swap_are_what_the_reference_holds(tiny_reference):
    reference = tiny_reference[0]
    again = recognize(reference.model, reference.signature.args, reference.signature.kwargs)
    assert [f.path for f in again.srus] == [f.path for f in reference.recognition.srus]
    assert set(dict(swap(reference.model, again).named_modules())) == set(dict(reference.swapped.named_modules()))


def test_a_reference_that_is_random_proves_nothing():
    class Random(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 1)

        def forward(self, x):
            return torch.nn.functional.dropout(self.conv(x), 0.5, training=True)

    torch.manual_seed(0)
    reference, log = reference_from_module(Random().eval(), torch.ones(2, 3, 8, 8))
    model = onnx.load_model_from_string(serialize(export_to_ir(reference, ExportOptions(), log)))
    report = judge(reference, model)
    assert not report
    assert "nothing can be judged by it" in check_of(report, "replay").reason


def test_a_child_in_train_mode_is_refused():
    net = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Dropout()).eval()
    net[1].train()
    with pytest.raises(UsageError, match="train mode"):
        reference_from_module(net, torch.ones(2, 3, 8, 8))
