"""Files for old TensorRT that a bundle carries: checked before they are written."""

from __future__ import annotations

import json

import onnx
import pytest

from scconv_deploy.errors import ModelError
from scconv_deploy.exporters.tensorrt import onnx_source
from scconv_deploy.exporters.tensorrt.targets import DEVICES
from scconv_deploy.model.inputs import DynamicAxis
from scconv_deploy.records.parity import Link, ParityReport
from scconv_deploy.workflows.build import EngineBuilder
from tests import int8

PASSED = ParityReport("m", "a", "", (Link("onnxruntime", "passed", "x"),), (), (), (), (), {})


def build(content, folder):
    builder = EngineBuilder((), (DEVICES["orin-jp6"],), (DynamicAxis(1, 2, 8),))
    return builder.build(onnx.load_model_from_string(content), content, folder, PASSED)


def broken(proto):
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    copy.graph.node[0].input[0] = "nobody gives it"
    return copy


@pytest.mark.parametrize(
    ("form", "name"), [("without_functions", "model.plugin.onnx"), ("inlined", "model.inlined.onnx")]
)
def test_a_broken_form_is_not_put_into_a_bundle(tmp_path, monkeypatch, tiny_bytes, form, name):
    monkeypatch.setattr(onnx_source, form, broken)
    with pytest.raises(ModelError, match=f"graph of {name} is invalid"):
        build(tiny_bytes[0], tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_forms_as_they_are_pass(tmp_path, tiny_bytes):
    assert build(tiny_bytes[0], tmp_path).unfinished
    assert {"model.plugin.onnx", "model.inlined.onnx"} <= {path.name for path in tmp_path.iterdir()}


def test_int8_keeps_its_codes_in_every_form(tmp_path):
    """TensorRT 10.3's parser gets the quantisers of the whole file, and the device's manifest names its layers."""
    model = int8.quantize(int8.reference()[1])
    content = model.SerializeToString(deterministic=True)
    EngineBuilder((), (DEVICES["orin-jp6"],)).build(model, content, tmp_path, PASSED)
    kinds = ("QuantizeLinear", "DequantizeLinear")
    expected = [(n.op_type, list(n.input)) for n in model.graph.node if n.op_type in kinds]
    for name in ("model.plugin.onnx", "model.inlined.onnx"):
        form = onnx.load(tmp_path / name)
        found = [(n.op_type, list(n.input)) for n in form.graph.node if n.op_type in kinds]
        assert sorted(found) == sorted(expected)
        stored = {tensor.name: tensor.raw_data for tensor in form.graph.initializer}
        assert all(
            stored[t.name] == t.raw_data for t in model.graph.initializer if t.data_type == onnx.TensorProto.INT8
        )
    device = json.loads((tmp_path / "device.json").read_text())
    assert len(device["network"]["quantized"]) == sum("weight_quantized" in one for _, (one, *_) in expected)
