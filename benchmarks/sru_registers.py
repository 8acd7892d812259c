"""Registers and spills of every CUDA kernel on every architecture: all ten compile here, warnings as errors.

No GPU is needed; the numbers are ptxas's. A kernel that spills keeps values in memory that belong in registers.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.harness import Row, write
from scconv_deploy.graph.contract import OPERATORS
from scconv_deploy.system.machine import Machine, find_nvcc
from scconv_deploy.trt_plugins.build import SOURCES

ARCHITECTURES = (75, 80, 86, 87, 89, 90, 100, 110, 120, 121)
TYPES = ("float", "half", "bfloat16")
_COLUMNS = {
    "architecture": "architecture",
    "kernel": "kernel",
    "instances": "instances",
    "most registers": "registers",
    "spilled bytes, most": "spill_bytes",
    "instances that spill": "spilling",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--arch", default=",".join(map(str, ARCHITECTURES)), help="compute capabilities, 75,80,...")


def run(options: argparse.Namespace) -> None:
    nvcc = find_nvcc(Machine())
    if nvcc is None:
        print("not run: nvcc was not found")
        return
    banner = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    release = re.search(r"V(\d+\.\d+\.\d+)", banner)
    instances = [
        row for architecture in options.arch.split(",") for name in TYPES for row in _compile(nvcc, architecture, name)
    ]
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in instances:
        groups.setdefault((row["architecture"], row["kernel"]), []).append(row)
    rows = [
        {
            "architecture": architecture,
            "kernel": kernel,
            "instances": len(found),
            "registers": max(row["registers"] for row in found),
            "spill_bytes": max(row["spill_bytes"] for row in found),
            "spilling": sum(row["spill_bytes"] > 0 for row in found),
            "spills": [row for row in found if row["spill_bytes"]],
        }
        for (architecture, kernel), found in groups.items()
    ]
    write(options.results, rows, _COLUMNS, cuda=release[1] if release else "unknown")


def _compile(nvcc: str, architecture: str, data_type: str) -> list[Row]:
    """What ptxas says of each kernel of a data type; ends the run where one does not compile."""
    with tempfile.TemporaryDirectory() as folder:
        command = [nvcc, "-std=c++17", "-O3", "-Werror", "all-warnings", "-Xptxas", "-v", "-cubin",
                   f"-arch=sm_{architecture}", str(SOURCES / "kernel" / f"sru_{data_type}.cu"),
                   "-o", str(Path(folder) / "out.cubin")]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"sm_{architecture}, {data_type}: {done.stderr}")
    entry = re.compile(
        r"Compiling entry function '(\w+)'.*?(\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) registers",
        re.DOTALL,
    )
    rows = []
    for symbol, stores, loads, registers in entry.findall(done.stderr):
        kernel = re.search(r"\d+([a-z_]+_kernel)", symbol)
        if kernel is None:
            sys.exit(f"a kernel of an unknown name: {symbol}")
        rows.append(
            {"architecture": f"sm_{architecture}", "kernel": kernel[1], "instance": _instance(symbol, data_type),
             "registers": int(registers), "spill_bytes": int(stores) + int(loads)}
        )  # fmt: skip
    return rows


def _instance(symbol: str, data_type: str) -> str:
    """``half, SRUNorm, 8 elements, rows`` of a mangled name."""
    operator, width, rows = (re.search(p, symbol) for p in (r"OperatorE(\d)", r"Li(\d+)E", r"Lb([01])E"))
    parts = [data_type]
    if operator:
        parts.append(OPERATORS[int(operator[1])])
    if width:
        parts.append(f"{width[1]} elements")
    if rows:
        parts.append("rows" if rows[1] == "1" else "any")
    return ", ".join(parts)
