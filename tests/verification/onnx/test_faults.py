"""What damages an artifact is caught by the check that is there for it; see also :mod:`.test_mutations`."""

import json

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from scconv_deploy.graph import instrument
from scconv_deploy.verification.reference.pytorch import TorchReference
from scconv_deploy.verification.samples import noise_samples
from tests.verification.judging import check_of, damage_weight, edit_body, initializer, judge, set_attribute


def scale_cut(model, edit):
    tensor = initializer(model, "a.SRU", 1)
    tensor.CopyFrom(numpy_helper.from_array(edit(numpy_helper.to_array(tensor).copy()), tensor.name))


def one_ulp(cut):
    cut[0] = np.nextafter(cut[0], np.float32(np.inf))
    return cut


FAULTS = {
    "cut one ulp off": (lambda m: scale_cut(m, one_ulp), "static", "cut differs in 1 of 16"),
    "cut moved by half a deviation": (
        lambda m: scale_cut(m, lambda c: c + np.float32(0.5)), "teacher-forced gates", "a.SRU",
    ),
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


def test_nodes_are_known_by_what_they_compute_and_not_by_their_names(tiny_reference, model):
    """Two calls of one module have the same parameters: only their inputs tell them apart."""
    nodes = instrument.sites(model)
    first, second, other = nodes["a.SRU"], nodes["a.SRU#2"], nodes["c"]
    first.name, second.name, other.name = "Concat_7", "Concat_3", "a.SRU"
    report = judge(tiny_reference[0], model)
    assert report
    assert check_of(report, "static").reason == "4 SRUs are bit for bit the reference's"
    assert check_of(report, "free-running gates").reason.startswith("running free, gates changed: 0 of")


def test_a_renamed_node_with_other_parameters_is_compared_with_the_module_in_its_place(tiny_reference, model):
    tensor = initializer(model, "c", 3)
    value = numpy_helper.to_array(tensor).copy()
    value[2] *= np.float32(1 + 1e-6)
    tensor.CopyFrom(numpy_helper.from_array(value, tensor.name))
    instrument.sites(model)["c"].name = "elsewhere"
    assert "c: scale differs in 1 of 16" in check_of(judge(tiny_reference[0], model), "static").reason


def test_nan_in_an_output_is_named_and_not_compared(tiny_reference, model):
    tensor = next(t for t in model.graph.initializer if t.name == "head.bias")
    value = numpy_helper.to_array(tensor).copy()
    value[1] = np.nan
    tensor.CopyFrom(numpy_helper.from_array(value, tensor.name))
    report = judge(tiny_reference[0], model)
    assert "the artifact's output logits" in check_of(report, "finite").reason
    assert [o.name for o in report.outputs] == ["features"]
    json.dumps(report.as_json(), allow_nan=False)


def test_an_output_of_another_shape_or_type_fails(tiny_reference, model):
    head = next(n for n in model.graph.node if n.output[0] == "logits")
    head.output[0] = "logits_before"
    model.graph.node.append(helper.make_node("Cast", ["logits_before"], ["logits"], to=onnx.TensorProto.DOUBLE))
    model.graph.output[0].type.tensor_type.elem_type = onnx.TensorProto.DOUBLE
    reason = check_of(judge(tiny_reference[0], model), "contract").reason
    assert "output logits is float64[2, 5], PyTorch's float32[2, 5]" in reason


TAMPERED = {
    "a standard operator redefined": (
        lambda m: m.functions.append(
            onnx.parser.parse_function('<domain: "", opset_import: ["" : 18]> Relu (x) => (y) { y = Neg (x) }')
        ),
        "redefines the standard operator Relu",
    ),
    "two nodes of one name": (
        lambda m: setattr(instrument.sites(m)["b.SRU"], "name", "a.SRU"),
        "2 nodes are called a.SRU",
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
    from scconv_deploy.verification.checks import static

    problems = static.whole_model(model) + [
        static.check_site(model, node, sites["a.SRU"]).reason
        for site, node in instrument.sites(model).items()
        if site == "a.SRU"
    ]
    assert words in " ".join(problems)
