"""Files for old TensorRT that a bundle carries: checked before they are written."""

from __future__ import annotations

import onnx
import pytest

from scconv_deploy.errors import ModelError
from scconv_deploy.exporters.tensorrt import onnx_source
from scconv_deploy.exporters.tensorrt.targets import DEVICES
from scconv_deploy.model.inputs import DynamicAxis
from scconv_deploy.records.parity import Link, ParityReport
from scconv_deploy.workflows.build import EngineBuilder

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
