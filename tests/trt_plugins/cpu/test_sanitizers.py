"""The CPU kernels under sanitizers: no access beyond a buffer, no undefined behaviour, no race."""

from __future__ import annotations

import subprocess
from pathlib import Path

from scconv_deploy.trt_plugins.cpu.build import CPU_SOURCES, WIDTHS, widths
from tests.trt_plugins.emulated import RACES

DRIVER = Path(__file__).with_name("sanitized.cpp")
RUNS = "126 runs\n"


def compiled(folder: Path, lanes: int, *flags: str) -> Path:
    """The driver with the kernels of one width."""
    program = folder / "sanitized"
    width = WIDTHS[f"width{lanes}.cpp"]
    command = ["g++", "-std=c++17", "-O1", "-g1", "-ffp-contract=off", *flags, *width, f"-DSCCONV_TEST_LANES={lanes}"]
    command += ["-Wall", "-Wextra", "-Werror", f"-I{CPU_SOURCES}", str(DRIVER), "-pthread", "-o", str(program)]
    subprocess.run(command, check=True, capture_output=True, text=True)
    return program


def test_memory_and_undefined_behaviour(memory_sanitizers, tmp_path):
    done = subprocess.run([compiled(tmp_path, 4, *memory_sanitizers)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, RUNS), done.stderr


def test_threads(races, cpu_library, tmp_path):
    lanes = 8 if cpu_library.lanes >= 8 and len(widths()) > 1 else 4
    done = races.run(compiled(tmp_path, lanes, *RACES))
    assert (done.returncode, done.stdout) == (0, RUNS), done.stderr
