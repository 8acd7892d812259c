"""convert: the file, the comparison with the original, and what is refused."""

import json

import numpy as np
import onnx
import onnx.parser
import pytest
from onnx import TensorProto, numpy_helper
from typer.testing import CliRunner

import scconv_deploy
from scconv_deploy import cli
from scconv_deploy.errors import ModelError, ParityError, UsageError
from scconv_deploy.graph.types import PRECISION
from scconv_deploy.precision.half import HalfOptions
from scconv_deploy.runtimes.onnxruntime import OnnxRuntimeRunner
from scconv_deploy.workflows.convert import convert_onnx
from tests.exporters.tensorrt.engines import conv_model


@pytest.fixture
def source(tiny_bytes, tmp_path):
    path = tmp_path / "model.onnx"
    path.write_bytes(tiny_bytes[0])
    return path


def costs(result):
    """What half costs each output."""
    checks = [c for link in result.report.links for c in link.checks if c.name == "rounding"]
    assert len(checks) == len(result.report.outputs)
    return checks


def test_a_converted_file_keeps_every_gate_on_the_same_input(source, tmp_path):
    result = convert_onnx(source, tmp_path / "half.onnx", HalfOptions("fp16"))
    links = {link.name: link for link in result.report.links}
    assert {name: link.status for name, link in links.items()} == {
        "PyTorch with SRUs swapped": "not run", "onnxruntime": "not run", "precision": "passed", "engine": "not run",
    }  # fmt: skip
    gates = [sru.teacher_forced for sru in result.report.srus]
    assert sum(count.gates for count in gates) == 4 * (2 + 67) * 16 * 8 * 8  # four sites, batches of 2 and 67
    assert [count.flips for count in gates] == [0] * 4
    assert {output.name for output in result.report.outputs} == {"logits", "features"}
    assert all(output.replay_error < 2**-11 for output in result.report.outputs)  # against the same roundings
    assert all(1e-5 < check.quantities[0].value < 2e-3 for check in costs(result))
    assert result.bytes_after < result.bytes_before
    model = onnx.load(result.path)
    assert json.loads(next(p.value for p in model.metadata_props if p.key == PRECISION))["precision"] == "fp16"
    assert [value.name for value in model.graph.output] == ["logits", "features"]
    again = convert_onnx(source, tmp_path / "again.onnx", HalfOptions("fp16"))
    assert again.sha256 == result.sha256


def test_bfloat16_is_judged_by_a_stand_in_that_is_called_one(tmp_path, tiny_reference):
    path = tmp_path / "m.onnx"
    model, image = tiny_reference[0].model, tiny_reference[0].signature.tensors["image"]
    scconv_deploy.export(model, image, path, options=scconv_deploy.ExportOptions(opset=22))
    result = convert_onnx(path, tmp_path / "half.onnx", HalfOptions("bf16"))
    assert any("a stand-in" in caveat for caveat in result.report.caveats)
    assert all(output.replay_error < 2**-8 for output in result.report.outputs)
    assert all(1e-4 < check.quantities[0].value < 2e-2 for check in costs(result))
    kinds = {t.name: t.data_type for t in onnx.load(result.path).graph.initializer}
    assert kinds["stem.weight"] == TensorProto.BFLOAT16


def test_bfloat16_needs_an_opset_whose_convolutions_take_it(source, tmp_path):
    with pytest.raises(ModelError, match="has opset 18; bf16 needs 22"):
        convert_onnx(source, tmp_path / "half.onnx", HalfOptions("bf16"))


def test_values_beyond_half_are_named_and_nothing_is_written(source, tmp_path):
    image = np.full((1, 3, 16, 16), 1e6, np.float32)
    image[:, :, ::2] *= -1
    np.savez(tmp_path / "large.npz", image=image)
    with pytest.raises(ParityError, match=r"reaches .* which fp16 cannot hold; --keep"):
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
    assert "same input, gates changed: 0 of" in result.output
    again = ["convert", str(source), "-o", str(output), "--precision", "fp16", "--force", "--json"]
    document = json.loads(CliRunner().invoke(cli.app, again).stdout)
    assert document["report"]["verdict"] == "passed"
    image = np.full((1, 3, 16, 16), 1e6, np.float32)
    np.savez(tmp_path / "large.npz", image=image)
    failing = ["convert", str(source), "-o", str(tmp_path / "x.onnx"), "--precision", "fp16"]
    failed = CliRunner().invoke(cli.app, [*failing, "--data", str(tmp_path / "large.npz")])
    assert failed.exit_code == 6
    assert not (tmp_path / "x.onnx").exists()


