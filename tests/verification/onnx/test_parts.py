"""Small parts of an output, as scores are beside boxes in pixels, which the whole output's error does not show."""

from __future__ import annotations

import onnx
import onnx_ir as ir
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from typer.testing import CliRunner

from scconv_deploy.bundle.reference import write_reference
from scconv_deploy.cli import app
from scconv_deploy.graph import instrument
from scconv_deploy.graph.file import serialize
from scconv_deploy.model.prepare import reference_from_module
from scconv_deploy.records.stage import StageLog
from scconv_deploy.verification.onnx.chain import Artifact, verify_artifact
from scconv_deploy.verification.reference.onnx_file import OnnxReference
from scconv_deploy.verification.reference.onnx_float64 import OnnxFloat64Reference
from scconv_deploy.verification.reference.pytorch import TorchReference
from scconv_deploy.verification.samples import noise_samples
from scconv_deploy.workflows.export import ExportOptions, export_to_ir, in_precision
from tests import yolo
from tests.verification.judging import check_of, judge
from tests.verified import verify_bundle
from tests.workflows.test_verify import make_bundle, seal

DATA = {"fp16": "float16", "bf16": "bfloat16"}
LARGEST_HEALTHY = 0.6
"""Share of the limit that a healthy half file may reach; 160 of these detectors reach 0.43 at most (four seeds, four
sizes of scores, both types)."""


class Anchored(nn.Module):
    """As in SSD: rows of anchors ``[N, cells, 4 + K]``, corners in pixels and a softmax without its background."""

    def __init__(self, channels, nc=3):
        super().__init__()
        self.cv = nn.Conv2d(channels, 4 + nc, 1)

    def forward(self, x):
        boxes, scores = self.cv(x).flatten(2).transpose(1, 2).split((4, self.cv.out_channels - 4), -1)
        return torch.cat([boxes.exp() * 40, scores.softmax(-1)[..., 1:]], -1)


def exported(logit, kind="sigmoid", seed=0, extra=yolo.Detect):
    """The reference and float32 file of a detector whose scores' logits are about ``logit``."""
    model = yolo.model(seed=seed, head=extra if kind == "sigmoid" else Anchored)
    head = model.model[-1]
    head.export = True
    with torch.no_grad():
        if kind == "sigmoid":
            head.cv.bias[4 : 4 + head.nc] = logit
        else:
            head.cv.bias[4] = -logit
    image = torch.rand((1, 3, 32, 32), generator=torch.manual_seed(seed))
    reference, log = reference_from_module(model, image)
    return reference, serialize(export_to_ir(reference, ExportOptions(opset=22), log))


@pytest.fixture(scope="module")
def detector():
    """A detector whose scores are 1e-3 beside boxes of 30 pixels, and its file."""
    return exported(-7)


@pytest.fixture(scope="module")
def anchored():
    """The same with a softmax and another order of the axes."""
    return exported(-7, "softmax")


def with_scores(content, factor):
    """The file with all scores multiplied by a factor."""
    model = onnx.load_model_from_string(content)
    node = [n for n in model.graph.node if n.op_type in ("Sigmoid", "Softmax")][-1]
    scores, node.output[0] = node.output[0], "scores_before"
    after = list(model.graph.node).index(node) + 1
    model.graph.initializer.append(onnx.helper.make_tensor("factor", onnx.TensorProto.FLOAT, [], [factor]))
    model.graph.node.insert(after, onnx.helper.make_node("Mul", ["scores_before", "factor"], [scores]))
    return model


def with_hard_sigmoid(content):
    """The file with HardSigmoid in the branch of the classes."""
    model = onnx.load_model_from_string(content)
    [n for n in model.graph.node if n.op_type == "Sigmoid"][-1].op_type = "HardSigmoid"
    return model


def halved(model, precision):
    """A float32 model in half."""
    half = in_precision(ir.from_proto(model), ExportOptions(precision=precision, opset=22), StageLog())
    return onnx.load_model_from_string(serialize(half))


