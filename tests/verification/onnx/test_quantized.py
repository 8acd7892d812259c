"""Quantised files are called what they are, judged as far as they can be, and not converted."""

import json

import numpy as np
import onnx
import pytest
import torch
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from typer.testing import CliRunner

from scconv_deploy import export, rewrite_onnx
from scconv_deploy.cli import app
from scconv_deploy.graph.types import quantization_of
from tests import wild
from tests.rewrite import naive

SHAPE = (2, 3, 10, 10)
MODEL = ["--reference", "tests/verification/onnx/test_quantized.py:net", "--input", "2x3x10x10"]


def net():
    """A factory."""
    torch.manual_seed(0)
    layers = torch.nn.Conv2d(3, 16, 3), wild.OriginalSRU(16, 4), torch.nn.Conv2d(16, 8, 1)
    return wild.randomize(torch.nn.Sequential(*layers)).eval()


def plain():
    """A factory: no SRU in it."""
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Conv2d(3, 16, 3), torch.nn.ReLU(), torch.nn.Conv2d(16, 8, 1)).eval()


class Reader(CalibrationDataReader):
    def __init__(self):
        self._left = [{"input": naive.noise(*SHAPE, seed=seed).numpy()} for seed in range(4)]

    def get_next(self):
        return self._left.pop() if self._left else None


def quantized(
    source, target, operators=("Conv",), activations=QuantType.QInt8, per_channel=False, form=QuantFormat.QDQ
):
    quantize_static(
        source, target, Reader(), quant_format=form, op_types_to_quantize=["Conv"],
        activation_type=activations, weight_type=QuantType.QInt8, per_channel=per_channel,
    )  # fmt: skip
    return target


FORMS = {
    "int8": {},
    "uint8": {"activations": QuantType.QUInt8},
    "per channel": {"per_channel": True},
}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Exports of both nets, the naive one of the first, and each quantised in every form."""
    folder = tmp_path_factory.mktemp("quantized")
    for factory in (net, plain):
        export(factory(), (naive.noise(*SHAPE),), folder / f"{factory.__name__}.onnx")
        for name, form in FORMS.items():
            quantized(folder / f"{factory.__name__}.onnx", folder / f"{factory.__name__} {name}.onnx", **form)
    return folder


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.mark.parametrize("form", FORMS)
def test_inspect_says_how_a_file_is_quantised(files, form):
    assert quantization_of(onnx.load(files / "net.onnx")) == ""
    found = run("inspect", files / f"net {form}.onnx", "--json")
    expected = "int8 (Q/DQ, for CPUs)" if form == "uint8" else "int8 (Q/DQ)"
    assert json.loads(found.stdout)["precision"] == expected


def test_other_ways_of_quantising_have_their_names(files, tmp_path):
    integer = quantized(files / "plain.onnx", tmp_path / "integer.onnx", form=QuantFormat.QOperator)
    assert quantization_of(onnx.load(integer)) == "int8 (integer operators)"
    text = "(float[2, 4] x) => (float[2, 4] y) <{types} w = {{1, 2, 3, 4}}, float s = {{0.5}}> "
    text += "{{ {domain}f = {domain}DequantizeLinear(w, s) y = Mul(x, f) }}"
    head = '<ir_version: 10, opset_import: ["" : 21, "com.microsoft" : 1]> g '
    four_bits = onnx.parser.parse_model(head + text.format(types="int8[4]", domain=""))
    four_bits.graph.initializer[0].CopyFrom(onnx.helper.make_tensor("w", onnx.TensorProto.INT4, [4], [1, 2, 3, 4]))
    assert quantization_of(four_bits) == "int4 (Q/DQ)"


@pytest.mark.parametrize("form", FORMS)
def test_verify_judges_the_srus_and_the_file_has_no_verdict(files, form):
    """Whatever this CPU's integer kernels make of it: where they saturate, the file with uint8 fails by them alone."""
    allowed = ["--tolerance", "integer_kernels=1e9"]
    found = run("verify", files / f"net {form}.onnx", *MODEL, *allowed, "--json")
    assert found.exit_code == 6
    assert "was not judged" in found.stderr
    report = json.loads(found.stdout)
    assert report["verdict"] == "not run"
    link = next(link for link in report["links"] if link["name"] == "precision")
    assert link["status"] == "not run"
    checks = {check["name"]: check for check in link["checks"]}
    assert checks["quantization"]["status"] == "not run"
    assert (
        "the parity of int8 (Q/DQ) is not judged: PyTorch has no place for the quant"
        in checks["quantization"]["reason"]
    )
    assert "replay" not in checks
    assert checks["integer kernels"]["status"] == "passed"
    assert (checks["static"]["status"], checks["teacher-forced gates"]["status"]) == ("passed", "passed")
    assert report["srus"][0]["teacher_forced"]["unexplained"] == 0
    assert next(link for link in report["links"] if link["name"] == "onnxruntime")["status"] == "not run"


