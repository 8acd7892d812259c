"""ONNX Runtime with the library: what it binds, what it computes, what it refuses; its C interface by its header."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper

from scconv_deploy.graph.contract import OPERATORS, PARAMETERS
from scconv_deploy.trt_plugins.cpu.build import CPU_SOURCES
from scconv_deploy.trt_plugins.elf import read_library
from tests.trt_plugins.cpu.models import ELEMENTS, feed, one_sru, outputs, session

HERE = Path(__file__).parent
CASES = {
    "whole": ((2, 16, 9, 7), 4),
    "odd": ((3, 6, 5, 3), 3),
    "straddle": ((2, 24, 4, 4), 16),
    "several blocks": ((1, 8, 60, 60), 2),
}
TOLERANCE = {"float32": 3e-6, "float16": 2e-3, "bfloat16": 2e-2}
"""Largest difference of values of size 1 to 10 from the function's: rounding of the type, in another order."""


def kernels_run(opened, inputs, tmp_path) -> list[str]:
    """Types of the nodes that a session runs."""
    opened.run(None, inputs)
    events = json.loads(Path(opened.end_profiling()).read_bytes())
    return [e["args"]["op_name"] for e in events if e["cat"] == "Node" and e["name"].endswith("_kernel_time")]


@pytest.mark.parametrize("data", ELEMENTS)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("operator", OPERATORS)
def test_it_computes_what_the_function_does(cpu_path, operator, case, data):
    (shape, groups), kind = CASES[case], ELEMENTS[data][1]
    x = np.random.default_rng(1).standard_normal(shape).astype(np.float32).astype(kind)
    inputs = feed(operator, x)
    found = outputs(one_sru(operator, shape, groups, data), inputs, cpu_path, threads=2)
    assert found.dtype == kind
    wide = {**inputs, "x": x.astype(np.float32)}  # the function on the same values, in float32
    expected = outputs(one_sru(operator, shape, groups), wide)
    assert np.max(np.abs(found.astype(np.float32) - expected)) < TOLERANCE[data] * max(1.0, np.abs(expected).max())


@pytest.mark.parametrize("level", ["none", "basic", "all"])
@pytest.mark.parametrize("opset", [18, 23])
def test_a_node_is_bound_although_the_file_has_its_function(cpu_path, opset, level):
    shape, groups = CASES["straddle"]
    inputs = feed("SRU", np.random.default_rng(2).standard_normal(shape).astype(np.float32))
    model = one_sru("SRU", shape, groups, opset=opset)
    bare = one_sru("SRU", shape, groups, opset=opset, function=False)
    found = outputs(model, inputs, cpu_path, level=level)
    np.testing.assert_array_equal(found, outputs(bare, inputs, cpu_path, level=level))


