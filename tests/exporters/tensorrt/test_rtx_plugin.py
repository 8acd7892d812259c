"""NVIDIA's own builder with this project's plugin, on the CPU: every operator, type, form of group, static and dynamic.

The plugin is the real one but for its kernels, which building does not run. One child process builds everything: a
registered plugin would be there for every later test of this process.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from scconv_deploy.graph.contract import PARAMETERS, FunctionKey, node_attributes
from scconv_deploy.graph.functions import function_proto
from scconv_deploy.runtimes.tensorrt.engine import load_engine
from tests import int8
from tests.command_line import run
from tests.exporters.tensorrt.engines import save, sru_model
from tests.trt_plugins.conftest import harness, nvcc, tensorrt_headers  # noqa: F401

pytest.importorskip("tensorrt_rtx", reason="needs tensorrt-rtx")
pytestmark = [pytest.mark.tensorrt, pytest.mark.nvcc]

TYPES = {"float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16, "bfloat16": TensorProto.BFLOAT16}
DATA = {"float32": "FLOAT", "float16": "HALF", "bfloat16": "BF16"}
CASES = [
    (operator, kind, groups, dynamic)
    for operator in PARAMETERS
    for kind in TYPES
    for groups in ((4,), (3,), (4, 3))  # of 8 channels: whole, straddling, and both in one model
    for dynamic in (False, True)
]
CONVOLUTIONS = [
    (operator, kind, dynamic) for operator in PARAMETERS for kind in ("float32", "float16") for dynamic in (False, True)
]
CHILD = """
import json, sys
from pathlib import Path
import onnx
from scconv_deploy.exporters.tensorrt import builder
from scconv_deploy.exporters.tensorrt.builder import build_plan, check_options
from scconv_deploy.exporters.tensorrt.onnx_source import OnnxSource
from scconv_deploy.exporters.tensorrt.options import BuildOptions
from scconv_deploy.exporters.tensorrt.profiles import ShapeRange, resolve_profiles
from scconv_deploy.runtimes.tensorrt.versions import load_module
module, (plugin, folder) = load_module("tensorrt-rtx"), sys.argv[1:]
listed, read = [], builder.compiled_plan
def kept(messages, optimum):
    listed[:] = [text for _, text in messages if text.startswith("Layers:")]
    return read(messages, optimum)
builder.compiled_plan = kept
for path in sorted(Path(folder).glob("*.onnx")):
    source = OnnxSource(onnx.load(path))
    name, shape = next(iter(source.facts.shapes.items()))
    sizes = f"{name}:1x{shape[1]}x6x6:2x{shape[1]}x12x6:8x{shape[1]}x24x24"
    ranges = (ShapeRange.parse(sizes),) if -1 in shape else ()
    options = BuildOptions("tensorrt-rtx", "sm89", shapes=ranges, plugin=Path(plugin), require_plugin=True)
    check_options(module, options)
    plan = build_plan(module, source, options, resolve_profiles(source.facts.shapes, options.shapes, ()))
    kinds = [layer.type for layer in plan.layers]
    print(json.dumps({
        "case": path.stem, "forms": [sru.form for sru in plan.srus], "plugins": kinds.count("PLUGIN_V3"),
        "reduces": kinds.count("REDUCE"), "types": [t.dtype for t in (*plan.inputs, *plan.outputs)],
        "custom": [layer.kind for layer in plan.compiled.layers].count("custom_layer"), "bytes": len(plan.data),
        "listed": listed[0], "integer": [layer.in_int8 for layer in plan.quantized],
    }))
