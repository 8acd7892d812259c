"""The fused SRU on a GPU: microseconds and GB/s beside eager PyTorch, torch.compile and a copy of the same tensor.

An SRU must read its input once and write its output once: 2 * bytes(x). GB/s are those bytes over the time, whatever a
variant really moves, so that the copy's GB/s are the bound. Every variant runs as a CUDA graph of several calls over
inputs that together exceed the L2 (unless one does), so that neither launches nor a warm cache flatter anyone.

One command on a machine with a GPU and nvcc; elsewhere it says why it does not run.
"""

from __future__ import annotations

import argparse
import math
import random
import re
import statistics
import subprocess
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import Row, write
from scconv_deploy.gate import VARIANTS, compare_outputs, gate_parameters
from scconv_deploy.gate.cut import operator_inputs
from scconv_deploy.gate.variant import sru as variant_sru
from scconv_deploy.machine import Machine, find_nvcc
from scconv_deploy.trt_plugins.build import BuildRequest, build
from scconv_deploy.trt_plugins.library import ALGORITHMS, SruLibrary, load, sru_params

SIZES = ((64, 56), (128, 28), (256, 14), (512, 7), (256, 56), (512, 28), (1024, 14), (2048, 7))
"""C and H = W of ScConv-ResNet-50's SRUs, in its 3x3 convolutions' place and behind its blocks."""
BATCHES = (1, 8, 64)
TYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
VARIANT = VARIANTS["groupbn-hard"]
EAGER, COMPILED, COPY = "PyTorch eager", "torch.compile", "copy"
_CALLS, _MAX_INPUT_BYTES = 20, 4 << 30
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
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--batches", default=",".join(map(str, BATCHES)))
    parser.add_argument("--types", default=",".join(TYPES))


def run(options: argparse.Namespace) -> None:
    if not torch.cuda.is_available():
        print("not run: torch sees no CUDA GPU")
        return
    if find_nvcc(Machine()) is None:
        print("not run: nvcc was not found (pip install nvidia-cuda-nvcc nvidia-cuda-runtime nvidia-cuda-cccl)")
        return
    library = load(build(BuildRequest(kernels_only=True)).path)
    rows: list[Row] = []
    for batch in map(int, options.batches.split(",")):
        for channels, size in SIZES:
            for name in options.types.split(","):
                rows += _one(library, (batch, channels, size, size), name, options)
    write(options.results, rows, _COLUMNS, variant=str(VARIANT), rounds=options.rounds, seed=options.seed, **_device())


def _one(library: SruLibrary, shape: tuple[int, int, int, int], name: str, options: argparse.Namespace) -> list[Row]:
    generator = torch.Generator().manual_seed(options.seed)
    gamma, beta = (torch.randn(shape[1], generator=generator) for _ in range(2))
    x = torch.randn(shape, generator=generator).to(TYPES[name]).cuda()
    inputs = [p.cuda() for p in operator_inputs(gamma, beta, VARIANT).values()]
    own = [p.to(x) for p in (gamma, beta)]

    def fused(algorithm: str) -> Callable[[Tensor], Tensor]:
        v = VARIANT
        rest = (v.operator, v.num_groups, v.ddof, v.eps_var, v.eps_std, algorithm)
        return lambda data: library.sru(data, inputs, *rest)

    def eager(data: Tensor) -> Tensor:
        return variant_sru(data, *own, VARIANT)  # in x's type, as model.half() runs it: fewer bytes, other gates

    torch._dynamo.reset()
    calls = {COPY: torch.clone, EAGER: eager, COMPILED: torch.compile(eager, dynamic=False)}
    calls |= {f"fused, {algorithm}": fused(algorithm) for algorithm in ("auto", "on_chip", "split")}
    seconds = _measure(calls, x, options.rounds)
    params = sru_params(x, inputs, VARIANT.operator, VARIANT.num_groups, VARIANT.ddof, 0.0, VARIANT.eps_std)
    params.y = x.data_ptr()
    moved = 2 * x.numel() * x.element_size()
    rows = []
    for variant, each in seconds.items():
        median = statistics.median(each)
        row: Row = {
            "shape": "x".join(map(str, shape)), "type": name, "variant": variant, "median_us": round(median * 1e6, 2),
            "min_us": round(min(each) * 1e6, 2), "max_us": round(max(each) * 1e6, 2),
            "gb_per_s": round(moved / median / 1e9, 1), "of_copy": round(statistics.median(seconds[COPY]) / median, 3),
            "speedup_eager": round(statistics.median(seconds[EAGER]) / median, 2),
            "speedup_compile": round(statistics.median(seconds[COMPILED]) / median, 2),
        }  # fmt: skip
        if variant.startswith("fused"):
            wanted = variant.partition(", ")[2]
            params.algorithm = ALGORITHMS.index(wanted)
            row["algorithm"] = library.chosen_algorithm(params)
            row |= _judge(calls[variant](x), x, gamma, beta)
        rows.append(row)
    return rows


def _judge(y: Tensor, x: Tensor, gamma: Tensor, beta: Tensor) -> dict[str, Any]:
    """Gates against PyTorch's on the CPU, of at most two samples."""
    wide = x[:2].float().cpu()
    expected = variant_sru(wide, gamma, beta, VARIANT)
    parameters = gate_parameters(gamma, beta, VARIANT)
    count, distance = compare_outputs(y[:2].cpu(), expected, wide, gamma, beta, parameters, VARIANT)
    return {"flips": count.flips, "unexplained": count.unexplained, "relative_l2": distance}


def _measure(calls: dict[str, Callable[[Tensor], Tensor]], x: Tensor, rounds: int) -> dict[str, list[float]]:
    """Seconds per call of each variant, variants taking turns in a seeded random order."""
    l2 = torch.cuda.get_device_properties(0).L2_cache_size
    bytes_ = x.numel() * x.element_size()
    copies = 1 if 2 * bytes_ > 4 * l2 else min(math.ceil(4 * l2 / bytes_), _MAX_INPUT_BYTES // bytes_, 256)
    data = [x, *(x.clone() for _ in range(copies - 1))]
    graphs = {name: _graph(call, data) for name, call in calls.items()}
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    order, shuffle = list(calls), random.Random(0).shuffle
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for _ in range(rounds):
        shuffle(order)
        for name in order:
            graph, count = graphs[name]
            graph.replay()  # so that the clock and the caches are this variant's own
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            seconds[name].append(start.elapsed_time(end) / 1e3 / count)
    return seconds


def _graph(call: Callable[[Tensor], Tensor], data: list[Tensor]) -> tuple[torch.cuda.CUDAGraph, int]:
    """Calls over all inputs, at least 20, captured in a graph of their own memory."""
    repeats = math.ceil(_CALLS / len(data))
    with torch.inference_mode():
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                call(data[0])
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(repeats):
                for each in data:
                    call(each)
    return graph, repeats * len(data)


def _device() -> dict[str, Any]:
    query = "name,driver_version,clocks.max.sm,clocks.max.mem"
    command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"]
    smi = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    nvcc = find_nvcc(Machine())
    banner = subprocess.run([str(nvcc), "--version"], capture_output=True, text=True, check=False).stdout
    release = re.search(r"V(\d+\.\d+\.\d+)", banner)
    return {"gpu": smi, "cuda": release[1] if release else "unknown", "torch_cuda": torch.version.cuda}
