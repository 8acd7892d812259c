"""The exporter: nodes, functions, names, metadata, bytes."""

import json

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

from scconv_deploy.errors import ModelError, UsageError
from scconv_deploy.graph import instrument
from scconv_deploy.graph.contract import FunctionKey
from scconv_deploy.graph.file import check, serialize
from scconv_deploy.graph.functions import fingerprint, function_proto
from scconv_deploy.model.inputs import DynamicAxis
from scconv_deploy.model.prepare import reference_from_module
from scconv_deploy.records.stage import StageLog
from scconv_deploy.workflows.export import ExportOptions, export, export_to_ir
from tests import wild
from tests.conftest import tiny_net
from tests.tolerances import ONE_SRU, SMALL_NETWORK

pytestmark = pytest.mark.usefixtures("exports_anew")


@pytest.fixture(scope="module")
def model(tiny_bytes):
    return onnx.load_model_from_string(tiny_bytes[0])


def test_each_call_of_an_sru_is_one_node_named_after_its_module(model):
    found = {name: (node.op_type, node.overload) for name, node in instrument.sites(model).items()}
    assert found == {
        "a.SRU": ("SRU", ""),
        "b.SRU": ("SRUNorm", ""),
        "c": ("SRUSoft", ""),
        "a.SRU#2": ("SRU", ""),
    }
    assert [o.version for o in model.opset_import if o.domain == ""] == [18]
    assert (model.ir_version, model.producer_name) == (10, "scconv-deploy")


def test_functions_are_those_of_the_contract(model):
    for function in model.functions:
        expected = function_proto(FunctionKey(function.name, False, "multiply", 18))
        assert fingerprint(function) == fingerprint(expected)
    assert sorted(f.name for f in model.functions) == ["SRU", "SRUNorm", "SRUSoft"]


def test_names_and_axes_survive(model):
    assert [i.name for i in model.graph.input] == ["image"]
    assert [o.name for o in model.graph.output] == ["logits", "features"]
    dims = [d.dim_param or d.dim_value for d in model.graph.input[0].type.tensor_type.shape.dim]
    assert dims == ["batch", 3, 16, 16]


def test_ort_computes_what_pytorch_computes_at_other_batches(tiny_bytes):
    session = onnxruntime.InferenceSession(tiny_bytes[0], providers=["CPUExecutionProvider"])
    net = tiny_net()
    for batch in (1, 2, 5):
        image = torch.randn(batch, 3, 16, 16, generator=torch.Generator().manual_seed(batch))
        with torch.no_grad():
            expected = net(image)
        logits, features = session.run(["logits", "features"], {"image": image.numpy()})
        np.testing.assert_allclose(logits, expected["logits"].numpy(), **ONE_SRU)
        np.testing.assert_allclose(features, expected["features"].numpy(), **SMALL_NETWORK)


def test_metadata_says_what_is_inside_and_nothing_of_this_machine(model, tiny_bytes):
    metadata = {p.key: p.value for p in model.metadata_props}
    assert json.loads(metadata["scconv_deploy.sites"]) == {
        "a.SRU": "groupbn-hard",
        "b.SRU": "groupbn-hard-normalized",
        "c": "groupnorm-soft",
        "a.SRU#2": "groupbn-hard",
    }
    assert set(json.loads(metadata["scconv_deploy.versions"])) == {"torch", "onnx", "onnxscript", "onnxsim"}
    assert metadata["scconv_deploy.mask_form"] == "multiply"
    assert b".py" not in tiny_bytes[0]  # no stack traces, hence no local paths
    assert not [key for key in metadata if key.startswith("onnxsim.")]


def test_same_model_same_bytes(tiny_reference, tiny_bytes):
    assert serialize(export_to_ir(tiny_reference[0], ExportOptions(), StageLog())) == tiny_bytes[0]


def test_the_users_model_is_left_as_it_was(tiny_reference):
    assert type(tiny_reference[0].model.c) is wild.SoftSRU


