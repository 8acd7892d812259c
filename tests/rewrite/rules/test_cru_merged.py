import numpy as np
import onnx
import pytest
from torch import nn

from scconv_deploy.graph import merged
from scconv_deploy.nn import CRU
from tests import wild
from tests.rewrite import naive
from tests.rewrite.rules.test_cru_halves import operators, prepared, seeded
from tests.tolerances import NETWORK

MAKES = {
    "original": lambda: wild.OriginalCRU(16),
    "nn": lambda: CRU(16),
    "alpha": lambda: CRU(16, alpha=0.75),
    "kernel 1": lambda: CRU(16, group_kernel_size=1, group_size=1),
    "kernel 5": lambda: CRU(32, group_kernel_size=5, group_size=4),
    "without PWC2": lambda: CRU(16, out_channels=4),
    "more channels": lambda: CRU(16, out_channels=24),
}


def net(make):
    model = seeded(make)
    if getattr(model.cru, "up_channels", 8) * 2 == 32 and isinstance(model.cru, CRU):
        model.stem = nn.Conv2d(3, 32, 1)
    return model


def made(make, dynamo=True, dynamic=False):
    model = net(make)
    return prepared(model, naive.noise(2, 3, 8, 8), dynamo, dynamic)


@pytest.mark.parametrize("make", MAKES)
@pytest.mark.parametrize("dynamo", [False, True], ids=["TorchScript", "torch.export"])
def test_two_convolutions_compute_the_same(make, dynamo):
    proto = made(MAKES[make], dynamo)
    result, applied = naive.rewritten(proto, cru="merged")
    assert applied.crus == {"cru merged": ["y"]}
    assert not applied.left_alone
    assert operators(result)[:3] == ["Conv"] * 3  # the stem, the squeezes, the paths
    assert operators(result)[4:] == ["Softmax", "Mul", "Split", "Add"]
    x = naive.noise(2, 3, 8, 8, seed=1)
    np.testing.assert_allclose(naive.run(result, x), naive.run(proto, x), **NETWORK)


@pytest.mark.parametrize("dynamo", [False, True], ids=["TorchScript", "torch.export"])
def test_dynamic_sizes(dynamo):
    proto = made(MAKES["nn"], dynamo, True)
    result, applied = naive.rewritten(proto, cru="merged")
    assert applied.crus == {"cru merged": ["y"]}
    for shape in [(2, 3, 8, 8), (5, 3, 14, 6)]:
        x = naive.noise(*shape, seed=1)
        np.testing.assert_allclose(naive.run(result, x), naive.run(proto, x), **NETWORK)


@pytest.mark.parametrize("dims", [1, 3])
def test_signals_and_volumes(dims):
    x = naive.noise(2, 16, *[8] * dims)
    proto = prepared(CRU(16, dims=dims).eval(), x, True)
    result, applied = naive.rewritten(proto, cru="merged")
    assert applied.crus == {"cru merged": ["y"]}
    np.testing.assert_allclose(naive.run(result, x), naive.run(proto, x), **NETWORK)


def test_a_file_in_halves_becomes_the_same_graph_and_a_merged_one_stays():
    proto = made(MAKES["nn"])
    direct, _ = naive.rewritten(proto, cru="merged")
    halves, _ = naive.rewritten(proto)
    result, applied = naive.rewritten(halves, cru="merged")
    assert applied.crus == {"cru merged": ["y"]}
    assert operators(result) == operators(direct)
    again, second = naive.rewritten(direct, cru="merged")
    assert not second
    assert not second.left_alone
    assert again == direct


def test_weights_are_named_after_their_parts_and_values_have_shapes():
    proto = made(MAKES["nn"])
    result, _ = naive.rewritten(proto, cru="merged")
    found = [merged.parts_of(t.name) for t in result.graph.initializer]
    assert [parts for parts in found if parts] == [
        ("squeeze", ("cru.squeeze1.weight", "cru.squeeze2.weight")),
        ("paths", ("cru.GWC.weight", "cru.PWC1.weight", "cru.PWC2.weight")),
        ("bias", ("cru.GWC.bias",)),
    ]
    known = {v.name: v.type.tensor_type for v in (*result.graph.value_info, *result.graph.output)}
    assert [name for node in result.graph.node for name in node.output if name not in known] == []


