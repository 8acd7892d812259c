"""convert: the file, the comparison with the original, and what is refused."""

import json

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, numpy_helper
from typer.testing import CliRunner

import scconv_deploy
from scconv_deploy import cli, converting
from scconv_deploy.converting import PRECISION, convert_onnx
from scconv_deploy.errors import ModelError, ParityError, UsageError
from scconv_deploy.precision.compare import compare_precision
from scconv_deploy.precision.half import HalfOptions, to_half
from scconv_deploy.verification import feeds, instrument


@pytest.fixture
def source(tiny_bytes, tmp_path):
    path = tmp_path / "model.onnx"
    path.write_bytes(tiny_bytes[0])
    return path


def half_of(tiny_bytes, precision="fp16"):
    return ir.to_proto(to_half(ir.from_proto(onnx.load_model_from_string(tiny_bytes[0])), HalfOptions(precision)).model)


def test_a_converted_file_keeps_every_gate_on_the_same_input(source, tmp_path):
    result = convert_onnx(source, tmp_path / "half.onnx", HalfOptions("fp16"))
    report = result.comparison
    assert (report.flips, report.not_run, bool(report)) == (0, "", True)
    assert report.gates == 4 * 2 * 16 * 8 * 8  # four sites, a batch of two
    assert set(report.errors) == {"logits", "features"}
    assert all(0 < error < report.limit for error in report.errors.values())
    assert result.bytes_after < result.bytes_before
    model = onnx.load(result.path)
    assert json.loads(next(p.value for p in model.metadata_props if p.key == PRECISION))["precision"] == "fp16"
    assert [value.name for value in model.graph.output] == ["logits", "features"]
    again = convert_onnx(source, tmp_path / "again.onnx", HalfOptions("fp16"))
    assert again.sha256 == result.sha256


def test_parameters_of_the_gate_in_half_are_caught(tiny_bytes):
    """What the usual converters do to them."""
    original, half = onnx.load_model_from_string(tiny_bytes[0]), half_of(tiny_bytes)
    for node in instrument.sites(half).values():
        tensor = next(t for t in half.graph.initializer if t.name == node.input[1])
        rounded = numpy_helper.to_array(tensor).astype(np.float16).astype(np.float32)
        tensor.CopyFrom(numpy_helper.from_array(rounded, tensor.name))
    report = compare_precision(original, half, [feeds.noise(original, 0)], "fp16")
    assert not report
    assert [f.split(" are ")[0] for f in report.failures] == [
        f"parameters of {site}" for site in ("a.SRU", "b.SRU", "c", "a.SRU#2")
    ]


def test_an_inverted_gate_is_caught(tiny_bytes):
    original, half = onnx.load_model_from_string(tiny_bytes[0]), half_of(tiny_bytes)
    function = next(f for f in half.functions if f.name == "SRU")
    next(node for node in function.node if node.op_type == "GreaterOrEqual").op_type = "Less"
    report = compare_precision(original, half, [feeds.noise(original, 0)], "fp16")
    assert report.flips > 0.9 * report.gates / 2  # two of the four sites are of this operator
    assert "same half input, gates changed" in report.failures[0]


def test_a_damaged_weight_is_caught(tiny_bytes):
    original, half = onnx.load_model_from_string(tiny_bytes[0]), half_of(tiny_bytes)
    tensor = next(t for t in half.graph.initializer if t.name == "head.weight")
    assert tensor.data_type == TensorProto.FLOAT16
    tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) * np.float16(1.05), tensor.name))
    report = compare_precision(original, half, [feeds.noise(original, 0)], "fp16")
    assert report.flips == 0
    assert [failure.split(":")[0] for failure in report.failures] == ["output logits"]


def test_bfloat16_is_written_and_said_not_to_be_compared(tmp_path, tiny_reference):
    path = tmp_path / "m.onnx"
    model = tiny_reference[0].model
    scconv_deploy.export(
        model, tiny_reference[0].signature.tensors["image"], path, options=scconv_deploy.ExportOptions(opset=22)
    )
    result = convert_onnx(path, tmp_path / "half.onnx", HalfOptions("bf16"))
    assert "ONNX Runtime" in result.comparison.not_run
    assert all("Softmax" in why or "sum of many" in why for _, why in result.kept)
    kinds = {t.name: t.data_type for t in onnx.load(result.path).graph.initializer}
    assert kinds["stem.weight"] == TensorProto.BFLOAT16


def test_values_beyond_half_are_named_and_nothing_is_written(source, tmp_path):
    image = np.full((1, 3, 16, 16), 1e6, np.float32)
    image[:, :, ::2] *= -1
    np.savez(tmp_path / "large.npz", image=image)
    with pytest.raises(ParityError, match="beyond half's range"):
        convert_onnx(source, tmp_path / "half.onnx", HalfOptions("fp16"), data=str(tmp_path / "large.npz"))
    assert not (tmp_path / "half.onnx").exists()


def test_refusals(source, tmp_path):
    convert_onnx(source, tmp_path / "half.onnx", HalfOptions("fp16"))
    with pytest.raises(ModelError, match="in half precision already"):
        convert_onnx(tmp_path / "half.onnx", tmp_path / "twice.onnx", HalfOptions("fp16"))
    with pytest.raises(UsageError, match="exists"):
        convert_onnx(source, tmp_path / "half.onnx", HalfOptions("fp16"))
    with pytest.raises(UsageError, match="is the input itself"):
        convert_onnx(source, source, HalfOptions("fp16"), force=True)


def test_the_command(source, tmp_path, monkeypatch):
    output = tmp_path / "half.onnx"
    result = CliRunner().invoke(cli.app, ["convert", str(source), "-o", str(output), "--precision", "fp16"])
    assert result.exit_code == 0, result.output
    assert "same half input, gates changed: 0 of" in result.output
    again = ["convert", str(source), "-o", str(output), "--precision", "fp16", "--force", "--json"]
    document = json.loads(CliRunner().invoke(cli.app, again).stdout)
    assert (document["comparison"]["verdict"], document["comparison"]["flips"]) == ("passed", 0)
    broken = converting.PrecisionReport(gates=10, flips=3)
    monkeypatch.setattr(converting, "compare_precision", lambda *args: broken)
    failed = CliRunner().invoke(
        cli.app, ["convert", str(source), "-o", str(tmp_path / "x.onnx"), "--precision", "fp16"]
    )
    assert failed.exit_code == 6
    assert not (tmp_path / "x.onnx").exists()