def test_it_is_one_kernel_and_the_function_many(cpu_path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shape, groups = CASES["whole"]
    inputs, ran = feed("SRU", np.ones(shape, np.float32)), {}
    for library in (None, cpu_path):
        settings = onnxruntime.SessionOptions()
        settings.enable_profiling = True
        if library is not None:
            settings.register_custom_ops_library(str(library))
        model = one_sru("SRU", shape, groups).SerializeToString()
        opened = onnxruntime.InferenceSession(model, settings, providers=["CPUExecutionProvider"])
        ran[library] = kernels_run(opened, inputs, tmp_path)
    assert ran[cpu_path] == ["SRU"]
    assert len(ran[None]) > 20


def test_a_node_inside_a_branch_is_bound_too(cpu_path):
    shape, groups = CASES["whole"]
    inner = one_sru("SRU", shape, groups)
    branches = {}
    for name, node in (("then_branch", inner.graph.node[0]), ("else_branch", helper.make_node("Neg", ["x"], ["y"]))):
        output = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
        branches[name] = helper.make_graph([node], name, [], [output])
    choice = helper.make_node("If", ["wanted"], ["y"], **branches)
    given = [*inner.graph.input, helper.make_tensor_value_info("wanted", TensorProto.BOOL, [])]
    graph = helper.make_graph([choice], "branches", given, inner.graph.output)
    model = helper.make_model(
        graph, functions=inner.functions, opset_imports=inner.opset_import, ir_version=inner.ir_version
    )
    inputs = feed("SRU", np.random.default_rng(3).standard_normal(shape).astype(np.float32))
    found = outputs(model, {**inputs, "wanted": np.array(True)}, cpu_path)
    np.testing.assert_array_equal(found, outputs(inner, inputs, cpu_path))


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("data", ["float32", "float16"])
def test_an_empty_batch_stays_one(cpu_path, operator, data):
    x = np.empty((0, 16, 4, 4), ELEMENTS[data][1])
    y = outputs(one_sru(operator, x.shape, 4, data), feed(operator, x), cpu_path)
    assert (y.shape, y.dtype) == (x.shape, x.dtype)


def test_shapes_are_inferred_with_the_names_of_open_axes(cpu_path):
    """Without them ONNX Runtime leaves out the fusions behind an SRU."""
    shape, groups = CASES["whole"]
    output = session(one_sru("SRU", shape, groups), cpu_path).get_outputs()[0]
    assert (output.shape, output.type) == (["n", 16, "h", "w"], "tensor(float)")
    output = session(one_sru("SRU", shape, groups, "float16"), cpu_path).get_outputs()[0]
    assert (output.shape, output.type) == (["n", 16, "h", "w"], "tensor(float16)")


def test_a_convolution_behind_it_is_fused_although_no_shape_is_stored(cpu_path, tmp_path, monkeypatch):
    """Conv, Add and Relu become one node, for which ONNX Runtime must know the SRU's shape."""
    monkeypatch.chdir(tmp_path)
    shape, groups = (1, 16, 8, 8), 4
    model = one_sru("SRU", shape, groups, function=False)
    model.graph.input[0].CopyFrom(helper.make_tensor_value_info("x", TensorProto.FLOAT, shape))
    model.graph.node[0].output[0] = "middle"
    for name, size in (("w", 1), ("v", 3)):
        weight = np.ones((16, 16, size, size), np.float32)
        model.graph.initializer.append(onnx.numpy_helper.from_array(weight, name))
    model.graph.node.extend(
        [
            helper.make_node("Conv", ["middle", "w"], ["one"]),
            helper.make_node("Conv", ["middle", "v"], ["two"], pads=[1, 1, 1, 1]),
            helper.make_node("Add", ["one", "two"], ["sum"]),
            helper.make_node("Relu", ["sum"], ["y"]),
        ]
    )
    settings = onnxruntime.SessionOptions()
    settings.enable_profiling = True
    settings.register_custom_ops_library(str(cpu_path))
    opened = onnxruntime.InferenceSession(model.SerializeToString(), settings, providers=["CPUExecutionProvider"])
    ran = kernels_run(opened, feed("SRU", np.ones(shape, np.float32)), tmp_path)
    assert ran.count("SRU") == 1
    assert not {"Add", "Relu"} & set(ran)


def test_threads_of_the_runtime_give_the_same_bytes(cpu_path):
    shape, groups = (2, 64, 48, 48), 8
    inputs = feed("SRUNorm", np.random.default_rng(4).standard_normal(shape).astype(np.float32))
    model = one_sru("SRUNorm", shape, groups)
    alone, together = (outputs(model, inputs, cpu_path, threads=n) for n in (1, 4))
    np.testing.assert_array_equal(alone, together)


def test_several_sessions_share_the_registration(cpu_path):
    shape, groups = CASES["whole"]
    inputs = feed("SRU", np.random.default_rng(5).standard_normal(shape).astype(np.float32))
    model = one_sru("SRU", shape, groups)
    first = session(model, cpu_path)
    expected = session(model, cpu_path).run(None, inputs)[0]  # its options are gone
    np.testing.assert_array_equal(first.run(None, inputs)[0], expected)


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({"shape": (1, 7, 3, 3), "groups": 7}, "scconv::SRU: the number of channels is odd"),
        ({"shape": (1, 8, 3, 3), "groups": 5}, "scconv::SRU: C * H * W is not a multiple of num_groups"),
        ({"cut": np.zeros(3, np.float32)}, "scconv::SRU: cut is not [C] of x, [N, C, H, W]"),
        ({"sign": np.zeros((8, 1), np.float32)}, "scconv::SRU: sign is not [C] of x, [N, C, H, W]"),
        ({"x": np.zeros((8, 9), np.float32)}, "scconv::SRU: x is not [N, C, H, W]"),
        ({"x": np.zeros((1, 8, 3, 3, 2), np.float32)}, "scconv::SRU: x is not [N, C, H, W]"),
    ],
)
def test_what_the_function_cannot_compute_is_an_error_with_its_reason(cpu_path, change, found):
    shape, groups = change.get("shape", (1, 8, 3, 3)), change.get("groups", 2)
    model = one_sru("SRU", shape, groups, function=False)
    for value in model.graph.input:
        value.type.tensor_type.ClearField("shape")
    inputs = feed("SRU", np.ones(shape, np.float32))
    inputs |= {f"sru__{name}" if name != "x" else name: change[name] for name in ("cut", "sign", "x") if name in change}
    with pytest.raises(Exception) as refused:  # noqa: PT011  (onnxruntime's exceptions share no public base class)
        outputs(model, inputs, cpu_path)
    assert found in str(refused.value)