def by_file(kind, content, model):
    """Judge a model against a file."""
    proto = onnx.load_model_from_string(content)
    source = OnnxReference("m", proto) if kind == "file" else OnnxFloat64Reference("m", proto, {})
    artifact = Artifact(model, "model.onnx", model.SerializeToString())
    return verify_artifact(source, artifact, source.samples(0), StageLog())


def share_of_limit(report):
    """Ratio of the parts in multiples of their limit, and the check, which passed."""
    assert report, report.failures
    check = check_of(report, "parts")
    assert check.status == "passed", check.reason
    return check.quantities[0].value / check.quantities[0].limit


def assert_only_parts_fail(report):
    """The whole output does not show the fault."""
    assert report.verdict == "failed"
    assert check_of(report, "parts").status == "failed"
    assert check_of(report, "replay").status == "passed"


def test_scores_of_a_healthy_file_are_within_their_noise(detector):
    reference, content = detector
    report = judge(reference, onnx.load_model_from_string(content))
    assert report, report.failures
    check = check_of(report, "parts")
    assert check.status == "passed"
    assert "output[axis 1: 4-6]" in check.reason
    assert check.quantities[0].value < 2


def test_scores_that_are_all_off_fail_though_the_output_as_a_whole_does_not_show_it(detector):
    reference, content = detector
    report = judge(reference, with_scores(content, 1.003))
    assert_only_parts_fail(report)
    assert report.outputs[0].replay_ratio < 4


def test_the_noise_of_parts_travels(detector, tmp_path):
    reference, content = detector
    bundle = make_bundle(tmp_path / "good", reference, content)
    assert verify_bundle(bundle)
    (bundle / "model.onnx").write_bytes(with_scores(content, 1.1).SerializeToString())
    assert check_of(verify_bundle(bundle), "parts").status == "failed"


class Tails(nn.Module):
    """Activations whose results are small, beside a plain output of 100."""

    def forward(self, x):
        low = x - torch.linspace(4, 10, 8)[:, None, None]
        small = [
            F.silu(low), F.gelu(low * 0.5, approximate="tanh"), F.elu(low * 1e-6), F.logsigmoid(-low),
            F.glu(torch.cat([x, low], 1), 1), torch.log1p(low.exp()), torch.sigmoid(low),
        ]  # fmt: skip
        return torch.cat([100 + x, *small], 1)


def test_small_results_of_activations_that_are_several_nodes_are_within_their_noise():
    x = torch.randn((1, 8, 12, 12), generator=torch.manual_seed(1))
    reference, log = reference_from_module(Tails().eval(), x)
    report = judge(reference, onnx.load_model_from_string(serialize(export_to_ir(reference, ExportOptions(), log))))
    assert report, report.failures
    check = check_of(report, "parts")
    assert "5 parts of outputs" in check.reason
    assert check.quantities[0].value < 3


class Softly(nn.Module):
    """log(1 + exp(x)), which is several nodes in a file, beside a plain output of 100 or alone."""

    def __init__(self, alone):
        super().__init__()
        self.alone = alone

    def forward(self, x):
        small = torch.log1p((x - 8).exp())
        return small if self.alone else torch.cat([100 + x, small], 1)


@pytest.mark.parametrize(
    ("alone", "name", "status", "words"),
    [(True, "replay", "failed", "x the noise floor"), (False, "parts", "not run", "noise is too large")],
)
def test_what_half_loses_fails_alone_and_is_named_beside_large_values(alone, name, status, words):
    """1 + 3e-4 has one digit of 3e-4 in float16; PyTorch's operator has all of them."""
    x = torch.randn((1, 8, 12, 12), generator=torch.manual_seed(1))
    reference, log = reference_from_module(Softly(alone).eval(), x)
    model = onnx.load_model_from_string(serialize(export_to_ir(reference, ExportOptions(), log)))
    check = check_of(judge(reference, halved(model, "fp16")), name)
    assert (check.status, words in check.reason) == (status, True), check.reason


