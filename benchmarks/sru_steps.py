"""What runs on a GPU beside the timing of the fused SRU: its tests, compute-sanitizer, Nsight Compute."""

from __future__ import annotations

import csv
import importlib.util
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.budget import run
from benchmarks.harness import Row
from benchmarks.sru_aims import Step
from benchmarks.sru_sweep import MARK, profiled
from scconv_deploy.system.machine import Machine, find_cuda_tool

GPU_TESTS = tuple(f"tests/trt_plugins/test_{name}.py" for name in ("kernels", "gpu", "harness"))
LIBRARY_VARIABLE = "SCCONV_SRU_LIBRARY"
"""The tests on a GPU take the library that it names, and need no nvcc."""
NCU = "Nsight Compute"
_TEST_PROCESSES = 8
_FOUND = 9
"""Exit status of compute-sanitizer where it found something."""
_REFUSED = re.compile(
    r"^=+ ?(?!Program hit)(?=[^ =]).*(not supported|unsupported|permission|ERR_NVGPUCTRPERM|insufficient|incompatible"
    r"|driver version|unable to|(failed|could not|cannot) (be |to )?(initialize|load|find|connect|inject|attach|launch)"
    r"|no kernels were profiled|before first instrumented)"
    r"|error while loading shared libraries|(unrecogni[sz]ed|unknown|invalid) option|argument for option .* is invalid",
    re.IGNORECASE,
)
"""What the tools say, after their '=====' or '==ERROR==', where the machine does not let them work. Indented lines are
frames of a stack."""
_FINDING = re.compile(r"^=+ (Invalid|Misaligned|Uninitialized|Barrier|.*\brace reported|.*\bhazard)", re.IGNORECASE)
_BYTES = ("dram__bytes_read.sum", "dram__bytes_write.sum")
_TIME = "gpu__time_duration.sum"


# --- the tests ---


def run_tests(library: Path, timeout_s: float) -> Step:
    """The tests on the GPU, in several processes where pytest-xdist is installed."""
    name = "tests on the GPU"
    if importlib.util.find_spec("pytest") is None:
        return Step(name, "not run", "pytest is not installed")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "gpu", *GPU_TESTS]
    if importlib.util.find_spec("xdist") is not None:
        command += ["-n", str(_TEST_PROCESSES), "--dist", "worksteal"]
    status, lines = run(command, timeout_s, {LIBRARY_VARIABLE: str(library.absolute())})
    if status is None:
        ended = "".join(line.split()[0] for line in lines if re.fullmatch(r"[.FEsxX]+( +\[ *\d+%\])?", line.strip()))
        bad = sum(ended.count(letter) for letter in "FE")
        found = f"did not end in {timeout_s:.0f} s: {ended.count('.')} had passed, {bad} failed"
        return Step(name, "failed" if bad else "not run", found)
    last = lines[-1].strip("= ") if lines else "no output"
    if status or " passed" not in last:
        failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
        return Step(name, "failed", "; ".join([last, *failed[:5]]))
    return Step(name, "passed", last)


# --- compute-sanitizer ---


