"""Functions of other domains are expanded as ONNX Runtime computes them; constants are folded for parsers."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest

from scconv_deploy.errors import ModelError
from scconv_deploy.graph.forms import folded, inlined, without_foreign_functions
from tests.exporters.tensorrt.engines import sru_model

HEAD = '<ir_version: 10, opset_import: ["" : 18, "my" : 1]> g (float[3] a, float[3] b) => (float[3] y) '
FUNCTION = '<domain: "my", opset_import: ["" : {opset}{more}]> {body}'


def function(body, opset=18, more=""):
    return onnx.parser.parse_function(FUNCTION.format(body=body, opset=opset, more=more))


def model(body, *functions):
    parsed = onnx.parser.parse_model(HEAD + body)
    parsed.functions.extend(functions)
    return parsed


SUBTRACT = function("F (a, b) => (c) { c = Sub(a, b) }")
LEAKY = function("L <alpha: float = 0.5> (x) => (c) { n = Neg(x) c = LeakyRelu <alpha: float = @alpha> (n) }")
CASES = {
    "formal names are outer names, the other way round": model("{ y = my.F(b, a) }", SUBTRACT),
    "an attribute's default": model("{ y = my.L(a) }", LEAKY),
    "an attribute that is given": model("{ y = my.L <alpha = 2.0> (a) }", LEAKY),
    "functions in functions in a branch": model(
        "{ k = Constant <value = bool {1}> () y = If (k) <then_branch = t () => (float[3] p) { p = my.G(b, a) },"
        " else_branch = e () => (float[3] q) { q = Abs(a) }> }",
        SUBTRACT, function("G (a, b) => (c) { d = my.F(b, a) c = Neg(d) }", more=', "my" : 1'),
    ),
    "another opset, in which its operators are the same": model(
        "{ y = my.F(b, a) }", function("F (a, b) => (c) { c = Sub(a, b) }", opset=17)
    ),
    "called twice": model("{ c = my.F(b, a) y = my.F(c, b) }", SUBTRACT),
}  # fmt: skip


def run(proto):
    feeds = {"a": np.array([1, -2, 3], np.float32), "b": np.array([10, 20, -30], np.float32)}
    return onnxruntime.InferenceSession(proto.SerializeToString()).run(None, feeds)[0].tolist()


@pytest.mark.parametrize("case", CASES)
def test_functions_of_others_are_expanded_as_they_are_run(case):
    found = without_foreign_functions(CASES[case])
    assert not found.functions
    assert {node.domain for node in found.graph.node} <= {""}
    assert run(found) == run(CASES[case])


def test_a_function_of_an_opset_that_means_something_else_is_refused():
    other = function("F (a, b) => (c) { d = ReduceMean <axes = [0]> (a) c = Sub(d, b) }", opset=17)
    with pytest.raises(ModelError, match=r"my::F.*version 18 in the model but version 17 in the function"):
        without_foreign_functions(model("{ y = my.F(b, a) }", other))


def test_our_functions_stay_and_those_that_nobody_calls_go():
    ours = sru_model()
    assert without_foreign_functions(ours) is ours
    ours.functions.append(SUBTRACT)
    found = without_foreign_functions(ours)
    assert [(f.domain, f.name) for f in found.functions] == [("scconv", "SRU")]
    assert [(n.domain, n.name) for n in found.graph.node] == [("scconv", "block.sru")]


def test_folding_leaves_what_depends_on_inputs_and_our_nodes():
    text = "{ k = Constant <value_ints = [0]> () m = Identity(k) s = ReduceMean <keepdims = 0> (a, m) y = Mul(s, b) }"
    found = folded(model(text))
    assert found is not None
    assert [node.op_type for node in found.graph.node] == ["ReduceMean", "Mul"]
    assert found.graph.node[0].input[1] in {t.name for t in found.graph.initializer}
    assert run(found) == run(model(text))
    again = folded(sru_model(("first", "second")))
    assert again is not None
    assert [n.name for n in again.graph.node] == ["first", "second"]
    assert [f.name for f in again.functions] == ["SRU"]


def test_a_file_without_functions_keeps_the_defaults_of_attributes():
    found = inlined(CASES["an attribute's default"])
    assert not found.functions
    assert run(found) == run(CASES["an attribute's default"])
