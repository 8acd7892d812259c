"""``deploy F.onnx``: a file of any exporter becomes a bundle, judged against itself or its model."""

from __future__ import annotations

import json

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from typer.testing import CliRunner

from scconv_deploy.bundle.reference import read_sealed_reference
from scconv_deploy.cli import app
from scconv_deploy.graph import instrument
from scconv_deploy.workflows import deploy_file
from tests.rewrite import naive


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A naive TorchScript export of a small net with two SRUs, with an open batch; and data for it."""
    folder = tmp_path_factory.mktemp("files")
    net = naive.small_net("groupbn-hard")
    onnx.save(naive.export(net, naive.noise(2, 3, 16, 16), False, 17, True), folder / "net.onnx")
    np.savez(folder / "data.npz", x=naive.noise(20, 3, 16, 16, seed=3).numpy())
    return folder


def run(*arguments):
    return CliRunner().invoke(app, ["deploy", *map(str, arguments)])


def links(folder):
    report = json.loads((folder / "report.json").read_text())
    return {link["name"]: link["status"] for link in report["links"]}


def test_a_file_becomes_a_bundle(files, tmp_path):
    result = run(files / "net.onnx", "-o", tmp_path / "b", "--data", files / "data.npz", "--json")
    assert result.exit_code == 0, result.stderr
    found = links(tmp_path / "b")
    assert next(iter(found)) == "rewrite"
    assert {found["rewrite"], found["onnxruntime"]} == {"passed"}
    artifact = onnx.load(tmp_path / "b" / "model.onnx")
    assert len(instrument.sites(artifact)) == 2
    report = json.loads((tmp_path / "b" / "report.json").read_text())
    assert [name for name in report["samples"] if name.startswith("data.npz")]
    assert report["provenance"]["file_sha256"]
    verified = CliRunner().invoke(app, ["verify", str(tmp_path / "b"), "--json"])
    assert verified.exit_code == 0, verified.stderr
    source = read_sealed_reference(tmp_path / "b")
    kept = source.run(0)
    for name, site in kept.sites.items():
        assert 0.05 < site.mask.mean() < 0.95, name


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_in_half_the_float32_form_is_judged_as_well(files, tmp_path, precision):
    result = run(files / "net.onnx", "-o", tmp_path / "b", "--precision", precision, "--quiet")
    assert result.exit_code == 0, result.stderr
    found = links(tmp_path / "b")
    assert (found["onnxruntime"], found["precision"]) == ("passed", "passed")


def test_against_its_model(files, tmp_path):
    result = run(
        files / "net.onnx", "-o", tmp_path / "b", "--quiet",
        "--reference", "tests.rewrite.naive:small_net", "--kwargs", '{"variant": "groupbn-hard"}',
        "--input", "2x3x16x16",
    )  # fmt: skip
    assert result.exit_code == 0, result.stderr
    found = links(tmp_path / "b")
    assert (found["PyTorch with SRUs swapped"], found["onnxruntime"]) == ("passed", "passed")


def test_another_model_fails_and_leaves_no_artifact_of_that_name(files, tmp_path):
    result = run(
        files / "net.onnx", "-o", tmp_path / "b", "--quiet",
        "--reference", "tests.rewrite.naive:small_net", "--kwargs", '{"variant": "groupbn-hard", "seed": 1}',
        "--input", "2x3x16x16",
    )  # fmt: skip
    assert result.exit_code in (4, 6), result.stderr
    assert not (tmp_path / "b" / "model.onnx").exists()


def test_a_wrong_gate_in_the_rewritten_file_is_rejected(files, tmp_path, monkeypatch):
    """The rewrite itself goes wrong: a cut moves. The file is judged by its own float64 graph and PyTorch's formula."""
    rewrite_graph = deploy_file.rewrite_graph

    def wrong(original, options, stage):
        proto, applied = rewrite_graph(original, options, stage)
        node = next(iter(instrument.sites(proto).values()))
        tensor = next(t for t in proto.graph.initializer if t.name == node.input[1])
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) + np.float32(1e-2), tensor.name))
        return proto, applied

    monkeypatch.setattr(deploy_file, "rewrite_graph", wrong)
    result = run(files / "net.onnx", "-o", tmp_path / "b", "--quiet")
    assert result.exit_code == 6
    found = links(tmp_path / "b")
    assert (found["rewrite"], found["onnxruntime"]) == ("failed", "failed")
    assert (tmp_path / "b" / "model.onnx.rejected").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--kwargs", "{}", "--embed", "paper"], "--kwargs, --embed means nothing"),
        (["--weights", "w.pt"], "--weights means nothing"),
        (["--input", "1x3x16x16"], "--input means nothing"),
        (["--baseline", "resnet20"], "--baseline"),
        (["--dynamic", "image:2=1:2:4"], "no input 'image'"),
        (["--dynamic", "x:1=1:2:4"], "no open axis 1"),
        (["--precision", "int8", "--data", "random"], "quantize"),
    ],
)
def test_what_means_nothing_to_a_file_is_refused_by_name(files, tmp_path, arguments, words):
    result = run(files / "net.onnx", "-o", tmp_path / "b", *arguments)
    assert result.exit_code == 2
    assert words in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert not (tmp_path / "b").exists()


def test_a_reference_is_for_a_file(tmp_path):
    result = run("scconv_resnet20", "-o", tmp_path / "b", "--reference", "scconv_resnet20")
    assert result.exit_code == 2
    assert "--reference is for an ONNX file" in result.stderr


@pytest.mark.parametrize("text", ["nothing.onnx", "empty.onnx", "bundle"])
def test_what_is_no_file_is_one_line(tmp_path, text):
    (tmp_path / "empty.onnx").write_bytes(b"")
    (tmp_path / "bundle").mkdir()
    result = run(tmp_path / text, "-o", tmp_path / "b")
    assert result.exit_code in (2, 7)
    assert len(result.stderr.splitlines()) == 1
    assert not (tmp_path / "b").exists()


def test_half_and_quantized_files_are_refused_with_the_way_out(tmp_path):
    half = '<ir_version: 10, opset_import: ["" : 18]> g (float16[2] x) => (float16[2] y) { y = Relu (x) }'
    codes = """<ir_version: 10, opset_import: ["" : 18]>
    g (float[2] x) => (float[2] y) <float s = {0.1}, int8 z = {0}> {
        q = QuantizeLinear (x, s, z)
        y = DequantizeLinear (q, s, z)
    }"""
    for text, words in ((half, "--precision fp16"), (codes, "verify --reference MODEL")):
        onnx.save(onnx.parser.parse_model(text), tmp_path / "net.onnx")
        result = run(tmp_path / "net.onnx", "-o", tmp_path / "b")
        assert result.exit_code == 4
        assert words in result.stderr
        assert not (tmp_path / "b").exists()