def sanitize(tool: str, library: Path, timeout_s: float, machine: Machine) -> Step:
    """One tool of compute-sanitizer over the sweep; one that the machine refuses has not run."""
    sanitizer = find_cuda_tool("compute-sanitizer", machine)
    if sanitizer is None:
        return Step(tool, "not run", "compute-sanitizer was not found (CUDA toolkit, or cuda-toolkit[sanitizer])")
    # PyTorch asks for driver functions that this driver lacks; errors of our own calls are raised
    quiet = ["--report-api-errors", "no"] if tool == "memcheck" else []
    command = [sanitizer, "--tool", tool, *quiet, "--error-exitcode", str(_FOUND), *_sweep(library)]
    # without PyTorch's cache every tensor is an allocation of its own, whose end the tool knows
    try:
        status, lines = run(command, timeout_s, {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"})
    except OSError as error:
        return Step(tool, "not run", f"{sanitizer} cannot be run: {error.strerror}")
    if refused := _refusal(lines):
        return Step(tool, "not run", refused)
    summary = next((line.strip("= ") for line in reversed(lines) if "SUMMARY:" in line), "")
    calls = next((line for line in lines if line.endswith("calls right")), "")
    clean = re.search(r"SUMMARY: 0 (errors|hazards)", summary) is not None
    if status is None:
        finding = next((line.strip("= ") for line in lines if _FINDING.search(line)), "")
        late = f"did not end in {timeout_s:.0f} s"
        return Step(tool, "failed", f"{finding}; {late}") if finding else Step(tool, "not run", late)
    found = "; ".join(filter(None, (summary, calls))) or (lines[-1].strip("= ") if lines else "no output")
    return Step(tool, "passed" if status == 0 and clean and calls else "failed", found)


def _sweep(library: Path, *options: str) -> list[str]:
    return [sys.executable, "-m", "benchmarks.sru_sweep", "--library", str(library.absolute()), *options]


def _refusal(lines: Sequence[str]) -> str:
    return next((line.strip("= ") for line in lines if _REFUSED.search(line)), "")


# --- Nsight Compute ---


def profile(library: Path, seed: int, timeout_s: float, machine: Machine) -> tuple[Step, list[Row]]:
    """Bytes that the kernels move and the bandwidth that they reach at the headline's cases, by hardware counters."""
    ncu = find_cuda_tool("ncu", machine)
    if ncu is None:
        return Step(NCU, "not run", "ncu was not found (CUDA toolkit, or Nsight Compute)"), []
    command = [ncu, "--csv", "--page", "raw", "--print-units", "base", "--metrics", ",".join((*_BYTES, _TIME)),
               "--profile-from-start", "off", "--cache-control", "none", "--clock-control", "none",
               *_sweep(library, "--profile", "--seed", str(seed))]  # fmt: skip
    try:
        status, lines = run(command, timeout_s)
    except OSError as error:
        return Step(NCU, "not run", f"{ncu} cannot be run: {error.strerror}"), []
    if refused := _refusal(lines):
        return Step(NCU, "not run", refused), []
    if status is None:
        return Step(NCU, "not run", f"did not end in {timeout_s:.0f} s"), []
    rows = profile_rows(lines)
    if status or len(rows) < len(profiled()):
        found = f"{len(rows)} of {len(profiled())} cases, exit status {status}: {lines[-1] if lines else 'no output'}"
        return Step(NCU, "failed", found), rows
    most = max(rows, key=lambda row: row["of_least_bytes"])
    return Step(NCU, "passed", f"at most {most['of_least_bytes']:.2f}x the least bytes, {most['shape']} "
                                f"{most['type']} {most['layout']}"), rows  # fmt: skip


def profile_rows(lines: Sequence[str]) -> list[Row]:
    """Rows of the profiler's table: the kernels between two marks are one case's."""
    begin = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), len(lines))
    table = [line for line in lines[begin:] if line.startswith('"')]
    calls: list[list[dict[str, str]]] = []
    for kernel in csv.DictReader(table):
        if MARK in kernel["Kernel Name"]:
            calls.append([])
        elif kernel["ID"] and calls:  # the second line has the units
            calls[-1].append(kernel)
    rows = []
    for case, kernels in zip(profiled(), calls, strict=False):
        if not kernels:
            break
        moved, nanoseconds = (sum(_number(kernel[key]) for kernel in kernels for key in keys)
                              for keys in (_BYTES, (_TIME,)))  # fmt: skip
        least = 2 * case.bytes
        rows.append({
            "shape": case.size, "type": case.type, "layout": case.layout, "kernels": len(kernels),
            "dram_bytes": round(moved), "of_least_bytes": round(moved / least, 3),
            "us": round(nanoseconds / 1e3, 2), "dram_gb_per_s": round(moved / nanoseconds, 1),
        })  # fmt: skip
    return rows


def _number(text: str) -> float:
    return float(text.replace(",", ""))
