"""The run on a GPU, rehearsed without one: steps, measuring and verdict, on emulated kernels and fake time."""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import __main__ as command_line
from benchmarks import cuda_timing, environment, harness, sru_cuda, sru_steps
from benchmarks.cuda_timing import GraphTimer
from benchmarks.sru_aims import judge
from scconv_deploy.errors import BuildError, MissingRuntimeError
from scconv_deploy.system.gpu import Gpu
from scconv_deploy.system.machine import Machine

ROOT = Path(__file__).parents[2]
L2 = 50 << 20


class FakeTimer:
    """Runs every variant but torch.compile's once, and answers with given seconds."""

    l2_bytes = 1000

    def __init__(self, seconds, errors=None):
        self.seconds, self.errors = seconds, errors or {}

    def measure(self, calls, x):
        for name, call in calls.items():
            if name != sru_cuda.COMPILED:
                assert call(x).shape == x.shape
        known = {name: self.seconds.get(name, 1e-3) for name in calls if name not in self.errors}
        return {name: [each, each * 1.1] for name, each in known.items()}, self.errors


@pytest.fixture
def options(monkeypatch, tmp_path):
    monkeypatch.setattr(harness, "RESULTS", tmp_path)
    monkeypatch.setattr(sru_cuda, "SIZES", ((32, 4), (64, 5)))
    return argparse.Namespace(batches="2,1", types="fp32,fp16,bf16", seed=0, rounds=2, results="sru_cuda",
                              budget_s=float("inf"))  # fmt: skip


FAST = {"copy": 9e-4, "PyTorch eager": 2e-2, "torch.compile": 3e-3}


def test_the_whole_run_writes_its_file_and_its_verdict(emulated, options, tmp_path, capsys):
    step = sru_steps.Step("kernels", "passed", "sm_90")
    status = sru_cuda.measure(emulated, FakeTimer(FAST), options, [step], time.monotonic(), "cpu")
    document = json.loads((tmp_path / "sru_cuda.json").read_text())
    assert document["steps"] == [{"name": "kernels", "verdict": "passed", "found": "sm_90"}]
    rows = document["rows"]
    assert len(rows) == 2 * 2 * 3 * 6  # batches, sizes, types, variants
    fused = [row for row in rows if row["variant"].startswith("fused")]
    assert {row["unexplained"] for row in fused} == {0}
    assert all(row["relative_l2"] <= row["tolerance"] for row in fused)
    assert {row["algorithm"] for row in fused} == {"on_chip", "split"}
    one = next(row for row in fused if row["variant"] == "fused, auto")
    assert (one["shape"], one["type"], one["bytes"]) == ("2x32x4x4", "fp32", 2 * 32 * 16 * 4)
    assert (one["median_us"], one["of_copy"], one["speedup_eager"], one["speedup_compile"]) == (1050, 0.9, 20.0, 3.0)
    assert one["gb_per_s"] == pytest.approx(2 * one["bytes"] / 1.05e-3 / 1e9, abs=0.1)
    assert document["metadata"]["l2_bytes"] == 1000
    verdicts = {each["aim"]: each["verdict"] for each in document["verdicts"]}
    assert list(verdicts.values()) == ["passed", "passed", "not run", "not run", "passed"]  # no headline among these
    assert status == 0
    printed = capsys.readouterr().out
    assert printed.count("| shape | type |") == 1  # the table once, at the end
    assert "passed   batch 1 no slower than torch.compile: 3.00 at least" in printed


def test_without_torch_compile_the_run_goes_on_and_judges_nothing_by_it(emulated, options, tmp_path):
    timer = FakeTimer(FAST, {"torch.compile": "Cannot find a working triton installation"})
    options.types = "fp16"
    assert sru_cuda.measure(emulated, timer, options, [], time.monotonic(), "cpu") == 0
    document = json.loads((tmp_path / "sru_cuda.json").read_text())
    errors = [row["error"] for row in document["rows"] if row["variant"] == "torch.compile"]
    assert errors == ["Cannot find a working triton installation"] * 4
    assert not any("speedup_compile" in row for row in document["rows"])
    assert [each["verdict"] for each in document["verdicts"]] == ["passed", "passed", "not run", "not run", "not run"]


