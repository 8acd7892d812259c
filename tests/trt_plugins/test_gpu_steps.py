"""Child processes with a limit, and what the tests, compute-sanitizer and Nsight Compute say, read without a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks import budget, sru_steps
from benchmarks.budget import Budget
from benchmarks.sru_sweep import profiled
from scconv_deploy.system.machine import Machine

ROOT = Path(__file__).parents[2]
LIBRARY = Path("libscconv_sru.so")


def script(path: Path, text: str) -> Path:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


# --- limits ---


def test_a_budget_is_counted_from_its_start(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(budget.time, "monotonic", lambda: now[0])
    limit = Budget(60)
    now[0] = 110.0
    assert (limit.left(), limit.left(0.5), limit.left(0.1)) == (50.0, 20.0, 0.0)
    now[0] = 200.0
    assert limit.left() == 0.0


def test_a_process_that_ends_gives_its_status_and_lines(capsys):
    seen = []
    assert budget.run(["sh", "-c", "echo one; echo; echo two >&2; exit 3"], 60, on_line=seen.append) == (
        3, ["one", "two"],
    )  # fmt: skip
    assert seen == ["one\n", "\n", "two\n"]
    assert budget.run(["sh", "-c", 'echo "$GREETING"'], 60, {"GREETING": "hello"}) == (0, ["hello"])
    assert capsys.readouterr().err == "hello\n"


def test_a_process_that_does_not_end_is_ended_with_its_children(tmp_path):
    """compute-sanitizer and ncu start Python as a child, which would keep the GPU and the pipe."""
    start, pid = time.monotonic(), tmp_path / "pid"
    status, lines = budget.run(["sh", "-c", f"echo one; sleep 60 & echo $! > {pid}; sleep 60"], 1)
    assert (status, lines) == (None, ["one"])
    assert time.monotonic() - start < 30
    for _ in range(100):
        stat = Path(f"/proc/{int(pid.read_text())}/stat")
        if not stat.exists() or stat.read_text().split()[2] == "Z":
            return
        time.sleep(0.1)
    pytest.fail("the child's child still runs")


# --- the tests on the GPU ---


@pytest.mark.parametrize(
    ("text", "verdict", "found"),
    [
        ('echo "= 390 passed, 8 skipped in 60 s ="', "passed", "390 passed, 8 skipped in 60 s"),
        ('echo "FAILED tests/x.py::one"; echo "= 1 failed, 5 passed in 1 s ="; exit 1', "failed",
         "1 failed, 5 passed in 1 s; FAILED tests/x.py::one"),
        ('echo "no tests ran"; exit 5', "failed", "no tests ran"),
        ('echo "8 workers [30 items]"; echo "....s.... [ 30%]"; echo "..."; sleep 60', "not run",
         "did not end in 1 s: 11 had passed, 0 failed"),
        ('echo "..F.E  [ 12%]"; sleep 60', "failed", "did not end in 1 s: 3 had passed, 2 failed"),
        ("exit 1", "failed", "no output"),
    ],
)  # fmt: skip
def test_the_tests_are_read(monkeypatch, tmp_path, text, verdict, found):
    monkeypatch.setattr(sys, "executable", str(script(tmp_path / "python", text)))
    step = sru_steps.run_tests(LIBRARY, 1)
    assert (step.verdict, step.found) == (verdict, found)


def test_the_tests_take_the_library_and_several_processes(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "executable", str(script(tmp_path / "python", 'echo "$SCCONV_SRU_LIBRARY $* 1 passed"')))
    found = sru_steps.run_tests(LIBRARY, 10).found
    assert found.startswith(f"{Path.cwd() / LIBRARY} -m pytest")
    assert "-n 8 --dist worksteal" in found
    monkeypatch.setattr(sru_steps.importlib.util, "find_spec", lambda name: None if name == "xdist" else name)
    assert "-n" not in sru_steps.run_tests(LIBRARY, 10).found.split()
    monkeypatch.setattr(sru_steps.importlib.util, "find_spec", lambda name: None)
    assert sru_steps.run_tests(LIBRARY, 10).found == "pytest is not installed"


def test_the_tests_run_the_library_that_the_variable_names(emulated_library, tmp_path):
    test = "def test_it(gpu_library):\n    assert gpu_library.path.name == 'libscconv_sru_emulated.so'\n"
    (tmp_path / "test_it.py").write_text(test)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "tests.trt_plugins.conftest", "-p", "no:cacheprovider",
               str(tmp_path / "test_it.py")]  # fmt: skip
    environment = os.environ | {sru_steps.LIBRARY_VARIABLE: str(emulated_library.path)}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, check=False)
    assert "1 passed" in done.stdout, done.stdout


# --- compute-sanitizer ---


@pytest.fixture
def machine(tmp_path) -> Machine:
    """Where scripts stand for the tools."""
    return Machine(which=lambda name: str(tmp_path / name) if (tmp_path / name).exists() else None,
                   environ={}, root=tmp_path / "no", site_packages=())  # fmt: skip


BANNER, CALLS = "echo '========= COMPUTE-SANITIZER'", "echo '126 of 126 calls right'"


@pytest.mark.parametrize(
    ("text", "verdict", "found"),
    [
        (f"{BANNER}; {CALLS}; echo '========= ERROR SUMMARY: 0 errors'", "passed",
         "ERROR SUMMARY: 0 errors; 126 of 126 calls right"),
        (f"{BANNER}; {CALLS}; echo '========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)'", "passed",
         "RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings); 126 of 126 calls right"),
        # a warning of racecheck is no error to its exit status
        (f"{CALLS}; echo '========= RACECHECK SUMMARY: 1 hazard displayed (0 errors, 1 warning)'", "failed",
         "RACECHECK SUMMARY: 1 hazard displayed (0 errors, 1 warning); 126 of 126 calls right"),
        (f"{CALLS}; echo '========= ERROR SUMMARY: 10 errors'; exit 9", "failed",
         "ERROR SUMMARY: 10 errors; 126 of 126 calls right"),
        ("echo '120 of 126 calls right'; echo '========= ERROR SUMMARY: 0 errors'; exit 1", "failed",
         "ERROR SUMMARY: 0 errors; 120 of 126 calls right"),
        ("echo 'Traceback'; echo '========= ERROR SUMMARY: 0 errors'; exit 1", "failed", "ERROR SUMMARY: 0 errors"),
        (CALLS, "failed", "126 of 126 calls right"),  # the tool did not look
        ("exit 1", "failed", "no output"),
        ("sleep 60 & sleep 60", "not run", "did not end in 1 s"),
        ("echo '========= Invalid __global__ write of size 4 bytes'; sleep 60", "failed",
         "Invalid __global__ write of size 4 bytes; did not end in 1 s"),
        ("echo '========= Error: Race reported between Write access at f+0x1'; sleep 60", "failed",
         "Error: Race reported between Write access at f+0x1; did not end in 1 s"),
    ],
)  # fmt: skip
def test_a_sanitizer_that_finds_something_or_did_not_look(machine, tmp_path, text, verdict, found):
    script(tmp_path / "compute-sanitizer", text)
    step = sru_steps.sanitize("memcheck", LIBRARY, 1, machine)
    assert (step.name, step.verdict, step.found) == ("memcheck", verdict, found)


REFUSALS = [
    '========= Error: Device not supported. Please refer to the "Supported Devices" section of the documentation',
    "========= Error: Insufficient permissions to debug the device",
    "========= Internal Sanitizer Error: The driver version is incompatible with this tool",
    "========= Unable to find injection library libsanitizer-collection.so",
    "========= Error: Failed to initialize the debugger",
    "========= Error: Target application terminated before first instrumented API call",
    "compute-sanitizer: error while loading shared libraries: libz.so.1: cannot open shared object file",
    "==ERROR== ERR_NVGPUCTRPERM - The user does not have permission to access NVIDIA GPU Performance Counters",
    "==ERROR== Failed to initialize the profiler: LibraryNotLoaded",
    "==ERROR== unrecognised option '--print-units'. Use --help for further details.",
    "==WARNING== No kernels were profiled.",
    "the argument for option '--tool' is invalid",
]


@pytest.mark.parametrize("line", REFUSALS)
def test_a_tool_that_the_machine_refuses_has_not_run(machine, tmp_path, line):
    """Although what it could not watch then goes wrong, and is counted as errors."""
    said = [line, "========= Program hit cudaErrorUnknown (error 999)", "========= ERROR SUMMARY: 2 errors"]
    for name in ("compute-sanitizer", "ncu"):
        script(tmp_path / name, "cat <<'END'\n" + "\n".join(said) + "\nEND\nexit 9")
    for step in (sru_steps.sanitize("racecheck", LIBRARY, 30, machine), sru_steps.profile(LIBRARY, 0, 30, machine)[0]):
        assert (step.verdict, step.found) == ("not run", line.strip("= "))


def test_what_a_sanitizer_finds_is_no_refusal(machine, tmp_path):
    """Frames and messages of a finding may hold the same words."""
    lines = [
        "========= Invalid __shared__ read of size 16 bytes",
        "=========     Host Frame: at::native::unsupported(insufficient) [0x1]",
        '========= Program hit cudaErrorNotSupported (error 801) due to "operation not supported" on CUDA API call',
        "========= ERROR SUMMARY: 1 error",
    ]
    script(tmp_path / "compute-sanitizer", "cat <<'END'\n" + "\n".join(lines) + "\nEND\nexit 9")
    assert sru_steps.sanitize("memcheck", LIBRARY, 30, machine).verdict == "failed"


def test_a_tool_that_is_missing_or_no_program_has_not_run(machine, tmp_path):
    assert sru_steps.sanitize("memcheck", LIBRARY, 1, machine).found == (
        "compute-sanitizer was not found (CUDA toolkit, or cuda-toolkit[sanitizer])"
    )
    assert sru_steps.profile(LIBRARY, 0, 1, machine)[0].found == "ncu was not found (CUDA toolkit, or Nsight Compute)"
    for name in ("compute-sanitizer", "ncu"):
        (tmp_path / name).write_bytes(b"\x7fELF of another machine")
        (tmp_path / name).chmod(0o755)
    for step in (sru_steps.sanitize("memcheck", LIBRARY, 1, machine), sru_steps.profile(LIBRARY, 0, 1, machine)[0]):
        assert (step.verdict, "cannot be run: Exec format error" in step.found) == ("not run", True)


@pytest.mark.parametrize(("tool", "more"), [("initcheck", ""), ("memcheck", "--report-api-errors no ")])
def test_the_sanitizer_watches_the_sweep(machine, tmp_path, tool, more):
    script(tmp_path / "compute-sanitizer", 'echo "$PYTORCH_NO_CUDA_MEMORY_CACHING $*"')
    found = sru_steps.sanitize(tool, LIBRARY, 30, machine).found
    assert found == (f"1 --tool {tool} {more}--error-exitcode 9 {sys.executable} -m benchmarks.sru_sweep --library "
                     f"{Path.cwd() / LIBRARY}")  # fmt: skip


# --- Nsight Compute ---

HEADER = '"ID","Process ID","Kernel Name","dram__bytes_read.sum","dram__bytes_write.sum","gpu__time_duration.sum"'
UNITS = '"","","","byte","byte","ns"'


def kernel(number, name, read="0", written="0", ns="0"):
    return f'"{number}","7","{name}","{read}","{written}","{ns}"'


def table(*kernels):
    return ["==PROF== Connected to process 7", HEADER, UNITS, *kernels, "==PROF== Disconnected from process 7"]


def test_the_kernels_between_two_marks_are_one_cases():
    first, second = profiled()[:2]
    rows = sru_steps.profile_rows(table(
        kernel(0, "spin_kernel(long)"), kernel(1, "void scconv::on_chip<T>(P)", "102,760,448", "102,760,448", "50,000"),
        kernel(2, "spin_kernel(long)"), kernel(3, "statistics", str(first.bytes), "1000", "60000"),
        kernel(4, "apply", str(second.bytes), str(second.bytes), "140000"),
    ))  # fmt: skip
    assert rows[0] == {
        "shape": "64x256x56x56", "type": "fp16", "layout": "NCHW", "kernels": 1, "dram_bytes": 205_520_896,
        "of_least_bytes": 1.0, "us": 50.0, "dram_gb_per_s": 4110.4,
    }  # fmt: skip
    moved = first.bytes + 1000 + 2 * second.bytes
    assert (rows[1]["type"], rows[1]["kernels"], rows[1]["us"]) == ("fp32", 2, 200.0)
    assert rows[1]["of_least_bytes"] == round(moved / (2 * second.bytes), 3)
    assert rows[1]["dram_gb_per_s"] == round(moved / 200_000, 1)
    assert sru_steps.profile_rows(["no table"]) == []


def test_a_profile_is_complete_or_says_so(machine, tmp_path):
    kernels = []
    for i, case in enumerate(profiled()):
        kernels += [kernel(2 * i, "spin_kernel"), kernel(2 * i + 1, "scconv", case.bytes, case.bytes + i, 1000)]

    def ncu(lines, status=0):
        script(tmp_path / "ncu", "cat <<'END'\n" + "\n".join(lines) + f"\nEND\nexit {status}")
        return sru_steps.profile(LIBRARY, 0, 30, machine)

    step, rows = ncu(table(*kernels))
    assert (step.verdict, len(rows)) == ("passed", 8)
    assert step.found == "at most 1.00x the least bytes, 64x256x56x56 fp16 NCHW"
    step, rows = ncu(table(*kernels[:6]), 1)
    assert (step.verdict, len(rows)) == ("failed", 3)
    assert step.found == "3 of 8 cases, exit status 1: ==PROF== Disconnected from process 7"
    script(tmp_path / "ncu", "sleep 60")
    assert sru_steps.profile(LIBRARY, 0, 1, machine)[0].found == "did not end in 1 s"


# --- the files that are named ---


def test_every_test_on_a_gpu_is_among_those_that_the_run_starts():
    folder = ROOT / "tests" / "trt_plugins"
    marks = ("pytest.mark.gpu", "ON_A_GPU", "BACKENDS", "gpu_library")
    marked = {path for path in folder.glob("test_*.py") if any(mark in path.read_text() for mark in marks)}
    assert marked - {Path(__file__)} == {ROOT / name for name in sru_steps.GPU_TESTS}


FEW = """
import importlib.abc, sys
class Missing(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {missing!r}:
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Missing())
import benchmarks.sru_cuda, benchmarks.sru_sweep, benchmarks.sru_times, pytest
sys.exit(pytest.main(["-q", "--collect-only", "-p", "no:hypothesispytest", "-p", "no:cacheprovider", "-p", "no:xdist",
                      "-m", "gpu", *benchmarks.sru_steps.GPU_TESTS]))
"""
MISSING = (
    "onnx", "onnx_ir", "onnxscript", "onnxruntime", "onnxsim", "onnxslim", "typer", "rich", "sklearn", "PIL", "scipy",
    "hypothesis", "jsonschema", "safetensors", "matplotlib", "tensorrt_rtx", "jinja2", "ml_dtypes", "xdist",
)  # fmt: skip


def test_a_gpus_machine_needs_pytorch_numpy_packaging_and_pytest_alone():
    done = subprocess.run([sys.executable, "-c", FEW.format(missing=MISSING)], capture_output=True, text=True, cwd=ROOT,
                          env=os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}, check=False)  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    collected = {line.split("::")[0] for line in done.stdout.splitlines() if "::" in line}
    assert collected == set(sru_steps.GPU_TESTS)