@pytest.fixture(scope="module")
def alike(files):
    """ONNX Runtime's quantiser with TensorRT's options: inputs and weights of Conv, and nothing else."""
    options = {
        "ActivationSymmetric": True, "WeightSymmetric": True, "QuantizeBias": False,
        "OpTypesToExcludeOutputQuantization": ["Conv"],
    }  # fmt: skip
    quantize_static(
        files / "net.onnx", files / "alike.onnx", Reader(), op_types_to_quantize=["Conv"], per_channel=True,
        activation_type=QuantType.QInt8, weight_type=QuantType.QInt8, extra_options=options,
    )  # fmt: skip
    return files / "alike.onnx"


def test_a_file_of_another_quantiser_is_proved_where_its_quantisers_have_a_place(alike, tmp_path):
    found = run("verify", alike, *MODEL, "--json")
    assert found.exit_code == 0, found.stderr
    link = next(link for link in json.loads(found.stdout)["links"] if link["name"] == "precision")
    checks = {check["name"]: check for check in link["checks"]}
    assert checks["scales"]["status"] == "not run", "nothing says what they should be"
    assert checks["weight codes"]["reason"] == "560 int8 weights are PyTorch's, code for code"
    assert (checks["codes"]["status"], checks["replay"]["status"]) == ("passed", "passed")
    model = onnx.load(alike)
    weight = next(t for t in model.graph.initializer if t.name == "0.weight_quantized")
    codes = onnx.numpy_helper.to_array(weight).copy()
    codes.flat[3] += 1 if codes.flat[3] < 100 else -1
    weight.CopyFrom(onnx.numpy_helper.from_array(codes, weight.name))
    onnx.save(model, tmp_path / "damaged.onnx")
    found = run("verify", tmp_path / "damaged.onnx", *MODEL, "--quiet")
    assert found.exit_code == 6
    assert "int8 weights: 0 differs from PyTorch's in 1 of 432" in found.stderr


def with_rounded_weights(model):
    """Float weights behind a QuantizeLinear, as NVIDIA Model Optimizer leaves them, in place of stored integers."""
    weights = {f"{name}_quantized": value.numpy() for name, value in net().state_dict().items()}
    stored = [t for t in model.graph.initializer if t.name in weights]
    for tensor in stored:
        node = next(n for n in model.graph.node if n.input[0] == tensor.name)
        name = tensor.name.removesuffix("_quantized")
        rounding = onnx.helper.make_node("QuantizeLinear", [name, *node.input[1:]], [tensor.name], axis=0)
        model.graph.node.insert(list(model.graph.node).index(node), rounding)
        tensor.CopyFrom(onnx.numpy_helper.from_array(weights[tensor.name], name))
    assert len(stored) == 2
    return model


def with_other_names(model):
    """Names that say nothing, as torch.onnx gives the constants of PyTorch's pt2e export."""
    names = {t.name: f"_frozen_param{i}" for i, t in enumerate(model.graph.initializer) if len(t.dims) == 4}
    for tensor in model.graph.initializer:
        tensor.name = names.get(tensor.name, tensor.name)
    for node in model.graph.node:
        node.input[:] = [names.get(name, name) for name in node.input]
    return model


def checks_of(path):
    found = run("verify", path, *MODEL, "--tolerance", "integer_kernels=1e9", "--json")
    link = next(link for link in json.loads(found.stdout)["links"] if link["name"] == "precision")
    return found, {check["name"]: check for check in link["checks"]}