def test_wrong_numbers_and_slow_ones_are_exit_1(emulated, options, monkeypatch, tmp_path):
    options.types, options.batches = "fp32", "1"
    slow = FAST | {"copy": 1e-4}
    assert sru_cuda.measure(emulated, FakeTimer(slow), options, [], time.monotonic(), "cpu") == 1
    failed = sru_steps.Step("memcheck", "failed", "1 error")
    assert sru_cuda.measure(emulated, FakeTimer(FAST), options, [failed], time.monotonic(), "cpu") == 1
    right = emulated.sru
    monkeypatch.setattr(emulated, "sru", lambda x, *rest: right(x, *rest).mul_(1.01))
    assert sru_cuda.measure(emulated, FakeTimer(FAST), options, [], time.monotonic(), "cpu") == 1
    document = json.loads((tmp_path / "sru_cuda.json").read_text())
    assert document["verdicts"][0]["verdict"] == "failed"
    assert "relative L2 1.0e-02 in 1x32x4x4 fp32" in document["verdicts"][0]["found"]


def test_a_budget_that_is_used_up_keeps_what_was_measured(emulated, options, tmp_path, capsys):
    options.budget_s = 1.0
    started = time.monotonic()
    clock = iter([started, started + 0.5, *[started + 2] * 99])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sru_cuda.time, "monotonic", lambda: next(clock))
        sru_cuda.measure(emulated, FakeTimer(FAST), options, [], started, "cpu")
    assert len(json.loads((tmp_path / "sru_cuda.json").read_text())["rows"]) == 2 * 6
    assert "10 of 12 sizes were not measured" in capsys.readouterr().out


# --- the verdict ---

ROW = {"shape": "64x256x56x56", "type": "fp16", "variant": "fused, auto", "algorithm": "on_chip", "bytes": 103 << 20,
       "of_copy": 0.9, "speedup_eager": 16.0, "speedup_compile": 2.5, "unexplained": 0, "relative_l2": 1e-4,
       "tolerance": 1e-3}  # fmt: skip
SINGLE = ROW | {"shape": "1x64x56x56", "bytes": 1 << 20, "of_copy": 0.2, "speedup_compile": 1.2}


@pytest.mark.parametrize(
    ("change", "failed"),
    [
        ({}, []),
        ({"unexplained": 1}, ["no gate"]),
        ({"relative_l2": float("nan")}, ["no gate"]),
        ({"error": "an illegal memory access"}, ["no gate"]),
        ({"of_copy": 0.84}, ["at least 85%"]),
        ({"of_copy": 0.84, "algorithm": "split"}, []),
        ({"of_copy": 0.84, "bytes": L2}, []),
        ({"speedup_compile": 1.99}, ["at least 2x"]),
        ({"speedup_eager": 14.9}, ["at least 15x"]),
        ({"variant": "fused, split", "speedup_eager": 1.0}, []),
    ],
)
def test_each_aim_fails_alone(change, failed):
    verdicts = judge([ROW | change, SINGLE], L2)
    assert [each.aim[: len(failed[0])] for each in verdicts if each.verdict == "failed"] == failed if failed else True
    assert len([each for each in verdicts if each.verdict == "failed"]) == len(failed)


def test_batch_1_is_held_against_torch_compile_everywhere():
    slow = SINGLE | {"type": "bf16", "speedup_compile": 0.9}
    verdict = judge([ROW, SINGLE, slow], L2)[-1]
    assert (verdict.verdict, verdict.found[:40]) == ("failed", "0.90 at least, 1x64x56x56 bf16 (fused, a")
    missing = {key: value for key, value in slow.items() if key != "speedup_compile"}
    assert judge([ROW, SINGLE, missing], L2)[-1].verdict == "not run"
    assert [each.verdict for each in judge([], L2)] == ["not run"] * 5


# --- the timer, on a CUDA that only counts ---


