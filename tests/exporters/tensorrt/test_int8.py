"""int8 in TensorRT-RTX: the layers that multiply integers, read from the plan that its builder compiled on the CPU."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from scconv_deploy.exporters.tensorrt.compiled_plan import quantized_layers
from scconv_deploy.exporters.tensorrt.onnx_source import graph_facts
from scconv_deploy.exporters.tensorrt.options import BuildOptions
from scconv_deploy.graph.file import serialize
from scconv_deploy.model.prepare import reference_from_module
from scconv_deploy.nn import ScConv
from scconv_deploy.records.stage import StageLog
from scconv_deploy.runtimes.tensorrt.engine import CompiledPlan, EngineQuantized, PlanLayer
from scconv_deploy.workflows.build import build_file
from scconv_deploy.workflows.export import ExportOptions, export_to_ir, in_precision
from tests import int8
from tests.precision.made import parsed


class Net(nn.Module):
    """Whole groups, straddling ones, a depthwise layer and a residual sum between the first and the last layers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.whole, self.down = nn.Conv2d(3, 16, 3, 2, 1), ScConv(16), nn.Conv2d(16, 24, 1)
        self.straddling, self.depthwise = ScConv(24), nn.Conv2d(24, 24, 3, 1, 1, groups=24)
        self.first, self.last = nn.Linear(24 * 64, 16), nn.Linear(16, 10)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.stem(image))
        x = torch.relu(self.whole(x)) + x
        x = self.depthwise(torch.relu(self.straddling(self.down(x))))
        return self.last(torch.relu(self.first(torch.relu(x).flatten(1))))


def quantized(precision: str, cru: str) -> onnx.ModelProto:
    """The network in int8 on top of a precision, its CRUs in a form."""
    torch.manual_seed(0)
    reference, log = reference_from_module(Net().eval(), int8.image())
    options = ExportOptions(precision=precision, cru=cru, mask_form="where", opset=22)
    model = in_precision(export_to_ir(reference, options, log), options, StageLog())
    return int8.quantize(onnx.load_model_from_string(serialize(model)))


def built(model: onnx.ModelProto, folder):
    pytest.importorskip("tensorrt_rtx", reason="needs tensorrt-rtx")
    onnx.save(model, folder / "m.onnx")
    return build_file(folder / "m.onnx", folder / "m.engine", BuildOptions("tensorrt-rtx", "sm89"))


def layers(model: onnx.ModelProto) -> list[str]:
    """Names of the nodes that the quantiser chose, told by the names that it gives their weights."""
    ending = ".weight_DequantizeLinear_Output"
    return [node.name for node in model.graph.node if len(node.input) > 1 and node.input[1].endswith(ending)]


@pytest.mark.tensorrt
@pytest.mark.parametrize(
    ("precision", "cru", "chosen"),
    [
        ("fp32", "halves", 13),
        ("fp16", "halves", 13),
        ("bf16", "halves", 13),
        ("fp32", "as-is", 13),
        ("fp16", "merged", 3),
    ],
)
def test_every_layer_that_should_multiplies_integers(precision, cru, chosen, tmp_path):
    model = quantized(precision, cru)
    result = built(model, tmp_path)
    manifest = result.engine.manifest
    assert [layer.node for layer in manifest.quantized] == layers(model)
    assert len(layers(model)) == chosen  # merged convolutions stay in float; they have no module to be proved by
    assert [layer.node for layer in manifest.quantized if not layer.in_int8] == []
    assert manifest.precision_name == {"fp32": "int8", "fp16": "int8+fp16", "bf16": "int8+bf16"}[precision]
    assert f"{manifest.precision_name} engine" in manifest.summary
    assert not any("kernel multiplies floats" in note for note in result.notes)
    products = [kernel for kernel in manifest.plan.layers if kernel.operands == ("Int8", "Int8")]
    assert len(products) >= chosen


@pytest.mark.tensorrt
def test_a_layer_left_in_float_is_noticed(tmp_path):
    """Its input comes past the quantiser; the others go on in int8."""
    model = quantized("fp32", "halves")
    made = {output: node for node in model.graph.node for output in node.output}
    layer = next(node for node in model.graph.node if node.name in layers(model) and "down.weight" in node.input[1])
    layer.input[0] = made[made[layer.input[0]].input[0]].input[0]
    result = built(model, tmp_path)
    left = result.engine.manifest.left_in_float
    assert left == [EngineQuantized(layer.name, ("Float", "Float"))]
    assert any(note.startswith(f"{layer.name}: its weights are integers") for note in result.notes)
    assert sum(one.in_int8 for one in result.engine.manifest.quantized) == len(layers(model)) - 1


def test_a_kernel_that_only_ends_a_layer_says_nothing_of_it():
    def kernel(kind, operands, *nodes):
        return PlanLayer("k", kind, 1, nodes, operands)

    plan = CompiledPlan(3, 3, None, (
        kernel("kgen", ("Float", "Float"), "a", "b"), kernel("correlation", ("Int8", "Int8"), "a"),
        kernel("gemm", ("Half", "Half"), "b"), kernel("kgen", ("Int8", "Int8"), "b", "c"),
    ))  # fmt: skip
    found = quantized_layers(("a", "b", "c"), plan)
    assert [(one.operands, one.in_int8) for one in found] == [
        (("Int8", "Int8"), True), (("Half", "Half"), False), ((), False),
    ]  # fmt: skip
    assert quantized_layers(("a",), None) == (EngineQuantized("a"),)


def test_nodes_without_names_have_the_parsers():
    """TensorRT-RTX 1.7.1 calls them after their outputs."""
    model = quantized("fp32", "halves")
    expected = graph_facts(model).quantized
    first = next(node for node in model.graph.node if node.name == expected[0])
    first.name = ""
    assert graph_facts(model).quantized == (f"node_of_{first.output[0]}", *expected[1:])


def test_weights_that_the_file_rounds_are_integers_too():
    """As NVIDIA Model Optimizer writes them."""
    body = "a = QuantizeLinear<axis = 0>(w, s, z) b = DequantizeLinear<axis = 0>(a, s, z) y = Conv(x, b)"
    stored = {"s": np.ones(2, np.float32), "z": np.zeros(2, np.int8), "w": np.ones((2, 2, 1, 1), np.float32)}
    text = "g (float[1, 2, 4, 4] x) => (float[1, 2, 4, 4] y) {{ {} }}"
    assert graph_facts(parsed(text.format(body), **stored)).quantized == ("node_of_y",)
    activations = body.replace("(w, s, z)", "(x, s, z)").replace("Conv(x, b)", "Conv(b, w)")
    assert graph_facts(parsed(text.format(activations), **stored)).quantized == ()
