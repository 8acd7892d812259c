"""Gates that differ from PyTorch eager on the same input, over seeds, means of the input, and betas.

A flip is explained when rounding can move the gate's margin that far, see ``scconv_deploy.gate.margins``; any other is
a fault. The formula of the cut is judged with torch's own statistics: what remains then is the formula's own error.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import replace

import torch

from benchmarks import subjects
from benchmarks.gates import eager_gates, ort_gates
from benchmarks.harness import write
from scconv_deploy.gate.cut import open_by_cut
from scconv_deploy.gate.gate import Gate
from scconv_deploy.gate.variant import VARIANTS
from scconv_deploy.records.gates import FlipCount
from tests.wild import OriginalSRU

SHAPE = (8, 256, 56, 56)
MEANS = (0, 10, 1000)
BETAS = ("zero", "random")
VARIANT = VARIANTS["groupbn-hard"]
_UNWEIGHTED = replace(VARIANT, weighting="none")
_COLUMNS = {
    "beta": "beta",
    "mean": "mean",
    "implementation": "implementation",
    "gates": "gates",
    "flips": "flips",
    "unexplained": "unexplained",
    "ill-conditioned": "ill_conditioned",
    "largest margin of a flip, in s": "largest_margin",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--gates", type=float, default=5e7, help="for each beta and mean (default 5e7)")


def run(options: argparse.Namespace) -> None:
    seeds = range(options.seed, options.seed + math.ceil(options.gates / math.prod(SHAPE)))
    counts: dict[tuple[str, int, str], FlipCount] = {}
    for beta in BETAS:
        for seed in seeds:
            for (mean, name), count in _one_model(beta, seed).items():
                key = (beta, mean, name)
                counts[key] = counts.get(key, FlipCount(0)) + count
    rows = [
        {"beta": beta, "mean": mean, "implementation": name, **vars(count)}
        for (beta, mean, name), count in sorted(counts.items(), key=lambda item: (item[0][0] != "zero", *item[0][1:]))
    ]
    write(options.results, rows, _COLUMNS, shape=SHAPE, seeds=[seeds.start, seeds.stop - 1])


def _one_model(beta: str, seed: int) -> dict[tuple[int, str], FlipCount]:
    """One draw of gamma (normal, as the original code initialises it) and beta, fed one noise tensor at every mean."""
    torch.manual_seed(seed)
    model = OriginalSRU(SHAPE[1]).eval()
    if beta == "random":
        torch.nn.init.normal_(model.gn.beta)
    noise = subjects.noise(SHAPE, seed)
    naive, _ = subjects.naive_onnx(model, noise)
    files = {
        "naive export in ORT": naive,
        "ours in ORT": subjects.our_onnx(model, noise),
        "ours (where) in ORT": subjects.our_onnx(model, noise, "where"),
    }
    gate = Gate(VARIANT, model.gn.gamma, model.gn.beta)
    folded = Gate(_UNWEIGHTED, gate.gamma * gate.weight, gate.beta * gate.weight)
    found = {}
    for mean in MEANS:
        x = noise + mean
        (expected,) = eager_gates(model, x)
        masks = {name: ort_gates(data, x)[0] for name, data in files.items()}
        masks["the cut, torch's statistics"] = open_by_cut(x, gate.form)
        masks["the cut of gamma * w folded, torch's statistics"] = open_by_cut(x, folded.form)
        for name, mask in masks.items():
            found[mean, name] = gate.count_flips(mask != expected, x)
    return found
