"""Models trained with fake quantisation: exported with their own scales, proved against themselves, or refused."""

from __future__ import annotations

import copy

import numpy as np
import onnx
import pytest
import torch
import torch.ao.quantization as ao
from onnx import numpy_helper
from torch import nn

from scconv_deploy.errors import ModelError
from scconv_deploy.exporters.tensorrt.onnx_source import graph_facts
from scconv_deploy.graph.file import serialize
from scconv_deploy.graph.quantizer_forms import why_not_for_tensorrt
from scconv_deploy.graph.types import quantization_of
from scconv_deploy.model.prepare import reference_from_module
from scconv_deploy.records.stage import StageLog
from scconv_deploy.runtimes.onnxruntime import OnnxRuntimeRunner, RuntimeOptions
from scconv_deploy.verification.onnx.parity import Artifact, verify_onnx
from scconv_deploy.verification.samples import Sample
from scconv_deploy.workflows.export import ExportOptions, export_to_ir, in_precision
from tests import qat
from tests.int8 import failed_checks
from tests.mutations import edit

pytest.importorskip("sklearn", reason="the digits come with scikit-learn")


def exported(net, image):
    reference, log = reference_from_module(net, image)
    return reference, onnx.load_model_from_string(serialize(export_to_ir(reference, ExportOptions(), log)))


@pytest.fixture(scope="module")
def digits():
    """(network, test images, labels, reference, its file)."""
    net, images, labels = qat.trained()
    return net, images, labels, *exported(net, images[:4])


def judge(digits, model):
    artifact = Artifact(model, "model.onnx", model.SerializeToString())
    return verify_onnx(digits[3], artifact, [Sample("digits", {"image": digits[1][4:8]})], StageLog())


def checks_of(report):
    return {check.name: check for link in report.links for check in link.checks}


def test_a_trained_network_is_exported_with_its_own_scales_and_proved_against_itself(digits):
    net, images, labels, _, model = digits
    with torch.no_grad():
        expected = net(images).numpy()
    assert (expected.argmax(1) == labels.numpy()).mean() > 0.9
    stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    scale = net.conv.weight_fake_quant.scale.numpy()
    read = next(n for n in model.graph.node if n.input[0] == "conv.weight_quantized")
    assert stored[read.input[1]].tobytes() == scale.tobytes()
    assert stored["conv.weight_quantized"].dtype == np.int8
    scales = {float(stored[n.input[1]]) for n in model.graph.node if n.op_type == "QuantizeLinear"}
    own = [m for m in net.modules() if isinstance(m, ao.FakeQuantize) and m.scale.numel() == 1]
    assert scales == {float(m.scale) for m in own if bool(m.activation_post_process.max_val > -np.inf)}
    report = judge(digits, model)
    assert report.verdict == "passed", report.failures
    found = checks_of(report)
    for name in ("scales", "weight codes", "teacher-forced gates", "codes", "replay"):
        assert found[name].status == "passed", found[name]
    assert found["codes"].reason.startswith("codes of quantisers, same input: ")
    runner = OnnxRuntimeRunner(model, RuntimeOptions(optimization="none"))
    answers = np.concatenate([runner.run({"image": images[i : i + 4].numpy()})["output"] for i in range(0, 100, 4)])
    assert (answers.argmax(1) == expected[:100].argmax(1)).mean() >= 0.99


def test_every_layer_has_integer_weights_and_tensorrt_can_read_the_file(digits):
    model = digits[4]
    assert quantization_of(model) == "int8 (Q/DQ)"
    assert why_not_for_tensorrt(model) == ""
    layers = [node.name for node in model.graph.node if node.op_type in ("Conv", "Gemm")]
    assert list(graph_facts(model).quantized) == layers


def scaled(model):
    node = next(n for n in model.graph.node if n.op_type == "QuantizeLinear")
    edit(model, node.input[1], lambda value: value * np.float32(1.01))


def one_code(model):
    def change(codes):
        codes.flat[5] += 1 if codes.flat[5] < 100 else -1
        return codes

    edit(model, "conv.weight_quantized", change)


def weight_scale(model):
    node = next(n for n in model.graph.node if n.input[0] == "fc.weight_quantized")
    edit(model, node.input[1], lambda value: np.nextafter(value, np.float32(1)))