@pytest.mark.parametrize(
    ("attribute", "value", "found"),
    [
        ("num_groups", 0, "num_groups is not between 1 and 2^31 - 1"),
        ("num_groups", 2**31, "num_groups is not between 1 and 2^31 - 1"),
        ("ddof", 2, "ddof is not 0 or 1"),
        ("eps_std", None, "eps_std"),
        ("num_groups", None, "num_groups"),
    ],
)
def test_attributes_are_checked_when_the_model_is_loaded(cpu_path, attribute, value, found):
    model = one_sru("SRU", (1, 8, 3, 3), 2, function=False)
    (stored,) = (a for a in model.graph.node[0].attribute if a.name == attribute)
    model.graph.node[0].attribute.remove(stored)
    if value is not None:
        model.graph.node[0].attribute.append(helper.make_attribute(attribute, value))
    with pytest.raises(Exception, match=found.replace("^", r"\^")):
        session(model, cpu_path)


def test_other_types_are_refused_by_the_runtime(cpu_path):
    model = one_sru("SRU", (1, 8, 3, 3), 2, function=False)
    model.graph.input[0].type.tensor_type.elem_type = TensorProto.DOUBLE
    with pytest.raises(Exception, match="double"):
        session(model, cpu_path)


def test_it_needs_nothing_of_the_runtime_and_exports_only_its_interface(cpu_path):
    library = read_library(cpu_path)
    assert {n for n in library.exported if not n.startswith("_Z")} == {
        "RegisterCustomOps", "scconv_sru_cpu_abi_version", "scconv_sru_cpu_lanes", "scconv_sru_cpu_run"
    }  # fmt: skip
    assert not [n for n in library.needed if "onnxruntime" in n or "torch" in n]
    assert not [n for n in library.undefined if "Ort" in n]