"""


def model_of(operator, kind, groups, dynamic):
    """SRUs in a row, one a number of groups, each with its function; the parameters are float32 in every type."""
    rng = np.random.default_rng(0)
    names = PARAMETERS[operator]
    values = [numpy_helper.from_array(rng.standard_normal(8).astype("float32"), f"p{i}") for i in range(len(names))]
    nodes = []
    for i, count in enumerate(groups):
        node = helper.make_node(
            operator, [f"x{i}" if i else "x", *(value.name for value in values)], [f"x{i + 1}"], domain="scconv",
            name=f"{i}.SRU", **node_attributes(count, 1, 0.0, 1e-10),
        )  # fmt: skip
        node.overload = "straddle" if 8 % count else ""
        nodes.append(node)
    opset = 22 if kind == "bfloat16" else 18
    functions = [function_proto(FunctionKey(operator, bool(8 % count), "where", opset)) for count in groups]
    shape = ["N", 8, "H", "W"] if dynamic else [2, 8, 12, 6]
    tensors = [helper.make_tensor_value_info(name, TYPES[kind], shape) for name in ("x", nodes[-1].output[0])]
    graph = helper.make_graph(nodes, "srus", tensors[:1], tensors[1:], values)
    opsets = [helper.make_opsetid("", opset), helper.make_opsetid("scconv", 1)]
    return helper.make_model(graph, functions=functions, opset_imports=opsets, ir_version=10)


def name_of(operator, kind, groups, dynamic):
    return f"{operator}-{kind}-{'-'.join(map(str, groups))}-{'dynamic' if dynamic else 'static'}"


def convolutions_of(operator, kind, dynamic):
    """SRUs between convolutions that change the number of channels, as in a network."""
    rng = np.random.default_rng(0)
    wide, values, nodes = (3, 16, 16, 32), [], []
    for i, (inside, outside) in enumerate(pairwise(wide)):
        weights = rng.standard_normal((outside, inside, 3, 3)).astype("float32")
        values.append(numpy_helper.from_array(weights.astype(kind), f"w{i}"))
        x = f"x{i}" if i else "x"
        nodes.append(helper.make_node("Conv", [x, f"w{i}"], [f"c{i}"], name=f"conv{i}", pads=[1] * 4))
        names = [f"{name}{i}" for name in PARAMETERS[operator]]
        values += [numpy_helper.from_array(rng.standard_normal(outside).astype("float32"), name) for name in names]
        nodes.append(helper.make_node(
            operator, [f"c{i}", *names], [f"x{i + 1}"], domain="scconv", name=f"{i}.SRU",
            **node_attributes(4, 1, 0.0, 1e-10),
        ))  # fmt: skip
    last = rng.standard_normal((8, wide[-1], 1, 1)).astype(kind)
    values.append(numpy_helper.from_array(last, "last"))
    nodes.append(helper.make_node("Conv", [nodes[-1].output[0], "last"], ["y"], name="last"))
    open_sizes, fixed = ("N", "H", "W"), (2, 12, 6)
    n, h, w = open_sizes if dynamic else fixed
    tensors = [helper.make_tensor_value_info("x", TYPES[kind], [n, 3, h, w]),
               helper.make_tensor_value_info("y", TYPES[kind], [n, 8, h, w])]  # fmt: skip
    graph = helper.make_graph(nodes, "net", tensors[:1], tensors[1:], values)
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("scconv", 1)]
    functions = [function_proto(FunctionKey(operator, False, "where", 18))]
    return helper.make_model(graph, functions=functions, opset_imports=opsets, ir_version=10)


LAYER = re.compile(
    r"^Name: (?P<name>.*?), LayerType: (?P<kind>\w+), Inputs: \[(?P<inputs>.*?)\], Constants: \[.*\], "
    r"Outputs: \[(?P<outputs>.*?)\], TacticName: .*?(?:Metadata: (?P<nodes>.*))?$"
)
TENSOR = re.compile(r"\{ Name: (?P<name>.*?), Dimensions: .*?, Format: \((?P<format>\w+)\)")


@dataclass(frozen=True)
class Kernel:
    """One kernel of the compiled plan, with its tensors by name and format."""

    kind: str
    inputs: dict[str, str]
    outputs: dict[str, str]
    nodes: tuple[str, ...]


def kernels(found):
    read = [LAYER.match(line) for line in found["listed"].splitlines() if line.startswith("Name: ")]
    return [
        Kernel(line["kind"], dict(TENSOR.findall(line["inputs"])), dict(TENSOR.findall(line["outputs"])),
               tuple(re.findall(r"\[ONNX Layer: (.*?)\]", line["nodes"] or "")))
        for line in read if line
    ]  # fmt: skip


def formats(kernel):
    """Formats of an SRU's x and y; the workspace is an output too."""
    return next(iter(kernel.inputs.values())), next(iter(kernel.outputs.values()))