class FakeGraph:
    def __init__(self):
        self.replays = 0

    def replay(self):
        self.replays += 1


@pytest.fixture
def cuda(monkeypatch):
    graphs = []
    stream = SimpleNamespace(wait_stream=lambda other: None, synchronize=lambda: None)

    def graph():
        graphs.append(FakeGraph())
        return graphs[-1]

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            pass

        def synchronize(self):
            pass

        def elapsed_time(self, end):
            return 40.0  # milliseconds

    fakes = {
        "get_device_properties": lambda device: SimpleNamespace(L2_cache_size=4096),
        "Stream": lambda: stream,
        "current_stream": lambda: stream,
        "stream": lambda stream: contextlib.nullcontext(),
        "CUDAGraph": graph,
        "graph": lambda graph: contextlib.nullcontext(),
        "Event": Event,
        "synchronize": lambda: None,
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    return graphs


def test_the_timer_divides_by_the_calls_of_a_graph_and_skips_what_cannot_run(cuda):
    x, seen = torch.zeros(256), []  # 1 KB: sixteen of them exceed an L2 of 4 KB four times

    def fails(data):
        raise RuntimeError("no compiler\nmore")

    seconds, errors = GraphTimer(rounds=3).measure({"one": lambda data: seen.append(data), "two": fails}, x)
    assert GraphTimer(3).inputs(x) == 16
    assert GraphTimer(3).inputs(torch.zeros(1 << 20)) == 1
    assert seconds == {"one": [40e-3 / 32] * 3}
    assert errors == {"two": "no compiler"}
    assert len(seen) == 3 + 32  # warm-up, and 16 inputs twice
    assert len({data.data_ptr() for data in seen}) == 16
    assert cuda[0].replays == 6


def test_a_device_that_no_longer_answers_ends_the_run(cuda, monkeypatch):
    def broken():
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "synchronize", broken)

    def fails(data):
        raise RuntimeError("illegal")

    assert not cuda_timing.usable()
    with pytest.raises(RuntimeError, match="illegal"):
        GraphTimer(1).measure({"one": fails}, torch.zeros(4))


# --- the steps ---


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """A machine with a compute-sanitizer and headers; builds and tests are recorded."""
    (tmp_path / "NvInfer.h").touch()
    (tmp_path / "NvInferVersion.h").write_text("#define NV_TENSORRT_MAJOR 10\n")
    built = SimpleNamespace(architectures=("90",), cuda="13.0.88", tensorrt="10.3.0", path=tmp_path / "x.so")
    monkeypatch.setattr(sru_steps, "build", lambda request, machine: built)
    monkeypatch.setattr(sru_steps, "check_plugin", lambda path, machine: SimpleNamespace(failures=()))
    tool = tmp_path / "compute-sanitizer"
    which = {"compute-sanitizer": str(tool)}.get
    return Machine(which=which, environ={"TENSORRT_INCLUDE_DIR": str(tmp_path)}, root=tmp_path, site_packages=())


def sanitizer(machine, script):
    tool = machine.root / "compute-sanitizer"
    tool.write_text(f"#!/bin/sh\n{script}\n")
    tool.chmod(0o755)


def test_every_step_is_reported(machine, monkeypatch):
    sanitizer(machine, 'echo "12 passed in 3 s"; echo "========= ERROR SUMMARY: 0 errors"')
    run, asked = sru_steps._run, []

    def recorded(command, environment, timeout_s):
        asked.append((command, environment))
        return (0, ["= 700 passed, 3 skipped in 60 s ="]) if command[0] == sys.executable else run(
            command, environment, timeout_s)  # fmt: skip

    monkeypatch.setattr(sru_steps, "_run", recorded)
    found = {step.name: (step.verdict, step.found) for step in sru_steps.steps(60, machine)}
    assert found == {
        "kernels": ("passed", "sm_90, CUDA 13.0.88"),
        "plugin": ("passed", "TensorRT 10.3.0"),
        "tests on the GPU": ("passed", "700 passed, 3 skipped in 60 s"),
        **dict.fromkeys(sru_steps.SANITIZER_TOOLS, ("passed", "ERROR SUMMARY: 0 errors; 12 passed in 3 s")),
    }
    assert asked[1][1] == {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}