def test_the_c_interface_is_that_of_the_real_header():
    """The header of any release from 1.17 on: ``ONNXRUNTIME_INCLUDE_DIR``, or the system's."""
    folders = [Path(os.environ[k]) for k in ("ONNXRUNTIME_INCLUDE_DIR",) if os.environ.get(k)]
    folders += [Path("/usr/include/onnxruntime"), Path("/usr/local/include/onnxruntime"), Path("/usr/include")]
    folder = next((f for f in folders if (f / "onnxruntime_c_api.h").is_file()), None)
    if folder is None:
        pytest.skip("onnxruntime_c_api.h was not found: set ONNXRUNTIME_INCLUDE_DIR to its folder")
    if shutil.which("g++") is None:
        pytest.skip("g++ is not installed")
    command = ["g++", "-std=c++17", "-fsyntax-only", "-w", f"-I{CPU_SOURCES}", "-isystem", str(folder)]
    done = subprocess.run([*command, str(HERE / "ort_header.cpp")], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_runtime_that_is_too_old_is_told(cpu_path, tmp_path):
    """A table of tables that has version 1 alone; its CreateStatus keeps the message."""
    program = """
import ctypes, sys
library = ctypes.CDLL(sys.argv[1])
CREATE = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_int32, ctypes.c_char_p)
said = []
create = CREATE(lambda code, message: said.append((code, message.decode())) or 1)
table = (ctypes.c_void_p * 1)(ctypes.cast(create, ctypes.c_void_p).value)
GET, VERSION = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_uint32), ctypes.CFUNCTYPE(ctypes.c_char_p)
get = GET(lambda version: ctypes.addressof(table) if version == 1 else None)
version = VERSION(lambda: b"1.16.3")
base = (ctypes.c_void_p * 2)(*(ctypes.cast(f, ctypes.c_void_p).value for f in (get, version)))
library.RegisterCustomOps.restype = ctypes.c_void_p
assert library.RegisterCustomOps(None, base)
print(said)
"""
    done = subprocess.run([sys.executable, "-c", program, str(cpu_path)], capture_output=True, text=True, check=True)
    assert "(1, 'The fused SRU needs ONNX Runtime 1.17 or later; this one is 1.16.3')" in done.stdout


# --- drawn shapes and values, against the function ---


def draws(seed: int):
    """A shape with its groups, an operator, a type, and x with special values among its own."""
    g = np.random.default_rng(seed)
    groups = int(g.integers(1, 9))
    while True:
        shape = (int(g.integers(1, 4)), 2 * int(g.integers(1, 13)), int(g.integers(1, 12)), int(g.integers(1, 12)))
        if np.prod(shape[1:]) % groups == 0 and np.prod(shape[1:]) > groups:
            break
    data = list(ELEMENTS)[int(g.integers(3))]
    kind = ELEMENTS[data][1]
    x = g.standard_normal(shape).astype(np.float32) * 10.0 ** g.integers(-3, 4) + g.standard_normal() * 3
    if g.random() < 0.5:
        x = np.maximum(x, 0)
    tiny = float(ml_dtypes.finfo(kind).smallest_normal)
    special = [0.0, -0.0, tiny / 3, -tiny / 2, 6e4, -6e4]
    if g.random() < 0.3:
        special += [np.nan, np.inf, -np.inf]
    places = g.random(shape) < g.choice([0.0, 0.02, 0.3])
    x[places] = g.choice(special, int(places.sum()))
    return shape, groups, OPERATORS[int(g.integers(3))], data, x.astype(kind)


@pytest.mark.parametrize("seed", range(40))
def test_drawn_shapes_tails_and_special_values(cpu_path, seed):
    shape, groups, operator, data, x = draws(seed)
    inputs = feed(operator, x, seed)
    attributes = {"ddof": seed % 2, "eps_var": [0.0, 1e-5][seed % 3 == 0]}
    with np.errstate(all="ignore"):
        found = outputs(one_sru(operator, shape, groups, data, **attributes), inputs, cpu_path).astype(np.float32)
        wide = x.astype(np.float32)
        expected = outputs(one_sru(operator, shape, groups, **attributes), {**inputs, "x": wide})
        assert found.shape == expected.shape
        scale = np.nan_to_num(np.abs(wide[np.isfinite(wide)]).max(initial=1.0), posinf=0.0)
        near = np.abs(found - expected) <= 2 * TOLERANCE[data] * np.maximum(1.0, np.maximum(scale, np.abs(expected)))
        # of a closed gate on Inf the function's rest, data - 0 * data, is NaN, PyTorch's and ours is Inf
        same = near | (np.isnan(expected) & ~np.isfinite(found)) | (found == expected)
    assert same.all(), (shape, groups, operator, data)


def test_every_operator_of_the_contract_is_here(cpu_path):
    assert set(PARAMETERS) == set(OPERATORS)
    for operator in OPERATORS:
        shape = (1, 8, 2, 2)
        y = outputs(one_sru(operator, shape, 2, function=False), feed(operator, np.ones(shape, np.float32)), cpu_path)
        assert y.shape == shape


def test_pytorchs_gates_are_the_sessions(cpu_path, cpu_library):
    """Both callers reach the same kernels: the same bytes."""
    shape, groups = CASES["whole"]
    inputs = feed("SRU", np.random.default_rng(6).standard_normal(shape).astype(np.float32))
    parameters = [torch.from_numpy(inputs[name]) for name in PARAMETERS["SRU"]]
    y = cpu_library.sru(
        torch.from_numpy(inputs["x"]), parameters, op=0, num_groups=groups, ddof=1, eps_var=0.0, eps_std=1e-10
    )
    np.testing.assert_array_equal(y.numpy(), outputs(one_sru("SRU", shape, groups), inputs, cpu_path))
