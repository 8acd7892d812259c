"""The fused SRU on a GPU: microseconds and GB/s beside eager PyTorch, torch.compile and a copy of the same tensor.

An SRU must read its input once and write its output once: 2 * bytes(x). GB/s are those bytes over the time, whatever a
variant really moves, so that the copy's GB/s are the bound. Every variant runs as a CUDA graph of several calls over
inputs that together exceed the L2 (unless one does), so that neither launches nor a warm cache flatter anyone. Gates
and values are compared with PyTorch's before anything is timed.

One command on a machine with a GPU and nvcc; elsewhere it says why it does not run. --everything builds the library,
runs the GPU tests and compute-sanitizer first. The results file is written again after every size; the exit status is
1 when an aim or a step failed.
"""

from __future__ import annotations

import argparse
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any, Protocol

import torch
from torch import Tensor

from benchmarks import sru_aims, sru_steps
from benchmarks.cuda_timing import Call, GraphTimer, usable
from benchmarks.harness import Row, write
from scconv_deploy.errors import MissingRuntimeError, ScconvDeployError
from scconv_deploy.gate.flips import compare_outputs
from scconv_deploy.gate.gate import Gate
from scconv_deploy.gate.variant import VARIANTS, from_normalized, gate_weight, normalize
from scconv_deploy.system.gpu import driver_cuda, gpus
from scconv_deploy.system.machine import CUDA_WHEELS, Machine, find_nvcc
from scconv_deploy.trt_plugins.build import BuildRequest, build
from scconv_deploy.trt_plugins.library import SruLibrary, SruSettings, load, sru_params

