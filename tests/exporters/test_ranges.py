"""Open axes: what a graph holds for, against what was declared."""

from __future__ import annotations

import numpy as np
import onnxruntime
import pytest
import sympy
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._sympy.functions import FloorDiv, Mod, ToFloat, TruncToInt

from scconv_deploy.errors import ModelError
from scconv_deploy.exporters.ranges import Guard, OpenSizes, check_guards
from scconv_deploy.graph.file import serialize
from scconv_deploy.model.inputs import DynamicAxis
from scconv_deploy.model.prepare import reference_from_module
from scconv_deploy.workflows.export import ExportOptions, export_to_ir
from tests import wild
from tests.tolerances import NETWORK

pytestmark = pytest.mark.usefixtures("exports_anew")

H, W, N, M = sympy.symbols("s2 s3 s0 s1", integer=True, positive=True)
HEIGHT = OpenSizes((DynamicAxis(8, 16, 64, 2, "x"),), 16, (H,))
WIDTH = OpenSizes((DynamicAxis(8, 16, 64, 3, "x"),), 16, (W,))
BATCH = OpenSizes((DynamicAxis(1, 2, 8),), 2, (N, M))


def refused(*conditions, opened=(HEIGHT, WIDTH, BATCH)) -> ModelError:
    with pytest.raises(ModelError) as caught:
        check_guards([Guard(c) for c in conditions], opened)
    return caught.value


# --- conditions ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "condition",
    [
        W >= 2,
        2 * FloorDiv(W, 2) - 2 < W,  # pooling with ceil_mode; torch's own solver gives up on it
        sympy.Eq(Mod(8 * W, 4), 0),
        sympy.Ne(TruncToInt(0.5 * ToFloat(W)), 3),
        sympy.Eq(N, M),  # one symbol in two inputs
        3 * H * W > 1,
        sympy.Or(W < 70, sympy.Eq(H, 3)),
        sympy.Symbol("u0", integer=True) > 3,  # a size that depends on values
    ],
)
def test_conditions_that_hold_everywhere(condition):
    assert check_guards([Guard(condition)], [HEIGHT, WIDTH, BATCH]) == []


@pytest.mark.parametrize(
    ("condition", "words", "remedy"),
    [
        (sympy.Eq(Mod(W, 2), 0), "(x.shape[3] % 2) == 0; it fails for 9", "x:3=8:16:64:2 (multiples of 2)"),
        (sympy.Eq(W, 8 * FloorDiv(W, 8)), "x.shape[3] == (8*(x.shape[3] // 8))", "x:3=8:16:64:8 (multiples of 8)"),
        (W <= 20, "x.shape[3] <= 20; it fails for 21", "--dynamic x:3=8:16:20,"),
        (W >= 12, "x.shape[3] >= 12; it fails for 8", "--dynamic x:3=12:16:64,"),
        (sympy.Ne(W, 32), "x.shape[3] != 32; it fails for 32", "--dynamic x:3=8:16:31,"),
        (N <= 2, "batch <= 2; it fails for 3", "--batch 1:2:2,"),
        (sympy.Ne(N, 1), "batch != 1; it fails for 1", "--batch 2:2:8,"),
        (sympy.Eq(TruncToInt(0.5 * ToFloat(W)), 8), "trunc(0.5", "--dynamic x:3=16:16:17,"),
    ],
)
def test_a_condition_on_one_axis(condition, words, remedy):
    error = refused(condition)
    assert words in error.message
    assert remedy in error.remedy
    assert ("The batch: axis 0" if "batch" in words else "Input x: axis 3") in error.message


def test_several_conditions_on_one_axis_are_one_range():
    assert "--dynamic x:3=12:16:20," in refused(W <= 20, W >= 12).remedy


def test_a_size_that_is_fixed():
    error = refused(sympy.Eq(96 * W, 1536))
    assert error.message.startswith("Input x: axis 3 was declared dynamic, but the model's code fixes it to 16: ")
    plain = refused(sympy.Eq(N, 2))
    assert plain.message == "The batch: axis 0 was declared dynamic, but the model's code fixes it to 2."
    assert plain.remedy.startswith("Leave it static")


def test_the_module_and_line_are_named():
    with pytest.raises(ModelError, match=r"\(module stem\.pool, net\.py line 26\)"):
        check_guards([Guard(W <= 20, "stem.pool", "net.py line 26")], [WIDTH])


def test_axes_that_must_be_equal_are_declared_as_one():
    error = refused(sympy.Eq(H, W))
    assert error.message.startswith("axis 2 of input x and axis 3 of input x must be equal")
    assert "--dynamic x:2,x:3=8:16:64," in error.remedy
    one = OpenSizes((*HEIGHT.axes, *WIDTH.axes), 16, (H, W))
    assert check_guards([Guard(sympy.Eq(H, W))], [one]) == []