def test_weights_that_the_file_rounds_itself_are_proved(alike, tmp_path):
    model = with_rounded_weights(onnx.load(alike))
    onnx.save(model, tmp_path / "rounded.onnx")
    found, checks = checks_of(tmp_path / "rounded.onnx")
    assert found.exit_code == 0, found.stderr
    assert checks["weight codes"]["reason"] == "560 int8 weights are PyTorch's, code for code"
    weight = next(t for t in model.graph.initializer if t.name == "0.weight")
    values = onnx.numpy_helper.to_array(weight).copy()
    values.flat[5] += 0.01
    weight.CopyFrom(onnx.numpy_helper.from_array(values, weight.name))
    onnx.save(model, tmp_path / "damaged.onnx")
    found, checks = checks_of(tmp_path / "damaged.onnx")
    assert found.exit_code == 6
    assert "0 differs from PyTorch's in 1 of 432" in checks["weight codes"]["reason"]


def test_weights_under_names_that_say_nothing_are_found_by_their_values(alike, tmp_path):
    model = with_other_names(onnx.load(alike))
    onnx.save(model, tmp_path / "renamed.onnx")
    found, checks = checks_of(tmp_path / "renamed.onnx")
    assert found.exit_code == 6
    assert checks["weight codes"]["reason"] == "int8 weights of 2 layers are the reference's, rounded to their scales"
    assert "no module is known for its weights _frozen_param" in found.stderr
    assert "Name its model" not in found.stderr
    assert "make another of the float file with scconv-deploy quantize" in found.stderr
    weight = next(t for t in model.graph.initializer if t.name.startswith("_frozen_param"))
    codes = onnx.numpy_helper.to_array(weight).copy()
    codes.flat[3] += 40 if codes.flat[3] < 0 else -40
    weight.CopyFrom(onnx.numpy_helper.from_array(codes, weight.name))
    onnx.save(model, tmp_path / "damaged.onnx")
    found, checks = checks_of(tmp_path / "damaged.onnx")
    assert found.exit_code == 6
    assert f"under another name or changed: {weight.name}" in checks["weight codes"]["reason"]


def test_a_damaged_sru_of_a_quantised_file_is_caught(files, tmp_path):
    model = onnx.load(files / "net int8.onnx")
    cut = next(t for t in model.graph.initializer if t.name == "1.cut")
    cut.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(cut) + np.float32(0.1), cut.name))
    onnx.save(model, tmp_path / "damaged.onnx")
    found = run("verify", tmp_path / "damaged.onnx", *MODEL, "--quiet")
    assert found.exit_code == 6
    assert "cut differs in 16 of 16 channels" in found.stderr


def test_a_damaged_weight_outside_srus_is_not_called_right(files, tmp_path):
    model = onnx.load(files / "net int8.onnx")
    weight = next(t for t in model.graph.initializer if t.data_type == onnx.TensorProto.INT8 and len(t.dims) == 4)
    weight.CopyFrom(onnx.numpy_helper.from_array(-onnx.numpy_helper.to_array(weight), weight.name))
    onnx.save(model, tmp_path / "damaged.onnx")
    found = run("verify", tmp_path / "damaged.onnx", *MODEL, "--quiet")
    assert found.exit_code == 6
    assert "the parity of int8 (Q/DQ) is not judged" in found.stderr


