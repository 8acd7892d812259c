"""Checks of a built CPU library: its symbols, what it is linked to, and its kernels in ONNX Runtime."""

from __future__ import annotations

import platform
import sys
import tempfile
from pathlib import Path

from onnx import ModelProto, TensorProto, helper

from scconv_deploy.graph.contract import IR_VERSION, OPERATORS, OPSETS, PARAMETERS, FunctionKey, node_attributes
from scconv_deploy.graph.functions import function_proto
from scconv_deploy.system.machine import Machine
from scconv_deploy.trt_plugins.check import CheckRow, PluginReport, answer_of, runtime_symbols
from scconv_deploy.trt_plugins.elf import SharedLibrary, read_library

ENTRY_POINT = "RegisterCustomOps"
C_INTERFACE = ("scconv_sru_cpu_abi_version", "scconv_sru_cpu_lanes", "scconv_sru_cpu_run")
_FOREIGN = ("libonnxruntime", "libtorch", "libc10")
_CHANNELS, _GROUPS = 8, 2
_RUN = """
import ctypes, json, sys
import numpy as np, onnxruntime as ort
library, model = sys.argv[1:3]
answers = []
for wanted in (True, False):
    options = ort.SessionOptions()
    options.log_severity_level = 4
    if wanted:
        options.register_custom_ops_library(library)
    session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    draw = np.random.default_rng(0).standard_normal
    answers.append(session.run(None, {i.name: draw(i.shape).astype("f") for i in session.get_inputs()}))
apart = max(float(np.abs(a - b).max()) for a, b in zip(*answers))
lanes = ctypes.CDLL(library).scconv_sru_cpu_lanes()
print(json.dumps({"version": ort.__version__, "apart": apart, "lanes": lanes, "operators": len(answers[0])}))
"""
_CLOSE = 1e-5
"""Largest difference from the function: rounding of values of size 10."""


def is_cpu_library(path: Path) -> bool:
    """Whether a file is a library of custom operators for ONNX Runtime (IntegrityError if it is no shared library)."""
    return ENTRY_POINT in read_library(path).exported


def check_cpu_library(path: Path, machine: Machine | None = None) -> PluginReport:
    """Check a CPU library; it is loaded only when its symbols are right, and only in a child process.

    Raises:
        IntegrityError: it is no shared library.
    """
    machine = machine or Machine()
    library = read_library(path)
    rows = _static_rows(library)
    here, name = platform.machine().replace("_", "-"), "runs in onnxruntime"
    if any(row.verdict == "failed" for row in rows):
        rows.append(CheckRow(name, "not run", "its symbols are wrong"))
    elif library.machine != here:
        rows.append(CheckRow(name, "not run", f"it is for {library.machine}, this machine is {here}"))
    elif machine.installed("onnxruntime") is None:
        rows.append(CheckRow(name, "not run", "onnxruntime is not installed"))
    else:
        rows.append(_run_row(name, path))
    return PluginReport(path, tuple(rows), (), (), library.needed, library.versions)


def _static_rows(library: SharedLibrary) -> list[CheckRow]:
    wanted = {ENTRY_POINT, *C_INTERFACE}
    missing = sorted(wanted - library.exported)
    extra = sorted(library.exported - wanted - set(runtime_symbols(library)))
    linked = [name for name in library.needed if name.startswith(_FOREIGN)]
    newest = ", ".join(f"{family} {version}" for family, version in sorted(library.versions.items()))
    return [
        _row("entry point and C interface", "all exported", missing and f"not exported: {', '.join(missing)}"),
        _row("nothing else exported", "no other symbol", extra and f"also exported: {', '.join(extra[:5])}"),
        _row("not linked to ONNX Runtime or PyTorch", ", ".join(library.needed), ", ".join(linked)),
        CheckRow("runs on", "passed", f"{library.machine}, needs {newest or 'no versioned symbol'}"),
    ]


def _row(name: str, found: str, wrong: object) -> CheckRow:
    return CheckRow(name, "failed" if wrong else "passed", str(wrong or found))


def _run_row(name: str, path: Path) -> CheckRow:
    """Run each operator in ONNX Runtime with the library and without it, in a child process."""
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "operators.onnx"
        model.write_bytes(_operators().SerializeToString())
        command = [sys.executable, "-c", _RUN, str(path.absolute()), str(model)]
        answer = answer_of(command)
    if isinstance(answer, str):
        return CheckRow(name, "failed", answer)
    found = f"onnxruntime {answer['version']}, {answer['operators']} operators, vectors of {answer['lanes']} floats, "
    found += f"{answer['apart']:.1e} from the functions"
    return CheckRow(name, "passed" if answer["apart"] <= _CLOSE else "failed", found)


def _operators() -> ModelProto:
    """A model with one node of each operator, with its function, on inputs of their own."""
    inputs, outputs, nodes = [], [], []
    for operator in OPERATORS:
        names = [f"{operator}.{name}" for name in ("x", *PARAMETERS[operator])]
        shapes = [[2, _CHANNELS, 5, 7], *[[_CHANNELS]] * len(PARAMETERS[operator])]
        inputs += [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in zip(names, shapes, strict=True)]
        outputs.append(helper.make_tensor_value_info(f"{operator}.y", TensorProto.FLOAT, shapes[0]))
        attributes = node_attributes(_GROUPS, 1, 1e-5, 0.0)
        nodes.append(helper.make_node(operator, names, [f"{operator}.y"], domain="scconv", **attributes))  # type: ignore[arg-type]
    opset = OPSETS[0]
    functions = [function_proto(FunctionKey(operator, False, "multiply", opset)) for operator in OPERATORS]
    opsets = [helper.make_opsetid("", opset), helper.make_opsetid("scconv", 1)]
    graph = helper.make_graph(nodes, "operators", inputs, outputs)
    return helper.make_model(graph, functions=functions, opset_imports=opsets, ir_version=IR_VERSION)