def test_stages_are_recorded(tiny_bytes):
    records = {record.name: record for record in tiny_bytes[1].records}
    assert list(records) == ["export", "simplify", "rewrite"]
    assert "b.SRU: scconv::SRUNorm [groupbn-hard-normalized]" in records["export"].applied
    assert records["simplify"].applied[0].startswith("onnxsim: ")


def test_straddling_groups_where_form_and_another_opset(tmp_path):
    net = nn.Sequential(nn.Conv2d(3, 24, 3), wild.randomize(wild.OriginalSRU(24))).eval()
    image = torch.randn(2, 3, 10, 10, generator=torch.Generator().manual_seed(0))
    result = export(net, image, tmp_path / "m.onnx", options=ExportOptions(opset=21, mask_form="where"))
    model = onnx.load(result.path)
    (node,) = instrument.sites(model).values()
    assert (node.overload, result.sites) == ("straddle", {"1": "groupbn-hard"})
    assert fingerprint(model.functions[0]) == fingerprint(function_proto(FunctionKey("SRU", True, "where", 21)))
    session = onnxruntime.InferenceSession(result.path, providers=["CPUExecutionProvider"])
    with torch.no_grad():
        expected = net(image).numpy()
    np.testing.assert_allclose(session.run(None, {"input": image.numpy()})[0], expected, **SMALL_NETWORK)


def test_a_model_without_an_sru_and_with_several_inputs(tmp_path):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 3)
            self.norm = wild.LayerNorm2d(6)

        def forward(self, x, index, *, scale):
            return self.fc(x)[index] * scale, (self.norm(x.reshape(1, 6, 1, 4)),)

    net = Net().eval()
    generator = torch.Generator().manual_seed(0)
    inputs = {
        "x": torch.randn(6, 4, generator=generator),
        "index": torch.tensor([0, 3]),
        "scale": torch.randn(2, 3, generator=generator),
    }
    result = export(net, inputs, tmp_path / "m.onnx")
    assert result.sites == {}
    export_record = next(stage for stage in result.stages if stage.name == "export")
    assert "no SRU was recognised" in export_record.applied[0]
    assert export_record.skipped[0][0] == "norm"
    session = onnxruntime.InferenceSession(result.path, providers=["CPUExecutionProvider"])
    assert [i.name for i in session.get_inputs()] == ["x", "index", "scale"]
    assert [o.name for o in session.get_outputs()] == ["output_0", "output_1_0"]
    first, _ = session.run(None, {name: value.numpy() for name, value in inputs.items()})
    with torch.no_grad():
        np.testing.assert_allclose(first, net(**inputs)[0].numpy(), **ONE_SRU)


def test_an_axis_that_the_code_fixes_is_refused():
    class Net(nn.Module):
        def forward(self, x):
            return torch.cat([x, torch.ones(2, 8)], 1)

    reference, log = reference_from_module(Net().eval(), torch.zeros(2, 8), (DynamicAxis(1, 2, 8),))
    with pytest.raises(ModelError, match="axis 0 was declared dynamic, but the model's code fixes it to 2"):
        export_to_ir(reference, ExportOptions(), log)


def test_control_flow_on_values_is_refused():
    class Net(nn.Module):
        def forward(self, x):
            return x + 1 if x.sum() > 0 else x - 1

    reference, log = reference_from_module(Net().eval(), torch.ones(2, 8))
    with pytest.raises(ModelError, match="branches on values"):
        export_to_ir(reference, ExportOptions(), log)


def test_unknown_opset_is_a_usage_error(tiny_reference):
    with pytest.raises(UsageError, match="18 to 23"):
        export_to_ir(tiny_reference[0], ExportOptions(opset=17), StageLog())


