"""Half precision in export and deploy: options, the stage's record, the file, and what is refused."""

from __future__ import annotations

import json

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto
from typer.testing import CliRunner

import scconv_deploy
from scconv_deploy import cli
from scconv_deploy.errors import ModelError, UsageError
from scconv_deploy.graph import instrument
from scconv_deploy.graph.hygiene import tidy
from scconv_deploy.precision.half import HalfOptions
from scconv_deploy.workflows import export as exporting
from scconv_deploy.workflows.convert import convert_onnx
from scconv_deploy.workflows.export import ExportOptions
from scconv_deploy.workflows.inspect import inspect_onnx
from scconv_deploy.workflows.subject import Bundle
from tests.conftest import in_half, tiny_net
from tests.verified import verify_bundle

NET = ("tests.conftest:tiny_net", "--input", "2x3x16x16")


def run(*arguments):
    return CliRunner().invoke(cli.app, [str(a) for a in arguments])


def types(model):
    return {t.name: TensorProto.DataType.Name(t.data_type) for t in model.graph.initializer}


def test_opsets_by_precision():
    assert [ExportOptions(precision=p).resolved_opset for p in ("fp32", "fp16", "bf16")] == [18, 18, 22]
    assert ExportOptions(23, precision="bf16").resolved_opset == 23
    assert ExportOptions(20).resolved_opset == 20
    assert ExportOptions(precision="fp16", io="half", keep=("a*",)).half == HalfOptions("fp16", "half", ("a*",))
    assert ExportOptions().half is None


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"precision": "bf16", "opset": 21}, "--precision bf16 needs opset 22 or later, found 21"),
        ({"precision": "int8"}, "precision is 'int8'. There are fp32, fp16, bf16"),
        ({"precision": "fp16", "io": "fp16"}, "io is 'fp16'. There are float32, half"),
        ({"io": "half"}, "--io half is for half precision"),
        ({"keep": ("stem*",)}, "--keep 'stem*' is for half precision"),
        ({"mask_form": "add"}, "mask_form is 'add'. There are auto, where, multiply"),
    ],
)
def test_options_that_cannot_be(options, words):
    with pytest.raises(UsageError) as error:
        ExportOptions(**options)
    assert words in str(error.value)


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_the_graph_and_the_record(tiny_fp16, tiny_bf16, precision):
    float32, half, log = tiny_fp16 if precision == "fp16" else tiny_bf16
    name = {"fp16": "FLOAT16", "bf16": "BFLOAT16"}[precision]
    assert {v.type.tensor_type.elem_type for v in (*half.graph.input, *half.graph.output)} == {TensorProto.FLOAT}
    kinds = types(half)
    parameters = {n for node in instrument.sites(half).values() for n in node.input[1:]}
    assert {kinds[n] for n in parameters} == {"FLOAT"}
    assert {kind for n, kind in kinds.items() if n not in parameters} <= {name, "INT64"}
    assert set(types(float32).values()) <= {"FLOAT", "INT64"}  # it is a copy, untouched
    (stage,) = [s for s in log.records if s.name == "precision"]
    casts = sum(n.op_type == "Cast" for n in half.graph.node) - sum(n.op_type == "Cast" for n in float32.graph.node)
    in_half_nodes, of_casts = stage.applied[0].split(", ")
    assert in_half_nodes.endswith(f" nodes in {precision}")
    assert of_casts == f"{casts} casts"
    assert {reason.split(":")[0] for _, reason in stage.skipped} == {"Softmax", "ReduceMean", "Concat"}
    assert all(any(node.name == kept for node in half.graph.node) for kept, _ in stage.skipped)


def test_bf16_is_of_an_opset_that_has_it(tiny_bf16):
    half = tiny_bf16[1]
    assert {o.domain: o.version for o in half.opset_import}[""] == 22
    weights = {n.input[1] for n in half.graph.node if n.op_type == "Conv"}
    assert {types(half)[name] for name in weights} == {"BFLOAT16"}


def test_both_mask_forms_agree_in_half(tiny_reference, tiny_fp16):
    image = np.random.default_rng(0).normal(size=(2, 3, 16, 16)).astype(np.float32)
    where = in_half(tiny_reference[0], ExportOptions(precision="fp16", mask_form="where"))[1]
    assert "Where" in {node.op_type for function in where.functions for node in function.node}
    outputs = [
        onnxruntime.InferenceSession(model.SerializeToString()).run(None, {"image": image})
        for model in (where, tiny_fp16[1])
    ]
    for one, other in zip(*outputs, strict=True):  # their statistics sum in other orders; a changed gate moves far more
        np.testing.assert_allclose(one, other, rtol=2**-11, atol=2**-11 * float(np.abs(other).max()))


def test_export_writes_what_convert_makes_of_the_float32_file(tiny_fp16, tiny_bytes, tmp_path):
    (tmp_path / "single.onnx").write_bytes(tiny_bytes[0])
    converted = onnx.load(convert_onnx(tmp_path / "single.onnx", tmp_path / "half.onnx", HalfOptions("fp16")).path)
    exported = tiny_fp16[1]
    assert types(exported) == types(converted)
    assert [n.op_type for n in exported.graph.node] == [n.op_type for n in converted.graph.node]
    assert [t.raw_data for t in exported.graph.initializer] == [t.raw_data for t in converted.graph.initializer]
    assert {p.key: p.value for p in exported.metadata_props} == {p.key: p.value for p in converted.metadata_props}


