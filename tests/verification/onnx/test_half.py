"""Half artifacts: healthy ones pass, what the usual converters break fails, and a stand-in is called one."""

from __future__ import annotations

import re

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from onnx import TensorProto, numpy_helper

from scconv_deploy.gate.margins import count_flips, decide
from scconv_deploy.graph import instrument
from scconv_deploy.graph.file import serialize
from scconv_deploy.model.prepare import reference_from_module
from scconv_deploy.records.stage import StageLog
from scconv_deploy.runtimes.half import HalfRunner
from scconv_deploy.runtimes.onnxruntime import OnnxRuntimeRunner
from scconv_deploy.verification.checks import native
from scconv_deploy.verification.onnx.chain import Artifact
from scconv_deploy.verification.onnx.parity import verify_onnx
from scconv_deploy.verification.samples import Sample, noise_samples
from scconv_deploy.workflows.export import ExportOptions, export_to_ir, in_precision
from tests.verification.judging import check_of, edit_body, judge


def halved(reference, options):
    """(float32 model, half model)."""
    float32_model = export_to_ir(reference, options, StageLog())
    half = in_precision(float32_model, options, StageLog())
    return ir.to_proto(float32_model), onnx.load_model_from_string(serialize(half))


@pytest.fixture(scope="module")
def half_bytes(tiny_reference):
    return halved(tiny_reference[0], ExportOptions(precision="fp16"))[1].SerializeToString()


@pytest.fixture
def half(half_bytes):
    return onnx.load_model_from_string(half_bytes)


def link_of(report, name):
    return next(link for link in report.links if link.name == name)


def checks_of(report, name):
    return [c for c in link_of(report, "precision").checks if c.name == name]


@pytest.mark.parametrize(
    ("options", "unit"),
    [
        (ExportOptions(precision="fp16"), 2.0**-11),
        (ExportOptions(precision="fp16", io="half", mask_form="where"), 2.0**-11),
        (ExportOptions(precision="bf16"), 2.0**-8),
        (ExportOptions(precision="bf16", io="half", opset=23), 2.0**-8),
        (ExportOptions(precision="fp16", keep=("stem*", "head*")), 2.0**-11),
    ],
    ids=["fp16", "fp16 io", "bf16", "bf16 io", "keep"],
)
def test_a_healthy_one_passes(tiny_reference, options, unit):
    reference = tiny_reference[0]
    float32_model, half = halved(reference, options)
    made = Artifact(half, "model.onnx", half.SerializeToString(), float32_model)
    report = verify_onnx(reference, made, noise_samples(reference.signature, 0), StageLog())
    assert report, report.failures
    assert [link_of(report, name).status for name in ("onnxruntime", "precision")] == ["passed", "passed"]
    assert [sru.teacher_forced.flips for sru in report.srus] == [0] * 4  # the gate is in float32
    assert [sru.free_running.unexplained for sru in report.srus] == [0] * 4
    for output in report.outputs:
        assert unit <= output.noise_floor < 4 * unit
        assert output.replay_error < unit  # PyTorch rounds where the file does
    for check in checks_of(report, "rounding"):
        assert 0.1 * unit < check.quantities[0].value < 3 * unit  # it is half, and no worse
    assert len(checks_of(report, "rounding")) == len(report.outputs)
    native = {check.status for check in checks_of(report, "runtime")}
    assert native == ({"not run"} if options.precision == "bf16" else {"passed"})
    stand_in = [c for c in link_of(report, "precision").checks if c.name == "stand-in"]
    assert [c.status for c in stand_in] == (["not run"] if options.precision == "bf16" else [])
    onnx_error = next(c for c in link_of(report, "onnxruntime").checks if c.name == "replay").quantities[0].value
    assert onnx_error < 1e-6  # the link before it is float32's


def test_alone_it_is_judged_by_the_link_precision(tiny_reference, half):
    report = judge(tiny_reference[0], half)
    assert report, report.failures
    assert link_of(report, "onnxruntime").status == "not run"
    assert link_of(report, "precision").status == "passed"


def test_cuts_rounded_to_half_are_caught(tiny_reference, half):
    """What converters do that do not know an SRU, though cast back to float32 so that the file is valid."""
    for node in instrument.sites(half).values():
        tensor = next(t for t in half.graph.initializer if t.name == node.input[1])
        rounded = numpy_helper.to_array(tensor).astype(np.float16).astype(np.float32)
        tensor.CopyFrom(numpy_helper.from_array(rounded, tensor.name))
    report = judge(tiny_reference[0], half)
    assert check_of(report, "static").status == "failed"
    assert link_of(report, "precision").status == "failed"


def test_an_inverted_gate_is_caught(tiny_reference, half):
    function = next(f for f in half.functions if f.name == "SRU")
    next(node for node in function.node if node.op_type == "GreaterOrEqual").op_type = "Less"
    report = judge(tiny_reference[0], half)
    check = check_of(report, "teacher-forced gates")
    assert check.status == "failed"
    assert "same input, gates changed" in check.reason
    gates = [sru.teacher_forced for sru in report.srus if sru.site in ("a.SRU", "a.SRU#2")]
    assert all(count.unexplained > 0.9 * count.gates for count in gates)


def test_another_body_is_caught(tiny_reference, half):
    """A second rounding of x, which no half input shows."""
    wanted = "sru__xf = Cast <to = 1> (sru__x)"
    edit_body(half, wanted, "sru__h = Cast <to = 10> (sru__x) sru__xf = Cast <to = 1> (sru__h)")
    check = check_of(judge(tiny_reference[0], half), "static")
    assert check.status == "failed"
    assert "function body" in check.reason


