"""The fused SRU's times beside a copy, eager PyTorch and torch.compile; prints a JSON line for each row.

A child process of ``sru_cuda``, which reads the lines and ends it when its time is up. An SRU must read its input once
and write its output once: 2 * bytes(x). GB/s are those bytes over the time, whatever a variant really moves, so that
the copy's GB/s are the bound. Gates and values are compared with PyTorch's before anything is timed.

``--compile I/N`` is the other child process: it compiles every N-th case into a cache that all share, and times
nothing. Compiling a case anew takes seconds, and torch.compile's own time does not depend on when it was compiled.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from benchmarks.cuda_timing import Call, GraphTimer, usable
from benchmarks.harness import Row
from benchmarks.sru_aims import HEADLINE
from scconv_deploy.gate.flips import compare_outputs
from scconv_deploy.gate.gate import Gate
from scconv_deploy.gate.variant import VARIANTS, from_normalized, gate_weight, normalize
from scconv_deploy.system.atomic import write_file
from scconv_deploy.system.machine import Machine
from scconv_deploy.trt_plugins.library import ALGORITHMS, SruLibrary, SruSettings, sru_params

SIZES = ((256, 56), (64, 56), (128, 28), (256, 14), (512, 7), (512, 28), (1024, 14), (2048, 7))
"""C and H = W of ScConv-ResNet-50's SRUs, in its 3x3 convolutions' place and behind its blocks."""
BATCHES = (1, 64)
TYPES = {"fp16": torch.float16, "fp32": torch.float32}
LAYOUTS = {"NCHW": torch.contiguous_format, "NHWC": torch.channels_last}
TOLERANCE = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
"""Relative L2: data are rounded once to their type."""
VARIANT = VARIANTS["groupbn-hard"]
EAGER, COMPILED, COPY = "PyTorch eager", "torch.compile", "copy"


@dataclass(frozen=True)
class Case:
    """An input's shape ``[N, C, H, W]``, type and layout, by the names in TYPES and LAYOUTS."""

    shape: tuple[int, int, int, int]
    type: str
    layout: str

    @property
    def size(self) -> str:
        return "x".join(map(str, self.shape))

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * TYPES[self.type].itemsize

    def __str__(self) -> str:
        return f"{self.size} {self.type} {self.layout}"


class Timer(Protocol):
    """What measures; tests answer in its place."""

    def measure(self, calls: Mapping[str, Call], x: Tensor) -> tuple[dict[str, list[float]], dict[str, str]]: ...


def cases() -> list[Case]:
    """The headline first, then batch 1, each in NCHW and then in NHWC: what a run that is cut off should have."""
    every = [
        Case((batch, channels, size, size), name, layout)
        for layout in LAYOUTS
        for batch in BATCHES
        for channels, size in SIZES
        for name in TYPES
    ]
    return sorted(every, key=lambda case: case.size not in HEADLINE)


def draw(case: Case, seed: int, device: str) -> tuple[Tensor, Gate]:
    """Input and gate of a case, the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    gate = Gate(VARIANT, *(torch.randn(case.shape[1], generator=generator) for _ in range(2)))
    x = torch.randn(case.shape, generator=generator).to(TYPES[case.type])
    return x.to(device=device, memory_format=LAYOUTS[case.layout]), gate


def eager_call(x: Tensor, gate: Gate) -> Call:
    """The SRU in PyTorch, in x's type as model.half() runs it: fewer bytes, other gates."""
    gamma, beta = gate.gamma.to(x), gate.beta.to(x)

    def eager(data: Tensor) -> Tensor:
        weight = gate_weight(gamma, VARIANT.weighting)
        return from_normalized(data, normalize(data, gamma, beta, VARIANT), weight, VARIANT)

    return eager


def compile_call(eager: Call) -> Call:
    """torch.compile in its default mode.

    Its choice among launch configurations is not kept in the cache: made beside other processes on the GPU it would be
    a worse one. The process that times makes it, alone on the GPU.
    """
    torch._dynamo.reset()
    return torch.compile(eager, dynamic=False, options={"autotune_local_cache": False})


# --- compiling ahead ---


def compile_cases(chosen: Sequence[Case], seed: int, device: str, cache: Path) -> None:
    """Compile cases into the cache of TORCHINDUCTOR_CACHE_DIR, and leave a note of each in the folder."""
    for case in chosen:
        x, gate = draw(case, seed, device)
        error = ""
        try:
            with torch.inference_mode():
                compile_call(eager_call(x, gate))(x)
        except Exception as failure:  # whatever torch.compile raises where its compiler is missing
            error = _first_line(failure)
        write_file(_note(cache, case), error.encode())


def compile_error(cache: Path, case: Case) -> str:
    """Why a case has no torch.compile to time; "" where it was compiled."""
    note = _note(cache, case)
    return note.read_text(encoding="utf-8") if note.is_file() else "was not compiled in the time for it"