def test_one_wrong_code_of_a_file_without_a_verdict_fails(files, tmp_path):
    """Nothing says where its quantisers belong, but its weights are the model's, rounded, whoever wrote it."""
    for name, change in {"same": None, "code": 40, "scale": np.float32(0)}.items():
        model = onnx.load(files / "net per channel.onnx")
        weight = next(t for t in model.graph.initializer if t.name == "0.weight_quantized")
        scales = next(t for t in model.graph.initializer if t.name == "0.weight_scale")
        if name == "code":
            codes = onnx.numpy_helper.to_array(weight).copy()
            codes.flat[3] += change if codes.flat[3] < 0 else -change
            weight.CopyFrom(onnx.numpy_helper.from_array(codes, weight.name))
        if name == "scale":
            values = onnx.numpy_helper.to_array(scales).copy()
            values[2] = change
            scales.CopyFrom(onnx.numpy_helper.from_array(values, scales.name))
        onnx.save(model, tmp_path / f"{name}.onnx")
        found = run("verify", tmp_path / f"{name}.onnx", *MODEL, "--json")
        assert found.exit_code == 6
        link = next(link for link in json.loads(found.stdout)["links"] if link["name"] == "precision")
        checks = {check["name"]: check for check in link["checks"]}
        assert link["status"] == ("not run" if name == "same" else "failed")
        if name == "same":
            assert checks["weight codes"]["reason"] == (
                "int8 weights of 2 layers are the reference's, rounded to their scales"
            )
            assert "judged and right: weight codes, static, teacher-forced gates" in checks["quantization"]["reason"]
            assert "by what rule its scales were made" in checks["scales"]["reason"]
        elif name == "code":
            assert "0.weight_quantized is not the reference's weight in 1 of 16 channels" in found.stderr
        else:
            assert "a scale is 0, expected above 0 and finite" in found.stderr


def test_parameters_behind_quantisers_are_a_fault(files, tmp_path):
    """What a quantiser does that knows no fence: sign and cut are no float32 constants any more."""
    model = onnx.load(files / "net int8.onnx")
    node = next(n for n in model.graph.node if n.domain == "scconv")
    index = list(model.graph.node).index(node)
    scale = onnx.numpy_helper.from_array(np.float32(1 / 64), "cut_scale")
    model.graph.initializer.append(scale)
    pair = [
        onnx.helper.make_node("QuantizeLinear", [node.input[1], "cut_scale"], ["cut_q"]),
        onnx.helper.make_node("DequantizeLinear", ["cut_q", "cut_scale"], ["cut_dq"]),
    ]
    node.input[1] = "cut_dq"
    for more in reversed(pair):
        model.graph.node.insert(index, more)
    onnx.save(model, tmp_path / "fenceless.onnx")
    found = run("verify", tmp_path / "fenceless.onnx", *MODEL, "--quiet")
    assert found.exit_code == 6
    assert "cut is not a constant" in found.stderr


def test_without_an_sru_there_is_no_verdict_of_the_file(files):
    found = run("verify", files / "plain int8.onnx", "--reference", files / "plain.onnx", "--json")
    link = next(link for link in json.loads(found.stdout)["links"] if link["name"] == "precision")
    assert link["status"] == "not run"
    assert "replay" not in {check["name"] for check in link["checks"]}


def test_convert_refuses_a_quantised_file(files, tmp_path):
    found = run("convert", files / "net int8.onnx", "-o", tmp_path / "h.onnx", "--precision", "fp16")
    assert found.exit_code == 4
    assert "net int8.onnx is int8 (Q/DQ)" in found.stderr
    assert "Convert the float32 file that it was quantised from" in found.stderr
    assert not (tmp_path / "h.onnx").exists()


def test_rewrite_keeps_a_quantised_file_quantised(files, tmp_path):
    """Only its convolutions are quantised, so that its SRU can be read: the weights stay integers."""
    naive_file = tmp_path / "naive.onnx"
    naive_file.write_bytes(naive.export(net(), naive.noise(*SHAPE), True, 18).SerializeToString())
    model = onnx.load(naive_file)
    for node in model.graph.node:
        node.input[:] = ["input" if name == model.graph.input[0].name else name for name in node.input]
    model.graph.input[0].name = "input"
    onnx.save(model, naive_file)
    result = rewrite_onnx(quantized(naive_file, tmp_path / "q.onnx"), tmp_path / "out.onnx")
    written = onnx.load(result.path)
    assert len(result.sites) == 1
    assert quantization_of(written) == "int8 (Q/DQ)"
    count = [
        sum(n.op_type == "DequantizeLinear" for n in m.graph.node) for m in (onnx.load(tmp_path / "q.onnx"), written)
    ]
    assert count[0] == count[1]
    assert rewrite_onnx(result.path, tmp_path / "again.onnx").outcome == "unchanged"