def test_train_mode_and_half_models_are_refused(tmp_path):
    with pytest.raises(UsageError, match="train mode"):
        export(nn.Linear(2, 2), torch.zeros(1, 2), tmp_path / "m.onnx")
    with pytest.raises(ModelError, match="float16"):
        export(nn.Linear(2, 2).half().eval(), torch.zeros(1, 2), tmp_path / "m.onnx")
    assert list(tmp_path.iterdir()) == []


def test_a_dynamic_batch_whose_optimum_is_one():
    net = nn.Sequential(nn.Conv2d(3, 16, 3), wild.randomize(wild.OriginalSRU(16, 4))).eval()
    reference, log = reference_from_module(net, torch.ones(1, 3, 8, 8), (DynamicAxis(1, 1, 8),))
    model = export_to_ir(reference, ExportOptions(), log)
    assert str(model.graph.inputs[0].shape[0]) == "batch"
    session = onnxruntime.InferenceSession(serialize(model), providers=["CPUExecutionProvider"])
    image = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = net(image).numpy()
    np.testing.assert_allclose(session.run(None, {"input": image.numpy()})[0], expected, **SMALL_NETWORK)


def test_dynamic_height_and_width():
    net = nn.Sequential(nn.Conv2d(3, 16, 3), wild.randomize(wild.SoftSRU(16))).eval()
    axes = (DynamicAxis(1, 2, 8), DynamicAxis(8, 12, 64, 2, "input"), DynamicAxis(8, 10, 64, 3, "input"))
    reference, log = reference_from_module(net, torch.ones(2, 3, 12, 10), axes)
    model = export_to_ir(reference, ExportOptions(), log)
    assert [str(d) for d in model.graph.inputs[0].shape] == ["batch", "3", "input_2", "input_3"]
    session = onnxruntime.InferenceSession(serialize(model), providers=["CPUExecutionProvider"])
    image = torch.randn(1, 3, 9, 21, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = net(image).numpy()
    np.testing.assert_allclose(session.run(None, {"input": image.numpy()})[0], expected, **SMALL_NETWORK)


def test_calls_are_numbered_as_the_code_makes_them():
    """The second call's node keeps its number although the first one's result is dropped."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.sru = wild.randomize(wild.OriginalSRU(16, 4))
            self.conv = nn.Conv2d(16, 16, 3)

        def forward(self, x):
            self.sru(x)
            return self.sru(self.conv(x))

    reference, log = reference_from_module(Net().eval(), torch.randn(2, 16, 8, 8))
    model = export_to_ir(reference, ExportOptions(), log)
    assert json.loads(model.metadata_props["scconv_deploy.sites"]) == {"sru#2": "groupbn-hard"}
    skipped = {site: reason for record in log.records for site, reason in record.skipped}
    assert "not used" in skipped["sru"]


def test_a_compiled_model_is_its_module_and_torchscript_is_refused(tmp_path):
    net = nn.Sequential(nn.Conv2d(3, 16, 3), wild.randomize(wild.OriginalSRU(16, 4))).eval()
    image = torch.randn(1, 3, 8, 8, generator=torch.manual_seed(0))
    assert export(torch.compile(net), image, tmp_path / "m.onnx").sites == {"1": "groupbn-hard"}
    with pytest.raises(UsageError, match="TorchScript"):
        export(torch.jit.trace(net, image), image, tmp_path / "n.onnx")


def test_an_invalid_graph_names_the_node_and_its_module():
    """The product of 3x4 and 5x2 is refused; the nodes before and after it are not to blame."""
    model = onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["" : 18]>'
        "g (float[3, 4] x, float[5, 2] w) => (float[3, 2] y)"
        " { a = Relu (x)  b = MatMul (a, w)  y = Relu (b) }"
    )
    model.graph.node[1].metadata_props.add(key="scconv.module", value="head.mix")
    with pytest.raises(ModelError, match=r"The MatMul of head\.mix in the exported graph is invalid") as caught:
        check(model)
    assert "other operators" in caught.value.remedy
