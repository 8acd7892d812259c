"""Where quantisers go, and why each node without one has none."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import helper

from scconv_deploy.errors import UsageError
from scconv_deploy.graph.contract import DOMAIN, LAYER, MODULE
from scconv_deploy.precision.float32 import as_ir
from scconv_deploy.precision.placement import Placement, PlacementOptions, place
from tests.precision.made import parsed

W = np.ones((4, 4, 1, 1), np.float32)
STEM = np.ones((4, 3, 1, 1), np.float32)
HEAD = np.ones((2, 4, 1, 1), np.float32)
RESIDUAL = (
    "(float[1, 3, 8, 8] x) => (float[1, 2, 8, 8] y) "
    "{ s = Conv(x, stem) a = Conv(s, w1) r = Relu(a) b = Conv(r, w2) t = Add(b, s) y = Conv(t, head) }"
)


def graph(text: str, **initializers) -> onnx.ModelProto:
    return parsed(f"g {text}", **({"stem": STEM, "w1": W, "w2": 2 * W, "head": HEAD} | initializers))


def placed(model: onnx.ModelProto, **options) -> Placement:
    return place(as_ir(onnx.shape_inference.infer_shapes(model)), PlacementOptions(**options))


def read(found: Placement) -> dict[str, list[str]]:
    """Quantised values, and what reads them quantised."""
    return {v.name: [f"{n.outputs[0].name}:{i}" for n, i in readers] for v, readers in found.readers.items()}


def reasons(found: Placement) -> dict[str, str]:
    return dict(found.kept)


def test_layers_between_the_first_and_the_last_and_the_skip_but_not_the_trunk():
    found = placed(graph(RESIDUAL))
    assert [node.outputs[0].name for node in found.layers] == ["a", "b"]
    assert read(found) == {"s": ["a:0", "t:1"], "r": ["b:0"]}
    assert reasons(found) == {
        "stem": "Conv: a first layer: the input in full", "head": "Conv: a last layer: the answers in full",
    }  # fmt: skip
    assert found.multiply_adds == (2 * 4 * 4 * 64, (3 * 4 + 2 * 4 * 4 + 4 * 2) * 64)


def test_the_skip_is_found_on_either_side_and_behind_a_projection():
    swapped = placed(graph(RESIDUAL.replace("Add(b, s)", "Add(s, b)")))
    assert read(swapped)["s"] == ["a:0", "t:0"]
    projected = placed(
        graph(RESIDUAL.replace("Add(b, s)", "Add(b, p)").replace("t =", "p = Conv(s, w3) t ="), w3=3 * W)
    )
    assert read(projected)["p"] == ["t:1"]


def test_two_branches_of_one_depth_are_no_residual():
    found = placed(
        graph(RESIDUAL.replace("r = Relu(a) b = Conv(r, w2) t = Add(b, s)", "b = Conv(s, w2) t = Add(a, b)"))
    )
    assert read(found) == {"s": ["a:0", "b:0"]}


def test_an_sru_is_a_fence_and_reads_what_it_read():
    text = RESIDUAL.replace("r = Relu(a)", "r = scconv.SRU(a, cut, sign)")
    model = graph(
        text.replace("scconv.SRU", "Relu").replace("(a, cut, sign)", "(a)"), cut=W[:, 0, 0, 0], sign=W[:, 0, 0, 0]
    )
    node = next(n for n in model.graph.node if n.output[0] == "r")
    node.op_type, node.domain = "SRU", DOMAIN
    node.input.extend(["cut", "sign"])
    model.opset_import.append(helper.make_opsetid(DOMAIN, 1))
    model.graph.value_info.append(helper.make_tensor_value_info("r", 1, [1, 4, 8, 8]))
    found = placed(model)
    assert read(found) == {"s": ["a:0", "t:1"], "r": ["b:0"]}
    assert reasons(found)["r"] == "SRU: a fence: statistics and gates in float32, parameters of its own"


def test_a_weight_shared_with_a_parameter_of_a_gate_stays():
    model = graph(RESIDUAL)
    node = next(n for n in model.graph.node if n.output[0] == "r")
    node.op_type, node.domain = "SRU", DOMAIN
    node.input.extend(["w1", "w1"])
    model.opset_import.append(helper.make_opsetid(DOMAIN, 1))
    model.graph.value_info.append(helper.make_tensor_value_info("r", 1, [1, 4, 8, 8]))
    assert reasons(placed(model))["w1"] == "Conv: its weights are also a parameter of a gate"


def test_a_concat_of_quantised_readers_has_one_scale():
    text = RESIDUAL.replace("t = Add(b, s)", "c = Concat<axis = 1>(b, s) t = Conv(c, w8)")
    found = placed(graph(text, w8=np.ones((4, 8, 1, 1), np.float32)))
    assert read(found) == {"s": ["a:0", "c:1"], "r": ["b:0"], "c": ["t:0"], "b": ["c:0"]}
    (group,) = {tuple(v.name for v in group) for group in found.groups.values()}
    assert set(group) == {"c", "b", "s"}


def test_a_concat_that_is_read_in_float_too_stays():
    text = RESIDUAL.replace("t = Add(b, s)", "c = Concat<axis = 1>(b, s) u = Conv(c, w8) v = Relu(c) t = Conv(v, w8)")
    text = text.replace("y = Conv(t, head)", "z = Add(u, t) y = Conv(z, head)")
    found = placed(graph(text, w8=np.ones((4, 8, 1, 1), np.float32)))
    assert "c" in read(found)
    assert "b" not in read(found)
    assert reasons(found)["c"] == "Concat: it is read in float too"


def test_layers_on_a_pooled_mean_stay():
    text = RESIDUAL.replace(
        "t = Add(b, s)", "m = GlobalAveragePool(b) e = Conv(m, w3) f = Relu(e) g = Conv(f, w4) t = Mul(b, g)"
    )
    found = placed(graph(text, w3=3 * W, w4=4 * W))
    assert {"e", "g"}.isdisjoint(n.outputs[0].name for n in found.layers)
    assert reasons(found)["w3"] == "Conv: it reads a pooled mean"
    assert reasons(found)["w4"] == "Conv: it reads a pooled mean"


def test_all_uses_of_a_weight_or_none():
    found = placed(graph(RESIDUAL.replace("Conv(t, head)", "Conv(t, w2)")))
    assert [node.outputs[0].name for node in found.layers] == ["a"]
    assert found.kept[1:3] == [
        ("w2", "Conv: its weight is also that of w2, which stays"), ("w2", "Conv: a last layer: the answers in full"),
    ]  # fmt: skip


def test_patterns_keep_and_choose():
    kept = placed(graph(RESIDUAL), keep=("w1", "t"))
    assert [node.outputs[0].name for node in kept.layers] == ["b"]
    assert reasons(kept)["w1"] == "Conv: kept by 'w1'"
    assert reasons(kept)["t"] == "Add: its skip is kept by 't'"
    only = placed(graph(RESIDUAL), only=("stem", "w2"))
    assert [node.outputs[0].name for node in only.layers] == ["s", "b"], "first layers too, where they are named"
    assert reasons(only)["w1"] == "Conv: not among --only"
    assert read(only) == {"x": ["s:0"], "r": ["b:0"]}


def with_modules(**paths: str) -> ir.Model:
    """The residual graph whose nodes say whose weights they have, by the names of their results."""
    model = as_ir(onnx.shape_inference.infer_shapes(graph(RESIDUAL)))
    for node in model.graph:
        if path := paths.get(node.outputs[0].name or ""):
            node.metadata_props.update({LAYER: path, MODULE: path})
    return model


def test_with_a_model_only_what_it_can_prove_is_quantised():
    asked = []

    def unprovable(path: str, norm: str, weight: np.ndarray) -> str:
        asked.append((path, norm, weight.shape))
        return "PyTorch has no module first" if path == "first" else ""

    found = place(with_modules(a="first", b="second"), PlacementOptions(), unprovable)
    assert [node.outputs[0].name for node in found.layers] == ["b"]
    assert reasons(found)["first"] == "Conv: PyTorch has no module first"
    assert asked == [("first", "", (4, 4, 1, 1)), ("second", "", (4, 4, 1, 1))]
    with pytest.raises(UsageError, match="the file does not say which module in PyTorch has its weights") as caught:
        place(with_modules(), PlacementOptions(), unprovable)
    assert "quantise this file without --reference" in str(caught.value)
    assert [node.outputs[0].name for node in place(with_modules()).layers] == ["a", "b"], "without a model all are"


def test_calls_of_one_module_with_other_weights_stay():
    with pytest.raises(UsageError, match="its module is called several times, with other weights in the graph"):
        place(with_modules(a="conv", b="conv"))


@pytest.mark.parametrize("option", ["keep", "only"])
def test_a_pattern_that_matches_nothing_is_refused(option):
    with pytest.raises(UsageError, match=rf"--{option} 'stem9' matches no node or weight. Close are stem"):
        placed(graph(RESIDUAL), **{option: ("stem9",)})


def test_a_graph_with_first_and_last_layers_alone_is_refused():
    text = "(float[1, 3, 8, 8] x) => (float[1, 2, 8, 8] y) { s = Conv(x, stem) y = Conv(s, head) }"
    with pytest.raises(UsageError, match=r"No layer is left to quantise \(stem: Conv: a first layer"):
        placed(graph(text))


def test_layers_in_branches_and_without_constant_weights_stay():
    text = RESIDUAL.replace("b = Conv(r, w2)", "k = Relu(w2) b = Conv(r, k)")
    assert reasons(placed(graph(text)))["b"] == "Conv: its weights are not constants"
    inner = helper.make_graph(
        [helper.make_node("Conv", ["r", "w2"], ["i"])], "then", [], [helper.make_tensor_value_info("i", 1, None)]
    )
    model = graph(RESIDUAL)
    index, node = next((i, n) for i, n in enumerate(model.graph.node) if n.output[0] == "b")
    model.graph.node.remove(node)
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.asarray(True), "yes"))
    model.graph.node.insert(index, helper.make_node("If", ["yes"], ["b"], then_branch=inner, else_branch=inner))
    found = placed(model)
    assert reasons(found)["w2"] == "Conv: it stands in a branch or the body of a loop"
    assert isinstance(found.layers[0], ir.Node)
