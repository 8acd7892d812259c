"""Registers, spills and machine code of every CUDA kernel, architecture by architecture; warnings are errors.

Registers and spills are ptxas's. The disassembler tells of the rest: local memory, 128-bit accesses, bulk copies, and
instructions an element of x on the way of whole vectors (benchmarks/sass.py). No GPU is needed.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks.harness import RESULTS, Row, write
from benchmarks.sass import Function, disassemble, passes_of
from scconv_deploy.graph.contract import OPERATORS
from scconv_deploy.system.machine import CUDA_WHEELS, Machine, find_cuda_tool, find_nvcc
from scconv_deploy.trt_plugins.build import SOURCES

ARCHITECTURES = (75, 80, 86, 87, 89, 90, 100, 110, 120, 121)
SHOWN = (89, 90)
"""The architectures that the table has kernel by kernel; tests/trt_plugins/test_sass.py holds half's kernels to it."""

TYPES = {"float": 4, "half": 2, "bfloat16": 2}
"""Bytes of an element."""

AIMS = {"fused_kernel<half, SRU, 8, 8>": 16.0, "fused_kernel<half, SRU, 8, 1>": 24.0}
"""Instructions an element that a kernel may have at most: vectors of one channel each, and of two (7x7)."""

_BY_THREADS = 0.5
"""More where threads load x and store it on chip, because the architecture copies nothing in bulk."""

_GROWTH = 1.05
"""By which instructions an element may exceed the table's before a test fails: compilers of one release differ less."""

_COLUMNS = {
    "architecture": "architecture",
    "kernel": "kernel",
    "registers": "registers",
    "LDG.128": "LDG",
    "STG.128": "STG",
    "LDS.128": "LDS",
    "bulk copies": "bulk_copies",
    "instructions an element": "per_element",
    "ragged, or diverging": "per_element_dearest",
    "by step": "steps",
}
_ENTRY = re.compile(
    r"Compiling entry function '(\w+)'.*?(\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) registers",
    re.DOTALL,
)


_TYPE_NAMES = {"f": "float", "6__half": "half", "13__nv_bfloat16": "bfloat16"}
_ARGUMENT = re.compile(r"(f|6__half|13__nv_bfloat16)|L(?:NS_\d+([A-Za-z]+)E|([a-z]))(\d+)E")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--arch", default=",".join(map(str, ARCHITECTURES)), help="compute capabilities, 75,80,...")


def run(options: argparse.Namespace) -> None:
    nvcc, nvdisasm = find_nvcc(Machine()), find_cuda_tool("nvdisasm", Machine())
    if nvcc is None or nvdisasm is None:
        print(f"not run: {'nvcc' if nvcc is None else 'nvdisasm'} was not found ({CUDA_WHEELS})")
        return
    banner = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    release = re.search(r"V(\d+\.\d+\.\d+)", banner)
    rows = [
        row
        for architecture in options.arch.split(",")
        for data_type in TYPES
        for row in measure(nvcc, nvdisasm, architecture, data_type)
    ]
    shown = [row for row in rows if row["architecture"] in [f"sm_{one}" for one in SHOWN]]
    said = faults(shown, [row for row in committed() if row["architecture"] in {one["architecture"] for one in rows}])
    write(options.results, shown, _COLUMNS, summary={"kernels": _by_kernel(rows)},
          cuda=release[1] if release else "unknown")  # fmt: skip
    for row in rows:
        if row["spill_bytes"] or row["local"]:
            print(f"spills: {row['architecture']}, {row['kernel']}: {row['spill_bytes']} bytes")
    for line in said:
        print(f"beside the table before: {line}")


def committed() -> list[Row]:
    """The table's rows, as they lie in benchmarks/results."""
    return json.loads((RESULTS / "sru_sass.json").read_text(encoding="utf-8"))["rows"]


def measure(nvcc: str, nvdisasm: str, architecture: str, data_type: str, sources: Path = SOURCES) -> list[Row]:
    """A row for each kernel of a data type, compiled as it ships.

    Exits:
        with what the compiler says, where a file does not compile.
    """
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "out.cubin"
        command = [nvcc, "-std=c++17", "-O3", "-Werror", "all-warnings", "-Xptxas", "-v", "-cubin",
                   f"-arch=sm_{architecture}", str(sources / "kernel" / f"sru_{data_type}.cu"),
                   "-o", str(cubin)]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit(f"sm_{architecture}, {data_type}: {done.stderr}")
        functions = disassemble(nvdisasm, cubin)
    return [
        {"architecture": f"sm_{architecture}", "kernel": name_of(symbol), "registers": int(registers),
         "spill_bytes": int(stores) + int(loads), **facts(functions[symbol], symbol, TYPES[data_type])}
        for symbol, stores, loads, registers in _ENTRY.findall(done.stderr)
    ]  # fmt: skip


