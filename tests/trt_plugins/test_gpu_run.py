"""The run on a GPU, rehearsed without one: the command's two parts with scripts in Python's and the tools' places."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import __main__ as command_line
from benchmarks import environment, harness, sru_cuda, sru_steps
from benchmarks.sru_aims import HEADLINE
from benchmarks.sru_times import cases
from scconv_deploy.errors import BuildError, IntegrityError
from scconv_deploy.system.environment import sha256_of
from scconv_deploy.system.gpu import Gpu

ROOT = Path(__file__).parents[2]
FUSED = {"algorithm": "on_chip", "unexplained": 0, "relative_l2": 1e-7, "tolerance": 1e-6}
TIMES = {"median_us": 50.0, "of_copy": 0.9, "speedup_eager": 13.0, "speedup_compile": 2.5}


def rows_of(case):
    shared = {"shape": case.size, "type": case.type, "layout": case.layout, "bytes": case.bytes}
    return [shared | {"variant": "fused, auto"} | TIMES | FUSED, shared | {"variant": "copy", "median_us": 45.0}]


ROWS = [row for case in cases() for row in rows_of(case)]


class Rehearsal:
    """A machine whose GPU, library and child processes are stand-ins.

    What a child does is a line of shell: ``pytest``, ``compile`` ($6 is the folder of notes), ``times``, and the tools.
    """

    def __init__(self, monkeypatch, folder: Path) -> None:
        self.folder, self.library = folder, folder / "kernels.so"
        self.library.write_bytes(b"kernels")
        (folder / "rows").write_text("".join(f"{json.dumps(row)}\n" for row in ROWS))
        (folder / "cases").write_text("".join(f"{case}\n" for case in cases()))
        self.children = {
            "pytest": 'echo "= 390 passed in 60 s ="',
            "compile": f'while read -r name; do : > "$6/$name.txt"; done < {folder}/cases',
            "times": f"""echo '{{"device": {{"multiprocessors": 132}}}}'; echo noise; cat {folder}/rows""",
            "compute-sanitizer": "echo '126 of 126 calls right'; echo '========= ERROR SUMMARY: 0 errors'",
            "ncu": "echo '==ERROR== Failed to initialize the profiler: LibraryNotLoaded'; exit 1",
        }
        monkeypatch.setattr(harness, "RESULTS", folder)
        monkeypatch.setattr(sys, "executable", str(folder / "python"))
        monkeypatch.setattr(sru_cuda, "gpus", lambda: (Gpu("NVIDIA H200", "9.0"),))
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(sru_cuda, "read_library", lambda path: SimpleNamespace(cubins=("9.0",)))
        monkeypatch.setattr(sru_cuda, "SruLibrary", lambda path: None)
        monkeypatch.setattr(sru_steps, "find_cuda_tool", lambda name, machine: str(folder / name))

    def __call__(self, part, *options) -> int:
        branches = {"pytest": "'-m pytest '*", "compile": "*--compile*", "times": "*sru_times*"}
        lines = "".join(f"{pattern}) {self.children[name]} ;;\n" for name, pattern in branches.items())
        self._script("python", f'case "$*" in\n{lines}esac')
        for name in ("compute-sanitizer", "ncu"):
            self._script(name, self.children[name])
        return command_line.main(["sru_cuda", part, "--library", str(self.library), *options])

    def _script(self, name, text) -> None:
        (self.folder / name).write_text(f"#!/bin/sh\n{text}\n")
        (self.folder / name).chmod(0o755)

    @property
    def document(self):
        return json.loads((self.folder / "sru_cuda.json").read_text())

    @property
    def steps(self):
        return {step["name"]: (step["verdict"], step["found"]) for step in self.document["steps"]}

    @property
    def verdicts(self):
        return [each["verdict"] for each in self.document["verdicts"]]


@pytest.fixture
def rehearsal(monkeypatch, tmp_path) -> Rehearsal:
    return Rehearsal(monkeypatch, tmp_path)


# --- measure ---


def test_measure_runs_the_tests_then_times_and_writes_its_verdict(rehearsal, capsys):
    assert rehearsal("measure") == 0
    assert list(rehearsal.steps) == ["tests on the GPU", "torch.compile, compiled ahead", "timing"]
    assert {verdict for verdict, _ in rehearsal.steps.values()} == {"passed"}
    assert rehearsal.steps["timing"][1] == f"{len(cases())} of {len(cases())} cases"
    assert rehearsal.document["rows"] == ROWS
    assert rehearsal.verdicts == ["passed"] * 5 + ["not run"]  # no sanitizer yet
    facts = rehearsal.document["metadata"]["measure"]
    assert (facts["library"], facts["compute_capability"], facts["multiprocessors"], facts["rounds"]) == (
        sha256_of(b"kernels"), "9.0", 132, 20,
    )  # fmt: skip
    printed = capsys.readouterr().out
    assert printed.startswith("passed   tests on the GPU: 390 passed in 60 s\n")
    assert printed.count("| shape | type |") == 1
    assert "passed   at least 85% of the copy's bandwidth at 64x256x56x56 and 64x512x28x28: 0.90 at least" in printed


def test_measure_keeps_to_its_budget_and_keeps_what_it_has(rehearsal):
    """Everything hangs: the tests, the compilers and, after four cases, the timing."""
    rehearsal.children |= {
        "pytest": "echo '.. [ 1%]'; sleep 60",
        "compile": 'printf broken > "$6/64x256x56x56 fp16 NCHW.txt"; sleep 60',
        "times": f"""head -n 8 {rehearsal.folder}/rows; printf '{{"shape": "64x2'; sleep 60 & sleep 60""",
    }
    start = time.monotonic()
    assert rehearsal("measure", "--budget-s", "5") == 0
    assert 4 < time.monotonic() - start < 15
    assert rehearsal.steps == {
        "tests on the GPU": ("not run", "did not end in 2 s: 2 had passed, 0 failed"),
        "torch.compile, compiled ahead": ("not run", f"0 of {len(cases())} cases by {processes()} processes; broken"),
        "timing": ("not run", f"4 of {len(cases())} cases, then the budget of 5 s was used up"),
    }
    assert rehearsal.document["rows"] == ROWS[:8]
    assert rehearsal.verdicts == ["passed"] * 4 + ["not run"] * 2  # four cases: the headline in NCHW


def processes() -> int:
    return max(1, (sru_cuda.os.cpu_count() or 1) // 2)


def test_the_compilers_share_the_cases_and_a_cache_with_the_timing(rehearsal, monkeypatch):
    monkeypatch.setattr(sru_cuda.os, "cpu_count", lambda: 6)
    seen = rehearsal.folder / "seen"
    for name in ("compile", "times"):
        rehearsal.children[name] += f'; echo "$TORCHINDUCTOR_CACHE_DIR $TORCHINDUCTOR_COMPILE_THREADS $*" >> {seen}'
    assert rehearsal("measure", "--seed", "7") == 0
    lines = [line.split() for line in seen.read_text().splitlines()]
    assert {line[0] for line in lines} == {lines[0][0]}
    assert {line[1] for line in lines} == {"1"}
    assert sorted(line[-1] for line in lines[:3]) == ["0/3", "1/3", "2/3"]
    assert lines[3][-2:] == ["--rounds", "20"]
    assert all(line[line.index("--seed") + 1] == "7" for line in lines)
    assert not Path(lines[0][0]).parent.exists()


@pytest.mark.parametrize(
    ("child", "text", "step", "found"),
    [
        ("pytest", "echo '= 1 failed, 5 passed ='; exit 1", "tests on the GPU", "1 failed, 5 passed"),
        ("times", "echo 'RuntimeError: x'; exit 1", "timing", f"0 of {len(cases())} cases, then exit status 1: "
                                                              "RuntimeError: x"),
    ],
)  # fmt: skip
def test_what_fails_is_exit_1_and_the_rest_runs(rehearsal, child, text, step, found):
    rehearsal.children[child] = text
    assert rehearsal("measure") == 1
    assert rehearsal.steps[step] == ("failed", found)
    assert len(rehearsal.steps) == 3


def test_a_missed_aim_is_exit_1(rehearsal):
    rows = [row | ({"of_copy": 0.8} if row["shape"] == HEADLINE[1] else {}) for row in ROWS]
    (rehearsal.folder / "rows").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    assert rehearsal("measure") == 1
    assert rehearsal.verdicts == ["passed", "failed", "passed", "passed", "passed", "not run"]


WRITER = """
import sys
from pathlib import Path
from benchmarks.sru_cuda import Record
from tests.trt_plugins.test_gpu_run import ROWS
record = Record(Path(sys.argv[1]), "measure", Path(sys.argv[1]))
for number in range(10**6):
    record.row(ROWS[number % len(ROWS)] | {"number": number})
    print(number, flush=True)