@pytest.mark.parametrize(("relative", "check"), [(0.05, "replay"), (0.02, "weights")])
def test_a_damaged_weight_is_caught(tiny_reference, half, relative, check):
    tensor = next(t for t in half.graph.initializer if t.name == "head.weight")
    assert tensor.data_type == TensorProto.FLOAT16
    value = numpy_helper.to_array(tensor).copy()
    value[:] *= np.float16(1 + relative) if check == "replay" else np.float16(1)
    value.flat[0] *= np.float16(1 + relative)
    tensor.CopyFrom(numpy_helper.from_array(value, tensor.name))
    report = judge(tiny_reference[0], half)
    assert check_of(report, check).status == "failed"


def test_values_that_half_cannot_hold_are_named_with_their_module(tiny_reference):
    reference = tiny_reference[0]
    float32_model, half = halved(reference, ExportOptions(precision="fp16"))
    image = 1e6 * noise_samples(reference.signature, 0)[0].tensors["image"]
    made = Artifact(half, "model.onnx", half.SerializeToString(), float32_model)

    def range_on(image):
        return check_of(verify_onnx(reference, made, [Sample("x", {"image": image})], StageLog()), "range")

    check = range_on(image / 1e6)
    with OnnxRuntimeRunner(float32_model) as runner:
        features = np.abs(runner.run({"image": image.numpy() / np.float32(1e6)})["features"]).max()
    assert check.status == "passed"
    words = r"fp16 holds the values of (\d+) tensors: (\S+) (\(\S+\) )?reaches (\S+) of 65504"
    found = re.fullmatch(words, check.reason)
    assert found, check.reason
    assert int(found[1]) > 5
    assert features <= float(found[4]) * 1.01 < 100
    check = range_on(image)
    assert check.status == "failed"
    assert "(stem" in check.reason
    assert "which fp16 cannot hold; --keep leaves layers in float32" in check.reason


def test_the_runner_rounds_what_goes_in_and_gives_float32(tiny_reference):
    """--io half: float32 arrays in and out, rounded on the way."""
    _, half = halved(tiny_reference[0], ExportOptions(precision="fp16", io="half"))
    image = np.random.default_rng(0).normal(size=(2, 3, 16, 16)).astype(np.float32)
    with HalfRunner(half) as runner:
        found = runner.run({"image": image})
        again = runner.run({"image": image.astype(np.float16).astype(np.float32)})
    assert {y.dtype for y in found.values()} == {np.dtype(np.float32)}
    for name, y in found.items():
        np.testing.assert_array_equal(y, again[name])
        np.testing.assert_array_equal(y, y.astype(np.float16))


def test_gates_decided_in_float64_are_pytorchs(tiny_reference):
    """decide() is the reference for data that PyTorch was not run on."""
    from scconv_deploy.verification.reference.pytorch import TorchReference

    source = TorchReference(tiny_reference[0])
    run = source.run(noise_samples(tiny_reference[0].signature, 0)[0])
    for found in run.sites.values():
        x = found.x.astype(np.float16).astype(np.float32)
        _, mask = source.sru(found.site, x)
        count = count_flips(decide(x, found.site.form) != mask, x, found.site.form)
        assert (count.unexplained, count.gates) == (0, mask.size)
        assert count.flips < 5
        assert (decide(-x, found.site.form) != mask).mean() > 0.2


@pytest.mark.parametrize(
    ("spoil", "check", "words"),
    [
        (lambda y: np.where(np.arange(y.size).reshape(y.shape), y, np.nan), "finite", "the runtime's output"),
        (lambda y: np.where(np.arange(y.size).reshape(y.shape), y, np.inf), "finite", "the runtime's output"),
        (lambda y: y[..., :-1], "contract", "the runtime's own output"),
    ],
)
def test_what_the_runtime_itself_spoils_fails(tiny_reference, half, monkeypatch, spoil, check, words):
    """On the last sample alone: what was measured before is judged all the same."""
    ran = []

    class Spoiling(HalfRunner):
        def run(self, tensors):
            ran.append(1)
            found = super().run(tensors)
            return {n: y * np.float32(2) if len(ran) == 1 else spoil(y) for n, y in found.items()}

    monkeypatch.setattr(native, "HalfRunner", Spoiling)
    report = judge(tiny_reference[0], half)
    assert len(ran) > 1
    assert check_of(report, check).status == "failed"
    assert words in check_of(report, check).reason
    assert check_of(report, "runtime").status == "failed"


class Largest(torch.nn.Module):
    """Which channel is the largest, of many that are near."""

    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 64, 3)

    def forward(self, image):
        return self.conv(image).argmax(1)


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_ties_that_half_decides_otherwise_are_no_fault(precision):
    torch.manual_seed(0)
    reference, _ = reference_from_module(Largest().eval(), torch.randn(2, 3, 16, 16))
    _, half = halved(reference, ExportOptions(precision=precision))
    report = judge(reference, half)
    assert not report.failures
    tensor = next(t for t in half.graph.initializer if t.name == "conv.weight")
    value = numpy_helper.to_array(tensor)
    tensor.CopyFrom(numpy_helper.from_array(value[::-1].copy(), tensor.name))
    assert check_of(judge(reference, half), "replay").status == ("failed" if precision == "fp16" else "not run")
