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
from scconv_deploy.gate import VARIANTS, gate_parameters, recognize, swap
from scconv_deploy.gate.bound import margins_and_bounds
from scconv_deploy.gate.probes import near_threshold
from scconv_deploy.gate.variant import open_mask
from scconv_deploy.pipeline import ExportOptions, export_to_ir, reference_from_module
from scconv_deploy.report.records import Link, StageLog
from scconv_deploy.rewrite.functions import FunctionKey, function_text
from scconv_deploy.verification import instrument
from scconv_deploy.verification.parity import Artifact, Reference, verify_onnx
from scconv_deploy.verification.samples import Sample, noise_samples
from scconv_deploy.verification.torch_reference import TorchReference
from tests import wild


def judge(reference, model, samples=None):
    data = model.SerializeToString()
    artifact = Artifact(model, "model.onnx", data)
    return verify_onnx(reference, artifact, samples or noise_samples(reference.signature, 0), StageLog())


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


# --- what is exported and what is judged -------------------------------------------------------------------------


class Calls(nn.Module):
    """Uses its SRUs as the argument says; a and b have equal parameters."""

    def __init__(self, use):
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 3)
        self.a, self.b = wild.randomize(wild.OriginalSRU(16, 4)), wild.randomize(wild.OriginalSRU(16, 4))
        self.c = wild.randomize(wild.OriginalSRU(16, 4), 3)
        self.use = use

    def forward(self, image):
        return self.use(self, self.conv(image))


def unused_first_call(net, x):
    net.a(x + 1)
    return net.a(x) + net.c(x)


REDUNDANT = {
    "the first call is not used": (unused_first_call, ["a#2", "c"], "no output depends on it"),
    "two equal calls": (lambda net, x: net.a(x) + 2 * net.a(x), ["a"], "a computes the same"),
    "two equal modules": (lambda net, x: net.a(x) + 2 * net.b(x), ["a"], "a computes the same"),
}


def export_of(model):
    reference, log = reference_from_module(model, torch.randn(2, 3, 10, 10, generator=torch.manual_seed(0)))
    return reference, onnx.load_model_from_string(serialize(export_to_ir(reference, ExportOptions(), log)))


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
    """Every SRU agrees, the whole does not: the parent treats a swapped one otherwise."""
    torch.manual_seed(0)
    net = Calls(lambda net, x: net.a(x) * (3 if isinstance(net.a, wild.OriginalSRU) else 1)).eval()
    reference, model = export_of(net)
    report = judge(reference, model)
    assert check_of(report, "gates").status == "passed"
    assert check_of(report, "whole model").status == "failed"
    assert "swapped against given" in check_of(report, "whole model").reason


class Nudged(wild.OriginalSRU):
    """Turns the gates that rounding cannot be sure of."""

    def forward(self, x):
        gamma, beta, variant = self.gn.gamma, self.gn.beta, replace(VARIANTS["groupbn-hard"], num_groups=4)
        margin, bound, _ = margins_and_bounds(x, gate_parameters(gamma, beta, variant), variant)
        mask = open_mask(x, gamma, beta, variant) ^ (margin.abs() <= 0.5 * bound)
        return wild.cross(mask * x, ~mask * x)


def test_explained_flips_between_given_and_swapped_are_replayed():
    torch.manual_seed(0)
    net = nn.Sequential(wild.randomize(wild.OriginalSRU(16, 4)), nn.Conv2d(16, 4, 1)).eval()
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(2, 16, 8, 8, generator=generator)
    variant = replace(VARIANTS["groupbn-hard"], num_groups=4)
    image = near_threshold(base, net[0].gn.gamma, net[0].gn.beta, variant, generator)
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
    assert "mask: replay error" in failures


def test_infinities_of_the_reference_are_no_fault():
    torch.manual_seed(0)
    net = Calls(lambda net, x: net.a(x).masked_fill(x < 0, -math.inf)).eval()
    reference, model = export_of(net)
    report = judge(reference, model)
    assert report, report.failures
    assert len(report.outputs) == 1


def test_nan_in_the_data_is_named_not_called_a_flip():
    torch.manual_seed(0)
    reference, model = export_of(Calls(lambda net, x: net.a(x)).eval())
    bad = torch.zeros(2, 3, 10, 10)
    bad[0, 0, 5, 5] = math.nan
    report = judge(reference, model, [Sample("bad", {"image": bad})])
    assert "a in PyTorch" in check_of(report, "finite").reason
    assert "unexplained" not in " ".join(report.failures)


def test_an_output_of_another_shape_or_type_fails(tiny_reference, model):
    head = next(n for n in model.graph.node if n.output[0] == "logits")
    head.output[0] = "logits_before"
    model.graph.node.append(helper.make_node("Cast", ["logits_before"], ["logits"], to=onnx.TensorProto.DOUBLE))
    model.graph.output[0].type.tensor_type.elem_type = onnx.TensorProto.DOUBLE
    reason = check_of(judge(tiny_reference[0], model), "contract").reason
    assert "output logits is float64[2, 5], PyTorch's float32[2, 5]" in reason


def test_outputs_in_another_order_are_refused(tiny_reference, model):
    outputs = list(model.graph.output)
    del model.graph.output[:]
    model.graph.output.extend(outputs[::-1])
    with pytest.raises(UsageError, match="outputs are features, logits; the reference's logits, features"):
        judge(tiny_reference[0], model)


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


TAMPERED = {
    "a standard operator redefined": (
        lambda m: m.functions.append(
            onnx.parser.parse_function('<domain: "", opset_import: ["" : 18]> Relu (x) => (y) { y = Neg (x) }')
        ),
        "redefines the standard operator Relu",
    ),
    "an attribute added": (lambda m: set_attribute(m, "alpha", 1.0), "unknown attribute alpha"),
}


@pytest.mark.parametrize("name", TAMPERED)
def test_what_the_contract_does_not_know_fails_the_static_link(tiny_reference, model, name):
    tamper, words = TAMPERED[name]
    tamper(model)
    source = TorchReference(tiny_reference[0])
    run = source.run(noise_samples(tiny_reference[0].signature, 0)[0])
    sites = {name: found.site for name, found in run.sites.items()}
    from scconv_deploy.verification import static

    problems = static.foreign_functions(model) + [
        static.check_site(model, node, sites["a.SRU"]).reason
        for site, node in instrument.sites(model).items()
        if site == "a.SRU"
    ]
    assert words in " ".join(problems)
