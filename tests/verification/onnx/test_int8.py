"""The proof of an int8 file: against fake-quantised PyTorch, undamaged and damaged."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from onnx import numpy_helper

from scconv_deploy.graph.file import serialize
from scconv_deploy.graph.quantization import read_quantization
from scconv_deploy.graph.types import ELEMENT, precision_of
from scconv_deploy.model.fake_quantize import fake_quantized, quantized_weights
from scconv_deploy.model.replay import record_gates
from scconv_deploy.precision.half import HalfOptions, converted
from scconv_deploy.records import tolerances
from scconv_deploy.records.quantization import METADATA, REDUCED_CODE
from scconv_deploy.records.stage import StageLog
from scconv_deploy.verification.checks.quantizers import Quantizers
from scconv_deploy.verification.reference.pytorch import TorchReference
from scconv_deploy.verification.reference.quantized import QuantizedReference
from scconv_deploy.verification.samples import Sample
from scconv_deploy.workflows.export import ExportOptions, export_to_ir
from tests import int8
from tests.int8 import FAULTS, LAYER, failed_checks, judge, quantize


@pytest.fixture(scope="module")
def made(exported):
    """(reference, its float32 file, its int8 file)."""
    proto = onnx.load_model_from_string(exported[1])
    return exported[0], proto, quantize(proto)


def copied(model: onnx.ModelProto) -> onnx.ModelProto:
    return onnx.ModelProto.FromString(model.SerializeToString())


def checks_of(report):
    return {check.name: check for link in report.links for check in link.checks}


def test_undamaged_it_passes_scales_and_codes_bit_for_bit(made):
    report = judge(made[0], made[2])
    assert report, report.failures
    found = checks_of(report)
    assert found["scales"].reason == "scales of 21 inputs are those of the record, of 18 weights PyTorch's, bit for bit"
    assert found["weight codes"].reason == "35,088 int8 weights are PyTorch's, code for code"
    assert "at 21 places" in found["codes"].reason
    assert sum(sru.teacher_forced.unexplained for sru in report.srus) == 0
    assert {link.name: link.status for link in report.links} == {
        "PyTorch with SRUs swapped": "passed", "onnxruntime": "not run", "budget": "not run", "precision": "passed",
        "engine": "not run",
    }  # fmt: skip
    assert "gates changed" in found["budget"].reason


def test_without_its_record_the_headline_says_that_its_scales_are_not_proved(made):
    model = copied(made[2])
    kept = [entry for entry in model.metadata_props if entry.key != METADATA]
    del model.metadata_props[:]
    model.metadata_props.extend(kept)
    report = judge(made[0], model)
    assert report, report.failures
    assert "not proved: scales" in report.headline
    assert "not proved" not in judge(made[0], made[2]).headline
    check = checks_of(report)["scales"]
    assert check.status == "not run"
    assert "18 of the weights' are those of PyTorch's largest magnitudes, bit for bit" in check.reason


def test_every_stored_weight_of_a_module_is_compared(made):
    """A second call may have a copy of its own."""
    model = copied(made[2])
    found = read_quantization(model)
    site = next(one for one in found.layers if one.path == LAYER)
    again = replace(site, call=2, weights=replace(site.weights, name="copy", scales=site.weights.scales * 2))
    expected = QuantizedReference(made[0], found).expected
    found.layers.append(again)
    check = Quantizers(expected, tolerances.table({})).checks()[0]
    assert check.status == "failed"
    assert f"scales of {LAYER} differ in" in check.reason


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_caught_by_the_checks_that_should(made, name):
    fault, model = FAULTS[name], copied(made[2])
    fault.damage(model)
    assert model.SerializeToString() != made[2].SerializeToString()
    failed = failed_checks(judge(made[0], model))
    assert fault.caught <= failed
    assert bool(fault.caught) == bool(failed), failed
    assert bool(fault.hidden) != bool(fault.caught)


def test_a_weight_on_a_tie_may_have_either_code(made):
    """A BatchNorm folded otherwise, or a quotient for a product, may round a tie to the other side."""
    reference, _, model = made
    with int8.weight_on_a_tie(reference, model) as with_code:
        for code, passes in ((10, True), (11, True), (12, False)):
            check = checks_of(judge(reference, with_code(code)))["weight codes"]
            assert (check.status == "passed") == passes, (code, check.reason)


def test_unsigned_activations_are_proved_too(made):
    model = quantize(made[1], target="cpu")
    kinds = {t.data_type for t in model.graph.initializer if t.name.endswith("_zero_point") and not t.dims}
    assert kinds == {onnx.TensorProto.UINT8}
    report = judge(made[0], model)
    assert report, report.failures
    assert checks_of(report)["scales"].status == "passed"


def test_weights_of_a_reduced_range_are_proved_and_keep_their_codes_small(made):
    model = quantize(made[1], "cpu", REDUCED_CODE)
    codes = [numpy_helper.to_array(t) for t in model.graph.initializer if t.name.endswith("_quantized")]
    assert {int(np.abs(one).max()) for one in codes} == {REDUCED_CODE}
    report = judge(made[0], model)
    assert report, report.failures
    found = checks_of(report)
    assert found["scales"].reason.startswith("scales of 21 inputs are those of the record, of 18 weights PyTorch's")
    assert found["integer kernels"].status == "passed"
    damaged = copied(model)
    entry = next(entry for entry in damaged.metadata_props if entry.key == METADATA)
    entry.value = entry.value.replace(f'"largest_code": {REDUCED_CODE}', '"largest_code": 127')
    assert "scales" in failed_checks(judge(made[0], damaged)), "the record does not say what the weights are"


@pytest.mark.parametrize("options", [{"keep": ("net.layer2.0.*",)}, {"only": (LAYER, "net.conv1")}])
def test_another_choice_of_layers_is_proved_too(made, options):
    model = quantize(made[1], **options)
    layers = {site.path for site in read_quantization(model).layers}
    assert (LAYER in layers) == ("only" in options)
    report = judge(made[0], model)
    assert report, report.failures


@pytest.fixture(scope="module")
def mixed():
    return int8.mixed()


def test_what_networks_hold_besides_is_proved_too(mixed):
    """A Concat whose inputs share a scale, an operator of its own for the padding, a module called twice."""
    model = quantize(mixed[1])
    found = read_quantization(model)
    assert [site.call for site in found.layers if site.path == "twice"] == [1, 2]
    assert len(found.joined) == 2
    assert {site.path for site in found.layers} >= {"dw", "second", "twice"}
    assert {(skip.path, skip.addition) for skip in found.skips} == {("", 1), ("", 2), ("", 3)}
    report = judge(mixed[0], model)
    assert report, report.failures
    assert "at 15 places" in checks_of(report)["codes"].reason


def test_all_layers_with_unsigned_activations_are_proved_too(mixed):
    model = quantize(mixed[1], target="cpu", only=("*",))
    assert {site.path for site in read_quantization(model).layers} >= {"stem", "squeeze", "fc"}
    report = judge(mixed[0], model)
    assert report, report.failures


def test_a_scale_of_one_input_of_a_concat_alone_is_a_fault(mixed):
    model = copied(quantize(mixed[1]))
    value = next(iter(read_quantization(model).joined))
    int8.edit(model, f"{value}_scale", lambda scale: scale * np.float32(1.01))
    report = judge(mixed[0], model)
    assert "several scales" in checks_of(report)["scales"].reason
    assert failed_checks(report) == {"scales"}


@pytest.fixture(scope="module")
def in_float32(exported):
    """The float32 file in an opset whose operators take both halves."""
    return ir.from_proto(
        onnx.load_model_from_string(serialize(export_to_ir(exported[0], ExportOptions(opset=22), StageLog())))
    )


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_int8_on_top_of_half_is_proved_too(made, in_float32, precision):
    """Scales and weights are rounded to half before codes are made; the rest is judged as a half file is."""
    half = ir.to_proto(converted(in_float32, HalfOptions(precision)).model)
    model = quantize(half)
    assert precision_of(model) == precision
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    assert stored[f"{LAYER}.weight_scale"].data_type == stored[f"{LAYER}.weight_bias"].data_type == ELEMENT[precision]
    report = judge(made[0], model)
    assert report, report.failures
    found = checks_of(report)
    assert found["scales"].reason.startswith("scales of 21 inputs are those of the record, of 18 weights PyTorch's")
    assert found["weight codes"].reason == "35,088 int8 weights are PyTorch's, code for code"
    assert found["codes"].status == found["replay"].status == found["rounding"].status == "passed"
    for name in ("scale of a weight off by one ulp", "int8 weight off by one code", "quantised cut"):
        damaged = copied(model)
        fault = FAULTS[name]
        if "ulp" in name:
            int8.edit(damaged, f"{LAYER}.weight_scale", lambda s: (s.view(np.uint16) + 1).view(s.dtype))
        else:
            fault.damage(damaged)
        assert fault.caught <= failed_checks(judge(made[0], damaged)), name


def test_pytorch_rounds_to_the_levels_with_the_batchnorm_folded_in(made):
    reference, _, model = made
    found = read_quantization(model)
    fake = fake_quantized(reference, found.plan)
    layer, norm = (reference.model.get_submodule(path) for path in (LAYER, "net.layer2.0.bn1"))
    x = int8.image(3, rows=1).expand(1, 3, int8.SIDE, int8.SIDE).repeat(1, 6, 1, 1)[:, :16]
    y = fake.model.get_submodule("net.layer2.0.bn1")(fake.model.get_submodule(LAYER)(x))
    levels = next(site.quantizer.levels for site in found.layers if site.path == LAYER)
    weights = quantized_weights(reference.model, found.plan)[LAYER]
    rounded = np.clip(np.rint(x.numpy() / np.float32(levels.scale)), -128, 127) * np.float32(levels.scale)
    factor = norm.weight / (norm.running_var + norm.eps).sqrt()
    torch.testing.assert_close(weights.weight, layer.weight * factor[:, None, None, None])
    assert weights.codes.abs().amax((1, 2, 3)).eq(127).all(), "the largest weight of each channel has the last code"
    kernel = weights.codes * weights.scales[:, None, None, None]
    shift = norm.bias - norm.running_mean * factor
    expected = torch.nn.functional.conv2d(torch.from_numpy(rounded), kernel, shift, layer.stride, layer.padding)
    torch.testing.assert_close(y, expected)
    with torch.no_grad():
        cost = float((y - norm(layer(x))).norm() / y.norm())
    assert cost > 1e-4, "rounding costs something"


def test_the_reference_is_the_users_module_and_its_weights_stay(made):
    reference, _, model = made
    before = {name: value.copy() for name, value in TorchReference(reference).weights.items()}
    source = QuantizedReference(reference, read_quantization(model))
    run = source.run(Sample("seeded", {"image": int8.image(9)}))
    assert set(read_quantization(model).quantizers) <= set(run.others)
    after = TorchReference(reference).weights
    assert all(np.array_equal(before[name], after[name]) for name in before)
    assert f"{LAYER}.weight" not in source.weights
    _, gates = record_gates(reference.swapped, reference.signature, {"image": int8.image(9)})
    assert {site: gate.mask.numpy().tobytes() for site, gate in gates.items()} == {
        site: mask.tobytes() for site, mask in run.unquantized_masks.items()
    }


def test_parameters_of_srus_are_float32_constants_of_their_own(made):
    model = made[2]
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    nodes = [node for node in model.graph.node if node.domain == "scconv"]
    names = [name for node in nodes for name in node.input[1:]]
    assert len(nodes) == 3
    assert len(set(names)) == len(names)
    assert {stored[name].data_type for name in names} == {onnx.TensorProto.FLOAT}
    readers = [name for node in model.graph.node for name in node.input if name in names]
    assert len(readers) == len(names)
    assert {f.SerializeToString() for f in model.functions} == {f.SerializeToString() for f in made[1].functions}
    biases = [node.input[2] for node in model.graph.node if node.op_type == "Conv" and len(node.input) > 2]
    assert {numpy_helper.to_array(stored[name]).dtype for name in biases} == {np.dtype(np.float32)}