SIZES = ((256, 56), (64, 56), (128, 28), (256, 14), (512, 7), (512, 28), (1024, 14), (2048, 7))
"""C and H = W of ScConv-ResNet-50's SRUs, in its 3x3 convolutions' place and behind its blocks."""
BATCHES = (64, 1, 8)
TYPES = {"fp16": torch.float16, "fp32": torch.float32, "bf16": torch.bfloat16}
TOLERANCE = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
"""Relative L2: data are rounded once to their type."""
VARIANT = VARIANTS["groupbn-hard"]
EAGER, COMPILED, COPY = "PyTorch eager", "torch.compile", "copy"
ALGORITHMS = ("auto", "on_chip", "split")
_COLUMNS = {
    "shape": "shape",
    "type": "type",
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
Shape = tuple[int, int, int, int]


class Timer(Protocol):
    """What measures; tests answer in its place."""

    l2_bytes: int

    def measure(self, calls: Mapping[str, Call], x: Tensor) -> tuple[dict[str, list[float]], dict[str, str]]: ...


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--batches", default=",".join(map(str, BATCHES)))
    parser.add_argument("--types", default=",".join(TYPES))
    parser.add_argument("--everything", action="store_true", help="build, GPU tests and compute-sanitizer first")
    parser.add_argument("--step-timeout-s", type=float, default=1200, help="of each test or sanitizer run")
    parser.add_argument("--budget-s", type=float, default=float("inf"), help="begin no further size after this")


def run(options: argparse.Namespace) -> int:
    start = time.monotonic()
    if not gpus():
        print("not run: the driver lists no CUDA GPU")
        return 0
    if missing := _missing():
        print(f"not run: {missing}")
        return MissingRuntimeError.exit_code
    done = []
    for step in sru_steps.steps(options.step_timeout_s) if options.everything else ():
        print(f"{step.verdict:8} {step.name}: {step.found}", flush=True)
        done.append(step)
    try:
        library = load(build(BuildRequest(kernels_only=True)).path)
    except ScconvDeployError as error:
        print(f"failed: {error}\n{error.details}".rstrip())
        return error.exit_code
    return measure(library, GraphTimer(options.rounds), options, done, start, "cuda")


def _missing() -> str:
    """What the GPU's machine lacks, and where it comes from."""
    if not torch.cuda.is_available():
        driver = ".".join(map(str, driver_cuda() or ("?",)))
        build = f"a build for CUDA {torch.version.cuda}" if torch.version.cuda else "a build without CUDA"
        return (
            f"torch {torch.__version__}, {build}, cannot use the GPU (the driver knows CUDA {driver}): pip install "
            "torch --index-url https://download.pytorch.org/whl/cuNNN, NNN no newer than the driver's"
        )
    return f"nvcc was not found ({CUDA_WHEELS})" if find_nvcc(Machine()) is None else ""


def measure(
    library: SruLibrary,
    timer: Timer,
    options: argparse.Namespace,
    steps: Sequence[sru_steps.Step],
    start: float,
    device: str,
) -> int:
    """Every size and type, written as they come; the verdict and the exit status."""
    facts = {"variant": str(VARIANT), "rounds": options.rounds, "seed": options.seed, "l2_bytes": timer.l2_bytes}
    facts |= _device()
    rows: list[Row] = []
    verdicts: list[sru_aims.Verdict] = []
    cases, left = list(_cases(options)), 0
    for number, (shape, name) in enumerate(cases):
        if time.monotonic() - start > options.budget_s:
            left = len(cases) - number
            break
        print(f"{number + 1}/{len(cases)} {'x'.join(map(str, shape))} {name}", file=sys.stderr, flush=True)
        rows += _one(library, timer, shape, name, options.seed, device)
        verdicts = sru_aims.judge(rows, timer.l2_bytes)
        summary = {"steps": list(map(asdict, steps)), "verdicts": list(map(asdict, verdicts))}
        last = number + 1 == len(cases)
        write(options.results, rows, _COLUMNS, table=last, summary=summary, **facts)
    if left:
        print(f"{left} of {len(cases)} sizes were not measured: the budget of {options.budget_s:.0f} s is used up")
    print()
    for verdict in verdicts:
        print(f"{verdict.verdict:8} {verdict.aim}: {verdict.found}")
    return int(any(each.verdict == "failed" for each in (*steps, *verdicts)))


def _cases(options: argparse.Namespace) -> Iterator[tuple[Shape, str]]:
    """The headline first, so that a run which is cut off has it."""
    for batch in map(int, options.batches.split(",")):
        for channels, size in SIZES:
            for name in options.types.split(","):
                yield (batch, channels, size, size), name


def _one(library: SruLibrary, timer: Timer, shape: Shape, name: str, seed: int, device: str) -> list[Row]:
    generator = torch.Generator().manual_seed(seed)
    gate = Gate(VARIANT, *(torch.randn(shape[1], generator=generator) for _ in range(2)))
    x = torch.randn(shape, generator=generator).to(TYPES[name]).to(device)
    inputs = [p.to(device) for p in gate.operator_inputs().values()]
    gamma, beta = gate.gamma.to(x), gate.beta.to(x)

    def fused(algorithm: str) -> Callable[[Tensor], Tensor]:
        settings = SruSettings.of(VARIANT, algorithm)
        return lambda data: library.sru(data, inputs, settings)

    def eager(data: Tensor) -> Tensor:
        # in x's type, as model.half() runs it: fewer bytes, other gates
        weight = gate_weight(gamma, VARIANT.weighting)
        return from_normalized(data, normalize(data, gamma, beta, VARIANT), weight, VARIANT)

    torch._dynamo.reset()
    calls: dict[str, Call] = {f"fused, {algorithm}": fused(algorithm) for algorithm in ALGORITHMS}
    found: dict[str, Row] = {variant: _judge(call, x, gate) for variant, call in calls.items()}
    for variant, algorithm in zip(calls, ALGORITHMS, strict=True):
        params = sru_params(x, inputs, SruSettings.of(VARIANT, algorithm))
        params.y = x.data_ptr()
        found[variant]["algorithm"] = library.chosen_algorithm(params)
    calls |= {COPY: torch.clone, EAGER: eager, COMPILED: torch.compile(eager, dynamic=False)}
    seconds, errors = timer.measure(calls, x)
    size = x.numel() * x.element_size()
    shared: Row = {"shape": "x".join(map(str, shape)), "type": name, "bytes": size}
    medians = {variant: statistics.median(each) for variant, each in seconds.items()}
    rows = [
        shared | {"variant": variant} | _times(variant, seconds[variant], medians, size) | found.get(variant, {})
        for variant in seconds
    ]
    return rows + [shared | {"variant": v, "error": error} | found.get(v, {}) for v, error in errors.items()]


def _times(variant: str, seconds: Sequence[float], medians: Mapping[str, float], size: int) -> Row:
    median = medians[variant]
    row: Row = {
        "median_us": round(median * 1e6, 2),
        "min_us": round(min(seconds) * 1e6, 2),
        "max_us": round(max(seconds) * 1e6, 2),
        "gb_per_s": round(2 * size / median / 1e9, 1),
    }
    for key, other in (("of_copy", COPY), ("speedup_eager", EAGER), ("speedup_compile", COMPILED)):
        if other in medians:
            row[key] = round(medians[other] / median, 3)
    return row


def _judge(call: Call, x: Tensor, gate: Gate) -> dict[str, Any]:
    """Gates and values against PyTorch's on the CPU, of at most two samples."""
    try:
        y = call(x)[:2].cpu()
    except RuntimeError as error:
        if x.is_cuda and not usable():
            raise
        return {"error": str(error).splitlines()[0]}
    wide = x[:2].float().cpu()
    count, distance = compare_outputs(y, gate.apply(wide), wide, gate)
    return {"flips": count.flips, "unexplained": count.unexplained, "relative_l2": distance,
            "tolerance": TOLERANCE[x.dtype]}  # fmt: skip


def _device() -> dict[str, Any]:
    machine = Machine()
    query = "name,driver_version,clocks.max.sm,clocks.max.mem"
    smi = machine.run(["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"]) or "unknown"
    nvcc = find_nvcc(machine)
    release = re.search(r"V(\d+\.\d+\.\d+)", machine.run([nvcc, "--version"]) or "") if nvcc else None
    return {"gpu": smi.strip(), "cuda": release[1] if release else "unknown", "torch_cuda": torch.version.cuda}
