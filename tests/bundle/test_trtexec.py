"""trtexec.txt, line by line."""

from dataclasses import replace

from scconv_deploy.bundle.device.plan import DevicePlan
from scconv_deploy.bundle.trtexec import trtexec_text
from scconv_deploy.exporters.tensorrt.source import GraphFacts, GraphInput, SRUNode
from scconv_deploy.exporters.tensorrt.targets import DEVICES
from scconv_deploy.runtimes.tensorrt.engine import EngineProfile

DYNAMIC = EngineProfile("x", (1, 3, 8, 8), (2, 3, 8, 8), (8, 3, 8, 8))
PLAN = DevicePlan(
    (DEVICES["orin-jp6"],), GraphFacts((GraphInput("x", (-1, 3, 8, 8)),), (SRUNode("sru", "SRU"),), ()), (DYNAMIC,)
)
SHAPES = "--minShapes=x:1x3x8x8 --optShapes=x:2x3x8x8 --maxShapes=x:8x3x8x8"
PLUGIN = "--dynamicPlugins=device/libscconv_sru.so"


def lines(plan):
    return [line for line in trtexec_text(plan).splitlines() if line.startswith("trtexec")]


def test_an_old_tensorrt_gets_the_adapted_files():
    assert lines(PLAN) == [
        f"trtexec --onnx=model.plugin.onnx --stronglyTyped --noTF32 {PLUGIN} {SHAPES} --saveEngine=../model.engine "
        "--skipInference",
        f"trtexec --loadEngine=../model.engine {PLUGIN} --shapes=x:2x3x8x8",
        f"trtexec --onnx=model.inlined.onnx --stronglyTyped --noTF32 {SHAPES} --saveEngine=../model.engine "
        "--skipInference",
        "trtexec --loadEngine=../model.engine --shapes=x:2x3x8x8",
    ]


def test_a_newer_one_gets_the_model_itself_with_and_without_the_plugin():
    found = lines(replace(PLAN, targets=(DEVICES["thor-jp7"],)))
    assert [line.split()[1] for line in found[::2]] == ["--onnx=model.onnx", "--onnx=model.onnx"]
    assert [PLUGIN in line for line in found] == [True, True, False, False]


def test_static_shapes_are_the_models_own_and_without_srus_there_is_no_plugin():
    static = replace(DYNAMIC, minimum=DYNAMIC.optimum, maximum=DYNAMIC.optimum)
    plan = DevicePlan((DEVICES["orin-jp6"],), GraphFacts((GraphInput("x", (2, 3, 8, 8)),), (), ()), (static,))
    assert lines(plan) == [
        "trtexec --onnx=model.onnx --stronglyTyped --noTF32 --saveEngine=../model.engine --skipInference",
        "trtexec --loadEngine=../model.engine",
    ]


def test_several_inputs_and_odd_names():
    plan = replace(PLAN, profiles=(DYNAMIC, replace(DYNAMIC, input="in:0")))
    assert "--optShapes=x:2x3x8x8,\"'in:0'\":2x3x8x8" in lines(plan)[0]
