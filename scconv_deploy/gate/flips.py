"""Gate flips read from an SRU's output."""

from __future__ import annotations

import torch
from torch import Tensor

from scconv_deploy.gate.gate import Gate
from scconv_deploy.gate.variant import per_channel
from scconv_deploy.records.gates import FlipCount


def relative_l2(y: Tensor, expected: Tensor) -> float:
    """``|y - expected| / |expected|``, accumulated in float64."""
    return float((y.double() - expected.double()).norm() / expected.double().norm().clamp_min(1e-300))


_ROUNDING = {torch.float16: 2**-9, torch.bfloat16: 2**-6}
"""Largest change of an output by rounding, relative to the data of both channels: twice a unit in the last place."""
_MASKED, _COMPUTED = 1e-6, 1e-4
"""The same in float32: where a mask multiplies x, an output is a sum of two numbers, rounded once; else its data are
computed, and lose digits where the mean is large."""


def compare_outputs(y: Tensor, expected: Tensor, x: Tensor, gate: Gate) -> tuple[FlipCount, float]:
    """Flips between two SRUs on the same x, and the relative L2 of their values; see :func:`changed_gates`."""
    differs, distance = changed_gates(y, expected, x, gate)
    return gate.count_flips(differs, x), distance


def changed_gates(y: Tensor, expected: Tensor, x: Tensor, gate: Gate) -> tuple[Tensor, float]:
    """Gates that an SRU decided otherwise than its variant, read from its output.

    Two gates, half of the channels apart, make two outputs; of their four combinations the nearest one counts. A flip
    moves its outputs by at least 0.4 of the gated data, rounding by 1e-6 of them (more where the data are computed, or
    of 16 bits). So a flip on data much smaller than its partner's cannot be told from rounding.

    Args:
        y: the output, ``[N, C, *]``; float16 or bfloat16 where that is the data's type, else float32.
        expected: the variant's, for the same x.
        x: the gate's input.

    Returns:
        bool ``[N, C, *]``, and the relative L2 distance of y from the variant with the gates so changed.
    """
    rounding = _ROUNDING.get(y.dtype, _MASKED if gate.variant.operator == "SRU" else _COMPUTED)
    y = y.to(expected.dtype)
    differs = torch.zeros_like(y, dtype=torch.bool)
    if torch.equal(y, expected):
        return differs, 0.0
    data = x if gate.variant.data == "x" else gate.normalize(x)
    size = _both_halves(data.abs())
    # what a mask lets through is exact however small it is; what was computed carries its sums' rounding
    floor = 0.0 if rounding == _MASKED else 1e-6 * float(data.square().mean().sqrt())
    apart = (y - expected).abs()
    suspect = _both_halves((apart > rounding * size + floor).float()) > 0
    if suspect.any():
        mask = gate.mask(x)
        lower = per_channel(torch.arange(y.shape[1]) < y.shape[1] // 2, y)
        error = _both_halves(apart)
        for pattern in (lower, ~lower, lower | ~lower):
            flips = pattern & suspect
            other = gate.apply(x, mask ^ flips)
            nearer = _both_halves((y - other).abs()) < error
            error = torch.where(nearer, _both_halves((y - other).abs()), error)
            differs = torch.where(nearer, flips, differs)
            expected = torch.where(nearer, other, expected)
    return differs, relative_l2(y, expected)


def _both_halves(values: Tensor) -> Tensor:
    """The sum over the two channels that cross, at each of them."""
    half = values.shape[1] // 2
    total = values[:, :half] + values[:, half:]
    return torch.cat([total, total], 1)
