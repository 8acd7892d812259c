"""``--cru`` in export and rewrite: each form's graph, its record, and its parity."""

from __future__ import annotations

import json

import numpy as np
import onnx
import onnxruntime
import pytest
from torch import nn
from typer.testing import CliRunner

from scconv_deploy import ExportOptions, RewriteOptions, cli, rewrite_onnx
from scconv_deploy.errors import ModelError, UsageError
from scconv_deploy.graph.file import serialize
from scconv_deploy.model.prepare import reference_from_module
from scconv_deploy.nn import CRU, ScConv
from scconv_deploy.records.stage import StageLog
from scconv_deploy.verification.onnx.parity import Artifact, verify_onnx
from scconv_deploy.verification.samples import noise_samples
from scconv_deploy.workflows.export import export_to_ir
from tests.mutations import two_heads
from tests.rewrite import naive

FORMS = ("as-is", "halves", "merged")
SITES = [f"net.layer{stage}.0.conv2.CRU" for stage in (1, 2, 3)]


@pytest.fixture(scope="module")
def reference():
    return reference_from_module(two_heads(1, 16), naive.noise(2, 3, 16, 16))[0]


@pytest.fixture(scope="module")
def exported(reference):
    """(model, stage "rewrite") of each form."""
    found = {}
    for form in FORMS:
        log = StageLog()
        model = onnx.load_model_from_string(serialize(export_to_ir(reference, ExportOptions(cru=form), log)))
        found[form] = model, log.records[-1]
    return found


def concatenated(model):
    """Channels of each concatenation of features."""
    shapes = {v.name: [d.dim_value for d in v.type.tensor_type.shape.dim] for v in model.graph.value_info}
    found = [shapes[node.output[0]] for node in model.graph.node if node.op_type == "Concat"]
    return [shape[1] for shape in found if shape[2] > 1]


def outputs(model, image):
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"image": image.numpy()})


def test_the_graph_its_metadata_and_the_record(exported):
    assert concatenated(exported["as-is"][0]) == [32, 64, 128]
    assert concatenated(exported["halves"][0]) == [16, 32, 64]
    assert concatenated(exported["merged"][0]) == []
    for form, (model, stage) in exported.items():
        assert {p.key: p.value for p in model.metadata_props}["scconv_deploy.cru"] == form
        assert stage.skipped == ()
    assert exported["as-is"][1].applied == ("nothing to do",)
    assert exported["halves"][1].applied == (f"cru halves: {', '.join(SITES)}",)
    assert exported["merged"][1].applied == (f"cru merged: {', '.join(SITES)}",)


@pytest.mark.parametrize("form", FORMS)
def test_parity_in_every_form(reference, exported, form):
    model = exported[form][0]
    artifact = Artifact(model, "model.onnx", model.SerializeToString())
    report = verify_onnx(reference, artifact, noise_samples(reference.signature, 0), StageLog())
    assert report.verdict == "passed"
    assert [gate.unexplained for site in report.srus if (gate := site.teacher_forced)] == [0, 0, 0]


def test_halves_are_equal_to_the_bit(exported):
    image = naive.noise(2, 3, 16, 16, seed=1)
    for one, other in zip(*(outputs(exported[form][0], image) for form in ("as-is", "halves")), strict=True):
        np.testing.assert_array_equal(one, other)


def test_auto_and_unknown_forms():
    assert ExportOptions().resolved_cru == "halves"
    assert ExportOptions(backends=("onnx", "tensorrt-rtx")).resolved_cru == "merged"
    assert ExportOptions(cru="as-is", backends=("tensorrt",)).resolved_cru == "as-is"
    with pytest.raises(UsageError, match="cru is 'thirds'"):
        ExportOptions(cru="thirds")


class Pairs(nn.Module):
    def __init__(self):
        super().__init__()
        self.block = ScConv(16, fusion="pairwise")

    def forward(self, x):
        return self.block(x)


def test_the_papers_fusion_is_recorded_with_its_reason():
    log = StageLog()
    export_to_ir(reference_from_module(Pairs().eval(), naive.noise(2, 16, 8, 8))[0], ExportOptions(), log)
    ((place, reason),) = log.records[-1].skipped
    assert place == "block.CRU (cru halves)"
    assert reason.startswith("its softmax runs over the two paths of each channel (the paper's Eq. 8)")


@pytest.mark.parametrize("form", FORMS)
def test_rewrite_takes_the_same_forms(tmp_path, form):
    path = tmp_path / "in.onnx"
    net = ScConv(16).eval()
    path.write_bytes(naive.export(net, naive.noise(2, 16, 8, 8), False).SerializeToString())
    arguments = ["rewrite", str(path), "-o", str(tmp_path / "out.onnx"), "--cru", form, "--json"]
    found = CliRunner().invoke(cli.app, arguments)
    assert found.exit_code == 0, found.stderr
    document = json.loads(found.stdout)
    assert document["outcome"] == "rewritten"
    lines = [line for stage in document["stages"] for line in stage["applied"] if line.startswith("cru ")]
    assert bool(lines) == (form != "as-is")
    again = rewrite_onnx(tmp_path / "out.onnx", tmp_path / "again.onnx", options=RewriteOptions(cru=form))
    assert again.outcome == "unchanged"


def test_a_file_without_a_gate_is_no_rewrite(tmp_path):
    path = tmp_path / "in.onnx"
    path.write_bytes(naive.export(CRU(16).eval(), naive.noise(2, 16, 8, 8), False).SerializeToString())
    with pytest.raises(ModelError, match="holds no gate to rewrite"):
        rewrite_onnx(path, tmp_path / "out.onnx")
    result = rewrite_onnx(path, tmp_path / "out.onnx", options=RewriteOptions(expect=0))
    assert result.outcome == "rewritten"
    assert result.guard is not None
    assert result.guard.failures == ()
