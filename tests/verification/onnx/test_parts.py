"""Small parts of an output, as scores are beside boxes in pixels, which the whole output's error does not show."""

import onnx
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from scconv_deploy.graph.file import serialize
from scconv_deploy.model.prepare import reference_from_module
from scconv_deploy.workflows.export import ExportOptions, export_to_ir
from tests import yolo
from tests.verification.judging import check_of, judge
from tests.verified import verify_bundle
from tests.workflows.test_verify import make_bundle


@pytest.fixture(scope="module")
def detector():
    """A detector whose scores are 1e-3 beside boxes of 30 pixels, and its file."""
    model = yolo.model()
    head = model.model[-1]
    head.export = True
    with torch.no_grad():
        head.cv.bias[4:] = -7
    image = torch.rand((1, 3, 32, 32), generator=torch.manual_seed(0))
    reference, log = reference_from_module(model, image)
    return reference, serialize(export_to_ir(reference, ExportOptions(), log))


def with_scores(content, factor):
    """The file with all scores multiplied by a factor."""
    model = onnx.load_model_from_string(content)
    node = [n for n in model.graph.node if n.op_type == "Sigmoid"][-1]
    scores, node.output[0] = node.output[0], "scores_before"
    after = list(model.graph.node).index(node) + 1
    model.graph.initializer.append(onnx.helper.make_tensor("factor", onnx.TensorProto.FLOAT, [], [factor]))
    model.graph.node.insert(after, onnx.helper.make_node("Mul", ["scores_before", "factor"], [scores]))
    return model


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
    assert report.verdict == "failed"
    assert check_of(report, "parts").status == "failed"
    assert check_of(report, "replay").status == "passed"
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
