"""Gates that the CUDA kernels' arithmetic decides otherwise than PyTorch, over more than 10^8 of them.

The header that the kernels compile (``trt_plugins/sru/sru_math.h``) runs on the CPU here, every sum in the order of the
kernels, which hangs on the layout alone. Each variant sees noise at several means and rectified noise, with beta zero
and random, in both layouts.
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
from tests.trt_plugins.reference import CHANNELS_LAST, LINEAR, Reference

SHAPES = ((4, 256, 28, 28), (1, 256, 56, 56))
LAYOUTS = {LINEAR: "NCHW", CHANNELS_LAST: "channels-last"}
INPUTS = {"mean 0": 0.0, "mean 10": 10.0, "mean 1000": 1000.0, "rectified": None}
BETAS = ("zero", "random")
_COLUMNS = {
    "variant": "variant",
    "layout": "layout",
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
    rows = list(itertools.product(VARIANTS, LAYOUTS, INPUTS))
    per_seed = len(rows) * len(BETAS) * sum(map(math.prod, SHAPES))
    seeds = range(options.seed, options.seed + math.ceil(options.gates / per_seed))
    with tempfile.TemporaryDirectory() as folder:
        reference = Reference(Path(folder))
        results = []
        for name, layout, kind in rows:
            count = FlipCount(0)
            for shape, beta, seed in itertools.product(SHAPES, BETAS, seeds):
                count += _one(reference, name, shape, layout, kind, beta, seed)
            results.append({"variant": name, "layout": LAYOUTS[layout], "input": kind, **vars(count)})
    everything = {"variant": "all", "layout": "all", "input": "all"}
    for key in ("gates", "flips", "unexplained", "ill_conditioned"):
        everything[key] = sum(row[key] for row in results)
    everything["largest_margin"] = max(row["largest_margin"] for row in results)
    write(options.results, [*results, everything], _COLUMNS, shapes=SHAPES, seeds=[seeds.start, seeds.stop - 1])


def _one(
    reference: Reference, name: str, shape: tuple[int, ...], layout: int, kind: str, beta: str, seed: int
) -> FlipCount:
    variant = VARIANTS[name]
    x, mean = subjects.noise(shape, seed), INPUTS[kind]
    x = x.relu() if mean is None else x + mean
    generator = torch.Generator().manual_seed(seed)
    gamma = torch.randn(shape[1], generator=generator)
    offset = torch.randn(shape[1], generator=generator) if beta == "random" else torch.zeros(shape[1])
    variant = replace(variant, num_groups=16)
    gate = Gate(variant, gamma, offset)
    _, opened = reference.sru(x, gate.operator_inputs(), variant, layout)
    return gate.count_flips(opened != gate.mask(x), x)