@pytest.fixture(scope="module")
def built(harness, tmp_path_factory):  # noqa: F811
    """What a child says of each case."""
    folder = tmp_path_factory.mktemp("cases")
    for case in CASES:
        save(model_of(*case), folder / f"{name_of(*case)}.onnx")
    save(int8.quantize(int8.reference()[1]), folder / "int8.onnx")
    for case in CONVOLUTIONS:
        save(convolutions_of(*case), folder / f"{'-'.join(map(str, case))}.onnx")
    environment = os.environ | {"XDG_CACHE_HOME": str(folder / "cache")}
    command = [sys.executable, "-c", CHILD, str(harness.plugin), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return {found["case"]: found for found in map(json.loads, done.stdout.splitlines())}


@pytest.mark.parametrize("case", CASES, ids=lambda case: name_of(*case))
def test_nvidias_builder_takes_the_plugin(built, case):
    _, kind, groups, _ = case
    found = built[name_of(*case)]
    assert found["forms"] == ["plugin"] * len(groups)
    assert (found["plugins"], found["custom"], found["reduces"]) == (len(groups), len(groups), 0)
    assert found["types"] == [DATA[kind]] * 2
    assert found["bytes"] > 1000
    chosen = [formats(kernel) for kernel in kernels(found) if kernel.kind == "custom_layer"]
    last = kind != "bfloat16"  # of which TensorRT-RTX 1.7.1 asks for no HWC
    assert chosen == [("NHWC", "NHWC") if last and 8 % count == 0 else ("Linear", "Linear") for count in groups]


@pytest.mark.parametrize("case", CONVOLUTIONS, ids=lambda case: "-".join(map(str, case)))
def test_between_convolutions_no_kernel_transposes_an_srus_tensors(built, case):
    plan = kernels(built["-".join(map(str, case))])
    srus = [kernel for kernel in plan if kernel.kind == "custom_layer"]
    assert [formats(kernel) for kernel in srus] == [("NHWC", "NHWC")] * 3
    ends = {name for kernel in srus for name in (next(iter(kernel.inputs)), next(iter(kernel.outputs)))}
    beside = [kernel for kernel in plan if kernel not in srus and ends & {*kernel.inputs, *kernel.outputs}]
    convolutions = ("conv0", "conv1", "conv2", "last")
    assert [(kernel.kind, kernel.nodes) for kernel in beside] == [("correlation", (name,)) for name in convolutions]


def test_srus_of_an_int8_network_are_in_the_plugin_and_its_layers_multiply_integers(built):
    found = built["int8"]
    assert (len(found["forms"]), set(found["forms"])) == (3, {"plugin"})
    assert (found["plugins"], found["custom"]) == (3, 3)
    assert (len(found["integer"]), set(found["integer"])) == (18, {True})


def test_the_command_line_builds_with_it_ships_it_and_says_so(harness, tmp_path, monkeypatch):  # noqa: F811
    """In children, for a plugin stays registered in the process that loaded it."""
    monkeypatch.chdir(tmp_path)
    save(sru_model(("a.SRU", "b.SRU")), tmp_path / "m.onnx")

    def shell(*arguments):
        command = [sys.executable, "-m", "scconv_deploy", *map(str, arguments)]
        environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path / "cache")}
        return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)

    base = ("build", "m.onnx", "--backend", "tensorrt-rtx", "--target", "sm89", "--batch", "1:2:8", "--json")
    plain = json.loads(shell(*base, "-o", "plain.engine").stdout)
    fused = json.loads(shell(*base, "-o", "fused.engine", "--plugin", harness.plugin, "--require-plugin").stdout)
    inside = json.loads(shell(*base, "-o", "inside.engine", "--plugin", harness.plugin, "--serialize-plugin").stdout)
    marked = json.loads(
        shell(*base, "-o", "marked.engine", "--plugin", harness.plugin, "--debug-tensors", "srus").stdout
    )
    ends = [(t["site"], t["side"], t["name"]) for t in marked["manifest"]["debug_tensors"]]
    assert ends == [("a.SRU", "x", "x"), ("a.SRU", "y", "x1"), ("b.SRU", "x", "x1"), ("b.SRU", "y", "x2")]
    assert [fused["manifest"]["debug_tensors"], plain["manifest"]["debug_tensors"]] == [[], []]
    cost = [(m["manifest"]["plan"]["launches"], m["manifest"]["plan"]["bytes_moved"]) for m in (marked, fused)]
    assert cost[0] == cost[1]
    forms = [[sru["form"] for sru in made["manifest"]["srus"]] for made in (plain, fused, inside)]
    assert forms == [["expanded"] * 2, ["plugin"] * 2, ["plugin"] * 2]
    plans = [made["manifest"]["plan"] for made in (plain, fused)]
    # of SRUs without convolutions, which a channels-last plugin transposes at both ends, the launches say nothing
    assert [sum(layer["kind"] == "custom_layer" for layer in plan["layers"]) for plan in plans] == [0, 2]
    library = harness.plugin.read_bytes()
    assert library not in Path("fused.engine").read_bytes()
    assert library in Path("inside.engine").read_bytes()
    assert inside["manifest"]["settings"]["plugins_to_serialize"] == ["libscconv_sru.so"]
    assert load_engine(Path("fused.engine")).manifest.plugin_sha256 == inside["manifest"]["plugin_sha256"] != ""
    shown = run("inspect", "fused.engine")
    assert "plugin   a.SRU, b.SRU" in shown.stdout


def test_a_release_that_ends_its_process_is_found_out_by_a_child(harness, tmp_path):  # noqa: F811
    """TensorRT-RTX 1.7.1 itself, its library's name not made to resolve: the parser ends the process."""
    save(sru_model(), tmp_path / "m.onnx")
    code = (
        "from scconv_deploy.runtimes.tensorrt import rtx_library\n"
        "rtx_library.resolve = lambda: ''\n"
        "from scconv_deploy.exporters.tensorrt.plugin_probe import parse_with_plugin\n"
        f"parse_with_plugin({str(harness.plugin)!r}, {str(tmp_path / 'm.onnx')!r}, {str(tmp_path / 'answer')!r})\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    import tensorrt_rtx

    if done.returncode == 0:
        pytest.skip(f"tensorrt-rtx {tensorrt_rtx.__version__} finds its library by itself")
    assert done.returncode < 0
