"""Gate of one SRU: variant, gamma and beta, and the cut, mask, margins and flips that follow from them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from scconv_deploy.errors import ModelError
from scconv_deploy.gate import margins
from scconv_deploy.gate.cut import tau
from scconv_deploy.gate.margins import GateForm, Margins
from scconv_deploy.gate.variant import (
    GateVariant,
    compare,
    cross_reconstruct,
    from_normalized,
    gate_weight,
    normalize,
    reweight,
)
from scconv_deploy.records.gates import FlipCount


@dataclass(frozen=True, eq=False)
class Gate:
    """Gate of one trained SRU; gamma and beta are detached.

    Data are ``[N, C, *]`` in float32, or in float64 to measure noise. The weight is float32's in both: the rounding of
    sum(gamma) is part of the model, not noise of a run.

    Attributes:
        gamma, beta: float32 ``[C]``; given with C elements in any shape.
        file_weight: gate weight ``[C]`` of a file that rounds sum(gamma) otherwise than the variant; else None.
    """

    variant: GateVariant
    gamma: Tensor
    beta: Tensor
    file_weight: Tensor | None = None

    def __post_init__(self) -> None:
        for name in ("gamma", "beta"):
            object.__setattr__(self, name, getattr(self, name).detach().float().reshape(-1))

    @property
    def channels(self) -> int:
        return self.gamma.numel()

    @cached_property
    def weight(self) -> Tensor:
        """W_gamma of the paper's Eq. 2, float32 ``[C]``."""
        return gate_weight(self.gamma, self.variant.weighting) if self.file_weight is None else self.file_weight

    @cached_property
    def form(self) -> GateForm:
        """Cut and sign of every channel, in float64 and then rounded; see :mod:`scconv_deploy.gate.cut`.

        Raises:
            ModelError: a parameter is not finite, or sum(gamma) is 0, so that the gate weight is not a number.
        """
        gamma, beta, weight = self.gamma.cpu(), self.beta.cpu(), self.weight.cpu()
        if not (torch.isfinite(gamma).all() and torch.isfinite(beta).all()):
            raise ModelError("gamma or beta is not finite, so no gate is defined.", "Check the checkpoint.")
        if not torch.isfinite(weight).all():
            raise ModelError(
                "sum(gamma) is 0, so the gate weight gamma / sum(gamma) is not a number.", "Check the checkpoint."
            )
        v = self.variant
        threshold = tau(v.threshold, v.comparison)
        g, b, w = (t.double().numpy() for t in (gamma, beta, weight))
        a = g * w
        sign = np.sign(a)
        constant_open = (b.astype(np.float32) * w.astype(np.float32)) >= np.float32(threshold)
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            cut = np.where(sign == 0, np.where(constant_open, -np.inf, np.inf), sign * (threshold - b * w) / a)
            cut_scale = np.where(sign == 0, 0.0, (np.abs(threshold / w) + np.abs(b)) / np.abs(g))
            return GateForm(
                num_groups=v.num_groups,
                ddof=v.ddof,
                eps_var=v.eps_var,
                eps_std=v.eps_std,
                uncentred=v.statistics == "group_norm",
                cut=cut.astype(np.float32),
                sign=sign.astype(np.float32),
                cut_scale=cut_scale,
            )

    def operator_inputs(self) -> dict[str, Tensor]:
        """The parameters of the variant's operator by name, in its order, float32 ``[C]`` each."""
        inputs = {"cut": torch.as_tensor(self.form.cut), "sign": torch.as_tensor(self.form.sign)}
        if self.variant.operator == "SRUNorm":
            inputs |= {"gamma": self.gamma.clone(), "beta": self.beta.clone()}
        elif self.variant.operator == "SRUSoft":
            weight = self.weight.double()
            inputs |= {"scale": (self.gamma.double() * weight).float(), "shift": (self.beta.double() * weight).float()}
        return inputs

    def normalize(self, x: Tensor) -> Tensor:
        """``n * gamma + beta``, ``[N, C, *]``."""
        return normalize(x, self.gamma.to(x.dtype), self.beta.to(x.dtype), self.variant)

    def sigmoid(self, x: Tensor) -> Tensor:
        """``sigmoid(z)``, which is compared with the threshold; ``[N, C, *]``."""
        return reweight(self.normalize(x), self.weight.to(x.dtype))

    def mask(self, x: Tensor) -> Tensor:
        """Gate mask in PyTorch's own arithmetic, which is the specification; bool ``[N, C, *]``."""
        return compare(self.sigmoid(x), self.variant)

    def apply(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """The whole SRU, ``[N, C, *]``.

        Args:
            mask: gates to use instead of the computed ones (replay), bool ``[N, C, *]``.
        """
        if mask is not None and self.variant.operator == "SRU":  # the output does not depend on the normalisation
            return cross_reconstruct(mask * x, (~mask) * x)
        return from_normalized(x, self.normalize(x), self.weight.to(x.dtype), self.variant, mask)

    def margins(self, x: Tensor) -> Margins:
        """Margin of every gate in float64, and how far rounding can move it."""
        return margins.margins(x.detach().numpy(), self.form)

    def count_flips(self, differs: Tensor, x: Tensor) -> FlipCount:
        """Sort the gates that differ into explained, unexplained and ill-conditioned ones.

        Args:
            differs: bool ``[N, C, *]``.
            x: the input both sides were given.
        """
        return margins.count_flips(differs.numpy(), x.detach().numpy(), self.form)
