"""The fused SRU on the CPU: one SRU, whole networks, and its gates.

One SRU in ONNX Runtime with the library, beside the naive export, our artifact's function, torch.compile and one pass
over x; processor time on one thread, wall time on two. The pass is timed twice: as a node of ONNX Runtime, so that a
session's call is in both, and as PyTorch's operator into a tensor that is there. Networks: our artifact with the
library and without it, beside the naive export in ONNX Runtime and in OpenVINO (where it is installed), torch.compile
and eager PyTorch.
Gates: those of 10^8 that PyTorch decides otherwise, and how many of them rounding does not explain.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import TensorProto, helper

from benchmarks import subjects
from benchmarks.harness import Row, interleave, write
from scconv_deploy.gate.flips import compare_outputs
from scconv_deploy.gate.gate import Gate
from scconv_deploy.gate.variant import VARIANTS
from scconv_deploy.graph.contract import OPERATORS
from scconv_deploy.records.gates import FlipCount
from scconv_deploy.system.environment import sha256_of
from scconv_deploy.trt_plugins.cpu.build import build_cpu
from scconv_deploy.trt_plugins.cpu.library import SruCpuLibrary
from scconv_deploy.zoo import MODELS
from tests.wild import OriginalSRU

SHAPES = ((8, 256, 56, 56), (1, 64, 56, 56), (8, 512, 7, 7))
NAIVE, FUNCTION, FUSED = "naive export in ORT", "function in ORT", "fused SRU in ORT"
COMPILED, PASS = "torch.compile", "one pass over x in torch (read, add 1, write)"
COPY = "one pass over x in ORT (Identity)"
AS_IS = "function in ORT, CRUs as they are"
EAGER, OPENVINO = "eager PyTorch", "naive export in OpenVINO"
AIMS = {NAIVE: 10.0, FUNCTION: 6.0, COMPILED: 5.0, COPY: 1 / 1.5, PASS: 1 / 1.5}
"""How many times as fast as these the fused SRU must be on one thread."""
NETWORKS = {"scconv_resnet20": 32, "scconv_resnet50": 4}
"""Networks with an aim, and their batch: 1.3 and 1.1 times the artifact without library and CRU halves."""
GATES = ("groupbn-hard", "groupnorm-soft")
"""Variants with different gates: groupbn-hard-normalized has groupbn-hard's."""
GATE_SHAPES = ((4, 256, 28, 28), (1, 256, 56, 56), (4, 512, 7, 7))
MEANS = {"mean 0": 0.0, "mean 10": 10.0, "mean 1000": 1000.0, "rectified": None}
PARTS = ("sru", "networks", "gates")
_SMALL_S = 1e-2
"""A call shorter than this is timed several at a time: the first after a pause takes four times as long."""
_COLUMNS = {
    "what": "what",
    "threads": "threads",
    "variant": "variant",
    "median": "median_s",
    "min": "min_s",
    "fused is faster": "fused_speedup",
    "aim": "aim",
    "gates": "gates",
    "flips": "flips",
    "unexplained": "unexplained",
    "largest margin of a flip, in s": "largest_margin",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2], help="1: processor time; more: wall time")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--gates", type=float, default=1.05e8, help="to compare with PyTorch's")
    parser.add_argument("--networks", nargs="*", default=list(NETWORKS), help="of the zoo; a batch of 1 if not listed")
    parser.add_argument("--network-rounds", type=int, default=20)
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")


def run(options: argparse.Namespace) -> None:
    built = build_cpu()
    rows: list[Row] = []
    for shape, threads in itertools.product(SHAPES if "sru" in options.parts else (), options.threads):
        rows += _one_sru(built.path, shape, threads, options)
        rows += _half(built.path, shape, threads, options)
    networks = options.networks if "networks" in options.parts else ()
    for name, threads in itertools.product(networks, options.threads):
        rows += _network(built.path, name, threads, options)
    library = SruCpuLibrary(built.path)
    if "gates" in options.parts:
        rows += _gates(library, options)
    facts: dict[str, object] = {
        "library_sha256": sha256_of(built.path),
        "compiler": built.compiler,
        "lanes": library.lanes,
    }
    with contextlib.suppress(PackageNotFoundError):
        facts["openvino"] = version("openvino")
    write(options.results, rows, _COLUMNS, seed=options.seed, warmup=options.warmup, clock={
        "1 thread": "processor time", "2 threads": "wall time"}, **facts)  # fmt: skip