def test_the_python_api(tiny_reference, tmp_path):
    model, image = tiny_reference[0].model, tiny_reference[0].signature.tensors["image"]
    options = ExportOptions(precision="fp16", io="half", keep=("stem.weight",))
    result = scconv_deploy.export(model, image, tmp_path / "m.onnx", options=options)
    written = onnx.load(tmp_path / "m.onnx")
    assert types(written)["stem.weight"] == "FLOAT"
    assert {v.type.tensor_type.elem_type for v in written.graph.output} == {TensorProto.FLOAT16}
    (stage,) = [s for s in result.as_json()["stages"] if s["name"] == "precision"]
    assert stage["applied"][0].endswith("casts")
    assert any(reason == "Conv: kept by 'stem.weight'" for _, reason in stage["skipped"])
    assert scconv_deploy.verify(tmp_path / "m.onnx", model, image)


@pytest.fixture(scope="module", params=["fp16", "bf16"])
def bundle(request, tmp_path_factory):
    """(precision, the JSON document, the folder) of ``deploy`` on the command line."""
    folder = tmp_path_factory.mktemp("deployed") / request.param
    result = run("deploy", *NET, "-o", folder, "--precision", request.param, "--json")
    assert result.exit_code == 0, result.output
    return request.param, json.loads(result.stdout), folder


def test_deploy_ships_the_half_file_and_its_proof(bundle):
    precision, document, folder = bundle
    assert [p.name for p in folder.glob("*.onnx")] == ["model.onnx"]
    shown = inspect_onnx(Bundle(folder))
    assert shown.precision == precision
    links = {link["name"]: link for link in document["report"]["links"]}
    assert [links[name]["status"] for name in ("onnxruntime", "precision")] == ["passed", "passed"]
    assert "same input, gates changed: 0 of" in links["precision"]["reason"]
    standing_in = [check["reason"] for check in links["precision"]["checks"] if check["name"] == "stand-in"]
    assert bool(standing_in) == (precision == "bf16")
    assert "precision" in [stage["name"] for stage in document["report"]["stages"]]
    checked = run("report", "check", folder, "--require", "precision")
    assert checked.exit_code == 0, checked.output


def test_the_bundle_judges_its_half_file(bundle):
    precision, _, folder = bundle
    report = verify_bundle(folder)
    assert {link.name: link.status for link in report.links}["precision"] == "passed"
    assert sum(sru.teacher_forced.gates for sru in report.srus) >= 4 * 16 * 8 * 8
    assert sum(sru.teacher_forced.flips for sru in report.srus) == 0
    if precision == "fp16":
        verified = run("verify", folder / "model.onnx", "--reference", *NET)
        assert verified.exit_code == 0, verified.output
        assert "precision  fp16" in run("inspect", folder / "model.onnx").stdout


def test_verify_fails_a_damaged_half_file(bundle, tmp_path):
    model = onnx.load(bundle[2] / "model.onnx")
    function = next(f for f in model.functions if f.name == "SRU")
    next(node for node in function.node if node.op_type == "GreaterOrEqual").op_type = "Less"
    onnx.save(model, tmp_path / "bad.onnx")
    failed = run("verify", tmp_path / "bad.onnx", "--reference", *NET)
    assert failed.exit_code == 6
    assert "precision: " in failed.stderr.strip().splitlines()[-1]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--precision", "fp8"), "'fp8' is not one of 'fp32', 'fp16', 'bf16'"),
        (("--io", "half"), "--io half is for half precision. Add --precision fp16 or bf16"),
        (("--keep", "stem*"), "--keep 'stem*' is for half precision"),
        (("--precision", "bf16", "--opset", "18"), "Use --opset 22, or leave --opset out"),
        (("--precision", "fp16", "--keep", "steem.weight"), "matches no node or weight. Close are stem.weight"),
    ],
)
def test_bad_options_are_one_line_and_write_nothing(tmp_path, arguments, words):
    for command in ("export", "deploy"):
        if command == "deploy" and "matches no node" in words:
            continue  # it is found by the same stage, after an export
        failed = run(command, *NET, "-o", tmp_path / "out", *arguments, "--quiet")
        assert failed.exit_code == 2, failed.output
        (line,) = failed.stderr.strip().splitlines()
        assert words in line
        assert not list(tmp_path.iterdir())


def test_a_half_file_is_not_converted_again(bundle, tmp_path):
    for precision in ("fp16", "bf16"):
        arguments = ("-o", tmp_path / "x.onnx", "--precision", precision, "--quiet")
        failed = run("convert", bundle[2] / "model.onnx", *arguments)
        assert failed.exit_code == 4
        (line,) = failed.stderr.strip().splitlines()
        assert "this model is in half precision already, at least in part. Convert the float32 one." in line
        assert not list(tmp_path.iterdir())


def test_an_older_file_is_not_converted_to_bf16(tiny_bytes, tmp_path):
    (tmp_path / "m.onnx").write_bytes(tiny_bytes[0])
    failed = run("convert", tmp_path / "m.onnx", "-o", tmp_path / "x.onnx", "--precision", "bf16", "--quiet")
    assert failed.exit_code == 4
    assert "has opset 18; bf16 needs 22, from which convolutions take it. Export it with --opset 22" in failed.stderr
    assert not (tmp_path / "x.onnx").exists()


@pytest.mark.parametrize("stage", ["rewritten", "converted"])
def test_the_graph_is_checked_after_each_stage(tmp_path, monkeypatch, stage):
    done = []

    def tidy_and_break(proto):
        done.append(tidy(proto))
        if len(done) == ["rewritten", "converted"].index(stage) + 1:
            proto.graph.node[-1].input[0] = "nobody gives it"

    monkeypatch.setattr(exporting, "tidy", tidy_and_break)
    with pytest.raises(ModelError, match=f"{stage} graph is invalid"):
        scconv_deploy.export(
            tiny_net(), torch.zeros(2, 3, 16, 16), tmp_path / "m.onnx", options=ExportOptions(precision="fp16")
        )
    assert not list(tmp_path.iterdir())