def test_a_condition_on_two_axes_that_multiples_meet():
    error = refused(sympy.Eq(6 * H * W, 24 * FloorDiv(H, 2) * FloorDiv(W, 2)))
    assert "--dynamic x:2=8:16:64:2 --dynamic x:3=8:16:64:2 (multiples of 2)" in error.remedy


def test_declared_multiples_are_what_is_tried():
    even = OpenSizes((DynamicAxis(8, 16, 64, 3, "x", 2),), 16, (W,))
    assert check_guards([Guard(sympy.Eq(Mod(W, 2), 0))], [even]) == []
    assert "x:3=8:16:64:4" in refused(sympy.Eq(Mod(W, 4), 0), opened=[even]).remedy


def test_a_range_too_long_to_try_every_size():
    long = OpenSizes((DynamicAxis(1, 16000, 2**31 - 1, 3, "x"),), 16000, (W,))
    assert check_guards([Guard(W >= 1)], [long]) == []
    for condition in (sympy.Ne(W, 123_456_789), W <= 2**30, sympy.Eq(Mod(W, 2), 0)):
        assert "Input x: axis 3" in refused(condition, opened=[long]).message


def test_what_torch_asks_of_a_size_of_one_is_looked_at_and_not_refused():
    asked = Guard(sympy.Ne(8 * FloorDiv(W, 8), 8), internal=True)
    assert check_guards([asked], [HEIGHT, WIDTH]) == [[16, 8]]
    assert "!= 1" in refused(sympy.Ne(N, 1)).message  # the model's own code asked


# --- models ----------------------------------------------------------------------------------------------------------