CASES = {
    "branches": (
        "g (float[1, 8] x) => (float[1, 8] y) { h = MatMul (x, w)  m = ReduceMax <keepdims = 0> (h)  c = Greater (m, z)"
        "  y = If (c) <then_branch = a () => (float[1, 8] p) { p = Mul (h, k) },"
        " else_branch = b () => (float[1, 8] p) { p = Identity (h) }> }"
    ),
    "sequence": "g (float[1, 8] x) => (float[1, 4] y) { h = MatMul (x, w)  q = SplitToSequence <axis = 1> (h, four)"
    "  y = SequenceAt (q, one) }",
    "rows": "g (int64[n] id) => (float[n, 8] y) { f = Cast <to = 1> (id)  g = Mul (f, unit)  i = Cast <to = 7> (g)"
    "  y = Gather (t, i) }",
    "mask of -inf": "g (float[1, 8] x) => (float[1, 8] y) { h = MatMul (x, w)  v = Where (b, h, low)  p = Softmax (v)"
    "  y = MatMul (p, w) }",
}


@pytest.mark.parametrize("case", CASES)
def test_files_of_any_form(case, tmp_path):
    """As a user sees them: exit 0, and the file computes what the original does."""
    rng = np.random.default_rng(0)
    model = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : 18]> {CASES[case]}')
    stored = {
        "w": rng.normal(size=(8, 8)).astype(np.float32), "t": rng.normal(size=(5000, 8)).astype(np.float32),
        "k": np.float32(3), "z": np.float32(0), "unit": np.float32(1), "four": np.int64(4), "one": np.int64(1),
        "b": np.arange(8) % 3 > 0, "low": np.float32(-np.inf),
    }  # fmt: skip
    used = {name for node in model.graph.node for name in node.input} | {"k"}
    model.graph.initializer.extend(numpy_helper.from_array(np.asarray(v), n) for n, v in stored.items() if n in used)
    onnx.save(model, tmp_path / "model.onnx")
    command = ["convert", str(tmp_path / "model.onnx"), "-o", str(tmp_path / "half.onnx"), "--precision", "fp16"]
    result = CliRunner().invoke(cli.app, command)
    assert result.exit_code == 0, result.output
    feed = {"id": np.arange(2040, 2060)} if case == "rows" else {"x": rng.normal(size=(1, 8)).astype(np.float32)}
    expected, found = (OnnxRuntimeRunner(onnx.load(tmp_path / f"{n}.onnx")).run(feed)["y"] for n in ("model", "half"))
    assert 0 < np.linalg.norm(found - expected) < 2**-9 * np.linalg.norm(expected)


def test_an_output_that_is_no_tensor_is_named(tmp_path):
    model = onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["" : 18]>'
        "g (float[2, 8] x) => (seq(float[2, 8]) q) { q = SequenceConstruct (x) }"
    )
    onnx.save(model, tmp_path / "model.onnx")
    with pytest.raises(ModelError, match="the output 'q' is no tensor, so it cannot be compared"):
        convert_onnx(tmp_path / "model.onnx", tmp_path / "half.onnx", HalfOptions("fp16"))


@pytest.mark.parametrize(("operator", "domain"), [("EfficientNMS_TRT", ""), ("Head", "my.ops")])
def test_what_nothing_here_can_run_is_named(tmp_path, operator, domain):
    """Nothing could be compared, so nothing is converted."""
    onnx.save(conv_model(operator, domain), tmp_path / "in.onnx")
    with pytest.raises(ModelError, match=operator) as refused:
        convert_onnx(tmp_path / "in.onnx", tmp_path / "out.onnx", HalfOptions("fp16"))
    assert refused.value.exit_code == 4
    assert not (tmp_path / "out.onnx").exists()


def test_what_vanishes_is_named_where_the_outputs_fail(tmp_path):
    model = onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["" : 18]>'
        "g (float[2, 8] x) => (float[2, 8] y) { h = Mul (x, s)  y = Mul (h, h) }"
    )
    model.graph.initializer.append(numpy_helper.from_array(np.float32([2**-13]), "s"))
    onnx.save(model, tmp_path / "model.onnx")
    with pytest.raises(ParityError, match="rounding costs") as caught:  # half outputs: no runtime can skip the rounding
        convert_onnx(tmp_path / "model.onnx", tmp_path / "half.onnx", HalfOptions("fp16", "half"))
    assert caught.value.remedy.startswith("Nothing was written; vanishing in fp16: y (at most ")
    assert "--keep" in caught.value.remedy
    convert_onnx(tmp_path / "model.onnx", tmp_path / "half.onnx", HalfOptions("fp16", keep=("y",)))