def faults(rows: Sequence[Row], table: Sequence[Row]) -> list[str]:
    """What is wrong with kernels, by themselves and beside the committed table of the same architectures and types."""
    before = {(row["architecture"], row["kernel"]): row for row in table}
    found = []
    for row in rows:
        kernel, known = row["kernel"], before.pop((row["architecture"], row["kernel"]), None)
        said = []
        if row["spill_bytes"] or row["local"]:
            said.append(f"{row['spill_bytes']} bytes spilled, {row['local']} accesses of local memory")
        if row.get("vector_bytes") == 16:
            if not row["LDG"] and not row["bulk_copies"]:
                said.append("no 128-bit load and no bulk copy")
            if not row["STG"] and "statistics" not in kernel:
                said.append("no 128-bit store")
            if kernel.startswith("fused") and int(row["architecture"][3:]) >= 90 and not row["bulk_copies"]:
                said.append("no bulk copy")
        if known is None:
            said.append("not in the table")
        for key in ("per_element", "per_element_dearest"):
            if known is not None and row.get(key, 0.0) > _GROWTH * known.get(key, 0.0):
                said.append(f"{key} {row[key]}, was {known.get(key)}")
        aim = AIMS.get(kernel, float("inf")) + (0.0 if row["bulk_copies"] else _BY_THREADS)
        if row.get("per_element", 0.0) > aim:
            said.append(f"{row['per_element']} instructions an element, at most {aim}")
        found += [f"{row['architecture']}, {kernel}: {one}" for one in said]
    return found + [f"{architecture}, {kernel}: in the table only" for architecture, kernel in before]


def facts(function: Function, symbol: str, element_bytes: int) -> Row:
    """What the listing of a kernel says.

    ``local``: loads from and stores to local memory. ``per_element``: instructions an element of whole vectors,
    ``steps`` the same of each loop, ``per_element_dearest`` over ragged ends and where a warp diverges; ``outside``:
    instructions of a thread outside of those loops.
    """
    wide = function.accesses(128)
    row: Row = {
        "local": function.count("LDL", "STL"),
        "LDG": wide["LDG"],
        "STG": wide["STG"],
        "LDS": wide["LDS"],
        "STS": wide["STS"],
        "bulk_copies": function.count("UBLKCP"),
        "barriers_of_copies": function.count("SYNCS"),
    }
    elements = vector_of(symbol)
    if elements * element_bytes < 8:  # single elements: what is x and what a parameter cannot be told
        return row
    passes = passes_of(function, elements * element_bytes * 8, elements)
    return row | {
        "vector_bytes": elements * element_bytes,
        "per_element": round(sum(passes.per_element()), 2),
        "per_element_dearest": round(sum(passes.per_element(dearest=True)), 2),
        "steps": [round(one, 2) for one in passes.per_element()],
        "outside": passes.outside,
    }


def name_of(symbol: str) -> str:
    """``on_chip_kernel<half, SRU, 8, true>`` of a mangled name."""
    kernel = re.search(r"\d+([a-z_]+_kernel)", symbol)
    if kernel is None:
        sys.exit(f"a kernel of an unknown name: {symbol}")
    arguments = ", ".join(_arguments(symbol))
    return f"{kernel[1]}<{arguments}>" if arguments else kernel[1]


def vector_of(symbol: str) -> int:
    """Elements of a vector: the first number among a kernel's template arguments; 1 where there is none."""
    return next((int(one) for one in _arguments(symbol) if one.isdigit()), 1)


def _arguments(symbol: str) -> list[str]:
    """Template arguments of a mangled name: data types, operators, numbers, true and false."""
    mangled = re.search(r"_kernelI(.*)EEv", symbol)
    found = []
    for data_type, enum, kind, value in _ARGUMENT.findall(f"{mangled[1]}E" if mangled else ""):
        if enum == "Operator":
            found.append(OPERATORS[int(value)])
        elif kind == "b":
            found.append("true" if int(value) else "false")
        else:
            found.append(_TYPE_NAMES.get(data_type) or value)
    return found


def _by_kernel(rows: Sequence[Row]) -> list[Row]:
    """Registers and spills of all instances of a kernel on an architecture."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["architecture"], row["kernel"].partition("<")[0]), []).append(row)
    return [
        {
            "architecture": architecture,
            "kernel": kernel,
            "instances": len(found),
            "registers": max(row["registers"] for row in found),
            "spill_bytes": max(row["spill_bytes"] for row in found),
            "spills": {row["kernel"]: row["spill_bytes"] for row in found if row["spill_bytes"]},
        }
        for (architecture, kernel), found in groups.items()
    ]
