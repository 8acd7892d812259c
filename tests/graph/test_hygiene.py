"""What every file with SRU nodes keeps, whatever was done to it last."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx
import onnxruntime
import onnxsim
import pytest
import torch
from onnx import helper, numpy_helper

from scconv_deploy import RewriteOptions, export, rewrite_onnx
from scconv_deploy.graph.contract import DOMAIN, FunctionKey, node_attributes
from scconv_deploy.graph.forms import inlined, without_functions
from scconv_deploy.graph.functions import function_proto
from scconv_deploy.graph.hygiene import tidy
from scconv_deploy.precision.half import HalfOptions
from scconv_deploy.workflows.convert import convert_onnx
from tests import wild
from tests.rewrite import naive


class Net(torch.nn.Module):
    """Everything that simplifiers like to merge: a module called twice, and a BatchNorm whose weight is all ones."""

    def __init__(self):
        super().__init__()
        self.conv, self.a, self.b = torch.nn.Conv2d(3, 16, 3), wild.OriginalSRU(16, 4), wild.SoftSRU(16, 4)
        self.c = wild.OriginalSRU(24, 16)  # groups straddle channels
        self.norm, self.up = torch.nn.BatchNorm2d(16), torch.nn.Conv2d(16, 24, 1)

    def forward(self, x):
        x = self.norm(torch.relu(self.a(self.a(self.conv(x)))))
        return self.c(self.up(self.norm(torch.relu(self.b(x)))))


SITES = ["a", "a#2", "b", "c"]
IMAGE = naive.noise(2, 3, 10, 10)


def net():
    torch.manual_seed(0)
    module = Net().eval()
    with torch.no_grad():
        for sru in (module.a, module.b, module.c):  # sums above 0: signs are all ones, like the BatchNorm's weight
            for name, parameter in sru.named_parameters():
                parameter.copy_(0.5 + torch.rand(parameter.shape) if "gamma" in name or "weight" in name else 0)
    return module


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Of one net: as exported, as rewritten from a naive export, and converted."""
    folder = tmp_path_factory.mktemp("hygiene")
    export(net(), (IMAGE,), folder / "export.onnx")
    (folder / "naive.onnx").write_bytes(naive.export(net(), IMAGE, True, 18).SerializeToString())
    rewrite_onnx(folder / "naive.onnx", folder / "rewrite.onnx", options=RewriteOptions(expect=4, adapted=True))
    convert_onnx(folder / "export.onnx", folder / "convert.onnx", HalfOptions("fp16"))
    return folder


@pytest.mark.parametrize("name", ["export", "rewrite", "convert"])
def test_parameters_are_initializers_of_their_own_named_after_their_site(files, name):
    model = onnx.load(files / f"{name}.onnx")
    nodes = {node.name: node for node in model.graph.node if node.domain == DOMAIN}
    assert sorted(nodes) == SITES
    stored = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    reads = Counter(name for node in model.graph.node for name in node.input)
    for site, node in nodes.items():
        further = ["scale", "shift"] if site == "b" else []
        assert list(node.input[1:]) == [f"{site}.{name}" for name in ("cut", "sign", *further)]
        assert [reads[name] for name in node.input[1:]] == [1] * (2 + len(further))
        assert {stored[name].dtype for name in node.input[1:]} == {np.dtype(np.float32)}
        np.testing.assert_array_equal(stored[f"{site}.sign"], np.ones(24 if site == "c" else 16))


@pytest.mark.parametrize("name", ["export", "rewrite", "convert", "rewrite.plugin", "rewrite.inlined"])
def test_what_each_stage_keeps(files, name):
    """Value infos of what SRUs give, without which ONNX Runtime loses fusions; order of functions; IR version."""
    model = onnx.load(files / f"{name}.onnx")
    onnx.checker.check_model(model, full_check=True)
    assert model.ir_version <= 10
    known = {v.name: v.type.tensor_type for v in (*model.graph.value_info, *model.graph.output)}
    whole = onnx.load(files / "rewrite.onnx") if "." in name else model
    given = [node.output[0] for node in whole.graph.node if node.domain == DOMAIN]
    half = onnx.TensorProto.FLOAT16 if name == "convert" else onnx.TensorProto.FLOAT
    assert [known[y].elem_type for y in given[:-1]] == [half] * 3
    assert [[d.dim_value for d in known[y].shape.dim] for y in given] == [[2, 16, 8, 8]] * 3 + [[2, 24, 8, 8]]
    overloads = [function.overload for function in model.functions]
    assert overloads == ([] if "." in name else ["straddle", "", ""])