"""


def test_the_file_is_whole_at_every_moment_also_after_a_kill(tmp_path):
    path = tmp_path / "results.json"
    writer = subprocess.Popen([sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    try:
        seen = -1
        for line in writer.stdout:
            rows = json.loads(path.read_text())["rows"]
            assert len(rows) > int(line)
            assert [row["number"] for row in rows] == list(range(len(rows)))
            seen = int(line)
            if seen >= 150:
                break
    finally:
        writer.send_signal(signal.SIGKILL)
        writer.wait()
    document = json.loads(path.read_text())
    assert len(document["rows"]) > seen
    assert len(document["verdicts"]) == 6


# --- inspect ---


def test_inspect_adds_to_what_measure_wrote(rehearsal):
    rehearsal("measure")
    before = rehearsal.document
    assert rehearsal("inspect") == 0
    after = rehearsal.document
    assert after["rows"] == before["rows"]
    assert after["steps"][:3] == before["steps"]
    assert after["metadata"]["measure"] == before["metadata"]["measure"]
    assert after["metadata"]["inspect"]["library"] == sha256_of(b"kernels")
    assert rehearsal.steps["Nsight Compute"] == (
        "not run",
        "ERROR== Failed to initialize the profiler: LibraryNotLoaded",
    )
    assert list(rehearsal.steps)[3:] == list(sru_cuda.TOOLS)
    assert rehearsal.verdicts == ["passed"] * 6


def test_inspect_again_replaces_its_own_steps(rehearsal):
    rehearsal.children["compute-sanitizer"] = "echo '========= Error: Device not supported'; exit 1"
    assert rehearsal("inspect") == 0
    assert rehearsal.steps["memcheck"] == ("not run", "Error: Device not supported")
    rehearsal.children["compute-sanitizer"] = "echo '========= ERROR SUMMARY: 3 errors'; exit 9"
    assert rehearsal("inspect") == 1
    assert rehearsal.steps["memcheck"] == ("failed", "ERROR SUMMARY: 3 errors")
    assert len(rehearsal.steps) == len(sru_cuda.TOOLS)
    assert rehearsal.verdicts == ["not run"] * 5 + ["failed"]


def test_inspect_shares_its_budget_and_hands_on_what_is_left(rehearsal, monkeypatch):
    given, now = {}, [0.0]

    def take(name, timeout_s):
        given[name] = round(timeout_s)
        now[0] += 10  # of whatever it was given

    def sanitize(tool, library, timeout_s, machine):
        take(tool, timeout_s)
        return sru_cuda.Step(tool, "passed", "")

    def profile(library, seed, timeout_s, machine):
        take(sru_steps.NCU, timeout_s)
        return sru_cuda.Step(sru_steps.NCU, "passed", ""), [{"kernels": 1}]

    monkeypatch.setattr(sru_cuda.budget.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(sru_steps, "sanitize", sanitize)
    monkeypatch.setattr(sru_steps, "profile", profile)
    assert rehearsal("inspect") == 0
    assert given == {"memcheck": 60, "racecheck": 77, "Nsight Compute": 110, "synccheck": 105, "initcheck": 200}
    assert rehearsal.document["profile"] == [{"kernels": 1}]


def test_inspect_does_not_mix_libraries_and_measure_begins_anew(rehearsal, capsys):
    rehearsal("measure")
    before = rehearsal.document
    rehearsal.library.write_bytes(b"other kernels")
    capsys.readouterr()
    assert rehearsal("inspect") == 2
    path = rehearsal.folder / "sru_cuda.json"
    assert capsys.readouterr().out == (
        f"not run: {path} holds results of another library. Name another file: --results NAME\n"
    )
    assert rehearsal.document == before
    assert rehearsal("measure") == 0
    assert rehearsal.document["metadata"]["measure"]["library"] == sha256_of(b"other kernels")
    for text in ("", "[]", "{}", '{"metadata": {"measure": {}}}'):
        path.write_text(text)
        assert rehearsal("inspect") == 2
        assert "holds no results of this benchmark" in capsys.readouterr().out
        assert path.read_text() == text


# --- the command ---


def test_without_a_gpu_it_says_so(monkeypatch, capsys):
    monkeypatch.setattr(sru_cuda, "gpus", lambda: ())
    for part in ("measure", "inspect"):
        assert command_line.main(["sru_cuda", part]) == 0
        assert capsys.readouterr().out == "not run: the driver lists no CUDA GPU\n"


def test_what_a_gpus_machine_lacks_is_named_with_where_it_comes_from(rehearsal, monkeypatch, capsys):
    def said(*options):
        status = command_line.main(["sru_cuda", "measure", *options])
        return status, capsys.readouterr().out

    assert said("--library", "nothing.so") == (2, "not run: nothing.so is no file. Name the kernels' library.\n")
    monkeypatch.setattr(sru_cuda, "read_library", lambda path: SimpleNamespace(cubins=("8.7", "8.9")))
    status, text = said("--library", str(rehearsal.library))
    assert (status, text) == (2, f"not run: {rehearsal.library} has machine code for 8.7, 8.9, the GPU is 9.0. "
                                 "scconv-deploy plugin build --kernels-only --arch 90 -o FILE\n")  # fmt: skip
    monkeypatch.setattr(sru_cuda, "find_nvcc", lambda machine: None)
    assert said() == (3, "not run: nvcc was not found. pip install 'scconv-deploy[cuda]', or name built kernels: "
                         "--library FILE\n")  # fmt: skip
    monkeypatch.setattr(sru_cuda, "find_nvcc", lambda machine: "nvcc")

    def broken(request):
        error = BuildError("nvcc could not build the fused SRU: x.", "Check.")
        error.details = "line 7: error"
        raise error

    monkeypatch.setattr(sru_cuda, "build", broken)
    assert said() == (BuildError.exit_code, "not run: nvcc could not build the fused SRU: x. Check.\nline 7: error\n")
    monkeypatch.setattr(sru_cuda, "driver_cuda", lambda: (12, 8))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    status, text = said()
    assert status == 3
    assert "a build without CUDA, cannot use the GPU (the driver knows CUDA 12.8). pip install torch" in text
    assert not (rehearsal.folder / "sru_cuda.json").exists()


def test_a_library_of_another_interface_is_refused_before_anything_runs(rehearsal, monkeypatch, capsys):
    def other(path):
        raise IntegrityError(f"{path} has interface version 1, expected 2.", "Build it: scconv-deploy plugin build")

    monkeypatch.setattr(sru_cuda, "SruLibrary", other)
    assert rehearsal("measure") == IntegrityError.exit_code
    assert "has interface version 1, expected 2." in capsys.readouterr().out


def test_without_a_library_it_is_built(rehearsal, monkeypatch):
    monkeypatch.setattr(sru_cuda, "find_nvcc", lambda machine: "nvcc")
    monkeypatch.setattr(sru_cuda, "build", lambda request: SimpleNamespace(path=rehearsal.library))
    assert sru_cuda._library(None) == rehearsal.library


def test_a_package_that_is_missing_is_named(monkeypatch, capsys):
    def missing(name):
        raise ModuleNotFoundError("No module named 'torch'", name="torch")

    monkeypatch.setattr(command_line.importlib, "import_module", missing)
    assert command_line.main(["sru_cuda", "measure"]) == 3
    assert capsys.readouterr().out == "not run: sru_cuda needs torch: pip install -e '.[test]', or torch alone\n"


def test_a_machine_without_git_gives_no_commit(monkeypatch):
    monkeypatch.setattr(environment.shutil, "which", lambda name: None)
    assert environment.metadata()["commit"] == "unknown"
    assert environment._version("a-package-that-is-not-there") is None
