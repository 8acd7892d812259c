"""The function bodies, run in ONNX Runtime and in onnx.reference, against PyTorch."""

from dataclasses import replace

import numpy as np
import onnx
import onnx.inliner
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from scconv_deploy.errors import UsageError
from scconv_deploy.gate.flips import compare_outputs
from scconv_deploy.gate.gate import Gate
from scconv_deploy.gate.variant import VARIANTS
from scconv_deploy.graph.contract import ATTRIBUTES, MASK_FORMS, OPERATORS, OPSETS, FunctionKey, node_attributes
from scconv_deploy.graph.functions import fingerprint, function_proto, function_text
from tests.tolerances import HALF_STEP, SMALL_NETWORK

VARIANT_OF = {v.operator: v for v in VARIANTS.values()}


def single(key, gate, dtype=TensorProto.FLOAT):
    """A model of one node, its parameters initializers."""
    variant = gate.variant
    values = {name: value.numpy() for name, value in gate.operator_inputs().items()}
    node = helper.make_node(
        key.operator, ["x", *values], ["y"], domain="scconv",
        **node_attributes(variant.num_groups, variant.ddof, variant.eps_var, variant.eps_std),
    )  # fmt: skip
    node.overload = key.overload
    graph = helper.make_graph(
        [node],
        "one",
        [helper.make_tensor_value_info("x", dtype, ["N", gate.channels, "H", "W"])],
        [helper.make_tensor_value_info("y", dtype, ["N", gate.channels, "H", "W"])],
        [numpy_helper.from_array(v, n) for n, v in values.items()],
    )
    opsets = [helper.make_opsetid("", key.opset), helper.make_opsetid("scconv", 1)]
    model = helper.make_model(graph, functions=[function_proto(key)], opset_imports=opsets, ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    return model


def run_ort(model, x):
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x.numpy() if isinstance(x, torch.Tensor) else x})[0]


def case(operator, straddle, seed=0, shape=(2, 24, 8, 8), mean=0.0):
    variant = replace(VARIANT_OF[operator], num_groups=16 if straddle else 4)
    if straddle and variant.statistics == "group_norm":
        variant = replace(variant, statistics="group_batchnorm", eps=1e-10)  # nn.GroupNorm cannot straddle
    generator = torch.Generator().manual_seed(seed)
    gamma, beta = torch.randn(shape[1], generator=generator), torch.randn(shape[1], generator=generator)
    return Gate(variant, gamma, beta), torch.randn(shape, generator=generator) + mean


@pytest.mark.parametrize("mask_form", MASK_FORMS)
@pytest.mark.parametrize("straddle", [False, True], ids=["", "straddle"])
@pytest.mark.parametrize("operator", OPERATORS)
def test_ort_computes_what_pytorch_computes(operator, straddle, mask_form):
    gate, x = case(operator, straddle)
    y = run_ort(single(FunctionKey(operator, straddle, mask_form, 18), gate), x)
    expected = gate.apply(x).numpy()
    if operator == "SRU":
        np.testing.assert_array_equal(y, expected)  # no arithmetic but gates and one sum: exact
    else:
        np.testing.assert_allclose(y, expected, **SMALL_NETWORK)


@pytest.mark.parametrize("opset", OPSETS)
@pytest.mark.parametrize("operator", OPERATORS)
def test_every_opset_gives_the_same(operator, opset):
    gate, x = case(operator, False)
    y = run_ort(single(FunctionKey(operator, False, "where", opset), gate), x)
    expected = run_ort(single(FunctionKey(operator, False, "where", 18), gate), x)
    np.testing.assert_array_equal(y, expected)


@pytest.mark.parametrize("straddle", [False, True], ids=["", "straddle"])
@pytest.mark.parametrize("operator", OPERATORS)
def test_reference_evaluator_agrees(operator, straddle):
    """onnx.reference ignores attribute defaults: every attribute must be written."""
    gate, x = case(operator, straddle)
    model = single(FunctionKey(operator, straddle, "where", 18), gate)
    (y,) = ReferenceEvaluator(model).run(None, {"x": x.numpy()})
    np.testing.assert_allclose(y, gate.apply(x).numpy(), **SMALL_NETWORK)