@pytest.mark.parametrize("precision", DATA)
def test_small_results_of_activations_are_within_their_noise_in_half(precision):
    x = torch.randn((1, 8, 12, 12), generator=torch.manual_seed(1))
    reference, log = reference_from_module(Tails().eval(), x)
    model = onnx.load_model_from_string(serialize(export_to_ir(reference, ExportOptions(opset=22), log)))
    assert share_of_limit(judge(reference, halved(model, precision))) < 1


@pytest.mark.parametrize("precision", DATA)
@pytest.mark.parametrize(
    ("logit", "kind", "seed", "head"),
    [
        (-7, "sigmoid", 0, yolo.Detect),
        (-3, "sigmoid", 1, yolo.Detect),
        (-14, "sigmoid", 2, yolo.Detect),
        (-7, "sigmoid", 3, yolo.Pose),
        (-10, "sigmoid", 4, yolo.Gridded),
        (-7, "softmax", 0, None),
        (-4, "softmax", 1, None),
    ],
)
def test_scores_of_a_healthy_half_file_are_within_their_noise(logit, kind, seed, head, precision):
    reference, content = exported(logit, kind, seed, head)
    report = judge(reference, halved(onnx.load_model_from_string(content), precision))
    assert share_of_limit(report) < LARGEST_HEALTHY, check_of(report, "parts").reason


@pytest.mark.parametrize(
    ("precision", "fault"),
    [
        ("fp16", lambda content: with_scores(content, 1.1)),
        ("fp16", lambda content: with_scores(content, 1.01)),
        ("fp16", with_hard_sigmoid),
        ("bf16", lambda content: with_scores(content, 1.1)),
        ("bf16", with_hard_sigmoid),
    ],
    ids=["fp16 1.1", "fp16 1.01", "fp16 hard", "bf16 1.1", "bf16 hard"],
)
def test_scores_of_a_half_file_that_are_all_off_fail(detector, precision, fault):
    reference, content = detector
    assert_only_parts_fail(judge(reference, halved(fault(content), precision)))


@pytest.mark.parametrize(("precision", "factor"), [("fp16", 1.01), ("bf16", 1.1)])
def test_a_softmax_that_is_off_in_half_fails(anchored, precision, factor):
    reference, content = anchored
    assert_only_parts_fail(judge(reference, halved(with_scores(content, factor), precision)))


def test_a_hundredth_is_bf16s_own_rounding(detector):
    """No file in bf16 can be asked for more: its logits of -7 are up to 0.016 off."""
    reference, content = detector
    check = check_of(judge(reference, halved(with_scores(content, 1.01), "bf16")), "parts")
    assert check.status == "passed"
    assert check.quantities[0].value < 1.5


@pytest.mark.parametrize(
    ("logit", "precision", "words"),
    [(-17, "fp16", "noise is too large (output[axis 1: 4-6]"), (-30, "fp16", "zeros in half (output[axis 1: 4-6])"),
     (-17, "bf16", "noise is too large (output[axis 1: 4-6]")],
)  # fmt: skip
def test_scores_below_what_a_runtime_can_compute_in_half_are_named_and_decide_nothing(logit, precision, words):
    reference, content = exported(logit)
    report = judge(reference, halved(onnx.load_model_from_string(content), precision))
    assert report, report.failures
    check = check_of(report, "parts")
    assert (check.status, words in check.reason) == ("not run", True), check.reason


def test_the_last_place_of_a_small_float16_is_that_of_the_smallest_normal_one():
    """Scores of 1e-7 are one or two of float16's smallest steps: a relative disturbance would move none of them."""
    content = exported(-17, "softmax")[1]
    report = by_file("file", content, halved(onnx.load_model_from_string(content), "fp16"))
    assert report, report.failures
    assert "noise is too large" in check_of(report, "parts").reason