@pytest.mark.parametrize(
    ("script", "verdict", "found"),
    [
        ('echo "12 passed"; echo "= ERROR SUMMARY: 2 errors"; exit 9', "failed", "ERROR SUMMARY: 2 errors; 12 passed"),
        ('echo "12 skipped"; exit 0', "failed", "12 skipped; no test passed"),
        ("exit 1", "failed", "no output; no test passed"),
        ("sleep 60 & sleep 60", "not run", "did not end in 1 s"),  # with a child that keeps the pipe
    ],
)
def test_a_sanitizer_that_finds_something_or_did_not_look(machine, script, verdict, found):
    sanitizer(machine, script)
    start = time.monotonic()
    step = sru_steps._sanitize(str(machine.root / "compute-sanitizer"), "memcheck", 1)
    assert (step.verdict, step.found) == (verdict, found)
    assert time.monotonic() - start < 30


def test_tests_that_fail_are_named_and_a_failed_build_does_not_end_the_steps(machine, monkeypatch):
    def broken(request, machine):
        raise BuildError("nvcc could not build the fused SRU: x.", "Check.")

    monkeypatch.setattr(sru_steps, "build", broken)
    lines = ["FAILED tests/trt_plugins/test_kernels.py::one", "= 1 failed, 5 passed in 1 s ="]
    monkeypatch.setattr(sru_steps, "_run", lambda *rest: (1, lines))
    bare = Machine(which=lambda name: None, environ={}, root=machine.root / "no", site_packages=())
    found = {step.name: (step.verdict, step.found) for step in sru_steps.steps(60, bare)}
    assert found["kernels"] == ("failed", "nvcc could not build the fused SRU: x. Check.")
    assert found["plugin"][0] == "not run"
    assert found["tests on the GPU"] == ("failed", f"1 failed, 5 passed in 1 s; {lines[0]}")
    assert found["memcheck"] == (
        "not run", "compute-sanitizer was not found (CUDA toolkit, or cuda-toolkit[sanitizer])"
    )  # fmt: skip


