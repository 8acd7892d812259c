"""Recognition where Python's and torch's sum(gamma) round apart: SRUs of 32 channels as the original code draws them.

Of the draws, those whose two sums differ by more than 2e-6 of the sum are recognised, written with either sum. None may
be refused, taken for another variant or for the other order, and no gate may change.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from benchmarks.harness import write
from scconv_deploy.gate.recognize import recognize
from scconv_deploy.gate.swap import swap
from scconv_deploy.gate.variant import VARIANTS, Weighting, gate_weight
from tests.gate.plain import Choices, PlainSRU

CHANNELS, GROUPS, SIZE, THRESHOLDS = 32, 16, 8, (0.5, 0.45)
APART = 2e-6
_AT_ONCE = 20
"""SRUs in one network: the first of them is ranked, the others are tried as what it was, as in a user's network."""
_WEIGHTING: dict[str, Weighting] = {"python": "sum", "torch": "torch_sum"}
_COLUMNS = {
    "sum": "order",
    "t": "threshold",
    "draws": "draws",
    "sums apart": "apart",
    "right": "right",
    "refused": "refused",
    "another variant": "another",
    "outputs": "outputs",
    "outputs changed": "changed",
    "time": "elapsed_s",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--draws", type=int, default=20_000, help="of gamma (default 20,000)")


def run(options: argparse.Namespace) -> int:
    gammas = [draw(seed) for seed in range(options.seed, options.seed + options.draws)]
    apart = [gamma for gamma in gammas if distance(gamma) > APART]
    rows = [
        {"order": order, "threshold": t, "draws": len(gammas), "apart": len(apart), **_recognised(apart, order, t)}
        for order in _WEIGHTING
        for t in THRESHOLDS
    ]
    write(options.results, rows, _COLUMNS, shape=(1, CHANNELS, SIZE, SIZE), limit=APART)
    return int(any(row["refused"] or row["another"] or row["changed"] for row in rows))


def draw(seed: int) -> Tensor:
    return torch.randn(CHANNELS, generator=torch.Generator().manual_seed(seed))


def distance(gamma: Tensor) -> float:
    """Of the two sums, relatively; through the weights, which are what an SRU computes with."""
    ours, theirs = (gate_weight(gamma, weighting) for weighting in _WEIGHTING.values())
    return float(((ours - theirs) / ours).abs().max())


def _recognised(gammas: Sequence[Tensor], order: str, threshold: float) -> dict[str, float]:
    expected = replace(VARIANTS["groupbn-hard"], threshold=threshold, weighting=_WEIGHTING[order])
    choices = Choices(CHANNELS, GROUPS, weight=order, threshold=threshold, beta=0.0)
    counts = dict.fromkeys(("right", "refused", "another", "outputs", "changed"), 0)
    x = torch.randn(1, CHANNELS, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    start = time.perf_counter()
    for first in range(0, len(gammas), _AT_ONCE):
        model = nn.Sequential(*(PlainSRU(choices) for _ in gammas[first : first + _AT_ONCE]))
        with torch.no_grad():
            for module, gamma in zip(model, gammas[first:], strict=False):
                module.gamma.copy_(gamma.reshape(-1, 1, 1))
        recognition = recognize(model, (x,), {})
        swapped = swap(model, recognition)
        counts["refused"] += len(recognition.refused)
        counts["right"] += sum(found.gate.variant == expected for found in recognition.srus)
        counts["another"] += sum(found.gate.variant != expected for found in recognition.srus)
        with torch.no_grad():
            for one, other in zip(model, swapped, strict=True):
                counts["changed"] += int((one(x) != other(x)).sum())
                counts["outputs"] += x.numel()
    return {**counts, "elapsed_s": time.perf_counter() - start}
