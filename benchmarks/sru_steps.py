"""What comes before measuring the fused SRU on a GPU: build, the GPU tests, compute-sanitizer."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from scconv_deploy.errors import ScconvDeployError
from scconv_deploy.system.machine import Machine, find_cuda_tool, find_tensorrt_headers
from scconv_deploy.trt_plugins.build import BuildRequest, build
from scconv_deploy.trt_plugins.check import check_plugin

ROOT = Path(__file__).parent.parent
SANITIZER_TOOLS = ("memcheck", "racecheck", "synccheck")
GPU_TESTS = tuple(f"tests/trt_plugins/test_{name}.py" for name in ("kernels", "gpu", "harness"))
SANITIZED_TESTS = "every_tail or straddle or many_pieces or empty_batch"
_SANITIZER_ERROR = 9


@dataclass(frozen=True)
class Step:
    """One step and how it ended."""

    name: str
    verdict: Literal["passed", "failed", "not run"]
    found: str


def steps(timeout_s: float, machine: Machine | None = None) -> Iterator[Step]:
    """Each step as it ends; a failed one does not keep the next from running."""
    machine = machine or Machine()
    yield _build("kernels", BuildRequest(kernels_only=True), machine)
    if find_tensorrt_headers(machine) is None:
        yield Step("plugin", "not run", "TensorRT's headers were not found; set TENSORRT_INCLUDE_DIR")
    else:
        yield _build("plugin", BuildRequest(register=True), machine)
    yield _pytest("tests on the GPU", ["-m", "gpu", *GPU_TESTS], timeout_s)
    sanitizer = find_cuda_tool("compute-sanitizer", machine)
    for tool in SANITIZER_TOOLS:
        if sanitizer is None:
            yield Step(tool, "not run", "compute-sanitizer was not found (CUDA toolkit, or cuda-toolkit[sanitizer])")
        else:
            yield _sanitize(sanitizer, tool, timeout_s)


def _build(name: str, request: BuildRequest, machine: Machine) -> Step:
    try:
        result = build(request, machine=machine)
        if request.kernels_only:
            return Step(name, "passed", f"sm_{', sm_'.join(result.architectures)}, CUDA {result.cuda}")
        report = check_plugin(result.path, machine)
    except ScconvDeployError as error:
        return Step(name, "failed", str(error))
    found = "; ".join(f"{row.name}: {row.found}" for row in report.failures) or f"TensorRT {result.tensorrt}"
    return Step(name, "passed" if report else "failed", found)


def sanitizer_command(sanitizer: str, tool: str) -> list[str]:
    """Our kernels alone are instrumented; PyTorch's would take hours."""
    return [
        sanitizer, "--tool", tool, "--kernel-name", "kernel_substring=scconv", "--error-exitcode",
        str(_SANITIZER_ERROR), sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "gpu",
        GPU_TESTS[0], "-k", SANITIZED_TESTS,
    ]  # fmt: skip


def _sanitize(sanitizer: str, tool: str, timeout_s: float) -> Step:
    # without PyTorch's cache every tensor is an allocation of its own, whose end the tool knows
    environment = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    status, lines = _run(sanitizer_command(sanitizer, tool), environment, timeout_s)
    if status is None:
        return Step(tool, "not run", f"did not end in {timeout_s:.0f} s")
    summary = next((line for line in reversed(lines) if "SUMMARY" in line), lines[-1] if lines else "no output")
    tests = next((line for line in reversed(lines) if " passed" in line), None)
    verdict: Literal["passed", "failed"] = "passed" if status == 0 and tests else "failed"
    return Step(tool, verdict, f"{summary.strip('= ')}; {(tests or 'no test passed').strip('= ')}")


def _pytest(name: str, arguments: Sequence[str], timeout_s: float) -> Step:
    if importlib.util.find_spec("pytest") is None:
        return Step(name, "not run", "pytest is not installed")
    status, lines = _run([sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments], {}, timeout_s)
    if status is None:
        return Step(name, "not run", f"did not end in {timeout_s:.0f} s")
    failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    last = lines[-1].strip("= ") if lines else "no output"
    if status or " passed" not in last:
        return Step(name, "failed", "; ".join([last, *failed[:5]]))
    return Step(name, "passed", last)


def _run(command: Sequence[str], environment: Mapping[str, str], timeout_s: float) -> tuple[int | None, list[str]]:
    """Status and lines, also shown on stderr; None where it did not end."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT,
                               env=os.environ | environment, start_new_session=True)  # fmt: skip
    try:
        output, _ = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        # compute-sanitizer starts Python as a child, which would keep the GPU and the pipe
        os.killpg(process.pid, signal.SIGKILL)
        sys.stderr.write(process.communicate()[0])
        return None, []
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    sys.stderr.write(output)
    return process.returncode, [line for line in output.splitlines() if line.strip()]