def merged():
    """A file as a simplifier leaves it: one initializer for three parameters and a BatchNorm's weight."""
    ones = numpy_helper.from_array(np.ones(8, np.float32), "bn.weight")
    cut = numpy_helper.from_array(np.linspace(-1, 1, 8).astype(np.float32), "cut")
    attributes = node_attributes(4, 1, 0.0, 1e-10)
    nodes = [
        helper.make_node("SRU", ["x", "cut", "bn.weight"], ["a"], domain=DOMAIN, name="first", **attributes),
        helper.make_node("Identity", ["bn.weight"], ["same"]),
        helper.make_node("SRU", ["a", "first.sign", "same"], ["b"], domain=DOMAIN, name="second", **attributes),
        helper.make_node("Constant", [], ["first.sign"], value=cut),
        helper.make_node("BatchNormalization", ["b", "bn.weight", "zeros", "zeros", "bn.weight"], ["y"]),
    ]
    nodes.insert(0, nodes.pop(3))
    info = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes, "g", [info("x", 1, [1, 8, 4, 4])], [info("y", 1, [1, 8, 4, 4])],
        [cut, ones, numpy_helper.from_array(np.zeros(8, np.float32), "zeros")],
    )  # fmt: skip
    functions = [function_proto(FunctionKey("SRU", straddle, "multiply", 18)) for straddle in (False, True)]
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid(DOMAIN, 1)]
    return helper.make_model(graph, functions=functions, opset_imports=opsets, ir_version=12)


def run(model, x):
    return onnxruntime.InferenceSession(model.SerializeToString()).run(None, {"x": x})[0]


def test_a_merged_file_is_put_right_and_computes_the_same():
    model = merged()
    x = naive.noise(1, 8, 4, 4).numpy()
    model.ir_version = 10
    expected = run(model, x)
    model.ir_version = 12
    tidy(model)
    first, second = (node for node in model.graph.node if node.domain == DOMAIN)
    assert list(first.input) == ["x", "first.cut", "first.sign#2"]  # a name that is taken is not taken away
    assert list(second.input) == ["a", "second.cut", "second.sign"]
    assert sorted(t.name for t in model.graph.initializer) == sorted(
        ["bn.weight", "zeros", "first.cut", "first.sign#2", "second.cut", "second.sign"]
    )
    assert {v.name for v in model.graph.value_info} == {"a", "b"}
    assert [f.overload for f in model.functions] == ["straddle", ""]
    assert model.ir_version == 10
    np.testing.assert_array_equal(run(model, x), expected)
    again = onnx.ModelProto()
    again.CopyFrom(model)
    tidy(again)
    assert again == model


def test_a_parameter_that_is_computed_or_an_input_stays_what_it_is():
    model = merged()
    model.graph.input.append(helper.make_tensor_value_info("cut", 1, [8]))  # an initializer that a caller may override
    index = next(i for i, node in enumerate(model.graph.node) if node.op_type == "Constant")
    model.graph.node[index].CopyFrom(helper.make_node("Neg", ["cut"], ["first.sign"]))
    tidy(model)
    second = next(node for node in model.graph.node if node.name == "second")
    assert second.input[1] == "first.sign"
    assert "cut" in {t.name for t in model.graph.initializer}


def test_rewrite_mends_what_a_simplifier_did_and_then_has_nothing_to_do(files, tmp_path):
    simplified, same = onnxsim.simplify(onnx.load(files / "export.onnx"))
    assert same
    names = [name for node in simplified.graph.node if node.domain == DOMAIN for name in node.input[1:]]
    assert len(set(names)) < len(names)  # it does merge them
    (tmp_path / "in.onnx").write_bytes(simplified.SerializeToString())
    first = rewrite_onnx(tmp_path / "in.onnx", tmp_path / "a.onnx", options=RewriteOptions(expect=4))
    assert first.outcome == "rewritten"
    assert first.stages[0].applied == ("SRUs have parameters of their own",)
    found = onnx.load(tmp_path / "a.onnx")
    names = [name for node in found.graph.node if node.domain == DOMAIN for name in node.input[1:]]
    assert len(set(names)) == len(names)
    assert rewrite_onnx(tmp_path / "a.onnx", tmp_path / "b.onnx").outcome == "unchanged"


def test_adapted_forms_of_a_file_keep_parameters_apart(files):
    model = onnx.load(files / "export.onnx")
    for form in (without_functions(model), inlined(model)):
        assert {f"{site}.sign" for site in SITES} <= {t.name for t in form.graph.initializer}