def bypassed(model):
    """The second reader of a pair takes the value as it was."""
    made = {output: node for node in model.graph.node for output in node.output}
    node = next(n for n in model.graph.node if n.op_type == "Conv" and n.input[0] in made
                and made[n.input[0]].op_type == "DequantizeLinear")  # fmt: skip
    pair = made[node.input[0]]
    node.input[0] = made[pair.input[0]].input[0]


@pytest.mark.parametrize(
    ("damage", "caught"),
    [(scaled, "scales"), (one_code, "weight codes"), (weight_scale, "scales"), (bypassed, "codes")],
)
def test_damage_is_caught(digits, damage, caught):
    model = onnx.ModelProto()
    model.CopyFrom(digits[4])
    damage(model)
    assert caught in failed_checks(judge(digits, model))


@pytest.mark.parametrize("options", [ExportOptions(precision="fp16")])
def test_another_precision_is_not_for_it(digits, options):
    model = export_to_ir(digits[3], ExportOptions(), StageLog())
    with pytest.raises(ModelError, match="fake quantisation and is int8 as it is, so --precision fp16"):
        in_precision(model, options, StageLog())


def test_a_file_without_quantisers_is_not_held_against_it(digits):
    plain = onnx.ModelProto()
    plain.CopyFrom(digits[4])
    for node in plain.graph.node:
        node.op_type = {"QuantizeLinear": "Identity", "DequantizeLinear": "Identity"}.get(node.op_type, node.op_type)
        if node.op_type == "Identity":
            del node.input[1:]
    with pytest.raises(ModelError, match=r"m.onnx has no quantisers, and QuantizedDigits was trained"):
        verify_onnx(digits[3], Artifact(plain, "m.onnx", b""), [], StageLog())


REFUSED = {
    "still observes": (lambda: qat.seen(qat.prepared()).apply(ao.enable_observer), "disable_observer"),
    "is off, so that": (lambda: qat.seen(qat.prepared()).apply(ao.disable_fake_quant), "enable_fake_quant"),
    "has the levels 0 to 127": (lambda: qat.seen(qat.prepared(qat.fake(0, 127))), "reduce_range=False"),
}  # fmt: skip


@pytest.mark.parametrize("words", REFUSED)
def test_what_is_no_int8_of_onnx_is_refused_in_one_line(words):
    make, remedy = REFUSED[words]
    with pytest.raises(ModelError, match=words) as error:
        reference_from_module(make(), torch.rand(2, 1, 8, 8))
    assert remedy in error.value.remedy


def test_a_quantiser_inside_an_sru_is_refused():
    net = qat.seen(qat.prepared())
    net.scconv.SRU.add_module("rounded", copy.deepcopy(net.quant.activation_post_process))
    net.scconv.SRU.register_forward_hook(lambda module, args, y: module.rounded(y))
    with pytest.raises(ModelError, match=r"scconv.SRU.rounded rounds inside the SRU scconv.SRU"):
        reference_from_module(net, torch.rand(2, 1, 8, 8))


def test_one_scale_for_all_weights_and_unsigned_activations_are_judged():
    """As they stand; TensorRT refuses the latter, which its own line says."""
    net = qat.seen(qat.prepared(qat.fake(0, 255, qscheme=torch.per_tensor_affine), qat.fake()))
    reference, model = exported(net, torch.rand(4, 1, 8, 8))
    report = judge((net, torch.rand(8, 1, 8, 8), None, reference, model), model)
    assert report.verdict == "passed", report.failures
    assert "and TensorRT has signed int8 around 0" in why_not_for_tensorrt(model)


def test_a_graph_of_pt2e_is_refused_before_and_after_it_is_converted():
    pt2e = pytest.importorskip("torchao.quantization.pt2e.quantize_pt2e", reason="needs torchao")
    testing = pytest.importorskip("torchao.testing.pt2e._xnnpack_quantizer", reason="needs torchao")
    quantizer = testing.XNNPACKQuantizer().set_global(testing.get_symmetric_quantization_config(is_qat=True))
    net, x = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU()).train(), torch.rand(2, 3, 4, 4)
    graph = pt2e.prepare_qat_pt2e(torch.export.export(net, (x,)).module(), quantizer)
    graph(x)
    said = r"The model is a graph of PyTorch's pt2e quantisation \(it calls {}"
    with pytest.raises(ModelError, match=said.format("activation_post_process")):
        reference_from_module(graph, x)
    with pytest.raises(ModelError, match=said.format("quantized_decomposed")):
        reference_from_module(pt2e.convert_pt2e(graph), x)
