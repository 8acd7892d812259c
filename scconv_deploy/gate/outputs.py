"""Reading gates from outputs: what an implementation decided, where its mask cannot be seen."""

from __future__ import annotations

import torch
from torch import Tensor

from scconv_deploy.gate.bound import FlipCount, count_flips, margins_and_bounds
from scconv_deploy.gate.cut import GateParameters
from scconv_deploy.gate.variant import GateVariant, normalize


def relative_l2(y: Tensor, expected: Tensor) -> float:
    """``|y - expected| / |expected|``, accumulated in float64."""
    return float((y.double() - expected.double()).norm() / expected.double().norm().clamp_min(1e-300))


def compare_outputs(
    y: Tensor,
    expected: Tensor,
    x: Tensor,
    gamma: Tensor,
    beta: Tensor,
    parameters: GateParameters,
    variant: GateVariant,
) -> tuple[FlipCount, float]:
    """Flips between two SRUs fed the same x, read from their outputs, and how far the other elements are apart.

    A gate that changes moves its outputs by at least 0.4 of the data it lets through, rounding by 1e-6 of it.

    Args:
        y, expected, x: ``[N, C, H, W]``, the outputs and the gate's input.

    Returns:
        the flips, and the relative L2 distance of the elements without one.
    """
    if torch.equal(y, expected):
        return FlipCount(y.numel()), 0.0
    data = (x if variant.data == "x" else normalize(x, gamma, beta, variant)).abs()
    half = x.shape[1] // 2
    size = data[:, :half] + data[:, half:]
    size = torch.cat([size, size], 1)
    floor = 1e-6 * data.square().mean().sqrt()
    changed = ~((y - expected).abs() <= 1e-4 * size + floor)
    pair = changed[:, :half] | changed[:, half:]
    margin, bound, _ = margins_and_bounds(x, parameters, variant)
    sureness = margin.abs() / bound
    lower_is_nearer = sureness[:, :half] <= sureness[:, half:]
    differs = torch.cat([pair & lower_is_nearer, pair & ~lower_is_nearer], 1)
    same = ~torch.cat([pair, pair], 1)
    return count_flips(differs, x, parameters, variant), relative_l2(y[same], expected[same])
