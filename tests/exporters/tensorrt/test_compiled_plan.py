"""Kernels and bytes read from the builder's log: the text that TensorRT-RTX 1.7.1 writes, and real builds."""

from __future__ import annotations

import pytest

from scconv_deploy.exporters.tensorrt.compiled_plan import compiled_plan, open_batch
from scconv_deploy.runtimes.tensorrt.engine import EngineProfile


def tensor(name, shape, kind="Half"):
    return (
        f"{{ Name: {name}, Dimensions: [{shape}], Strides: [1,1], StrideOrder: [1,0], Datatype: {kind}, "
        "Format: (NHWC) Channel major format }"
    )


def layer(name, kind, inputs, outputs, constants="", end=", TacticName: t, StreamId: 0, Metadata: "):
    return (
        f"Name: {name}, LayerType: {kind}, Inputs: [ {', '.join(inputs)}], Constants: [{constants}], "
        f"Outputs: [ {', '.join(outputs)}]{end}"
    )


TEXT = "\n".join(
    [
        "Layers:",
        layer("conv", "correlation", [tensor("x", "8,4,2,2")], [tensor("y", "8,16,2,2")], f" {tensor('w', '16,4,1,1')}")
        + "[ONNX Layer: node_conv][ONNX Layer: node_of_sru__mean | a.SRU (SRU)][ONNX Layer: node_conv]",
        layer("s", "signal", [tensor("y", "8,16,2,2")], [], end=""),
        layer("w", "wait", [tensor("y", "8,16,2,2")], [], end=""),
        layer("mean", "kgen", [tensor("y", "8,16,2,2"), tensor("k", "")], [tensor("m", "8,16", "Float")], end=""),
        "",
        "I/O Tensors:",
        " Name: x, IOMode: Input, DataType: Half",
    ]
)


def test_bytes_are_those_of_inputs_and_outputs_and_streams_launch_nothing():
    plan = compiled_plan([("VERBOSE", "something else"), ("VERBOSE", TEXT)], None)
    assert [(found.name, found.kind) for found in plan.layers] == [("conv", "correlation"), ("mean", "kgen")]
    conv, mean = (found.bytes_moved for found in plan.layers)
    assert conv == 2 * (8 * 4 * 2 * 2 + 8 * 16 * 2 * 2)  # the weights are no traffic of activations
    assert mean == 2 * (8 * 16 * 2 * 2 + 1) + 4 * 8 * 16  # a tensor without axes has one element
    assert (plan.bytes_moved, plan.launches, plan.batch) == (conv + mean, 2, None)
    assert plan.layers[0].nodes == ("node_conv", "node_of_sru__mean | a.SRU (SRU)")
    assert plan.traffic("m.engine", "tensorrt-rtx").srus == (0,)
    assert plan.traffic("m.engine", "tensorrt-rtx").kernels == (conv, mean)


def test_an_open_batch_counts_as_its_optimum_and_another_open_axis_hides_the_bytes():
    of_batch = TEXT.replace("[8,", "[-1,")
    assert compiled_plan([("VERBOSE", of_batch)], 8).bytes_moved == compiled_plan([("VERBOSE", TEXT)], 8).bytes_moved
    hidden = compiled_plan([("VERBOSE", of_batch)], None)
    assert (hidden.bytes_moved, hidden.launches) == (None, 2)
    assert "open axes hide" in str(hidden.traffic("m", "tensorrt-rtx"))
    sides = compiled_plan([("VERBOSE", TEXT.replace("8,16,2,2", "8,16,-1,-1"))], 8)
    assert [found.bytes_moved for found in sides.layers] == [None, None]


@pytest.mark.parametrize("text", ["", "Layers:\n", "Layers:\nName: conv, LayerType: new, Reads: []", TEXT[8:]])
def test_words_that_are_not_known_give_no_plan_rather_than_a_wrong_one(text):
    assert compiled_plan([("VERBOSE", text)], None) is None


def test_shapes_that_the_host_computes_launch_nothing():
    """As TensorRT-RTX 1.7.1 lists them where height and width are open; they have no list of constants."""
    shapes = (
        "Name: [ShapeHostToDeviceCopy 0], LayerType: ShapeHostToDevice, Inputs: [], Outputs: [ { Name: f, "
        "Location: Device, Dimensions: [1], Datatype: Int64, Format: Format not available due to dynamic shapes }], "
        "ParameterType: ShapeH2D, shapeValues0: [-19], TacticValue: 0x0000000000000000, StreamId: 0, Metadata: \n"
        "Name: __mye2827_0_myl1_0, LayerType: shape_call, Inputs: [], Constants: [], Outputs: [], TacticName: , "
        "StreamId: 0, Metadata: \n"
    )
    plan = compiled_plan([("VERBOSE", TEXT.replace("Layers:\n", "Layers:\n" + shapes))], None)
    assert plan == compiled_plan([("VERBOSE", TEXT)], None)


def test_an_unknown_type_hides_the_bytes():
    plan = compiled_plan([("VERBOSE", TEXT.replace("Datatype: Float", "Datatype: FP4"))], None)
    assert [found.bytes_moved is None for found in plan.layers] == [False, True]


@pytest.mark.parametrize(
    ("ranges", "batch"),
    [
        ([((1, 3), (4, 3), (8, 3))], 4),
        ([((1, 3), (4, 3), (8, 3)), ((2, 2), (2, 2), (2, 2))], 4),
        ([((1, 3), (4, 3), (8, 3)), ((1, 3), (2, 3), (8, 3))], None),
        ([((1, 3), (4, 3), (8, 9))], None),
        ([((4, 3), (4, 3), (4, 3))], None),
        ([], None),
    ],
)
def test_the_open_batch_is_the_profiles(ranges, batch):
    assert open_batch([EngineProfile(f"x{i}", *sizes) for i, sizes in enumerate(ranges)]) == batch


@pytest.mark.parametrize(
    ("second", "batch"),
    [
        (((8, 3), (16, 3), (32, 3)), 4),
        (((8, 9), (16, 9), (32, 9)), None),  # each profile has one size of axis 1, and the axis is open all the same
    ],
)
def test_of_several_profiles_the_open_batch_is_the_firsts(second, batch):
    first = EngineProfile("x", (4, 3), (4, 3), (4, 3))
    assert open_batch([first, EngineProfile("x", *second, index=1)]) == batch


def test_the_kernels_of_further_profiles_are_not_counted():
    of_shapes = layer("shapes", "shape_call", [], [])
    again = TEXT.replace("Name: x,", "Name: x [profile 1],").replace("Layers:\n", "").replace("Name: conv", "Name: c2")
    first = TEXT.split("\n\n")[0]
    both = "\n".join([first.replace("Layers:\n", f"Layers:\n{of_shapes}\n"), of_shapes, again])
    found, alone = compiled_plan([("VERBOSE", both)], None), compiled_plan([("VERBOSE", TEXT)], None)
    assert [kernel.name for kernel in found.layers] == ["conv", "mean"]
    assert found.bytes_moved == alone.bytes_moved