class Shared(nn.Module):
    """One CRU, called twice: its weights are merged twice."""

    def __init__(self):
        super().__init__()
        self.cru = CRU(16)

    def forward(self, x):
        return self.cru(self.cru(x))


def test_one_module_called_twice():
    x = naive.noise(2, 16, 8, 8)
    proto = prepared(Shared().eval(), x, True)
    result, applied = naive.rewritten(proto, cru="merged")
    assert len(applied.crus["cru merged"]) == 2
    np.testing.assert_allclose(naive.run(result, x), naive.run(proto, x), **NETWORK)


class Strided(CRU):
    def __init__(self):
        super().__init__(16)
        self.GWC = nn.Conv2d(4, 16, 3, padding=2, dilation=2, groups=2)


class Biased(CRU):
    def __init__(self):
        super().__init__(16)
        self.PWC2 = nn.Conv2d(4, 12, 1)


class Activated(CRU):
    def __init__(self):
        super().__init__(16)
        self.squeeze2 = nn.Sequential(self.squeeze2, nn.ReLU())


REFUSED = {
    "dilated": (Strided, "its upper path is no sum of a convolution that keeps the size and a 1x1 without a bias"),
    "a bias": (Biased, "its lower path is no 1x1 convolution without a bias, followed by that convolution's input"),
    "activated": (Activated, "its squeezes are no 1x1 convolutions without a bias"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_crus_that_differ_are_left_alone_with_the_reason_and_still_lose_the_concatenation(case):
    make, reason = REFUSED[case]
    proto = made(make)
    result, applied = naive.rewritten(proto, cru="merged")
    assert [(miss.rule, miss.reason) for miss in applied.left_alone] == [("cru merged", reason)]
    assert applied.crus == {"cru halves": ["y"]}
    x = naive.noise(2, 3, 8, 8, seed=1)
    np.testing.assert_array_equal(naive.run(result, x), naive.run(proto, x))


@pytest.mark.parametrize("value", ["conv2d_1", "conv2d_5", "add"])
def test_a_tensor_that_is_an_output_stays(value):
    proto = made(MAKES["nn"])
    (info,) = [v for v in proto.graph.value_info if v.name == value]
    proto.graph.output.append(info)
    _, applied = naive.rewritten(proto, cru="merged")
    assert "cru merged" not in applied.crus
    assert [miss.reason for miss in applied.left_alone if miss.rule == "cru merged"] == [
        f"its {value} is an output of the graph"
    ]


def test_half_weights_are_left_alone():
    proto = made(MAKES["nn"])
    half = onnx.numpy_helper.from_array
    for tensor in proto.graph.initializer:
        if tensor.data_type == onnx.TensorProto.FLOAT:
            tensor.CopyFrom(half(onnx.numpy_helper.to_array(tensor).astype(np.float16), tensor.name))
    for value in (*proto.graph.value_info, *proto.graph.input, *proto.graph.output):
        if value.type.tensor_type.elem_type == onnx.TensorProto.FLOAT:
            value.type.tensor_type.elem_type = onnx.TensorProto.FLOAT16
    _, applied = naive.rewritten(proto, cru="merged")
    assert "cru merged" not in applied.crus
    assert [m.reason for m in applied.left_alone] == ["the weights cru.squeeze1.weight are no float32 constant"]


def test_names_with_a_comma_are_left_alone():
    """A merged weight's name says its parts, with commas between them."""
    proto = made(MAKES["nn"])
    old = next(tensor for tensor in proto.graph.initializer if tensor.name.endswith("GWC.weight"))
    for node in proto.graph.node:
        for index, name in enumerate(node.input):
            if name == old.name:
                node.input[index] = "x,y"
    old.name = "x,y"
    result, applied = naive.rewritten(proto, cru="merged")
    assert "comma" in applied.left_alone[0].reason
    assert not [tensor.name for tensor in result.graph.initializer if merged.parts_of(tensor.name)]
