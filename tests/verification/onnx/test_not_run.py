"""What cannot be run or compared is said, and what is not the reference's is refused."""

import math

import onnx
import pytest
import torch
from torch import nn

from scconv_deploy.errors import UsageError
from scconv_deploy.graph import instrument
from scconv_deploy.graph.file import serialize
from scconv_deploy.model.prepare import reference_from_module
from scconv_deploy.verification.samples import Sample
from scconv_deploy.workflows.export import ExportOptions, export_to_ir
from tests.verification.judging import Calls, check_of, export_of, judge


class Float32Only(nn.Module):
    """Cannot run in float64: it makes a float32 tensor of its own."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.register_buffer("unused", torch.zeros(1))

    def forward(self, x):
        return torch.nn.functional.linear(x, self.fc.weight.float(), None)


class Float32Asked(Float32Only):
    """The same with an exception of its own."""

    def forward(self, x):
        if x.dtype != torch.float32:
            raise TypeError("float32 please")
        return self.fc(x)


@pytest.mark.parametrize("model", [Float32Only, Float32Asked])
def test_without_float64_the_noise_is_that_of_other_float32_runs(model):
    reference, log = reference_from_module(model().eval(), torch.ones(2, 4))
    model = onnx.load_model_from_string(serialize(export_to_ir(reference, ExportOptions(), log)))
    report = judge(reference, model)
    assert report
    (output,) = report.outputs
    assert output.floor_measured
    assert 2**-24 <= output.noise_floor < 3e-7
    assert report.stages[-1].skipped[0][0] == "float64 among the runs whose distance is the noise"


def test_without_nodes_gates_are_not_run_and_the_outputs_decide(tiny_reference, model):
    inlined = onnx.inliner.inline_local_functions(model)
    report = judge(tiny_reference[0], inlined)
    assert check_of(report, "static").status == "not run"
    assert check_of(report, "teacher-forced gates").status == "not run"
    assert report.srus[0].teacher_forced is None
    assert check_of(report, "replay").status == "passed"
    assert report


def test_an_sru_that_one_sample_needs_is_needed():
    """On images below zero on average no output depends on c, on others one does."""
    torch.manual_seed(0)
    net = Calls(lambda net, x: net.a(x) + net.c(x) * (x.mean() > 0).float()).eval()
    reference, model = export_of(net)
    node = instrument.sites(model)["c"]
    for other in model.graph.node:
        other.input[:] = [node.input[0] if name == node.output[0] else name for name in other.input]
    model.graph.node.remove(node)
    with torch.no_grad():
        shift = net.conv(torch.zeros(1, 3, 10, 10)).mean()
        step = net.conv(torch.ones(1, 3, 10, 10)).mean() - shift
    images = {sign: torch.full((2, 3, 10, 10), float((sign - shift) / step)) for sign in (-1, 1)}
    images = {sign: image + 0.1 * torch.randn(image.shape) for sign, image in images.items()}

    def judged(*signs):
        return judge(reference, model, [Sample(str(sign), {"image": images[sign]}) for sign in signs])

    assert judged(-1)
    assert "c" not in check_of(judged(-1), "static").reason.split()
    for signs in ((1,), (-1, 1), (1, -1)):
        report = judged(*signs)
        assert check_of(report, "replay").status == "failed"
        assert check_of(report, "static").reason.endswith("without a node: c")


def test_another_models_artifact_is_refused(tiny_reference, model):
    model.graph.input[0].name = "pixels"
    for node in model.graph.node:
        for index, name in enumerate(node.input):
            if name == "image":
                node.input[index] = "pixels"
    with pytest.raises(UsageError, match="inputs are pixels; the reference's image"):
        judge(tiny_reference[0], model)


def test_outputs_in_another_order_are_refused(tiny_reference, model):
    outputs = list(model.graph.output)
    del model.graph.output[:]
    model.graph.output.extend(outputs[::-1])
    with pytest.raises(UsageError, match="outputs are features, logits; the reference's logits, features"):
        judge(tiny_reference[0], model)


def test_non_finite_inputs_are_reported_by_name(tiny_reference, model):
    bad = torch.full((2, 3, 16, 16), math.nan)
    report = judge(tiny_reference[0], model, [Sample("bad", {"image": bad})])
    assert "the input of a.SRU" in check_of(report, "finite").reason


def test_nan_in_the_data_is_named_not_called_a_flip():
    torch.manual_seed(0)
    reference, model = export_of(Calls(lambda net, x: net.a(x)).eval())
    bad = torch.zeros(2, 3, 10, 10)
    bad[0, 0, 5, 5] = math.nan
    report = judge(reference, model, [Sample("bad", {"image": bad})])
    assert "a in PyTorch" in check_of(report, "finite").reason
    assert "unexplained" not in " ".join(report.failures)


def test_a_reference_that_is_random_proves_nothing():
    class Random(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 1)

        def forward(self, x):
            return torch.nn.functional.dropout(self.conv(x), 0.5, training=True)

    torch.manual_seed(0)
    reference, log = reference_from_module(Random().eval(), torch.ones(2, 3, 8, 8))
    model = onnx.load_model_from_string(serialize(export_to_ir(reference, ExportOptions(), log)))
    report = judge(reference, model)
    assert not report
    assert "nothing can be judged by it" in check_of(report, "replay").reason


def test_a_child_in_train_mode_is_refused():
    net = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Dropout()).eval()
    net[1].train()
    with pytest.raises(UsageError, match="train mode"):
        reference_from_module(net, torch.ones(2, 3, 8, 8))
