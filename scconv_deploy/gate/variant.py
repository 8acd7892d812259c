"""Variants of the SRU and their formula in PyTorch: the specification of every other form.

:class:`scconv_deploy.gate.gate.Gate` is one gate with its parameters; the functions here also serve modules that train.

Symbols of the paper (Li, Wen, He, CVPR 2023, section 3.1) and their names here: x the input ``[N, C, *]`` (in the
paper ``[N, C, H, W]``, of volumes ``[N, C, D, H, W]``, of signals ``[N, C, L]``), gamma and beta the affine parameters
of the group normalisation, W_gamma (Eq. 2) the ``gate_weight``, W_1 and W_2 (Eq. 3) the open and the closed part, Eq. 4
the :func:`cross_reconstruct`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from scconv_deploy.errors import ConfigurationError
from scconv_deploy.gate.gamma_sum import sum_in_order
from scconv_deploy.gate.margins import GateForm

Statistics = Literal["group_batchnorm", "group_norm", "unbiased_variance", "biased_variance", "biased_deviation"]
Weighting = Literal["sum", "torch_sum", "softmax", "none"]
Comparison = Literal[">=", ">"]
Fusion = Literal["hard", "soft"]
Data = Literal["x", "normalized"]


_SHORT_NAMES: dict[Statistics, str] = {
    "group_batchnorm": "groupbn",
    "group_norm": "groupnorm",
    "unbiased_variance": "groupvar",
    "biased_variance": "groupnorm",
    "biased_deviation": "groupstd",
}


@dataclass(frozen=True)
class GateVariant:
    """All choices in which two SRUs with the same gamma and beta can differ.

    Attributes:
        statistics: ``group_batchnorm`` divides by ``std(ddof=1) + eps`` (the original code), ``group_norm`` by
            ``sqrt(var(ddof=0) + eps)`` (``torch.nn.GroupNorm``, whose arithmetic is uncentred); user code also mixes
            them: ``unbiased_variance`` is ``sqrt(var(ddof=1) + eps)``, ``biased_deviation`` is ``std(ddof=0) + eps``,
            ``biased_variance`` is GroupNorm written out, ``(x - mean) / sqrt(var(ddof=0) + eps)``.
        weighting: the gate weight is ``gamma / sum(gamma)`` or, in older code, ``softmax(gamma)``. ``sum`` is Python's
            (the original code's), which adds one channel after the other in float32; ``torch_sum`` is ``torch.sum`` and
            ``gamma.sum()``, in the order of torch's vectors. Where gamma nearly cancels, the two move gates.
            ``none``: the weight is 1, as in a graph where a simplifier has multiplied gamma and beta by it.
        comparison: ``open = sigmoid(z) >= threshold`` or strictly ``>``.
        fusion: ``hard`` multiplies by the mask, ``soft`` by ``where(open, 1, sigmoid(z))`` and its counterpart.
        data: what the mask multiplies: the input, or the normalised input ``n * gamma + beta``.
        num_groups: G; the groups lie over the flattened channels and positions of a sample.
        eps: added to the deviation (``group_batchnorm``, ``biased_deviation``) or to the variance (the others).
        threshold: t, compared with the sigmoid.
    """

    statistics: Statistics
    weighting: Weighting
    comparison: Comparison
    fusion: Fusion
    data: Data
    num_groups: int
    eps: float
    threshold: float = 0.5

    def __post_init__(self) -> None:
        if self.fusion == "soft" and self.data == "normalized":
            raise ConfigurationError(
                "SRU variant: a soft gate on normalised data is not one of the three operators.",
                "Use fusion='hard' or data='x'.",
            )

    @property
    def operator(self) -> str:
        """The operator of the domain ``scconv`` that computes this variant."""
        if self.fusion == "soft":
            return "SRUSoft"
        return "SRU" if self.data == "x" else "SRUNorm"

    @property
    def ddof(self) -> int:
        return 1 if self.statistics in ("group_batchnorm", "unbiased_variance") else 0

    @property
    def eps_var(self) -> float:
        return self.eps if self.statistics in ("group_norm", "unbiased_variance", "biased_variance") else 0.0

    @property
    def eps_std(self) -> float:
        return self.eps if self.statistics in ("group_batchnorm", "biased_deviation") else 0.0

    @property
    def name(self) -> str:
        """Published name where there is one, else its choices with hyphens; :attr:`label` adds the order of the sum."""
        weighting = "sum" if self.weighting == "torch_sum" else self.weighting
        statistics = "group_norm" if self.statistics == "biased_variance" else self.statistics
        plain = replace(self, weighting=weighting, statistics=statistics)
        for name, known in VARIANTS.items():
            if replace(known, num_groups=self.num_groups, eps=self.eps, threshold=self.threshold) == plain:
                return name
        parts = [_SHORT_NAMES[self.statistics], self.fusion]
        if self.data == "normalized":
            parts.append("normalized")
        if weighting != "sum":
            parts.append("softmax" if weighting == "softmax" else "unweighted")
        if self.comparison == (">=" if statistics == "group_norm" else ">"):
            parts.append("strict" if self.comparison == ">" else "inclusive")
        return "-".join(parts)

    @property
    def label(self) -> str:
        """Name in files and reports: :attr:`name`, with ``(torch.sum)`` where gamma is summed in torch's order."""
        return f"{self.name} (torch.sum)" if self.weighting == "torch_sum" else self.name

    def __str__(self) -> str:
        choices = [f"G={self.num_groups}", f"eps={self.eps:g}", f"t={self.threshold:g}", self.comparison]
        if self.weighting == "torch_sum":
            choices.append("torch.sum")
        return f"{self.name} ({', '.join(choices)})"


VARIANTS: dict[str, GateVariant] = {
    "groupbn-hard": GateVariant("group_batchnorm", "sum", ">=", "hard", "x", 16, 1e-10),
    "groupbn-hard-normalized": GateVariant("group_batchnorm", "sum", ">=", "hard", "normalized", 4, 1e-10),
    "groupnorm-soft": GateVariant("group_norm", "sum", ">", "soft", "x", 4, 1e-5),
}
"""The variants in public code, with the number of groups each of them uses by default."""


def check_groups(channels: int, num_groups: int, elements: int | None = None, owner: str = "SRU") -> None:
    """Refuse sizes for which the gate is not defined.

    Args:
        channels: C.
        num_groups: G.
        elements: of a sample, ``C * H * W``, where it is known.
        owner: the name that the message starts with.

    Raises:
        ConfigurationError: C < G, G does not divide the elements, or a group has one element.
    """
    if num_groups < 1:
        raise ConfigurationError(
            f"{owner}: num_groups is {num_groups}, expected at least 1.", f"Use a divisor of the {channels} channels."
        )
    if channels < num_groups:
        raise ConfigurationError(
            f"{owner}: {channels} channels are fewer than num_groups {num_groups}.",
            f"Use num_groups of at most {channels}.",
        )
    if elements is None:
        return
    if elements % num_groups:
        raise ConfigurationError(
            f"{owner}: C*H*W = {elements} is not a multiple of num_groups {num_groups}.",
            "Choose num_groups that divides C, or another input size.",
        )
    if elements == num_groups:
        raise ConfigurationError(
            f"{owner}: each of the {num_groups} groups has one element, whose unbiased deviation is NaN.",
            "Use fewer groups or a larger input.",
        )


def check_halves(channels: int, owner: str = "SRU") -> None:
    """Refuse channels that Eq. 4 cannot cross in two halves (ConfigurationError)."""
    if channels < 2 or channels % 2:
        raise ConfigurationError(
            f"{owner}: {channels} channels cannot be crossed in two halves.", "Use an even number of channels."
        )


def normalize(x: Tensor, gamma: Tensor, beta: Tensor, variant: GateVariant) -> Tensor:
    """Group-normalise x and apply gamma and beta, as the variant's PyTorch code does.

    Args:
        x: ``[N, C, *]``.
        gamma: C elements, of any shape.
        beta: the same.

    Returns:
        ``n * gamma + beta``, ``[N, C, *]``.
    """
    if variant.statistics == "group_norm":
        return F.group_norm(x, variant.num_groups, gamma.reshape(-1), beta.reshape(-1), variant.eps)
    groups = x.reshape(x.shape[0], variant.num_groups, -1)
    mean = groups.mean(dim=2, keepdim=True)
    n = ((groups - mean) / deviation(groups, variant)).reshape(x.shape)
    return n * per_channel(gamma, x) + per_channel(beta, x)


def per_channel(values: Tensor, x: Tensor) -> Tensor:
    """C values in any shape as ``[C, 1, ...]``, which broadcasts to x ``[N, C, *]``."""
    return values.reshape(-1, *(1,) * (x.dim() - 2))


def statistics(x: Tensor, of: GateVariant | GateForm) -> tuple[Tensor, Tensor]:
    """Mean and s of each group of x ``[N, C, *]`` in x's own type; ``[N, G, 1]``."""
    groups = x.reshape(x.shape[0], of.num_groups, -1)
    return groups.mean(dim=2, keepdim=True), deviation(groups, of)


def deviation(groups: Tensor, of: GateVariant | GateForm) -> Tensor:
    """``s = sqrt(SS / (L - ddof) + eps_var) + eps_std`` of every group, ``[N, G, L]`` to ``[N, G, 1]``."""
    unbiased = of.ddof == 1
    if of.eps_var:
        return torch.sqrt(groups.var(dim=2, unbiased=unbiased, keepdim=True) + of.eps_var)
    return groups.std(dim=2, unbiased=unbiased, keepdim=True) + of.eps_std


def gate_weight(gamma: Tensor, weighting: Weighting) -> Tensor:
    """W_gamma of the paper's Eq. 2, ``[C]``, its sum in the order that the weighting says."""
    gamma = gamma.reshape(-1)
    if weighting == "none":
        return torch.ones_like(gamma)
    if weighting == "softmax":
        return torch.softmax(gamma, 0)
    return gamma / (gamma.sum() if weighting == "torch_sum" else sum_in_order(gamma))


def reweight(normalized: Tensor, weight: Tensor) -> Tensor:
    """``sigmoid(z)``, z = normalised data times the gate weight ``[C]``; ``[N, C, *]``."""
    return torch.sigmoid(normalized * per_channel(weight, normalized))


def compare(r: Tensor, variant: GateVariant) -> Tensor:
    """Gate mask of ``r = sigmoid(z)``, bool ``[N, C, *]``."""
    return r >= variant.threshold if variant.comparison == ">=" else r > variant.threshold


def cross_reconstruct(x1: Tensor, x2: Tensor) -> Tensor:
    """Eq. 4: the halves of the open and of the closed part cross; ``[N, C, *]``."""
    half = x1.shape[1] // 2
    return torch.cat([x1[:, :half] + x2[:, half:], x1[:, half:] + x2[:, :half]], dim=1)


def from_normalized(
    x: Tensor, normalized: Tensor, weight: Tensor, variant: GateVariant, mask: Tensor | None = None
) -> Tensor:
    """SRU output from normalised data.

    Args:
        x: ``[N, C, *]``.
        normalized: output of :func:`normalize` for x, ``[N, C, *]``.
        weight: the gate weight, ``[C]``.
        mask: gates to use instead of the computed ones, bool ``[N, C, *]``.

    Returns:
        ``[N, C, *]``, x's dtype.
    """
    if variant.fusion == "soft" or mask is None:
        r = reweight(normalized, weight)
        opened = compare(r, variant) if mask is None else mask
    else:
        opened = mask
    if variant.fusion == "soft":
        x1 = torch.where(opened, torch.ones_like(r), r) * x
        x2 = torch.where(opened, torch.zeros_like(r), r) * x
    else:
        data = x if variant.data == "x" else normalized
        x1 = opened * data
        x2 = (~opened) * data
    return cross_reconstruct(x1, x2)
