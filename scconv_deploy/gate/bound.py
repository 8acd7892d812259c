"""Which flips rounding explains, and which it does not.

Two implementations that are both right still sum in different orders. With u = 2**-24 and L elements in a group,
each computes the margin ``sign * (x - mean) - s * cut`` to within half of ::

    B = u * [ k * mean|x| + 2 * |x - mean| + (k + 4) * s * reach ]        k = log2(L) + 4
      + u * 4 * (|x| + |mean| + s * reach)                                only nn.GroupNorm

- ``k * mean|x|``: the mean by pairwise summation (error log2(L) * u * mean|x|), rounded once more;
- ``|x - mean|``: one subtraction;
- ``s * reach``: s by the same sums, and the rounding of the terms whose difference the cut is;
- nn.GroupNorm is uncentred inside PyTorch (``x * scale + shift``) and takes its variance in float32.

Naive summation is not covered: a runtime that sums a group in one go is less exact than this, and fails.

A flip with ``|margin| <= B`` (margin in float64) is explained; every other flip is a fault. Groups with s below
``1e-6 * |mean|`` hold no answer even in PyTorch: their flips are counted apart and not judged.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from scconv_deploy.gate.cut import GateParameters, statistics
from scconv_deploy.gate.variant import GateVariant

UNIT_ROUNDOFF = 2.0**-24
ILL_CONDITIONED = 1e-6


def margins_and_bounds(x: Tensor, parameters: GateParameters, variant: GateVariant) -> tuple[Tensor, Tensor, Tensor]:
    """Margin of every gate, the bound of what rounding can move it by, and where the group is ill-conditioned.

    Args:
        x: float32 ``[N, C, H, W]``.

    Returns:
        margin and bound, float64 ``[N, C, H, W]``, in x's units; ill-conditioned, bool ``[N, C, H, W]``.
    """
    x64 = x.double()
    mean, s = statistics(x64, variant)
    groups = x64.reshape(x.shape[0], variant.num_groups, -1)
    centred = (groups - mean).reshape(x.shape)
    spread = s.expand_as(groups).reshape(x.shape)
    k = math.log2(groups.shape[2]) + 4

    def channels(values) -> Tensor:
        return torch.as_tensor(values).double().reshape(1, -1, 1, 1)

    sign, cut, reach = channels(parameters.sign), channels(parameters.cut), channels(parameters.reach)
    size = groups.abs().mean(dim=2, keepdim=True).expand_as(groups).reshape(x.shape)
    bound = k * size + 2 * centred.abs() + (k + 4) * spread * reach
    if variant.statistics == "group_norm":
        centre = mean.abs().expand_as(groups).reshape(x.shape)
        bound = bound + 4 * (x64.abs() + centre + spread * reach)
    ill = (s < ILL_CONDITIONED * mean.abs()).expand_as(groups).reshape(x.shape)
    return sign * centred - spread * cut, UNIT_ROUNDOFF * bound, ill


@dataclass(frozen=True)
class FlipCount:
    """Gates that differ between two implementations fed the same input.

    Attributes:
        gates: how many were compared.
        flips: how many differ in a well-conditioned group.
        unexplained: how many of the flips have a margin beyond the rounding bound. Anything but 0 is a fault.
        ill_conditioned: differing gates in groups with ``s < 1e-6 * |mean|``; not judged.
        channels: how many channels hold a flip.
        largest_margin: the largest ``|margin| / s`` of a flip, 0.0 without one.
    """

    gates: int
    flips: int = 0
    unexplained: int = 0
    ill_conditioned: int = 0
    channels: int = 0
    largest_margin: float = 0.0

    def __add__(self, other: FlipCount) -> FlipCount:
        """The sum over two samples; channels is the larger of both, for which ones they were is not kept."""
        return FlipCount(
            self.gates + other.gates,
            self.flips + other.flips,
            self.unexplained + other.unexplained,
            self.ill_conditioned + other.ill_conditioned,
            max(self.channels, other.channels),
            max(self.largest_margin, other.largest_margin),
        )


def count_flips(differs: Tensor, x: Tensor, parameters: GateParameters, variant: GateVariant) -> FlipCount:
    """Sort the gates that differ into explained, unexplained and ill-conditioned ones.

    Args:
        differs: bool ``[N, C, H, W]``.
        x: the input both sides were given, float32 ``[N, C, H, W]``.
    """
    if not differs.any():
        return FlipCount(gates=differs.numel())
    margin, bound, ill = margins_and_bounds(x, parameters, variant)
    flips = differs & ~ill
    if not flips.any():
        return FlipCount(gates=differs.numel(), ill_conditioned=int(differs.sum()))
    _, s = statistics(x.double(), variant)
    groups_shape = (x.shape[0], variant.num_groups, -1)
    relative = (margin.reshape(groups_shape).abs() / s).reshape(x.shape)
    return FlipCount(
        gates=differs.numel(),
        flips=int(flips.sum()),
        # not (<=), so that a margin that is not a number counts as unexplained
        unexplained=int((flips & ~(margin.abs() <= bound)).sum()),
        ill_conditioned=int((differs & ill).sum()),
        channels=int(flips.any(dim=0).flatten(1).any(dim=1).sum()),
        largest_margin=float(relative[flips].max()),
    )
