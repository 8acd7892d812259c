"""A whole ScConv network on the CPU: what a user gets today beside our artifact.

The network is plain user code (tests/wild.py) with the weights of the zoo's. Every variant runs free: convolutions
round differently in each runtime, which moves gates downstream, so some gates change in any of them.
"""

from __future__ import annotations

import argparse

import torch

from benchmarks import subjects
from benchmarks.gates import count_changed, eager_gates, ort_gates
from benchmarks.harness import Row, interleave, write
from scconv_deploy.verification.metrics import compare
from scconv_deploy.zoo import MODELS

BASELINE = "naive export in ORT"
_COLUMNS = {
    "batch": "batch",
    "variant": "variant",
    "median": "median_s",
    "min": "min_s",
    "p25": "p25_s",
    "p75": "p75_s",
    "faster than naive": "speedup",
    "gates changed": "gates_changed",
    "logits: relative L2": "relative_l2",
    "max abs": "max_abs_error",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--network", choices=("resnet50", "resnet20"), default="resnet50")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out (it compiles for minutes)")


def run(options: argparse.Namespace) -> None:
    rows = [row for batch in options.batches for row in _batch(options, batch)]
    write(options.results, rows, _COLUMNS, network=options.network, seed=options.seed, warmup=options.warmup)


def _batch(options: argparse.Namespace, batch: int) -> list[Row]:
    shape = (batch, *MODELS[options.network].input_shape[1:])
    plain, zoo = subjects.plain_network(options.network, options.seed)
    x = subjects.noise(shape, options.seed)
    naive, export = subjects.cached_naive_onnx(plain, x)
    files = {BASELINE: naive, "ours in ORT": subjects.our_onnx(plain, x)}
    variants = {name: subjects.in_ort(data, x) for name, data in files.items()}
    variants["PyTorch eager, user code"] = subjects.in_torch(plain, x)
    variants["PyTorch eager, scconv_deploy.nn"] = subjects.in_torch(zoo, x)
    compile_s = None
    if not options.no_compile:
        torch._dynamo.reset()  # else the second batch is compiled for any batch
        compiled, compile_s = subjects.compiled(plain, x, "torch.compile")
        if compiled is not None:
            variants["torch.compile, user code"] = compiled
    timing = interleave(variants, options.rounds, options.warmup)

    expected, gates = subjects.in_torch(plain, x)().numpy(), eager_gates(plain, x)
    common = {"shape": shape, "gates": sum(mask.numel() for mask in gates), "naive": vars(export)}
    rows = []
    for name, call in variants.items():
        found = compare(call().numpy(), expected)
        row = {"batch": batch} | timing.row(name, BASELINE) | {"metadata": common | {"compile_s": compile_s}}
        row |= {"relative_l2": found.relative_l2, "max_abs_error": found.max_abs, "top1": found.top1_agreement}
        if name in files:
            row["gates_changed"] = count_changed(ort_gates(files[name], x), gates)
        rows.append(row)
    return rows