def opened(model, x):
    """The gates that ONNX Runtime opens, and the output."""
    inlined = onnx.inliner.inline_local_functions(model)
    mask = next(node.output[0] for node in inlined.graph.node if node.op_type == "GreaterOrEqual")
    inlined.graph.output.append(helper.make_tensor_value_info(mask, TensorProto.BOOL, None))
    session = onnxruntime.InferenceSession(inlined.SerializeToString(), providers=["CPUExecutionProvider"])
    y, found = session.run(None, {"x": x.numpy()})
    return torch.from_numpy(found), y


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 2**31), operator=st.sampled_from(OPERATORS), straddle=st.booleans(), zeros=st.booleans(),
    half=st.booleans(),
)  # fmt: skip
def test_mask_forms_agree(seed, operator, straddle, zeros, half):
    """Their sums have different orders: gates may differ within rounding, and normalised data by rounding."""
    gate, x = case(operator, straddle, seed)
    if zeros:  # as after a ReLU
        x = x.relu()
    x, kind = (x.half(), TensorProto.FLOAT16) if half else (x, TensorProto.FLOAT)
    keys = [FunctionKey(operator, straddle, form, 18) for form in MASK_FORMS]
    (mask, y), (other_mask, other_y) = (opened(single(key, gate, kind), x) for key in keys)
    flips = mask != other_mask
    assert gate.count_flips(flips, x.float()).unexplained == 0
    pair = flips[:, :12] | flips[:, 12:]
    same = ~torch.cat([pair, pair], 1).numpy()
    if operator == "SRU":
        assert y[same].tobytes() == other_y[same].tobytes()  # no arithmetic but one sum, in half rounded once
    else:
        np.testing.assert_allclose(y[same], other_y[same], **(HALF_STEP if half else SMALL_NETWORK))


def test_mask_forms_agree_on_negative_zeros_but_for_the_sign():
    gate, x = case("SRU", False)
    x[:, ::2] = -0.0
    forms = [run_ort(single(FunctionKey("SRU", False, form, 18), gate), x) for form in MASK_FORMS]
    np.testing.assert_array_equal(*forms)


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize(
    "shape", [(1, 8, 127, 129), (1, 8, 128, 128), (2, 8, 129, 127), (1, 8, 1, 20000)],
    ids=["planes", "rows", "planes of odd rows", "one long row"],
)  # fmt: skip
def test_long_planes_are_measured_by_rows(operator, shape):
    """From 16,384 elements on; rows and channels have means of their own, 100 times the spread within a row."""
    variant = replace(VARIANT_OF[operator], num_groups=2)
    generator = torch.Generator().manual_seed(3)
    gate = Gate(variant, torch.randn(8, generator=generator), torch.randn(8, generator=generator))
    x = torch.randn(shape, generator=generator)
    x += 100 * torch.randn(1, 8, shape[2], 1, generator=generator)
    mask, y = opened(single(FunctionKey(operator, False, "where", 18), gate), x)
    flips = mask != gate.mask(x)
    assert gate.count_flips(flips, x).unexplained == 0
    assert int(flips.sum()) <= 2
    pair = flips[:, :4] | flips[:, 4:]
    same = ~torch.cat([pair, pair], 1).numpy()
    np.testing.assert_allclose(y[same] / 100, gate.apply(x).numpy()[same] / 100, **SMALL_NETWORK)  # of size 1


@pytest.mark.parametrize("mean", [0.0, 30.0])
@pytest.mark.parametrize("mask_form", MASK_FORMS)
@pytest.mark.parametrize("straddle", [False, True], ids=["", "straddle"])
def test_no_unexplained_flip_in_many_gates(straddle, mask_form, mean):
    gate, x = case("SRU", straddle, 1, (4, 24, 64, 64), mean)
    y = run_ort(single(FunctionKey("SRU", straddle, mask_form, 18), gate), x)
    expected = gate.apply(x).numpy()
    half = 12
    pair = (y != expected)[:, :half] | (y != expected)[:, half:]
    assert pair.sum() <= (0 if mean == 0 else 4)
    if pair.any():  # then one gate of the pair is within rounding of its threshold
        both = torch.from_numpy(np.concatenate([pair, pair], 1))
        explained = 2 * int(pair.sum()) - gate.count_flips(both, x).unexplained
        assert explained >= int(pair.sum())


