"""The fused SRU on a GPU, in two parts that fit fifteen minutes together.

``measure``: the tests on the GPU, then the kernels beside a copy, eager PyTorch and torch.compile (sru_times.py).
``inspect``: compute-sanitizer and Nsight Compute (sru_steps.py); it adds to the file that ``measure`` wrote.

Each part keeps to its budget: whatever it starts is a child process with a limit. The results file is written whole
after every row and step, with the verdicts so far, so that a run that is cut off keeps what it had. The exit status is
1 when an aim or a step of the file failed, 2 or 3 when nothing could be run.

``--library`` names kernels that were built elsewhere (scconv-deploy plugin build --kernels-only --arch 90 -o FILE):
then no nvcc is needed.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks import budget, harness, sru_steps
from benchmarks.budget import Budget
from benchmarks.environment import metadata
from benchmarks.sru_aims import Step, Verdict, judge
from benchmarks.sru_times import SIZES, TYPES, cases, compile_error
from scconv_deploy.errors import MissingRuntimeError, ScconvDeployError, UsageError
from scconv_deploy.system.atomic import write_file
from scconv_deploy.system.environment import sha256_of
from scconv_deploy.system.gpu import driver_cuda, gpus
from scconv_deploy.system.machine import CUDA_WHEELS, Machine, find_nvcc
from scconv_deploy.trt_plugins.build import BuildRequest, build
from scconv_deploy.trt_plugins.elf import read_library
from scconv_deploy.trt_plugins.library import SruLibrary

BUDGETS_S = {"measure": 420.0, "inspect": 240.0}
TESTS_UNTIL, COMPILED_UNTIL = 0.4, 0.5
"""Shares of the budget; torch.compile's cases are compiled beside the tests, and timed when nothing else runs."""
TOOLS = {"memcheck": 2, "racecheck": 2, sru_steps.NCU: 2, "synccheck": 1, "initcheck": 1}
"""In their order, with their shares of the time; what one leaves goes to the next ones."""
COLUMNS = {
    "shape": "shape",
    "type": "type",
    "layout": "layout",
    "variant": "variant",
    "algorithm": "algorithm",
    "median": "median_us",
    "GB/s": "gb_per_s",
    "of the copy": "of_copy",
    "faster than eager": "speedup_eager",
    "faster than compile": "speedup_compile",
    "unexplained": "unexplained",
    "not run": "error",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("part", choices=BUDGETS_S)
    parser.add_argument("--library", type=Path, metavar="FILE", help="kernels built before (default: build them here)")
    parser.add_argument("--budget-s", type=float, help="seconds in all (default 420 for measure, 240 for inspect)")
    parser.add_argument("--rounds", type=int, default=20)


def run(options: argparse.Namespace) -> int:
    limit = Budget(options.budget_s or BUDGETS_S[options.part])
    if not gpus():
        print("not run: the driver lists no CUDA GPU")
        return 0
    try:
        library = _library(options.library)
        record = Record(harness.RESULTS / f"{options.results}.json", options.part, library)
    except ScconvDeployError as error:
        print(f"not run: {error}\n{error.details}".rstrip())
        return error.exit_code
    record.facts(_machine() | {"library": sha256_of(library), "seed": options.seed, "rounds": options.rounds})
    if options.part == "measure":
        measure(record, library, limit, options)
    else:
        inspect(record, library, limit, options)
    return record.close()


def _library(given: Path | None) -> Path:
    """The library to run, checked as far as it can be without running it (ScconvDeployError)."""
    if not torch.cuda.is_available():
        driver = ".".join(map(str, driver_cuda() or ("?",)))
        made = f"a build for CUDA {torch.version.cuda}" if torch.version.cuda else "a build without CUDA"
        raise MissingRuntimeError(
            f"torch {torch.__version__}, {made}, cannot use the GPU (the driver knows CUDA {driver}).",
            "pip install torch --index-url https://download.pytorch.org/whl/cuNNN, NNN no newer than the driver's",
        )
    if given is None:
        if find_nvcc(Machine()) is None:
            raise MissingRuntimeError("nvcc was not found.", f"{CUDA_WHEELS}, or name built kernels: --library FILE")
        given = build(BuildRequest(kernels_only=True)).path
    if not given.is_file():
        raise UsageError(f"{given} is no file.", "Name the kernels' library.")
    wanted = gpus()[0].compute_capability
    if wanted not in (found := read_library(given).cubins):
        architecture = wanted.replace(".", "")
        raise UsageError(
            f"{given} has machine code for {', '.join(found) or 'no GPU'}, the GPU is {wanted}.",
            f"scconv-deploy plugin build --kernels-only --arch {architecture} -o FILE",
        )
    SruLibrary(given)
    return given


def _machine() -> dict[str, Any]:
    query = "name,driver_version,clocks.max.sm,clocks.max.mem,power.limit"
    smi = Machine().run(["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"]) or "unknown"
    return {"gpu": smi.strip(), "compute_capability": gpus()[0].compute_capability}


class Record:
    """The results file, written whole after every addition: rows, steps, the verdicts that follow, metadata by part.

    ``measure`` begins it anew; ``inspect`` adds to what is there, unless that is of another library (UsageError).
    """

    def __init__(self, path: Path, part: str, library: Path) -> None:
        self.path, self.part = path, part
        self._steps: list[Step] = []
        self._verdicts: list[Verdict] = []
        self._metadata: dict[str, Any] = {}
        self.rows: list[harness.Row] = []
        self._profile: list[harness.Row] = []
        if part == "inspect" and path.exists():
            self._resume(sha256_of(library))
        self._metadata[part] = metadata()

    def _resume(self, library: str) -> None:
        remedy = "Name another file: --results NAME"
        try:
            found = json.loads(self.path.read_text(encoding="utf-8"))
            of = {each["library"] for each in found["metadata"].values()}
            self._steps = [Step(**each) for each in found["steps"]]
            self._metadata, self.rows, self._profile = found["metadata"], found["rows"], found["profile"]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UsageError(f"{self.path} holds no results of this benchmark.", remedy) from error
        if of != {library}:
            raise UsageError(f"{self.path} holds results of another library.", remedy)

    def facts(self, found: dict[str, Any]) -> None:
        self._metadata[self.part] |= found
        self._write()

    def row(self, row: harness.Row) -> None:
        self.rows.append(row)
        self._write()

    def profile(self, rows: list[harness.Row]) -> None:
        self._profile = rows
        self._write()

    def step(self, step: Step) -> None:
        """One of the same name is replaced."""
        print(f"{step.verdict:8} {step.name}: {step.found}", flush=True)
        self._steps = [each for each in self._steps if each.name != step.name] + [step]
        self._write()

    def _write(self) -> None:
        single = [f"1x{channels}x{size}x{size}" for channels, size in SIZES]
        self._verdicts = judge(self.rows, self._steps, single, tuple(TYPES))
        document = {
            "benchmark": "sru_cuda",
            "steps": list(map(asdict, self._steps)),
            "verdicts": list(map(asdict, self._verdicts)),
            "metadata": self._metadata,
            "profile": self._profile,
            "rows": self.rows,
        }
        write_file(self.path, harness.by_lines(document).encode())

    def close(self) -> int:
        """Print tables and verdicts; the exit status."""
        harness.show(self.rows, COLUMNS)
        print(f"\n{json.dumps(self._metadata)}\nwritten to {self.path}\n")
        for verdict in self._verdicts:
            print(f"{verdict.verdict:8} {verdict.aim}: {verdict.found}")
        return int(any(each.verdict == "failed" for each in (*self._steps, *self._verdicts)))


# --- measure ---


def measure(record: Record, library: Path, limit: Budget, options: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        notes = Path(folder) / "notes"
        notes.mkdir()
        # its own pool of compilers would leave the process's session
        environment = {"TORCHINDUCTOR_CACHE_DIR": f"{folder}/cache", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
        arguments = ["--library", str(library), "--notes", str(notes), "--seed", str(options.seed)]
        command = [sys.executable, "-m", "benchmarks.sru_times", *arguments]
        with compiling(command, environment) as compilers:
            record.step(sru_steps.run_tests(library, limit.left(TESTS_UNTIL)))
            for process in compilers:
                try:
                    process.wait(limit.left(COMPILED_UNTIL))
                except subprocess.TimeoutExpired:
                    break
        record.step(_compiled(notes, len(compilers)))
        record.step(_timed(record, [*command, "--rounds", str(options.rounds)], environment, limit))


@contextmanager
def compiling(command: list[str], environment: dict[str, str]) -> Iterator[list[subprocess.Popen[str]]]:
    """Processes that compile torch.compile's cases, on half of the cores; whichever still runs is ended."""
    count = max(1, (os.cpu_count() or 1) // 2)
    threads = {"OMP_NUM_THREADS": "1"}
    processes: list[subprocess.Popen[str]] = []
    try:
        for number in range(count):
            processes.append(budget.start([*command, "--compile", f"{number}/{count}"], environment | threads,
                                          stdout=subprocess.DEVNULL))  # fmt: skip
        yield processes
    finally:
        for process in processes:
            budget.end(process)


def _compiled(notes: Path, processes: int) -> Step:
    name = "torch.compile, compiled ahead"
    errors = [error for case in cases() if (error := compile_error(notes, case))]
    count = len(cases()) - len(errors)
    found = f"{count} of {len(cases())} cases by {processes} processes" + (f"; {errors[0]}" if errors else "")
    return Step(name, "not run" if errors else "passed", found)


def _timed(record: Record, command: list[str], environment: dict[str, str], limit: Budget) -> Step:
    def take(line: str) -> None:
        if not (line.startswith("{") and line.endswith("\n")):  # the last one of a process that was ended may be half
            sys.stderr.write(line)
            return
        found = json.loads(line)
        record.facts(found["device"]) if "device" in found else record.row(found)

    name, timeout_s = "timing", limit.left()
    status, lines = budget.run(command, timeout_s, environment, take)
    measured = len({(row["shape"], row["type"], row["layout"]) for row in record.rows})
    found = f"{measured} of {len(cases())} cases"
    if status is None:
        return Step(name, "not run", f"{found}, then the budget of {limit.seconds:.0f} s was used up")
    if status or measured < len(cases()):
        return Step(name, "failed", f"{found}, then exit status {status}: {lines[-1] if lines else 'no output'}")
    return Step(name, "passed", found)


# --- inspect ---


def inspect(record: Record, library: Path, limit: Budget, options: argparse.Namespace) -> None:
    machine, left = Machine(), sum(TOOLS.values())
    for tool, share in TOOLS.items():
        timeout_s = limit.left() * share / left
        left -= share
        if tool == sru_steps.NCU:
            step, rows = sru_steps.profile(library, options.seed, timeout_s, machine)
            record.profile(rows)
        else:
            step = sru_steps.sanitize(tool, library, timeout_s, machine)
        record.step(step)
