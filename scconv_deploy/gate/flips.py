"""Gate flips of tensors: how many, and which of them rounding explains (:mod:`scconv_deploy.gate.margins`)."""

from __future__ import annotations

import torch
from torch import Tensor

from scconv_deploy.gate import margins
from scconv_deploy.gate.cut import GateParameters
from scconv_deploy.gate.margins import UNIT_ROUNDOFF, GateForm
from scconv_deploy.gate.variant import GateVariant, from_normalized, normalize, open_mask, per_channel
from scconv_deploy.records.gates import ILL_CONDITIONED, FlipCount

__all__ = ["ILL_CONDITIONED", "UNIT_ROUNDOFF", "FlipCount", "count_flips", "gate_form", "margins_and_bounds"]


def gate_form(parameters: GateParameters, variant: GateVariant) -> GateForm:
    """What the margins of a variant depend on."""
    return GateForm(
        variant.num_groups,
        variant.ddof,
        variant.eps_var,
        variant.eps_std,
        variant.statistics == "group_norm",
        parameters.cut,
        parameters.sign,
        parameters.reach,
    )


def margins_and_bounds(x: Tensor, parameters: GateParameters, variant: GateVariant) -> tuple[Tensor, Tensor, Tensor]:
    """Margin of every gate, the bound of what rounding can move it by, and where the group is ill-conditioned.

    Args:
        x: float32 ``[N, C, *]``.

    Returns:
        margin and bound, float64 ``[N, C, *]``, in x's units; ill-conditioned, bool ``[N, C, *]``.
    """
    found = margins.margins(x.detach().numpy(), gate_form(parameters, variant))
    return torch.from_numpy(found.margin), torch.from_numpy(found.bound), torch.from_numpy(found.ill.copy())


def count_flips(differs: Tensor, x: Tensor, parameters: GateParameters, variant: GateVariant) -> FlipCount:
    """Sort the gates that differ into explained, unexplained and ill-conditioned ones.

    Args:
        differs: bool ``[N, C, *]``.
        x: the input both sides were given, float32 ``[N, C, *]``.
    """
    return margins.count_flips(differs.numpy(), x.detach().numpy(), gate_form(parameters, variant))


def relative_l2(y: Tensor, expected: Tensor) -> float:
    """``|y - expected| / |expected|``, accumulated in float64."""
    return float((y.double() - expected.double()).norm() / expected.double().norm().clamp_min(1e-300))


_ROUNDING = {torch.float16: 2**-9, torch.bfloat16: 2**-6}
"""How far rounding may move an output, relative to the data of both channels: twice a unit in the last place."""
_MASKED, _COMPUTED = 1e-6, 1e-4
"""The same in float32: where a mask multiplies x, an output is a sum of two numbers, rounded once; else its data are
computed, and lose digits where the mean is large."""


def compare_outputs(
    y: Tensor,
    expected: Tensor,
    x: Tensor,
    gamma: Tensor,
    beta: Tensor,
    parameters: GateParameters,
    variant: GateVariant,
) -> tuple[FlipCount, float]:
    """Flips between two SRUs fed the same x, and how far their values are apart; see :func:`changed_gates`."""
    differs, distance = changed_gates(y, expected, x, gamma, beta, variant)
    return count_flips(differs, x, parameters, variant), distance


def changed_gates(
    y: Tensor, expected: Tensor, x: Tensor, gamma: Tensor, beta: Tensor, variant: GateVariant
) -> tuple[Tensor, float]:
    """Which gates an SRU decided differently than its variant, read from its output.

    Two gates, a half of the channels apart, make two outputs: of the four ways that they can stand, the nearest one
    counts. A gate that changes moves its outputs by at least 0.4 of the data it lets through, rounding by 1e-6 of it
    (by more where the data are computed, or of 16 bits): a gate of data much smaller than its partner's cannot be told
    from rounding.

    Args:
        y: the output, ``[N, C, *]``; float16 or bfloat16 where that is the data's type, else float32.
        expected: the variant's, for the same x.
        x: the gate's input.

    Returns:
        bool ``[N, C, *]``, and the relative L2 distance of y from the variant with the gates so changed.
    """
    masked = variant.fusion == "hard" and variant.data == "x"
    rounding = _ROUNDING.get(y.dtype, _MASKED if masked else _COMPUTED)
    y = y.to(expected.dtype)
    differs = torch.zeros_like(y, dtype=torch.bool)
    if torch.equal(y, expected):
        return differs, 0.0
    normalized = normalize(x, gamma, beta, variant)
    data = x if variant.data == "x" else normalized
    size = _both_halves(data.abs())
    floor = 1e-6 * data.square().mean().sqrt()
    apart = (y - expected).abs()
    suspect = _both_halves((apart > rounding * size + floor).float()) > 0
    if suspect.any():
        mask = open_mask(x, gamma, beta, variant)
        lower = per_channel(torch.arange(y.shape[1]) < y.shape[1] // 2, y)
        error = _both_halves(apart)
        for pattern in (lower, ~lower, lower | ~lower):
            flips = pattern & suspect
            other = from_normalized(x, normalized, gamma, variant, mask ^ flips)
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