def module(function) -> nn.Module:
    class Body(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.conv = nn.Conv2d(3, 4, 3, 2, 1)

        def forward(self, x):
            return function(self, x)

    return nn.Sequential(Body()).eval()


def exported(net, *axes, shape=(2, 3, 16, 16)):
    reference, log = reference_from_module(net, torch.randn(shape, generator=torch.Generator().manual_seed(0)), axes)
    return export_to_ir(reference, ExportOptions(), log)


ANY_BATCH = DynamicAxis(1, 2, 8)
ANY_WIDTH = DynamicAxis(8, 16, 64, 3, "input")


@pytest.mark.parametrize(
    ("function", "axis", "words"),
    [
        (lambda self, x: F.avg_pool2d(F.pad(x, (0, 1)) if x.shape[-1] % 2 else x, (1, 2)), ANY_WIDTH, "% 2) == 0"),
        (lambda self, x: x * 2 if x.shape[0] > 2 else x + 1, ANY_BATCH, "batch <= 2"),
        (lambda self, x: x * 2 if x.shape[0] == 1 else x + 1, ANY_BATCH, "batch != 1"),
        (lambda self, x: torch.stack([row * n for n, row in enumerate(x)]), ANY_BATCH, "fixes it to 2 (module 0, test"),
        (lambda self, x: torch.cat([x, F.interpolate(self.conv(x), scale_factor=2)], 1), ANY_WIDTH, "64:2 (mult"),
        (lambda self, x: F.adaptive_avg_pool2d(x, 4), ANY_WIDTH, "fixes it to 16: "),
        (lambda self, x: x.mean((2, 3)).squeeze(), ANY_BATCH, "the batch is 1, which was declared, the model returns"),
        (lambda self, x: F.conv2d(x, torch.ones(1, 3, 9, 9)), ANY_WIDTH, "x.shape[3] >= 9"),
    ],
)
def test_a_range_that_does_not_hold_is_refused(function, axis, words):
    with pytest.raises(ModelError) as caught:
        exported(module(function), axis)
    assert words.replace("x.shape", "input.shape") in str(caught.value)


def tile(self, x):
    """Windows of 8, as in Swin: padded, cut, put in a row."""
    x = F.pad(x, (0, -x.shape[3] % 8))
    return x.view(x.shape[0], 3, 2, 8, x.shape[3] // 8, 8).permute(0, 2, 4, 1, 3, 5).reshape(-1, 3, 8, 8).mean((2, 3))


@pytest.mark.parametrize(
    "function",
    [
        lambda self, x: F.max_pool2d(x, 3, 2, ceil_mode=True),
        lambda self, x: F.interpolate(x, size=(8, int(x.shape[3] * 0.5))),  # only the bytecode keeps it open
        lambda self, x: F.interpolate(self.conv(x), scale_factor=2.0),
        lambda self, x: F.adaptive_avg_pool2d(self.conv(x), 1),
        lambda self, x: x + torch.arange(64.0)[: x.shape[3]],  # a table as long as the largest size
        lambda self, x: x.topk(min(20, x.shape[3]), -1)[0],
        lambda self, x: F.pad(x, (0, -x.shape[3] % 8)),
        tile,
    ],
)
def test_what_holds_is_exported_and_equals_pytorch_everywhere(function):
    net = module(function)
    session = onnxruntime.InferenceSession(serialize(exported(net, ANY_WIDTH)), providers=["CPUExecutionProvider"])
    for size in (8, 9, 16, 31, 64):
        x = torch.randn(2, 3, 16, size, generator=torch.Generator().manual_seed(size))
        with torch.no_grad():
            expected = net(x).numpy()
        np.testing.assert_allclose(session.run(None, {"input": x.numpy()})[0], expected, **NETWORK)


def test_a_u_net_in_whole_steps():
    """Refused where its halves do not meet; declared in multiples, it is exported and named so."""

    def forward(self, x):
        return torch.cat([x, F.interpolate(self.conv(x), scale_factor=2)], 1)

    both = [DynamicAxis(8, 16, 64, axis, "input") for axis in (2, 3)]
    with pytest.raises(ModelError, match="multiples of 2"):
        exported(module(forward), *both)
    model = exported(module(forward), *(DynamicAxis(8, 16, 64, axis, "input", 2) for axis in (2, 3)))
    assert [str(size) for size in model.graph.inputs[0].shape] == ["2", "3", "input_2", "input_3"]


def test_two_inputs_of_one_size():
    class Pair(nn.Module):
        def forward(self, tokens, mask):
            return tokens * mask.unsqueeze(-1)

    inputs = {"tokens": torch.ones(2, 5, 4), "mask": torch.ones(2, 5)}

    def model(*axes):
        reference, log = reference_from_module(Pair().eval(), inputs, axes)
        return export_to_ir(reference, ExportOptions(), log)

    alone = [DynamicAxis(3, 5, 9, 1, name) for name in inputs]
    with pytest.raises(ModelError, match="--dynamic tokens:1,mask:1=3:5:9"):
        model(*alone)
    found = model(*DynamicAxis.parse_all("tokens:1,mask:1=3:5:9"))
    assert [str(value.shape[1]) for value in found.graph.inputs] == ["tokens_1", "tokens_1"]


@pytest.mark.parametrize(
    ("function", "traced"),
    [
        (lambda x, y: x.sum(2) * (2 if x.shape[2] == y.shape[2] + 3 else 5), 11),
        (lambda x, y: x.sum(2) * (2 if x.shape[2] == 2 * y.shape[2] else 5), 16),
        (lambda x, y: x[:, :, : int(x.shape[2] * 0.5)].sum(2) * (2 if x.shape[2] == y.shape[2] + 3 else 5), 11),
    ],
    ids=["a sum", "a multiple", "what only the bytecode keeps open"],
)
def test_an_axis_that_the_code_ties_to_another_is_refused(function, traced):
    """A trace replaces such an axis by what it follows, so that no condition on it is left."""

    class Tied(nn.Module):
        def forward(self, x, y):
            return function(x, y) + y.sum(2)

    inputs = {"x": torch.ones(1, 4, traced), "y": torch.ones(1, 4, 8)}
    axes = [DynamicAxis(4, 8, 32, 2, name) for name in inputs]
    reference, log = reference_from_module(Tied().eval(), inputs, axes)
    with pytest.raises(ModelError) as caught:
        export_to_ir(reference, ExportOptions(), log)
    assert "input x" in str(caught.value).lower()


def test_srus_are_looked_at_in_every_size():
    net = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1), wild.randomize(wild.OriginalSRU(16, 4))).eval()
    session = onnxruntime.InferenceSession(
        serialize(exported(net, ANY_BATCH, ANY_WIDTH)), providers=["CPUExecutionProvider"]
    )
    for shape in ((1, 3, 16, 8), (8, 3, 16, 61)):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            expected = net(x).numpy()
        np.testing.assert_allclose(session.run(None, {"input": x.numpy()})[0], expected, **NETWORK)


def test_groups_that_depend_on_the_batch():
    def forward(self, x):
        groups = x.shape[0] * 3
        return F.conv2d(x.reshape(1, -1, 16, 16), torch.ones(1, 1, 3, 3).expand(groups, 1, 3, 3), groups=groups)

    with pytest.raises(ModelError, match=r"Module 0 .*the attribute group of conv2d depends on an open axis.*--batch"):
        exported(module(forward), ANY_BATCH)


def test_a_plain_number_is_wanted():
    def forward(self, x):
        return x * float(np.sqrt(x.shape[3]))

    with pytest.raises(ModelError, match=r"the size of an open axis as a plain number \(module 0, test_ranges"):
        exported(module(forward), ANY_WIDTH)