@pytest.mark.parametrize("precision", DATA)
def test_the_noise_of_parts_in_half_travels(detector, tmp_path, precision):
    reference, content = detector
    folder = tmp_path / "bundle"
    folder.mkdir()
    healthy = halved(onnx.load_model_from_string(content), precision)
    (folder / "model.onnx").write_bytes(healthy.SerializeToString())
    source = TorchReference(reference)
    runs = map(source.run, noise_samples(reference.signature, 0)[:1])
    write_reference(folder, source, runs, instrument.sites(healthy), rounded_to=DATA[precision])
    seal(folder)
    assert share_of_limit(verify_bundle(folder)) < LARGEST_HEALTHY
    (folder / "model.onnx").write_bytes(halved(with_scores(content, 1.1), precision).SerializeToString())
    assert_only_parts_fail(verify_bundle(folder))


@pytest.mark.parametrize("logit", [-3, -7, -14, -30])
@pytest.mark.parametrize("reference", ["file", "float64"])
def test_a_healthy_file_is_as_right_as_another(reference, logit):
    """ONNX Runtime's sigmoid of -14 is a hundredth off, and that of -30 has no digit in common with the right one."""
    content = exported(logit)[1]
    report = by_file(reference, content, onnx.load_model_from_string(content))
    assert report, report.failures
    if logit > -30:
        assert share_of_limit(report) < 0.3, check_of(report, "parts").reason


@pytest.mark.parametrize("reference", ["file", "float64"])
def test_scores_that_are_off_from_another_files_fail(detector, reference):
    assert_only_parts_fail(by_file(reference, detector[1], with_scores(detector[1], 1.001)))
    report = by_file(reference, detector[1], with_hard_sigmoid(detector[1]))
    assert (report.verdict, check_of(report, "parts").status) == ("failed", "failed")


@pytest.mark.parametrize("precision", DATA)
def test_half_scores_that_are_off_from_another_files_fail(detector, anchored, precision):
    for content in (detector[1], anchored[1]):
        healthy = halved(onnx.load_model_from_string(content), precision)
        assert share_of_limit(by_file("file", content, healthy)) < LARGEST_HEALTHY
        assert_only_parts_fail(by_file("file", content, halved(with_scores(content, 1.1), precision)))
    assert_only_parts_fail(by_file("file", detector[1], halved(with_hard_sigmoid(detector[1]), precision)))


@pytest.mark.parametrize("precision", [None, "fp16"])
def test_the_command_line_exits_with_6(detector, tmp_path, precision):
    right, wrong = onnx.load_model_from_string(detector[1]), with_scores(detector[1], 1.1)
    (tmp_path / "reference.onnx").write_bytes(detector[1])
    for model, code in ((right, 0), (wrong, 6)):
        artifact = halved(model, precision) if precision else model
        (tmp_path / "m.onnx").write_bytes(artifact.SerializeToString())
        arguments = ["verify", str(tmp_path / "m.onnx"), "--reference", str(tmp_path / "reference.onnx"), "--quiet"]
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == code, result.stderr


def test_a_bundle_of_a_file_in_half_keeps_what_its_parts_are_judged_by(detector, tmp_path):
    (tmp_path / "m.onnx").write_bytes(detector[1])
    options = ["-o", str(tmp_path / "b"), "--precision", "fp16", "--opset", "22", "--quiet"]
    result = CliRunner().invoke(app, ["deploy", str(tmp_path / "m.onnx"), *options])
    assert result.exit_code == 0, result.stderr
    assert share_of_limit(verify_bundle(tmp_path / "b")) < LARGEST_HEALTHY
    faulty = with_hard_sigmoid((tmp_path / "b" / "model.onnx").read_bytes())
    (tmp_path / "b" / "model.onnx").write_bytes(faulty.SerializeToString())
    assert_only_parts_fail(verify_bundle(tmp_path / "b"))
