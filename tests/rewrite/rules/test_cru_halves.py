import re

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from torch import nn

from scconv_deploy.nn import CRU
from scconv_deploy.records.stage import StageLog
from scconv_deploy.rewrite.prepare import prepare
from tests import wild
from tests.rewrite import naive


class Net(nn.Module):
    def __init__(self, cru):
        super().__init__()
        self.stem, self.cru = nn.Conv2d(3, 16, 1), cru

    def forward(self, x):
        return self.cru(self.stem(x))


def seeded(make):
    torch.manual_seed(0)
    return Net(make()).eval()


def prepared(model, x, dynamo, dynamic=False):
    with StageLog().stage("prepare") as stage:
        return ir.to_proto(prepare(naive.export(model, x, dynamo, dynamic=dynamic), 18, stage))


TAIL = """
    h, k = Split<axis = 1, num_outputs = 2>(p)
    y = Add(h, k)
"""
HEAD = """g (float[N, 4, H, W] x) => (float[N, M, H, W] y{more})
    <int64[1] zero = {{0}}, int64[1] four = {{4}}, int64[1] eight = {{8}}, int64[1] one = {{1}},
     int64[2] axes = {{2, 3}}, int64[1] rows = {{2}}> {{ a = Neg(x) b = Relu(x) {body} }}"""
PLAIN = "z = Concat<axis = 1>(a, b) m = GlobalAveragePool(z) s = Softmax<axis = 1>(m) p = Mul(s, z)" + TAIL


def graph(body, more=""):
    return naive.parse(HEAD.format(body=body, more=more))


def operators(proto):
    return [node.op_type for node in proto.graph.node]


MADE = {"original": lambda: wild.OriginalCRU(16), "ours": lambda: CRU(16), "ours, 3/4": lambda: CRU(16, alpha=0.75)}
FILES = [(make, *kind) for make in MADE for kind in ((False, False), (False, True), (True, False))]


@pytest.mark.parametrize(("make", "dynamo", "dynamic"), [*FILES, ("original", True, True)])
def test_equal_to_the_bit_in_the_files_of_both_exporters(make, dynamo, dynamic):
    x = naive.noise(2, 3, 8, 8)
    proto = prepared(seeded(MADE[make]), x, dynamo, dynamic)
    result, applied = naive.rewritten(proto)
    assert applied.crus == {"cru halves": ["y"]}
    assert not applied.left_alone
    assert operators(result).count("Mul") == 2
    sizes = {v.name: [d.dim_value for d in v.type.tensor_type.shape.dim] for v in result.graph.value_info}
    wide = [n.output[0] for n in result.graph.node if n.op_type == "Concat" and sizes[n.output[0]][1] == 32]
    assert [sizes[name][2:] for name in wide] == [[1, 1]]  # of the means alone
    for shape in [(2, 3, 8, 8), *([(3, 3, 14, 6)] if dynamic else [])]:
        other = naive.noise(*shape, seed=1)
        np.testing.assert_array_equal(naive.run(result, other), naive.run(proto, other))


@pytest.mark.parametrize("dims", [1, 3])
def test_signals_and_volumes(dims):
    torch.manual_seed(0)
    x = naive.noise(2, 16, *[8] * dims)
    proto = prepared(CRU(16, dims=dims).eval(), x, True)
    result, applied = naive.rewritten(proto)
    assert applied.crus == {"cru halves": ["y"]}
    np.testing.assert_array_equal(naive.run(result, x), naive.run(proto, x))


