"""Gates that the CUDA kernels' arithmetic decides otherwise than PyTorch, over more than 10^8 of them.

The header that the kernels compile (``trt_plugins/sru/sru_math.h``) runs on the CPU here, every sum in the order of the
kernels. Each variant sees noise at several means and rectified noise, with beta zero and random, on every algorithm.
"""

from __future__ import annotations

import argparse
import itertools
import math
import tempfile
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks import subjects
from benchmarks.harness import write
from scconv_deploy.gate.gate import Gate
from scconv_deploy.gate.variant import VARIANTS
from scconv_deploy.records.gates import FlipCount
from tests.trt_plugins.reference import GENERAL, ON_CHIP, SPLIT, Reference

SHAPES = {ON_CHIP: (4, 256, 28, 28), SPLIT: (1, 256, 56, 56), GENERAL: (1, 256, 56, 56)}
ALGORITHMS = {ON_CHIP: "on chip", SPLIT: "split", GENERAL: "general"}
INPUTS = {"mean 0": 0.0, "mean 10": 10.0, "mean 1000": 1000.0, "rectified": None}
BETAS = ("zero", "random")
_COLUMNS = {
    "variant": "variant",
    "algorithm": "algorithm",
    "input": "input",
    "gates": "gates",
    "flips": "flips",
    "unexplained": "unexplained",
    "ill-conditioned": "ill_conditioned",
    "largest margin of a flip, in s": "largest_margin",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--gates", type=float, default=1.05e8, help="over all rows (default 1.05e8)")


def run(options: argparse.Namespace) -> None:
    rows = list(itertools.product(VARIANTS, ALGORITHMS, INPUTS))
    per_seed = sum(math.prod(SHAPES[algorithm]) for _, algorithm, _ in rows) * len(BETAS)
    seeds = range(options.seed, options.seed + math.ceil(options.gates / per_seed))
    with tempfile.TemporaryDirectory() as folder:
        reference = Reference(Path(folder))
        results = []
        for name, algorithm, kind in rows:
            count = FlipCount(0)
            for beta, seed in itertools.product(BETAS, seeds):
                count += _one(reference, name, algorithm, kind, beta, seed)
            results.append({"variant": name, "algorithm": ALGORITHMS[algorithm], "input": kind, **vars(count)})
    everything = {"variant": "all", "algorithm": "all", "input": "all"}
    for key in ("gates", "flips", "unexplained", "ill_conditioned"):
        everything[key] = sum(row[key] for row in results)
    everything["largest_margin"] = max(row["largest_margin"] for row in results)
    shapes = {ALGORITHMS[algorithm]: shape for algorithm, shape in SHAPES.items()}
    write(options.results, [*results, everything], _COLUMNS, shapes=shapes, seeds=[seeds.start, seeds.stop - 1])


def _one(reference: Reference, name: str, algorithm: int, kind: str, beta: str, seed: int) -> FlipCount:
    variant, shape = VARIANTS[name], SHAPES[algorithm]
    x, mean = subjects.noise(shape, seed), INPUTS[kind]
    x = x.relu() if mean is None else x + mean
    generator = torch.Generator().manual_seed(seed)
    gamma = torch.randn(shape[1], generator=generator)
    offset = torch.randn(shape[1], generator=generator) if beta == "random" else torch.zeros(shape[1])
    variant = replace(variant, num_groups=16)
    gate = Gate(variant, gamma, offset)
    _, opened = reference.sru(x, gate.operator_inputs(), variant, algorithm)
    return gate.count_flips(opened != gate.mask(x), x)
