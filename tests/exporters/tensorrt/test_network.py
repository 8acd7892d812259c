"""What the real parser of TensorRT-RTX makes of a file: its own reasons, and what is put right before it reads."""

from pathlib import Path

import onnx
import pytest
from onnx import helper

from scconv_deploy.errors import BuildError, UsageError
from scconv_deploy.exporters.tensorrt.builder import build_plan
from scconv_deploy.exporters.tensorrt.network import _check_gpu_code, parse
from scconv_deploy.exporters.tensorrt.onnx_source import OnnxSource
from scconv_deploy.exporters.tensorrt.options import BuildOptions
from scconv_deploy.exporters.tensorrt.profiles import resolve_profiles
from scconv_deploy.graph.contract import FunctionKey, node_attributes
from scconv_deploy.graph.functions import function_proto
from scconv_deploy.runtimes.tensorrt import log as logs
from scconv_deploy.trt_plugins.elf import SharedLibrary
from tests.exporters.tensorrt.engines import sru_model

trt = pytest.importorskip("tensorrt_rtx", reason="needs tensorrt-rtx")
pytestmark = pytest.mark.tensorrt
HEAD = '<ir_version: 10, opset_import: ["" : 18, "my" : 1]> g '


def plan_of(text):
    source = OnnxSource(onnx.parser.parse_model(HEAD + text))
    return build_plan(trt, source, BuildOptions("tensorrt-rtx", "sm89"), resolve_profiles(source.facts.shapes, (), ()))


def network_of(data, facts):
    logger = logs.library_log(trt).logger
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    return network, parse(trt, network, logger, data, facts, BuildOptions("tensorrt-rtx")), builder


def test_an_axis_that_is_no_constant_is_folded_where_it_can_be():
    folds = (
        "(float[2, 3] x) => (float[N] y) { k = Constant <value_ints = [1]> () o = Constant <value_ints = [0]> ()"
        " s = Shape(x) r = Gather(s, k) a = Mul(r, o) y = ReduceMean <keepdims = 0> (x, a) }"
    )
    plan = plan_of(folds)
    assert tuple(plan.outputs[0].shape) == (3,)
    assert not plan.warnings or "constants were folded first" in plan.warnings[0]


def test_the_parsers_own_reason_is_told_of_an_operator_that_it_has():
    with pytest.raises(BuildError) as refused:
        plan_of("(float[2, 3] x, int64[1] axis) => (float[N] y) { y = ReduceMean <keepdims = 0> (x, axis) }")
    assert "refuses the model: ReduceMean" in refused.value.message
    assert "Axis input must resolve to a build-time constant" in refused.value.message
    assert "Assertion" not in refused.value.message
    assert "has no operator" not in refused.value.message


def test_a_sequence_of_known_length_is_resolved_and_said():
    plan = plan_of(
        "(float[4, 3] x) => (float[2, 3] y) { n = Constant <value_int = 2> () i = Constant <value_int = 1> ()"
        " s = SplitToSequence <axis = 0> (x, n) y = SequenceAt (s, i) }"
    )
    assert "SplitToSequence" in plan.warnings[0]
    assert tuple(plan.outputs[0].shape) == (2, 3)


def test_an_operator_that_is_not_there_is_named():
    with pytest.raises(BuildError, match="TensorRT-RTX has no operator Unique"):
        plan_of("(float[6] x) => (float[N] y) { y = Unique(x) }")


SUBTRACT = '<domain: "my", opset_import: ["" : 18]> F (a, b) => (c) { c = Sub(a, b) }'


def test_functions_of_others_keep_the_order_of_their_inputs():
    """F(b, a) of F(a, b) = a - b; the parser alone reads b - b."""
    model = onnx.parser.parse_model(HEAD + "(float[3] a, float[3] b) => (float[3] y) { y = my.F(b, a) }" + SUBTRACT)
    source = OnnxSource(model)

    def operands(data):
        network, parser, builder = network_of(data, source.facts)
        (layer,) = [network.get_layer(i) for i in range(network.num_layers)]
        assert layer.type.name == "ELEMENTWISE"
        names = [layer.get_input(i).name for i in range(2)]
        del network, parser, builder
        return names

    assert operands(source.read("whole")) == ["b", "a"]
    assert operands(model.SerializeToString()) != ["b", "a"]  # what this is for: if it mends itself, drop it


def test_whole_and_straddling_groups_in_one_model():
    """The parser takes the first function of a name and fails on the other kind of node, unless straddling is first."""
    model = sru_model(("whole", "straddling"))
    second = model.graph.node[1]
    del second.attribute[:]
    second.attribute.extend(helper.make_node("n", [], [], **node_attributes(16, 1, 0.0, 1e-10)).attribute)
    second.overload = "straddle"
    model.functions.append(function_proto(FunctionKey("SRU", True, "where", 18)))
    source = OnnxSource(model)
    network, parser, builder = network_of(source.read("whole"), source.facts)
    assert tuple(network.get_output(0).shape) == (-1, 8, 8, 8)
    del network, parser, builder


@pytest.mark.parametrize(
    ("cubins", "ptx", "target", "missing"),
    [
        (("8.9",), (), "sm89", ""),
        (("8.0",), (), "sm89,sm86", ""),  # machine code runs on later GPUs of its major version
        (("8.9",), ("8.9",), "sm120", ""),  # PTX on all later ones
        (("8.0", "12.0"), ("8.0", "12.0"), "sm89,sm121", ""),  # what plugin build writes for 80 and 120
        (("8.0", "12.0"), ("8.0", "12.0"), "sm75", "sm_75"),
        (("8.9",), ("8.9",), "sm86", "sm_86"),
        (("8.9",), (), "sm120", "sm_120"),
        (("8.9",), ("8.9",), "portable", "sm_80"),
        ((), (), "sm86", ""),  # nothing is known of a library without GPU code; plugin check names it
    ],
)
def test_a_plugin_without_code_for_the_engines_gpu_is_refused(cubins, ptx, target, missing):
    library = SharedLibrary("x86-64", "", (), frozenset(), frozenset(), {}, cubins, ptx)
    options = BuildOptions("tensorrt-rtx", target)
    if not missing:
        _check_gpu_code(Path("p.so"), library, options)
        return
    with pytest.raises(UsageError, match=f"has no code for {missing}, which the engine is for") as refused:
        _check_gpu_code(Path("p.so"), library, options)
    assert f"plugin build --arch {missing.removeprefix('sm_')}" in refused.value.remedy