def _note(cache: Path, case: Case) -> Path:
    return cache / f"{case}.txt"


# --- timing ---


def times(
    library: SruLibrary, timer: Timer, case: Case, seed: int, device: str, compile_error: str = ""
) -> Iterator[Row]:
    """A row for each variant of a case; one that could not run has its error."""
    x, gate = draw(case, seed, device)
    inputs = [p.to(device) for p in gate.operator_inputs().values()]
    shared: Row = {"shape": case.size, "type": case.type, "layout": case.layout, "bytes": case.bytes}
    calls: dict[str, Call] = {}
    found: dict[str, Row] = {}
    for algorithm, chosen in _different(library, x, inputs).items():
        variant = f"fused, {algorithm}"
        settings = SruSettings.of(VARIANT, algorithm)
        calls[variant] = lambda data, settings=settings: library.sru(data, inputs, settings)
        found[variant] = {"algorithm": chosen} | _judge(calls[variant], x, gate, LAYOUTS[case.layout])
    eager = eager_call(x, gate)
    calls |= {COPY: torch.clone, EAGER: eager}
    if not compile_error:
        calls[COMPILED] = compile_call(eager)
    seconds, errors = timer.measure(calls, x)
    if compile_error:
        errors = errors | {COMPILED: compile_error}
    medians = {variant: statistics.median(each) for variant, each in seconds.items()}
    for variant in seconds:
        yield shared | {"variant": variant} | _times(seconds[variant], medians, case.bytes) | found.get(variant, {})
    for variant, error in errors.items():
        yield shared | {"variant": variant, "error": error} | found.get(variant, {})


def _different(library: SruLibrary, x: Tensor, inputs: Sequence[Tensor]) -> dict[str, str]:
    """Settings that run different algorithms, auto first, and what each runs."""
    chosen: dict[str, str] = {}
    for algorithm in ALGORITHMS:
        params = sru_params(x, inputs, SruSettings.of(VARIANT, algorithm))
        params.y = x.data_ptr()
        name = library.chosen_algorithm(params)
        if name not in chosen.values():
            chosen[algorithm] = name
    return chosen


def _times(seconds: Sequence[float], medians: Mapping[str, float], size: int) -> Row:
    median = statistics.median(seconds)
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


def _judge(call: Call, x: Tensor, gate: Gate, layout: torch.memory_format) -> dict[str, Any]:
    """Gates and values against PyTorch's on the CPU, of at most two samples."""
    try:
        y = call(x)
        if not y.is_contiguous(memory_format=layout):
            return {"error": f"y is not in x's layout: strides {y.stride()}, of x {x.stride()}"}
        y = y[:2].cpu()
    except RuntimeError as error:
        if x.is_cuda and not usable():
            raise
        return {"error": _first_line(error)}
    wide = x[:2].float().cpu()
    count, distance = compare_outputs(y, gate.apply(wide), wide, gate)
    return {"flips": count.flips, "unexplained": count.unexplained, "tolerance": TOLERANCE[x.dtype],
            "relative_l2": distance if math.isfinite(distance) else None}  # fmt: skip


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


# --- the process ---


def _device() -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(0)
    return {"multiprocessors": properties.multi_processor_count, "l2_bytes": properties.L2_cache_size,
            "memory_bytes": properties.total_memory, "torch_cuda": torch.version.cuda}  # fmt: skip


def _clocks() -> str:
    query = ["nvidia-smi", "--query-gpu=clocks.sm,clocks.mem,temperature.gpu,power.draw", "--format=csv,noheader"]
    return (Machine().run(query) or "unknown").strip()


def _emit(found: Mapping[str, Any]) -> None:
    print(json.dumps(found), flush=True)


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sru_times", description=__doc__)
    parser.add_argument("--library", type=Path, required=True)
    parser.add_argument("--notes", type=Path, required=True, help="folder of what was compiled")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--compile", metavar="I/N", default="", help="compile every N-th case from I on, time none")
    options = parser.parse_args(arguments)
    if options.compile:
        first, step = map(int, options.compile.split("/"))
        return compile_cases(cases()[first::step], options.seed, "cuda", options.notes)
    _emit({"device": _device()})
    library, timer = SruLibrary(options.library), GraphTimer(options.rounds)
    for case in cases():
        start = time.monotonic()
        for row in times(library, timer, case, options.seed, "cuda", compile_error(options.notes, case)):
            _emit(row)
        missed = torch._dynamo.utils.counters["inductor"]["fxgraph_cache_miss"]
        print(f"{case}: {time.monotonic() - start:.1f} s, {missed} compiled anew so far", flush=True)
        if case == cases()[0]:
            _emit({"device": {"clocks_after_the_first_case": _clocks()}})


if __name__ == "__main__":
    main(sys.argv[1:])
