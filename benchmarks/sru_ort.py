"""One SRU on the CPU: what a user gets today beside our artifact.

Time, and what it is worth: how many gates and outputs differ from PyTorch eager on the same input. An SRU only copies,
zeroes and adds, so an output differs by more than rounding exactly where a gate changed.
"""

from __future__ import annotations

import argparse

import torch

from benchmarks import subjects
from benchmarks.gates import count_changed, eager_gates, ort_gates
from benchmarks.harness import interleave, write
from tests.wild import OriginalSRU

SHAPE = (8, 256, 56, 56)
BASELINE = "naive export in ORT"
RULER = "one pass over x (read, add 1, write)"
"""What memory allows in this run: an SRU needs at least two reads and one write. No SRU, so no gates to compare."""
_COLUMNS = {
    "variant": "variant",
    "median": "median_s",
    "min": "min_s",
    "p25": "p25_s",
    "p75": "p75_s",
    "faster than naive": "speedup",
    "gates changed": "gates_changed",
    "outputs changed": "outputs_changed",
    "max abs error": "max_abs_error",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rounds", type=int, default=150)
    parser.add_argument("--warmup", type=int, default=5)


def run(options: argparse.Namespace) -> None:
    torch.manual_seed(options.seed)
    model, x = OriginalSRU(SHAPE[1]).eval(), subjects.noise(SHAPE, options.seed)
    naive, export = subjects.naive_onnx(model, x)
    files = {
        BASELINE: naive,
        "ours (multiply) in ORT": subjects.our_onnx(model, x, "multiply"),
        "ours (where) in ORT": subjects.our_onnx(model, x, "where"),
    }
    variants = {name: subjects.in_ort(data, x) for name, data in files.items()}
    variants["PyTorch eager"] = subjects.in_torch(model, x)
    compiled, compile_s = subjects.compiled(model, x, "torch.compile")
    if compiled is not None:
        variants["torch.compile"] = compiled
    ruler = torch.empty_like(x)
    variants[RULER] = lambda: torch.add(x, 1.0, out=ruler)
    timing = interleave(variants, options.rounds, options.warmup)

    expected, gates = variants["PyTorch eager"](), eager_gates(model, x)
    rows = []
    for name, call in variants.items():
        row, y = timing.row(name, BASELINE), call()
        if name != RULER:
            error = (y - expected).abs()
            row["outputs_changed"] = int((error > 1e-6 * torch.maximum(y.abs(), expected.abs())).sum())
            row["max_abs_error"] = float(error.max())
        if name in files:
            row["gates_changed"] = count_changed(ort_gates(files[name], x), gates)
        rows.append(row)
    write(options.results, rows, _COLUMNS, shape=SHAPE, seed=options.seed, naive=vars(export), compile_s=compile_s,
          gates=expected.numel(), warmup=options.warmup)  # fmt: skip