def test_the_sanitized_tests_exist():
    """The expression selects tests on the GPU; one that selects none would pass unseen."""
    command = sru_steps.sanitizer_command("compute-sanitizer", "memcheck")
    pytest_part = command[command.index(sys.executable) :]
    done = subprocess.run([*pytest_part, "--collect-only"], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stdout
    selected = {line.split("::")[1].split("[")[0] for line in done.stdout.splitlines() if "::" in line}
    assert len(selected) == 4
    assert not any("emulated" in line for line in done.stdout.splitlines())


# --- the command ---


def test_without_a_gpu_it_says_so(monkeypatch, capsys):
    monkeypatch.setattr(sru_cuda, "gpus", lambda: ())
    assert command_line.main(["sru_cuda", "--everything"]) == 0
    assert capsys.readouterr().out == "not run: the driver lists no CUDA GPU\n"


def test_what_a_gpus_machine_lacks_is_named_with_where_it_comes_from(monkeypatch, capsys):
    monkeypatch.setattr(sru_cuda, "gpus", lambda: (Gpu("H200", "9.0"),))
    monkeypatch.setattr(sru_cuda, "driver_cuda", lambda: (12, 8))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    assert command_line.main(["sru_cuda", "--everything"]) == 3
    said = capsys.readouterr().out
    assert "a build without CUDA, cannot use the GPU (the driver knows CUDA 12.8): pip install torch" in said
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(sru_cuda, "find_nvcc", lambda machine: None)
    assert command_line.main(["sru_cuda", "--everything"]) == 3
    assert capsys.readouterr().out == "not run: nvcc was not found (pip install 'scconv-deploy[cuda]')\n"
    monkeypatch.setattr(sru_cuda, "find_nvcc", lambda machine: "nvcc")

    def refused(request):
        raise MissingRuntimeError("nvcc is of CUDA 13.0.88, the driver knows CUDA 12.8.", "Update the driver.")

    monkeypatch.setattr(sru_cuda, "build", refused)
    assert command_line.main(["sru_cuda"]) == 3
    assert capsys.readouterr().out == (
        "failed: nvcc is of CUDA 13.0.88, the driver knows CUDA 12.8. Update the driver.\n"
    )


def test_a_package_that_is_missing_is_named(monkeypatch, capsys):
    def missing(name):
        raise ModuleNotFoundError("No module named 'torch'", name="torch")

    monkeypatch.setattr(command_line.importlib, "import_module", missing)
    assert command_line.main(["sru_cuda"]) == 3
    assert capsys.readouterr().out == "not run: sru_cuda needs torch: pip install -e '.[test]', or torch alone\n"


def test_a_machine_without_git_gives_no_commit(monkeypatch):
    monkeypatch.setattr(environment.shutil, "which", lambda name: None)
    assert environment.metadata()["commit"] == "unknown"


def test_with_a_gpu_everything_runs_in_order(emulated, options, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(sru_cuda, "gpus", lambda: (Gpu("H200", "9.0"),))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(sru_cuda, "find_nvcc", lambda machine: "nvcc")
    monkeypatch.setattr(sru_cuda, "build", lambda request: SimpleNamespace(path=tmp_path / "x.so"))
    monkeypatch.setattr(sru_cuda, "load", lambda path: emulated)
    monkeypatch.setattr(sru_cuda, "GraphTimer", lambda rounds: FakeTimer(FAST))
    steps = [sru_steps.Step("kernels", "passed", "sm_90"), sru_steps.Step("plugin", "not run", "no headers")]
    monkeypatch.setattr(sru_steps, "steps", lambda timeout_s: iter(steps))
    measure = sru_cuda.measure
    monkeypatch.setattr(sru_cuda, "measure", lambda *rest: measure(*rest[:-1], "cpu"))
    status = command_line.main(["sru_cuda", "--everything", "--batches", "1", "--types", "fp16", "--results", "mine"])
    assert status == 0
    assert json.loads((tmp_path / "mine.json").read_text())["steps"][1]["verdict"] == "not run"
    assert capsys.readouterr().out.startswith("passed   kernels: sm_90\nnot run  plugin: no headers\n")


FEW = """
import importlib.abc, sys
class Missing(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {missing!r}:
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Missing())
import benchmarks.sru_cuda, pytest
sys.exit(pytest.main(["-q", "--collect-only", "-p", "no:hypothesispytest", "-p", "no:cacheprovider", "-m", "gpu",
                      *benchmarks.sru_steps.GPU_TESTS]))
"""
MISSING = (
    "onnx", "onnx_ir", "onnxscript", "onnxruntime", "onnxsim", "onnxslim", "typer", "rich", "sklearn", "PIL", "scipy",
    "hypothesis", "jsonschema", "safetensors", "matplotlib", "tensorrt_rtx", "jinja2", "ml_dtypes",
)  # fmt: skip


def test_a_gpus_machine_needs_pytorch_numpy_packaging_and_pytest_alone():
    done = subprocess.run([sys.executable, "-c", FEW.format(missing=MISSING)], capture_output=True, text=True, cwd=ROOT,
                          check=False)  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert environment._version("a-package-that-is-not-there") is None
    collected = {line.split("::")[0] for line in done.stdout.splitlines() if "::" in line}
    assert collected == set(sru_steps.GPU_TESTS)


def test_every_test_on_a_gpu_is_among_those_that_the_run_starts():
    folder = ROOT / "tests" / "trt_plugins"
    marked = {
        path for path in folder.glob("test_*.py") if "mark.gpu" in path.read_text() or "ON_A_GPU" in path.read_text()
    }
    marked |= {path for path in folder.glob("test_*.py") if "BACKENDS" in path.read_text()}
    assert marked - {Path(__file__)} == {ROOT / name for name in sru_steps.GPU_TESTS}
