"""Non-maximum suppression in the exported graph: standard operators, and the same mask."""

import onnxruntime
import pytest
import torch
from torch import nn

from scconv_deploy.exporters.onnx import export_model
from scconv_deploy.gate.recognize import Recognition
from scconv_deploy.graph.file import serialize
from scconv_deploy.model.inputs import DynamicAxis
from scconv_deploy.model.signature import Signature
from scconv_deploy.records.stage import StageLog
from scconv_deploy.zoo.nms import non_max_suppression


class Suppress(nn.Module):
    def forward(self, boxes, scores):
        return non_max_suppression(boxes, scores, 5, 0.3, 0.4)


def inputs(batch, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(batch, 40, 4, generator=generator), torch.rand(batch, 3, 40, generator=generator)


@pytest.mark.parametrize("opset", [18, 23])
def test_the_graph_and_its_mask(opset):
    signature = Signature(inputs(2, 0), {}, ("boxes", "scores"), (DynamicAxis(1, 2, 8),))
    model = export_model(Suppress().eval(), Recognition(()), signature, StageLog(), opset=opset)
    operators = [node.op_type for node in model.graph]
    assert operators.count("NonMaxSuppression") == operators.count("ScatterND") == 1
    assert {node.domain for node in model.graph} == {""}
    assert [str(size) for size in model.graph.outputs[0].shape] == ["batch", "3", "40"]
    session = onnxruntime.InferenceSession(serialize(model), providers=["CPUExecutionProvider"])
    for batch in (1, 3):
        boxes, scores = inputs(batch, 1)
        (mask,) = session.run(None, {"boxes": boxes.numpy(), "scores": scores.numpy()})
        assert 0 < mask.sum() < mask.size / 2
        torch.testing.assert_close(torch.from_numpy(mask), Suppress()(boxes, scores), rtol=0, atol=0)