def _one_sru(library: Path, shape: tuple[int, ...], threads: int, options: argparse.Namespace) -> list[Row]:
    torch.set_num_threads(threads)
    torch.manual_seed(options.seed)
    model, x = OriginalSRU(shape[1]).eval(), subjects.noise(shape, options.seed)
    ours, feed = subjects.our_onnx(model, x), x.numpy()
    variants: dict[str, Callable[[], object]] = {
        NAIVE: _in_ort(subjects.cached_naive_onnx(model, x)[0], feed, threads),
        FUNCTION: _in_ort(ours, feed, threads),
        FUSED: _in_ort(ours, feed, threads, library),
    }
    if not options.no_compile:
        torch._dynamo.reset()  # its code is for a number of threads
        compiled, _ = subjects.compiled(model, x, COMPILED)
        if compiled is not None:
            variants[COMPILED] = compiled
    variants |= _passes(x, threads)
    return _timed(f"one SRU, {'x'.join(map(str, shape))}", variants, threads, options.rounds, options.warmup, AIMS)


def _half(library: Path, shape: tuple[int, ...], threads: int, options: argparse.Namespace) -> list[Row]:
    """float16 in and out: the node alone, for ONNX Runtime's own casts would hide it."""
    torch.set_num_threads(threads)
    torch.manual_seed(options.seed)
    proto = onnx.load_model_from_string(subjects.our_onnx(OriginalSRU(shape[1]).eval(), subjects.noise(shape, 0)))
    (node,) = [n for n in proto.graph.node if n.domain == "scconv"]
    x = subjects.noise(shape, options.seed).half()
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT16, shape) for name in (node.input[0], node.output[0])]
    graph = helper.make_graph([node], "sru", ends[:1], ends[1:], initializer=proto.graph.initializer)
    half = helper.make_model(graph, functions=proto.functions, opset_imports=proto.opset_import, ir_version=10)
    data, feed = half.SerializeToString(), x.numpy()
    variants: dict[str, Callable[[], object]] = {
        FUNCTION: _in_ort(data, feed, threads),
        FUSED: _in_ort(data, feed, threads, library),
        **_passes(x, threads),
    }
    what = f"one SRU, {'x'.join(map(str, shape))}, float16"
    return _timed(what, variants, threads, options.rounds, options.warmup, {name: AIMS[name] for name in (COPY, PASS)})


def _passes(x: torch.Tensor, threads: int) -> dict[str, Callable[[], object]]:
    """Reading x and writing as much, in ONNX Runtime and in PyTorch. ONNX Runtime's Add has no float16 on x86."""
    element = helper.np_dtype_to_tensor_dtype(x.numpy().dtype)
    ends = [helper.make_tensor_value_info(name, element, x.shape) for name in ("x", "y")]
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "copy", ends[:1], ends[1:])
    copy = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    y = torch.empty_like(x)
    return {
        COPY: _in_ort(copy.SerializeToString(), x.numpy(), threads),
        PASS: lambda: torch.add(x, 1.0, out=y),
    }


def _network(library: Path, name: str, threads: int, options: argparse.Namespace) -> list[Row]:
    torch.set_num_threads(threads)
    batch = NETWORKS.get(name, 1)
    shape = (batch, *MODELS[name].input_shape[1:])
    plain, _ = subjects.plain_network(name.removeprefix("scconv_"), options.seed)
    x = subjects.noise(shape, options.seed)
    data, (naive, _) = subjects.our_onnx(plain, x), subjects.cached_naive_onnx(plain, x)
    feed = x.numpy()
    variants: dict[str, Callable[[], object]] = {
        NAIVE: _in_ort(naive, feed, threads),
        FUNCTION: _in_ort(data, feed, threads),
        AS_IS: _in_ort(subjects.our_onnx(plain, x, cru="as-is"), feed, threads),
        FUSED: _in_ort(data, feed, threads, library),
        EAGER: subjects.in_torch(plain, x),
    }
    if (in_openvino := _in_openvino(naive, feed, threads)) is not None:
        variants[OPENVINO] = in_openvino
    if not options.no_compile:
        torch._dynamo.reset()
        compiled, _ = subjects.compiled(plain, x, COMPILED)
        if compiled is not None:
            variants[COMPILED] = compiled
    aims = {AS_IS: {"scconv_resnet20": 1.3, "scconv_resnet50": 1.1}.get(name, 1.0)}
    clock = time.process_time if threads == 1 else time.perf_counter  # OpenVINO computes in a thread of its own
    return _timed(f"{name}, batch {batch}", variants, threads, options.network_rounds, 1, aims, clock)


