"""Optimization profiles from --batch, --dynamic and --shape."""

import pytest

from scconv_deploy.errors import UsageError
from scconv_deploy.exporters.tensorrt.onnx_source import graph_facts
from scconv_deploy.exporters.tensorrt.profiles import ShapeRange, resolve_profiles
from scconv_deploy.model.inputs import DynamicAxis
from scconv_deploy.runtimes.tensorrt.engine import EngineProfile
from tests.exporters.tensorrt.engines import conv_model


def test_a_shape_is_one_or_three():
    assert ShapeRange.parse("x:0:1x3:2x3:4x3") == ShapeRange("x:0", (1, 3), (2, 3), (4, 3))
    assert ShapeRange.parse("x:1x3") == ShapeRange("x", (1, 3), (1, 3), (1, 3))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x", "is not NAME:MIN:OPT:MAX"),
        ("x:4x3:2x3:8x3", "MIN <= OPT <= MAX"),
        ("x:1x3:2x3:8x2", "MIN <= OPT <= MAX"),
        ("x:1x3:2x3:8", "differ in rank"),
        ("x:0x3", "1 <= MIN"),
    ],
)
def test_a_bad_shape_is_refused(text, message):
    with pytest.raises(UsageError, match=message):
        ShapeRange.parse(text)


def test_batch_opens_axis_0_and_shape_wins():
    model = conv_model()
    batch = DynamicAxis(1, 4, 8)
    assert resolve_profiles(graph_facts(model).shapes, (), (batch,)) == (
        EngineProfile("x", (1, 16, 8, 8), (4, 16, 8, 8), (8, 16, 8, 8)),
    )
    shape = ShapeRange.parse("x:2x16x8x8:3x16x8x8:5x16x8x8")
    assert resolve_profiles(graph_facts(model).shapes, (shape,), (batch,))[0].maximum == (5, 16, 8, 8)
    fixed = resolve_profiles(graph_facts(model).shapes, (), (DynamicAxis.parse_batch("4:4:4"),))[0]
    assert fixed.minimum == fixed.maximum == (4, 16, 8, 8)
    static = resolve_profiles(graph_facts(conv_model(batch=3)).shapes, (), ())[0]
    assert static.minimum == static.maximum == (3, 16, 8, 8)


@pytest.mark.parametrize(
    ("shapes", "axes", "message"),
    [
        ((), (), r"axis 0 is not known\. Add --batch"),
        (("z:1x16x8x8",), (), r"no input 'z'\. Its inputs: x"),
        (("x:1x8x8x8",), (), "the model's input is -1x16x8x8"),
        (("x:1x16x8",), (), "the model's input is -1x16x8x8"),
        ((), ("x:2=4:8:16",), "this axis is 8 in the model"),
        ((), ("z:2=4:8:16",), "no input 'z'"),
        ((), ("x:4=4:8:16",), "x:4: the input is -1x16x8x8"),
        ((), ("x:0=1:2:8", "x:0=1:4:9"), "Axis 0 of input x is given twice"),
        (("x:1x16x8x8", "x:2x16x8x8"), (), "an input is given twice"),
    ],
)
def test_what_does_not_fit_the_graph_is_refused(shapes, axes, message):
    with pytest.raises(UsageError, match=message):
        resolve_profiles(
            graph_facts(conv_model()).shapes, tuple(map(ShapeRange.parse, shapes)), tuple(map(DynamicAxis.parse, axes))
        )  # fmt: skip


def test_batch_without_an_open_axis_is_refused():
    with pytest.raises(UsageError, match="no input has an open axis 0"):
        resolve_profiles(graph_facts(conv_model(batch=2)).shapes, (), (DynamicAxis(1, 2, 4),))