FORMS = {
    "as it is written": PLAIN,
    "other order": PLAIN.replace("Mul(s, z)", "Mul(z, s)").replace("Add(h, k)", "Add(k, h)"),
    "axes from the end": PLAIN.replace("axis = 1>(m)", "axis = -3>(m)"),
    "reduced": PLAIN.replace("GlobalAveragePool(z)", "ReduceMean<keepdims = 1>(z, axes)"),
    "sliced": PLAIN.replace(TAIL, "h = Slice(p, zero, four, one) k = Slice(p, four, eight, one) y = Add(h, k)"),
    "three parts": PLAIN.replace(
        "z = Concat<axis = 1>(a, b)", "c, d = Split<axis = 1, num_outputs = 2>(b) z = Concat<axis = 1>(a, c, d)"
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_spellings(form):
    proto = graph(FORMS[form])
    result, applied = naive.rewritten(proto)
    assert applied.crus == {"cru halves": ["y"]}
    x = naive.noise(2, 4, 5, 7)
    np.testing.assert_array_equal(naive.run(result, x), naive.run(proto, x))
    again, second = naive.rewritten(result)
    assert not second
    assert not second.left_alone
    assert again == result


def test_every_new_value_has_its_shape_and_type():
    result, _ = naive.rewritten(graph(FORMS["three parts"]))
    known = {v.name: v.type.tensor_type for v in (*result.graph.value_info, *result.graph.output)}
    made = [name for node in result.graph.node for name in node.output]
    assert [name for name in made if name not in known] == []
    inferred = onnx.ModelProto()
    inferred.CopyFrom(result)
    del inferred.graph.value_info[:]
    for value in onnx.shape_inference.infer_shapes(inferred, strict_mode=True, data_prop=True).graph.value_info:
        stored, expected = known[value.name], value.type.tensor_type
        assert stored.elem_type == expected.elem_type
        pairs = zip(stored.shape.dim, expected.shape.dim, strict=True)
        assert all(a.dim_value == b.dim_value for a, b in pairs if b.dim_value), value.name


REFUSED = {
    "another axis": (PLAIN.replace("axis = 1>(m)", "axis = 0>(m)"), "its softmax runs along axis 0"),
    "another tensor's means": (
        PLAIN.replace("GlobalAveragePool(z)", "GlobalAveragePool(w)").replace("m =", "w = Abs(z) m ="),
        "its softmax is not over the means of the features that it weights",
    ),
    "means of the rows alone": (
        PLAIN.replace("GlobalAveragePool(z)", "ReduceMean<keepdims = 1>(z, rows)"),
        "its softmax is not over the means",
    ),
    "no concatenation": (
        PLAIN.replace("z = Concat<axis = 1>(a, b)", "w = Concat<axis = 1>(a, b) z = Abs(w)"),
        "its features are no concatenation along the channels",
    ),
    "no border at the half": (
        PLAIN.replace("z = Concat<axis = 1>(a, b)", "c = Slice(b, zero, one, one) z = Concat<axis = 1>(c, c, a, a)"),
        "no border of its concatenation lies at 5, half of its channels",
    ),
    "features needed elsewhere": (PLAIN + "q = Abs(z) r = Add(q, z)", "its z is also needed by"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_left_alone_with_the_reason(case):
    body, reason = REFUSED[case]
    proto = graph(body, ", float[N, K, H, W] r" if " r =" in body else "")
    result, applied = naive.rewritten(proto)
    assert not applied
    assert [re.match(re.escape(reason), miss.reason) is not None for miss in applied.left_alone] == [True]
    assert operators(result) == operators(proto)
    assert not applied.near_misses  # it is no gate


@pytest.mark.parametrize("value", ["z", "s", "p", "h"])
def test_a_tensor_that_is_an_output_keeps_the_fusion(value):
    _, applied = naive.rewritten(graph(PLAIN, f", float[N, K, A, B] {value}"))
    assert not applied
    assert [miss.reason for miss in applied.left_alone] == [f"its {value} is an output of the graph"]


@pytest.mark.parametrize("dynamo", [False, True], ids=["TorchScript", "torch.export"])
def test_the_papers_pairwise_fusion_is_left_alone(dynamo):
    proto = prepared(seeded(lambda: CRU(16, fusion="pairwise")), naive.noise(2, 3, 8, 8), dynamo)
    result, applied = naive.rewritten(proto)
    assert not applied
    assert "Eq. 8" in applied.left_alone[0].reason
    assert operators(result) == operators(proto)


def test_other_sums_are_no_candidates():
    proto = graph("z = Concat<axis = 1>(a, b) p = Mul(z, z)" + TAIL)
    _, applied = naive.rewritten(proto)
    assert not applied
    assert not applied.left_alone


def test_as_is_is_left_alone_without_a_word():
    _, applied = naive.rewritten(graph(PLAIN), cru="as-is")
    assert not applied
    assert not applied.left_alone


@pytest.mark.parametrize("operator", ["Concat", "GlobalAveragePool", "Softmax", "Mul", "Split"])
def test_an_operator_of_another_domain_is_none_of_onnxs(operator):
    """Nobody knows what my.Softmax computes, and no runtime here can compare the result."""
    text = HEAD.format(body=re.sub(rf"= {operator}\b", f"= my.{operator}", PLAIN), more="")
    proto = onnx.parser.parse_model('<ir_version: 10, opset_import: ["" : 18, "my" : 1]>\n' + text)
    assert f"my.{operator}" in {f"{node.domain}.{node.op_type}" for node in proto.graph.node}
    result, applied = naive.rewritten(proto)
    assert not applied.crus
    assert operators(result) == operators(proto)


def test_a_squeeze_without_axes_and_axes_from_the_end_are_no_mean_of_planes():
    lone = "z = Concat<axis = 1>(a, b) u = Unsqueeze(z, {axis}) n = ReduceMean(u, axes) m = Squeeze(n{again})"
    rest = " s = Softmax<axis = 1>(m) p = Mul(s, z)" + TAIL
    signal = HEAD.replace("H, W]", "L]").replace("axes = {{2, 3}}", "axes = {{2, 3}}, int64[1] front = {{-3}}")
    for axis, again in (("rows", ""), ("front", ", front")):
        body = lone.format(axis=axis, again=again) + rest
        proto = naive.parse(signal.format(body=body, more=""))
        assert operators(naive.rewritten(proto)[0]) == operators(proto)
