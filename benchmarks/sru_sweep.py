"""A small sweep of the fused SRU, for compute-sanitizer and Nsight Compute; a child process of ``sru_cuda``.

It launches no kernel but ours, since PyTorch's would take the tools hours: PyTorch only allocates and copies.
``--profile`` runs the headline cases instead, each once, between two marks that the profiler's list shows.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.sru_aims import HEADLINE
from benchmarks.sru_times import LAYOUTS, TOLERANCE, VARIANT, Case, cases, draw
from scconv_deploy.gate.flips import compare_outputs
from scconv_deploy.gate.gate import Gate
from scconv_deploy.gate.variant import VARIANTS
from scconv_deploy.trt_plugins.library import ALGORITHMS, SruLibrary, SruSettings

SIZES = ((2, 16, 14, 14, 4), (2, 64, 7, 7, 8), (1, 32, 56, 56, 2), (2, 24, 5, 8, 16))
"""N, C, H, W and groups: even pieces, odd ones, a pair larger than a block's shared memory, groups across channels."""
OPERATORS = ("groupbn-hard", "groupbn-hard-normalized", "groupnorm-soft")
MARK = "spin_kernel"
"""Of torch.cuda._sleep."""


def sweep(library: SruLibrary, device: str) -> tuple[int, int]:
    """How many calls gave PyTorch's gates and values, and how many there were."""
    right = count = 0
    for (*shape, groups), name, dtype in itertools.product(SIZES, OPERATORS, TOLERANCE):
        if VARIANTS[name].statistics == "group_norm" and shape[1] % groups:
            continue  # torch.nn.GroupNorm knows no groups that straddle channels
        generator = torch.Generator().manual_seed(count)
        variant = replace(VARIANTS[name], num_groups=groups)
        gate = Gate(variant, *(torch.randn(shape[1], generator=generator) for _ in range(2)))
        data = torch.randn(shape, generator=generator).to(dtype)
        expected = gate.apply(data.float())
        inputs = [p.to(device) for p in gate.operator_inputs().values()]
        for layout, algorithm in itertools.product(LAYOUTS, ALGORITHMS[1:]):
            if layout == "NHWC" and shape[1] % groups:
                continue  # the kernels refuse it, so a copy would be made first
            x = data.contiguous(memory_format=LAYOUTS[layout]).to(device)
            y = library.sru(x, inputs, SruSettings.of(variant, algorithm)).cpu()
            flips, distance = compare_outputs(y, expected, data.float(), gate)
            good = flips.unexplained == 0 and distance < TOLERANCE[dtype]
            if not good:
                print(f"wrong: {shape} {groups} {name} {dtype} {layout} {algorithm}: {distance:.1e}", flush=True)
            right, count = right + good, count + 1
    return right, count


def profiled() -> list[Case]:
    """The cases that ``--profile`` runs, in its order."""
    return [case for case in cases() if case.size in HEADLINE]


def profile(library: SruLibrary, seed: int) -> None:
    """Run the headline cases under a profiler that begins at cudaProfilerStart, each after a cache without them."""
    other = torch.zeros(256 << 20, dtype=torch.uint8, device="cuda")
    for case in profiled():
        x, gate = draw(case, seed, "cuda")
        inputs = [p.cuda() for p in gate.operator_inputs().values()]
        library.sru(x, inputs, SruSettings.of(VARIANT))
        other.max()  # reads, so that no kernel below pays for what others have written
        torch.cuda.synchronize()
        torch.cuda.profiler.start()
        torch.cuda._sleep(1)
        library.sru(x, inputs, SruSettings.of(VARIANT))
        torch.cuda.synchronize()
        torch.cuda.profiler.stop()


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sru_sweep", description=__doc__)
    parser.add_argument("--library", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--profile", action="store_true")
    options = parser.parse_args(arguments)
    library = SruLibrary(options.library)
    if options.profile:
        profile(library, options.seed)
        return 0
    right, count = sweep(library, "cuda")
    print(f"{right} of {count} calls right")
    return int(right < count)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