@pytest.mark.parametrize("mask_form", MASK_FORMS)
def test_half_data_keeps_a_float32_gate(mask_form):
    gate, x = case("SRU", False)
    half = x.half()
    model = single(FunctionKey("SRU", False, mask_form, 18), gate, TensorProto.FLOAT16)
    y = run_ort(model, half.numpy())
    opened = gate.mask(half.float())
    x1, x2 = opened * half, ~opened * half
    expected = torch.cat([x1[:, :12] + x2[:, 12:], x1[:, 12:] + x2[:, :12]], 1)
    assert y.dtype == np.float16
    np.testing.assert_array_equal(y, expected.numpy())


def test_gates_of_gamma_zero_need_no_statistics():
    gate = Gate(replace(VARIANT_OF["SRU"], num_groups=2), torch.tensor([0.0, 1.0, 2.0, 0.0]), torch.zeros(4))
    x = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    y = run_ort(single(FunctionKey("SRU", False, "where", 18), gate), x)
    np.testing.assert_array_equal(y, gate.apply(x).numpy())


def test_a_wrong_body_is_noticed():
    """What the tests above rest on: an inverted comparison or uncrossed halves change the result."""
    gate, x = case("SRU", False)
    key = FunctionKey("SRU", False, "where", 18)
    good = single(key, gate)
    expected = run_ort(good, x)
    for old, new in (("GreaterOrEqual", "Less"), ("[1, 0]", "[0, 1]")):
        bad = onnx.ModelProto()
        bad.CopyFrom(good)
        del bad.functions[:]
        text = function_text(key)
        assert old in text
        bad.functions.append(onnx.parser.parse_function(text.replace(old, new)))
        assert (run_ort(bad, x) != expected).mean() > 0.3


def test_text_follows_the_contract():
    text = function_text(FunctionKey("SRUNorm", False, "where", 20))
    head, _, body = text.partition("{")
    assert head == (
        '<domain: "scconv", opset_import: ["" : 20]>\n'
        "SRUNorm <num_groups, ddof, eps_var, eps_std, plugin_namespace, plugin_version> "
        "(sru__x, sru__cut, sru__sign, sru__gamma, sru__beta) => (sru__y)\n"
    )
    names = [part.strip() for line in body.splitlines() if "=" in line for part in line.split(" = ")[0].split(",")]
    assert all(name.startswith("sru__") for name in names)  # TensorRT < 10.7 confuses formal and outer names
    assert len(names) == len(set(names))


def test_every_attribute_is_written_on_a_node():
    assert tuple(node_attributes(4, 1, 0.0, 1e-10)) == ATTRIBUTES
    assert node_attributes(4, 1, 0.0, 1e-10)["plugin_namespace"] == "scconv"


def test_fingerprint_sees_meaning_and_nothing_else():
    key = FunctionKey("SRU", False, "where", 18)
    first, same = function_proto(key), function_proto(key)
    same.node[0].name = "a name"
    same.doc_string = "a comment"
    assert fingerprint(first) == fingerprint(same)
    everything = {
        fingerprint(function_proto(FunctionKey(op, straddle, form, opset)))
        for op in OPERATORS for straddle in (False, True) for form in MASK_FORMS for opset in OPSETS
    }  # fmt: skip
    assert len(everything) == 3 * 2 * 2 * 6
    changed = function_proto(key)
    next(n for n in changed.node if n.op_type == "GreaterOrEqual").op_type = "Greater"
    assert fingerprint(changed) != fingerprint(first)


@pytest.mark.parametrize("opset", [17, 24])
def test_other_opsets_are_refused(opset):
    with pytest.raises(UsageError, match="18 to 23"):
        function_text(FunctionKey("SRU", False, "where", opset))


@pytest.mark.parametrize(("shape", "groups"), [((1, 64, 8192, 2), 1), ((1, 32, 16384, 1), 1)])
def test_moments_of_very_many_pieces_change_no_gate(shape, groups):
    """Planes this long are measured by rows; the mean of half a million squares must be compensated too."""
    variant = replace(VARIANT_OF["SRU"], num_groups=groups)
    generator = torch.Generator().manual_seed(0)
    gate = Gate(variant, *(torch.randn(shape[1], generator=generator) for _ in range(2)))
    x = torch.randn(shape, generator=generator).relu() + 0.5
    y = run_ort(single(FunctionKey("SRU", False, "where", 18), gate), x)
    count, distance = compare_outputs(torch.from_numpy(y), gate.apply(x), x, gate)
    assert (count.unexplained, distance < 1e-6) == (0, True)
