"""A network with attention, trained on images of little contrast: judged on generated inputs that are like them."""

from collections.abc import Sequence

import onnx
import pytest
import torch

from scconv_deploy.graph.file import serialize
from scconv_deploy.model.prepare import Reference, reference_from_module, reference_from_spec
from scconv_deploy.model.spec import ModelSpec
from scconv_deploy.verification.reference.pytorch import TorchReference
from scconv_deploy.verification.samples import noise_samples
from scconv_deploy.workflows.export import ExportOptions, export_to_ir
from tests import yolo
from tests.verification.judging import judge


@pytest.fixture(scope="module")
def deployed(tmp_path_factory):
    """The reference and the ONNX file of a checkpoint."""
    file = tmp_path_factory.mktemp("checkpoint") / "best.pt"
    torch.save(yolo.checkpoint(yolo.settled(yolo.model(yolo.AttentiveModel), 0.5, 0.1)), file)
    reference, log = reference_from_spec(ModelSpec(str(file), trust_checkpoint=True))
    assert "batch norms folded by its own fuse()" in log.records[0].applied
    assert any("inputs drawn at 0.5 +- 0." in line for line in log.records[0].applied)
    return reference, serialize(export_to_ir(reference, ExportOptions(), log))


def noise_of(reference: Reference) -> Sequence[float | None]:
    source = TorchReference(reference)
    return [source.run(sample).floors["output0"] for sample in noise_samples(reference.signature, 0)]


def test_normal_noise_would_be_amplified_beyond_measure(deployed):
    """Its attention has logits of 1e4, and rounding chooses among them."""
    (image,) = deployed[0].signature.tensors.values()
    normal = torch.randn(image.shape, generator=torch.Generator().manual_seed(0))
    assert max(noise_of(reference_from_module(deployed[0].model, normal)[0])) > 1e-3
    assert max(noise_of(deployed[0])) < 1e-5


def test_a_healthy_file_passes(deployed):
    reference, content = deployed
    report = judge(reference, onnx.load_model_from_string(content))
    assert report, report.failures
    assert report.outputs[0].replay_ratio < 4


def test_a_wrong_operator_fails_wherever_it_is(deployed):
    """On normal noise five of these thirteen have no verdict, because all that follows saturates."""
    reference, content = deployed
    others = {"Sigmoid": "HardSigmoid", "Softmax": "Hardmax"}
    nodes = onnx.load_model_from_string(content).graph.node
    places = [index for index, node in enumerate(nodes) if node.op_type in others]
    assert len(places) == 13
    for place in places:
        model = onnx.load_model_from_string(content)
        node = model.graph.node[place]
        node.op_type = others[node.op_type]
        assert judge(reference, model).verdict == "failed", node
