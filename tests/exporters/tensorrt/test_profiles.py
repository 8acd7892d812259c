"""Optimization profiles from --batch, --dynamic and --shape."""

import pytest

from scconv_deploy.errors import UsageError
from scconv_deploy.exporters.tensorrt.onnx_source import graph_facts
from scconv_deploy.exporters.tensorrt.profiles import ShapeRange, parse_profile, resolve_profiles
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


# --- several profiles ---------------------------------------------------------------------------------------------


def test_each_profile_has_a_range_for_every_input_and_static_ones_need_none():
    first, second = map(parse_profile, ("x:1x3:2x3:4x3,y:5x5", "x:8x3:16x3:32x3"))
    assert first == (ShapeRange("x", (1, 3), (2, 3), (4, 3)), ShapeRange("y", (5, 5), (5, 5), (5, 5)))
    assert resolve_profiles({"x": (-1, 3), "y": (5, 5)}, (), (), (first, second)) == (
        EngineProfile("x", (1, 3), (2, 3), (4, 3), 0), EngineProfile("y", (5, 5), (5, 5), (5, 5), 0),
        EngineProfile("x", (8, 3), (16, 3), (32, 3), 1), EngineProfile("y", (5, 5), (5, 5), (5, 5), 1),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("profiles", "message"),
    [
        (("x:1x16x8x8", "z:1x16x8x8"), r"no input 'z'"),
        (("x:1x16x8x8", "x:1x16x8x8,x:2x16x8x8"), "--profile: an input is given twice"),
        (("x:1x8x8x8",), "--profile x: the model's input is -1x16x8x8"),
    ],
)
def test_a_profile_that_does_not_fit_the_graph_is_refused(profiles, message):
    with pytest.raises(UsageError, match=message):
        resolve_profiles(graph_facts(conv_model()).shapes, (), (), tuple(map(parse_profile, profiles)))


def test_a_profile_without_an_open_input_names_it():
    with pytest.raises(UsageError, match=r"'y' is -1: .* in one --profile\. Add y:MIN:OPT:MAX to it, after a comma"):
        resolve_profiles({"x": (-1,), "y": (-1,)}, (), (), (parse_profile("x:1:2:4"),))


def test_profiles_exclude_other_ranges_and_static_models():
    profile = parse_profile("x:2x16x8x8")
    shapes = graph_facts(conv_model()).shapes
    with pytest.raises(UsageError, match="--profile excludes --shape, --batch and --dynamic"):
        resolve_profiles(shapes, (), (DynamicAxis(1, 2, 8),), (profile,))
    with pytest.raises(UsageError, match="--profile excludes"):
        resolve_profiles(shapes, profile, (), (profile,))
    with pytest.raises(UsageError, match="no input of the model has an open axis"):
        resolve_profiles(graph_facts(conv_model(batch=2)).shapes, (), (), (profile,))


@pytest.mark.parametrize("text", ["x:1x3:2x3:4x3,", "x:", "x"])
def test_a_bad_profile_is_refused_under_its_own_name(text):
    with pytest.raises(UsageError, match=r"--profile '.*' is not NAME:MIN:OPT:MAX"):
        parse_profile(text)


@pytest.mark.parametrize("size", [2**31, 10**30])
def test_a_size_that_no_library_takes_is_refused(size):
    with pytest.raises(UsageError, match="an axis is larger than 2,147,483,647"):
        ShapeRange.parse(f"x:1x8:1x8:{size}x8")
