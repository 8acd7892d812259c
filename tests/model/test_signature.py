"""Inputs by name and by position, and outputs by name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import pytest
import torch
from torch import nn

from scconv_deploy.errors import ModelError, UsageError
from scconv_deploy.model import signature as signatures
from scconv_deploy.model.inputs import DynamicAxis, InputSpec
from scconv_deploy.model.signature import Signature, named_outputs, refuse_what_is_no_tensor


def net(forward):
    """A module with this forward; a star in front of ``self`` is spared."""
    return type("Net", (nn.Module,), {"forward": forward})()


def bind(forward, *inputs, dynamic=(), seed=0) -> Signature:
    return signatures.from_specs(net(forward), [InputSpec.parse(text) for text in inputs], dynamic, seed)


def shapes(signature):
    return {name: tuple(tensor.shape) for name, tensor in signature.tensors.items()}


def called_with(signature, forward):
    """What the forward receives when it is called through the signature with its own tensors."""
    seen = {}

    def spy(self, *args, **kwargs):
        seen["args"], seen["kwargs"] = args, kwargs
        return torch.ones(1)

    model = net(spy)
    signature.call(model, signature.tensors)
    forward(model, *seen["args"], **seen["kwargs"])  # Python itself says whether they fit
    return seen["args"], seen["kwargs"]


# --- forwards ---------------------------------------------------------------------------------------------------


def test_one_input():
    signature = bind(lambda self, image: image, "2x3x4x4")
    assert shapes(signature) == {"image": (2, 3, 4, 4)}
    expected = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    assert torch.equal(signature.tensors["image"], expected)
    assert torch.equal(signature.call(net(lambda self, image: image * 2), {"image": expected})["output"], expected * 2)


def test_named_inputs_first_and_the_others_fill_what_is_left():
    def forward(self, a, b, c):
        return a

    signature = bind(forward, "1x1", "b:2x2", "3x3")
    assert shapes(signature) == {"a": (1, 1), "b": (2, 2), "c": (3, 3)}


def test_a_default_that_is_skipped_stays_a_default():
    def forward(self, x, scale=None, flag=True, bias=None):
        assert scale is None
        assert flag is True
        return x + bias

    signature = bind(forward, "x:2x3", "bias:2x3")
    assert signature.names == ("x", "bias")
    args, kwargs = called_with(signature, forward)
    assert [tuple(a.shape) for a in args] == [(2, 3)]
    assert list(kwargs) == ["bias"]
    x, bias = torch.ones(2, 3), torch.full((2, 3), 2.0)
    assert torch.equal(signature.call(net(forward), {"bias": bias, "x": x})["output"], x + bias)


def test_keyword_only_parameters():
    def forward(self, x, *, mask, scale=None):
        return x * mask

    signature = bind(forward, "2x3", "2x3")
    assert signature.names == ("x", "mask")
    assert list(signature.kwargs) == ["mask"]
    assert shapes(bind(forward, "scale:4", "2x3", "2x3")) == {"x": (2, 3), "mask": (2, 3), "scale": (4,)}


def test_a_keyword_only_option_is_not_filled_by_position():
    with pytest.raises(UsageError, match="no parameter left"):
        bind(lambda self, x, *, scale=None: x, "2x3", "2x3")


def test_positional_only_parameters():
    def forward(self, x=None, y=None, /):
        return y

    signature = bind(forward, "y:2x3")
    assert signature.args[0] is None
    assert signature.names == ("y",)
    called_with(signature, forward)


def test_star_args():
    def forward(self, *images):
        return images[0] - images[1]

    signature = bind(forward, "2x3", "2x3")
    assert signature.names == ("images_0", "images_1")
    a, b = signature.tensors.values()
    assert torch.equal(signature.call(net(forward), {"images_1": b, "images_0": a})["output"], a - b)


def test_star_args_after_a_default_that_is_skipped():
    def forward(self, x, scale=2, *rest):
        return x * scale + rest[0]

    signature = bind(forward, "1x1", "1x1", "1x1")
    assert signature.names == ("x", "scale", "rest_0")
    by_name = bind(forward, "x:1x1", "scale:1x1", "1x1")
    assert by_name.names == ("x", "scale", "rest_0")


def test_star_kwargs():
    def forward(self, **batch):
        return batch["image"] + batch["label"]

    signature = bind(forward, "image:2x3", "label:2x3")
    assert signature.names == ("image", "label")
    called_with(signature, forward)
    with pytest.raises(UsageError, match=r"It takes \*\*batch"):
        bind(forward, "2x3")


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        (["1x3", "1x3", "1x3"], "--input 1x3: forward has no parameter left for it. It takes x, y=None."),
        (["z:1x3"], "--input z:1x3: forward has no parameter 'z'. It takes x, y=None."),
        (["y:1x3"], "forward also needs x. Add for example --input x:1x16."),
        ([], "forward also needs x."),
        (["x:1x3", "x:1x4"], "--input x:1x4: x is given twice."),
        (["self:1x3"], "no parameter 'self'"),
    ],
)
def test_inputs_that_do_not_fit(inputs, words):
    with pytest.raises(UsageError) as caught:
        bind(lambda self, x, y=None: x, *inputs)
    assert words in str(caught.value)
    assert caught.value.remedy


@pytest.mark.parametrize("name", ["args", "kwargs"])
def test_a_star_is_no_name(name):
    with pytest.raises(UsageError, match="no parameter"):
        bind(lambda self, x, *args: x, f"{name}:1x3")


@pytest.mark.parametrize("shape", ["99999x99999x99999x99999", "9" * 30, "x".join(["99999"] * 9)])
def test_inputs_larger_than_the_memory(shape):
    with pytest.raises(UsageError, match="larger than the memory"):
        bind(lambda self, x: x, shape)


def test_values_are_seeded_and_of_their_dtype():
    def forward(self, a, b, c, d):
        return a

    inputs = ("64", "b:64:int64", "c:64:bool", "d:64:float16")
    one, two = bind(forward, *inputs, seed=5), bind(forward, *inputs, seed=5)
    assert all(torch.equal(one.tensors[name], two.tensors[name]) for name in "abcd")
    assert not torch.equal(one.tensors["a"], bind(forward, *inputs, seed=6).tensors["a"])
    assert [t.dtype for t in one.tensors.values()] == [torch.float32, torch.int64, torch.bool, torch.float16]
    assert set(one.tensors["b"].tolist()) == {0, 1}
    assert one.tensors["c"].any()
    assert not one.tensors["c"].all()


# --- open axes --------------------------------------------------------------------------------------------------


def test_an_open_axis_has_its_optimum():
    def forward(self, x, y):
        return x

    axes = (DynamicAxis(8, 16, 32, 2, "x"), DynamicAxis(1, 5, 9, 0, "y"))
    assert shapes(bind(forward, "1x3x8x8", "y:2x4", dynamic=axes)) == {"x": (1, 3, 16, 8), "y": (5, 4)}


def test_an_open_axis_of_star_args():
    assert shapes(bind(lambda self, *x: x, "1x3", "1x3", dynamic=(DynamicAxis(2, 4, 8, 1, "x_1"),))) == {
        "x_0": (1, 3),
        "x_1": (1, 4),
    }


@pytest.mark.parametrize(
    ("axes", "words"),
    [
        ((DynamicAxis(1, 2, 3, 0, "y"),), "no input is called 'y'. The inputs are x."),
        ((DynamicAxis(1, 2, 3, 4, "x"),), "axis 4 of input x: its shape [2, 3, 8, 8] has 4 axes"),
        ((DynamicAxis(1, 3, 4, 1, "x"), DynamicAxis(2, 3, 6, 1, "x")), "axis 1 of input x is given twice"),
        ((DynamicAxis(1, 2, 3), DynamicAxis(1, 2, 3, 0, "x")), "axis 0 of input x is given twice"),
        ((DynamicAxis(4, 4, 8),), "axis 0 of input x: the example has 2, expected 4 to 8"),
    ],
)
def test_open_axes_that_do_not_fit(axes, words):
    with pytest.raises(UsageError) as caught:
        bind(lambda self, x: x, "2x3x8x8", dynamic=axes)
    assert words in str(caught.value)
    with pytest.raises(UsageError):
        signatures.from_example(net(lambda self, x: x), [torch.ones(2, 3, 8, 8)], {}, axes)


def test_dynamic_shapes_name_every_parameter():
    def forward(self, x, scale=None, *, pair):
        return x

    axes = (DynamicAxis(1, 2, 4), DynamicAxis(8, 8, 16, 2, "x"))
    pair = (torch.ones(2, 1), torch.ones(2, 1))
    signature = signatures.from_example(net(forward), [torch.ones(2, 3, 8)], {"pair": pair}, axes)
    dims = {"batch": "B", "x_2": "W"}
    assert signature.dynamic_shapes(net(forward), dims) == {"x": {0: "B", 2: "W"}, "pair": ({0: "B"}, {0: "B"})}
    static = bind(lambda self, x: x, "1x3")
    assert static.dynamic_shapes(net(lambda self, x: x), {}) is None


# --- examples ---------------------------------------------------------------------------------------------------


def test_names_of_nested_examples():
    def forward(self, x, features, flag=False, **more):
        return x

    one = torch.ones(1)
    signature = signatures.from_example(
        net(forward), [one, {"low": one * 2, "all": [one * 3, one * 4]}], {"flag": True, "mask": one * 5}, ()
    )
    assert {name: float(t) for name, t in signature.tensors.items()} == {
        "x": 1, "features_low": 2, "features_all_0": 3, "features_all_1": 4, "mask": 5,
    }  # fmt: skip
    called_with(signature, forward)


def test_examples_that_do_not_fit():
    with pytest.raises(UsageError, match="do not fit the model's forward: missing a required argument: 'y'"):
        signatures.from_example(net(lambda self, x, y: x), [torch.ones(1)], {}, ())
    with pytest.raises(UsageError, match="Two inputs have one name: x_0, x_0"):
        signatures.from_example(net(lambda self, x, x_0: x), [[torch.ones(1)], torch.ones(1)], {}, ())


# --- outputs ----------------------------------------------------------------------------------------------------


class Boxes(NamedTuple):
    corners: torch.Tensor
    scores: torch.Tensor


class Opaque:
    def __init__(self, x):
        self.x = x


@dataclass(frozen=True)
class Detections:
    boxes: torch.Tensor
    scores: torch.Tensor | None = None


@pytest.mark.parametrize(
    ("output", "names"),
    [
        (torch.ones(1), ["output"]),
        (Detections(torch.ones(1)), ["boxes"]),
        (
            (Detections(torch.ones(1), torch.ones(2)), [torch.ones(1)]),
            ["output_0_boxes", "output_0_scores", "output_1_0"],
        ),
        ({"low": Detections(torch.ones(1))}, ["low_boxes"]),
        ((torch.ones(1), torch.ones(2)), ["output_0", "output_1"]),
        ([torch.ones(1), None, [torch.ones(2)]], ["output_0", "output_2_0"]),
        ({"logits": torch.ones(1), "features": [torch.ones(2), torch.ones(3)]}, ["logits", "features_0", "features_1"]),
        ({0: torch.ones(1), "flag": True}, ["output_0"]),
        (Boxes(torch.ones(1), torch.ones(2)), ["corners", "scores"]),
    ],
)
def test_names_of_outputs(output, names):
    named = named_outputs(output)
    assert list(named) == names
    assert all(isinstance(tensor, torch.Tensor) for tensor in named.values())


def test_an_output_called_like_an_input():
    forward = lambda self, x: {"x": x + 1, "y": x + 2}  # noqa: E731
    signature = bind(forward, "1x1")
    named = signature.call(net(forward), {"x": torch.zeros(1, 1)})
    assert {name: float(t) for name, t in named.items()} == {"output_x": 1, "y": 2}


@pytest.mark.parametrize("output", [None, 3, {}, Opaque(torch.ones(1))])
def test_outputs_without_a_tensor(output):
    with pytest.raises(ModelError, match=f"returned {type(output).__name__} without a tensor"):
        named_outputs(output)


@pytest.mark.parametrize(
    ("output", "words"),
    [
        ((torch.ones(1), 8), "Output output_1 of the model is 8, a Python int; .*Leave it out, or return torch.tensor"),
        ({"y": torch.ones(1), "name": "a"}, "Output name of the model is 'a', a Python str"),
        (
            (torch.ones(1), [Opaque(torch.ones(1))]),
            "Output output_1_0 of the model is of type Opaque; .*in a tuple, list",
        ),
    ],
)
def test_outputs_that_no_graph_can_have(output, words):
    with pytest.raises(ModelError, match=words) as caught:
        refuse_what_is_no_tensor(output)
    assert "scconv-deploy rewrite" in caught.value.remedy
    refuse_what_is_no_tensor((torch.ones(1), None))


def test_two_outputs_of_one_name():
    with pytest.raises(ModelError, match="Two outputs of the model have one name: a_0"):
        named_outputs({"a": [torch.ones(1)], "a_0": torch.ones(1)})


# --- calling ----------------------------------------------------------------------------------------------------


def test_what_a_forward_raises():
    def unpacks(self, x):
        _n, _c, _h, _w = x.shape
        return x

    signature = bind(unpacks, "1x3")
    with pytest.raises(ModelError, match=r"refuses its inputs \(x 1x3\): ValueError: not enough values"):
        signature.call(net(unpacks), signature.tensors)
    with pytest.raises(RuntimeError, match="mat1 and mat2"):  # torch's own word is kept, for a better remedy
        signature.call(nn.Linear(4, 4), {"x": torch.ones(1, 3)})


def test_no_gradient_is_recorded():
    signature = bind(lambda self, input: input, "1x4")
    assert not signature.call(nn.Linear(4, 4), signature.tensors)["output"].requires_grad
