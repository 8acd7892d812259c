"""Which flips rounding explains: :mod:`scconv_deploy.margins`, for tensors and variants. The bound is written there."""

from __future__ import annotations

import torch
from torch import Tensor

from scconv_deploy import margins
from scconv_deploy.gate.cut import GateParameters
from scconv_deploy.gate.variant import GateVariant
from scconv_deploy.margins import ILL_CONDITIONED, UNIT_ROUNDOFF, GateForm
from scconv_deploy.outcomes import FlipCount

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