def _in_openvino(data: bytes, x: np.ndarray, threads: int) -> Callable[[], object] | None:
    """A float32 model in OpenVINO; None, and a line, where that is not installed."""
    try:
        import openvino
    except ImportError:
        print("OpenVINO is not installed, and left out")
        return None
    core = openvino.Core()
    settings = {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY"}
    request = core.compile_model(core.read_model(data), "CPU", settings).create_infer_request()
    return lambda: request.infer([x])


def _in_ort(data: bytes, x: np.ndarray, threads: int, library: Path | None = None) -> Callable[[], object]:
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = threads
    settings.log_severity_level = 3
    if library is not None:
        settings.register_custom_ops_library(str(library))
    loaded = onnxruntime.InferenceSession(data, settings, providers=["CPUExecutionProvider"])
    feed = {loaded.get_inputs()[0].name: x}
    return lambda: loaded.run(None, feed)


def _timed(
    what: str,
    variants: Mapping[str, Callable[[], object]],
    threads: int,
    rounds: int,
    warmup: int,
    aims: Mapping[str, float],
    clock: Callable[[], float] | None = None,
) -> list[Row]:
    calls = {name: _repeated(call) for name, call in variants.items()}
    clock = clock or (time.thread_time if threads == 1 else time.perf_counter)
    timing = interleave({name: call for name, (call, _) in calls.items()}, rounds, warmup, clock)
    seconds = {name: [s / calls[name][1] for s in timing.seconds[name]] for name in calls}
    timing = replace(timing, seconds=seconds)
    rows = [{"what": what, "threads": threads, **timing.row(name, FUSED)} for name in variants]
    for row in rows:  # how many times as fast the fused SRU is
        row["fused_speedup"] = 1 / row.pop("speedup")
        for key in ("speedup_p25", "speedup_p75"):
            row[f"fused_{key}"] = 1 / row.pop(key)
        row["aim"] = aims.get(row["variant"]) if threads == 1 else None
    return rows


def _repeated(call: Callable[[], object]) -> tuple[Callable[[], object], int]:
    """A call so long that clocks and caches do not decide, and how many calls it is."""
    call()
    start = time.perf_counter()
    call()
    count = max(1, math.ceil(_SMALL_S / max(time.perf_counter() - start, 1e-6)))

    def several() -> None:
        for _ in range(count):
            call()

    return several, count


def _gates(library: SruCpuLibrary, options: argparse.Namespace) -> list[Row]:
    torch.set_num_threads(2)
    cases = list(itertools.product(GATES, MEANS, ("zero", "random")))
    each = sum(math.prod(shape) for shape in GATE_SHAPES)
    seeds = range(options.seed, options.seed + math.ceil(options.gates / (each * len(cases))))
    counts: dict[tuple[str, str], FlipCount] = {}
    for (name, kind, beta), shape, seed in itertools.product(cases, GATE_SHAPES, seeds):
        found = _one_count(library, name, kind, beta, shape, seed)
        counts[name, kind] = counts.get((name, kind), FlipCount(0)) + found
    rows = [{"what": f"gates of {name}", "variant": kind, **vars(count)} for (name, kind), count in counts.items()]
    total = {key: sum(row[key] for row in rows) for key in ("gates", "flips", "unexplained", "ill_conditioned")}
    margin = max(row["largest_margin"] for row in rows)
    return [*rows, {"what": "gates of all", "variant": "all", **total, "largest_margin": margin}]


def _one_count(library: SruCpuLibrary, name: str, kind: str, beta: str, shape: tuple[int, ...], seed: int) -> FlipCount:
    # the same comparison whatever the data: where masks multiply x itself, the output shows it exactly
    variant = replace(VARIANTS[name], num_groups=16, fusion="hard", data="x")
    x, mean = subjects.noise(shape, seed), MEANS[kind]
    x = x.relu() if mean is None else x + mean
    generator = torch.Generator().manual_seed(seed)
    gamma = torch.randn(shape[1], generator=generator)
    offset = torch.randn(shape[1], generator=generator) if beta == "random" else torch.zeros(shape[1])
    gate = Gate(variant, gamma, offset)
    y = library.sru(
        x, list(gate.operator_inputs().values()),
        op=OPERATORS.index(variant.operator), num_groups=16, ddof=variant.ddof, eps_var=variant.eps_var,
        eps_std=variant.eps_std,
    )  # fmt: skip
    return compare_outputs(y, gate.apply(x), x, gate)[0]
