"""A file in float64 with PyTorch's formula at its gates is a reference: it agrees with PyTorch, and finds faults."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

from scconv_deploy.graph.float64 import as_float64
from scconv_deploy.records.stage import StageLog
from scconv_deploy.runtimes.onnx_reference import OnnxReferenceRunner
from scconv_deploy.verification.metrics import relative_l2
from scconv_deploy.verification.onnx.chain import Artifact, verify_artifact
from scconv_deploy.verification.reference.onnx_float64 import OnnxFloat64Reference
from scconv_deploy.workflows.rewrite import RewriteOptions, rewrite_graph
from tests.rewrite import naive


@pytest.fixture(scope="module", params=["groupbn-hard", "groupbn-hard-normalized", "groupnorm-soft"])
def rewritten(request):
    """(module, rewritten file, gates by site) of a small net with two SRUs."""
    net = naive.small_net(request.param)
    original = naive.export(net, naive.noise(2, 3, 16, 16), False, 17)
    proto, applied = rewrite_graph(original, RewriteOptions(), StageLog().stage("rewrite").__enter__())
    return net, proto, {one.site: one.gate for one in applied.fused}


def changed(proto, name, change):
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    tensor = next(t for t in copy.graph.initializer if t.name == name)
    tensor.CopyFrom(numpy_helper.from_array(change(numpy_helper.to_array(tensor)), name))
    return copy


def weights_off(proto):
    """The file with a convolution whose weights are off by up to 1e-3, each by its own share."""
    name = next(node.input[1] for node in proto.graph.node if node.op_type == "Conv")
    draw = np.random.default_rng(0).uniform
    return changed(proto, name, lambda w: w * draw(0.999, 1.001, w.shape).astype(np.float32))


def judged(source, artifact):
    return verify_artifact(source, Artifact(artifact, "net.onnx", b""), source.samples(0), StageLog())


def status(report, check):
    return {c.name: c.status for link in report.links for c in link.checks}[check]


def test_it_is_pytorch_in_float64(rewritten):
    net, proto, gates = rewritten
    source = OnnxFloat64Reference("net.onnx", proto, gates)
    sample = source.samples(0)[0]
    run = source.run(sample)
    assert run.float64_refusal == ""
    with torch.no_grad():
        exact = net.double()(torch.from_numpy(sample.inputs["x"]).double()).numpy()
        float32 = net.float()(torch.from_numpy(sample.inputs["x"])).numpy()
    (y,) = run.outputs.values()
    assert y.dtype == np.float32
    # the gates are the same, and the rest is float64: the outputs' own rounding is left, and that of stored constants
    assert relative_l2(y, exact) < 1e-7
    assert not np.array_equal(y, float32)
    for name, gate in gates.items():
        np.testing.assert_array_equal(run.sites[name].mask, gate.mask(torch.from_numpy(run.sites[name].x)).numpy())


def test_the_file_passes_and_its_second_opinion_is_pytorch(rewritten):
    _, proto, gates = rewritten
    report = judged(OnnxFloat64Reference("net.onnx", proto, gates), proto)
    assert report.verdict == "passed"
    assert status(report, "second opinion") == "passed"
    assert [sru.teacher_forced.unexplained for sru in report.srus] == [0, 0]


def test_other_gates_in_the_file_than_the_formulas_fail(rewritten):
    """The file is its own reference but for the gates: these come from gamma and beta."""
    _, proto, gates = rewritten
    site, gate = next(iter(gates.items()))
    moved = {**gates, site: replace(gate, beta=gate.beta + 1e-3)}
    report = judged(OnnxFloat64Reference("net.onnx", proto, moved), proto)
    assert report.verdict == "failed"
    assert status(report, "teacher-forced gates") == "failed"


def test_an_error_of_the_artifact_is_no_noise(rewritten):
    """The noise is measured about ONNX Runtime's values, not about the difference itself."""
    _, proto, gates = rewritten
    report = judged(OnnxFloat64Reference("net.onnx", proto, gates), weights_off(proto))
    assert status(report, "replay") == "failed"


def test_a_runtime_that_is_wrong_everywhere_is_no_noise_either(rewritten, monkeypatch):
    """The float64 graph has another weight than ONNX Runtime was given: as if a kernel of the runtime were wrong."""
    _, proto, gates = rewritten
    source = OnnxFloat64Reference("net.onnx", proto, gates)
    other = OnnxFloat64Reference("net.onnx", weights_off(proto), gates)
    monkeypatch.setattr(source, "_float64", other._float64)
    assert status(judged(source, proto), "replay") == "failed"


def test_an_operator_that_the_interpreter_lacks_is_said(rewritten):
    _, proto, _ = rewritten
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    last = copy.graph.output[0].name
    for node in copy.graph.node:
        node.output[:] = [f"{last}_before" if o == last else o for o in node.output]
    copy.graph.node.append(onnx.helper.make_node("QuickGelu", [f"{last}_before"], [last], domain="com.microsoft"))
    copy.opset_import.append(onnx.helper.make_opsetid("com.microsoft", 1))
    source = OnnxFloat64Reference("net.onnx", copy, {})
    run = source.run(source.samples(0)[0])
    assert "QuickGelu" in run.float64_refusal


def test_every_kind_of_constant_becomes_float64():
    text = """
        <ir_version: 10, opset_import: ["" : 18]>
        g (float[2] x) => (y) <float[2] w = {0.1, 0.2}> {
            a = Constant <value_float = 0.1> ()
            b = Constant <value_floats = [0.1, 0.3]> ()
            shape = Constant <value_ints = [2]> ()
            c = ConstantOfShape <value = float[1] {0.7}> (shape)
            d = Cast <to = 1> (shape)
            xa = Add (x, a)
            xb = Mul (xa, b)
            xc = Add (xb, c)
            xd = Add (xc, d)
            y = Mul (xd, w)
        }"""
    wide = as_float64(onnx.parser.parse_model(text))
    found = OnnxReferenceRunner(wide).run({"x": np.array([1.0, 2.0])})["y"]
    a, b, c, w = (np.float32(v).astype(np.float64) for v in (0.1, [0.1, 0.3], 0.7, [0.1, 0.2]))
    assert found.dtype == np.float64
    np.testing.assert_array_equal(found, ((np.array([1.0, 2.0]) + a) * b + c + 2.0) * w)
