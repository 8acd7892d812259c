"""ScConv's modules: GroupBatchnorm2d, SRU, CRU, ScConv (Li, Wen, He, CVPR 2023).

State dicts of the original code load unchanged (``SRU.gn.gamma``, ``CRU.GWC.weight``, ...). Sizes that the
modules cannot have are refused at construction where they are known there, else in ``forward``.

Every module takes ``dims``, the number of axes behind the channels: 2 for images ``[N, C, H, W]``, 3 for volumes
``[N, C, D, H, W]``, 1 for signals ``[N, C, L]``. ``[N, C, *]`` below stands for the three. The parameters have the
shapes that code for so many axes gives them, so that its state dicts load too.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scconv_deploy.errors import ConfigurationError
from scconv_deploy.gate import variant as gate
from scconv_deploy.gate.variant import VARIANTS, GateVariant, check_groups, check_halves

Dims = Literal[1, 2, 3]
_CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
_POOLED = {1: F.adaptive_avg_pool1d, 2: F.adaptive_avg_pool2d, 3: F.adaptive_avg_pool3d}


def _check_dims(dims: int, owner: str) -> None:
    if dims not in _CONVOLUTIONS:
        raise ConfigurationError(
            f"{owner}: dims is {dims}, expected 1, 2 or 3.", "Use 1 for signals, 2 for images, 3 for volumes."
        )


def _check_rank(x: Tensor, dims: int, owner: str) -> None:
    if x.dim() != dims + 2:
        raise ConfigurationError(
            f"{owner}: the input {list(x.shape)} has {x.dim()} axes, expected {dims + 2} ([N, C] and dims = {dims}).",
            f"Build it with dims={x.dim() - 2}." if x.dim() - 2 in _CONVOLUTIONS else "Reshape the input to that.",
        )


class GroupBatchnorm2d(nn.Module):
    """Group normalisation by the unbiased deviation: ``(x - mean) / (std + eps) * gamma + beta``.

    Args:
        channels: C.
        num_groups: G, groups over the flattened channels and positions of a sample.
        eps: added to the deviation, not to the variance.
        dims: axes behind the channels; the name is the original code's, also for 1 and 3.

    Parameters are ``gamma`` and ``beta``, ``[C, 1, 1]`` with one 1 for each axis; a state dict that calls them
    ``weight`` and ``bias`` loads too. gamma starts random, as in the original code.

    Shape: ``[N, C, *]`` to the same.
    """

    def __init__(self, channels: int, num_groups: int = 16, eps: float = 1e-10, dims: Dims = 2) -> None:
        super().__init__()
        _check_dims(dims, "GroupBatchnorm2d")
        check_groups(channels, num_groups, owner="GroupBatchnorm2d")
        self.variant = replace(VARIANTS["groupbn-hard"], num_groups=num_groups, eps=eps)
        self.gamma = nn.Parameter(torch.randn(channels, *(1,) * dims))
        self.beta = nn.Parameter(torch.zeros(channels, *(1,) * dims))

    def forward(self, x: Tensor) -> Tensor:
        if not torch.compiler.is_compiling():
            _check_rank(x, self.gamma.dim() - 1, "GroupBatchnorm2d")
        return gate.normalize(x, self.gamma, self.beta, self.variant)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        for ours, theirs in (("gamma", "weight"), ("beta", "bias")):
            if prefix + ours not in state_dict and prefix + theirs in state_dict:
                state_dict[prefix + ours] = state_dict.pop(prefix + theirs)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


class SRU(nn.Module):
    """Spatial reconstruction unit: a gate on normalised features, then a cross reconstruction.

    Args:
        channels: C, even.
        num_groups: G; the variant's own default (16 for ``groupbn-hard``, 4 for the others) if None.
        gate_threshold: t (``gate_treshold`` in the original code).
        torch_gn: normalise with ``nn.GroupNorm``; the rest of the variant stays.
        variant: a name in :data:`~scconv_deploy.gate.variant.VARIANTS` or a :class:`GateVariant`.
        dims: axes behind the channels, 1 to 3.

    Raises:
        ConfigurationError: sizes for which the gate is not defined.

    Shape: ``[N, C, *]`` to the same.
    """

    def __init__(
        self,
        channels: int,
        num_groups: int | None = None,
        gate_threshold: float = 0.5,
        torch_gn: bool = False,
        variant: str | GateVariant = "groupbn-hard",
        dims: Dims = 2,
    ) -> None:
        super().__init__()
        _check_dims(dims, "SRU")
        self.dims = dims
        if isinstance(variant, str):
            if variant not in VARIANTS:
                raise ConfigurationError(f"SRU: no variant is called {variant!r}.", f"Known: {', '.join(VARIANTS)}.")
            variant = replace(VARIANTS[variant], threshold=gate_threshold)
        if torch_gn:
            variant = replace(variant, statistics="group_norm", eps=1e-5)
        if num_groups is not None:
            variant = replace(variant, num_groups=num_groups)
        check_halves(channels)
        check_groups(channels, variant.num_groups)
        self.variant = variant
        self.gn: nn.Module
        if variant.statistics == "group_norm":
            if channels % variant.num_groups:
                raise ConfigurationError(
                    f"SRU: {channels} channels are not a multiple of num_groups {variant.num_groups}, "
                    "which nn.GroupNorm needs.",
                    "Use torch_gn=False, or num_groups that divides the channels.",
                )
            self.gn = nn.GroupNorm(variant.num_groups, channels, eps=variant.eps)
        else:
            self.gn = GroupBatchnorm2d(channels, variant.num_groups, variant.eps, dims)

    @property
    def gamma(self) -> Tensor:
        """``[C]`` or ``[C, 1, ...]``, under whichever name the normalisation keeps it."""
        return self.gn.weight if isinstance(self.gn, nn.GroupNorm) else self.gn.gamma  # type: ignore[return-value]

    def forward(self, x: Tensor) -> Tensor:
        if not torch.compiler.is_compiling():
            _check_rank(x, self.dims, "SRU")
            check_groups(x.shape[1], self.variant.num_groups, x[0].numel())
        weight = gate.gate_weight(self.gamma, self.variant.weighting)
        return gate.from_normalized(x, self.gn(x), weight, self.variant)


class CRU(nn.Module):
    """Channel reconstruction unit: split, squeeze, transform (Eq. 5 and 6), fuse (Eq. 7 and 8).

    Args:
        channels: C.
        alpha: the share of channels in the upper path, in (0, 1).
        squeeze_ratio: r; each path is squeezed by a 1x1 convolution to a 1/r of its channels.
        group_size: groups of the upper path's convolution.
        group_kernel_size: its kernel, odd.
        fusion: ``concat`` is a softmax over all 2C pooled channels (all public code), ``pairwise`` the paper's
            Eq. 8, a softmax over the two pooled values of each channel.
        out_channels: the paper's C2, C itself if None. Where the squeezed lower channels are as many already, the lower
            path has no ``PWC2``: it makes the rest of C2, and there is none.
        dims: axes behind the channels, 1 to 3.

    Raises:
        ConfigurationError: naming the numbers that do not fit.

    Shape: ``[N, C, *]`` to ``[N, out_channels, *]``.
    """

    def __init__(
        self,
        channels: int,
        alpha: float = 0.5,
        squeeze_ratio: int = 2,
        group_size: int = 2,
        group_kernel_size: int = 3,
        fusion: Literal["concat", "pairwise"] = "concat",
        out_channels: int | None = None,
        dims: Dims = 2,
    ) -> None:
        super().__init__()
        _check_dims(dims, "CRU")
        out = channels if out_channels is None else out_channels
        if not 0 < alpha < 1:
            raise ConfigurationError(
                f"CRU: alpha is {alpha}, expected a number between 0 and 1.", "Use 0.5, as the paper does."
            )
        if group_kernel_size < 1 or group_kernel_size % 2 == 0:
            raise ConfigurationError(
                f"CRU: group_kernel_size is {group_kernel_size}, expected an odd number.", "Use 1, 3 or 5."
            )
        if squeeze_ratio < 1 or group_size < 1:
            raise ConfigurationError(
                f"CRU: squeeze_ratio {squeeze_ratio} and group_size {group_size} must both be at least 1.",
                "Use 2 and 2, as the paper does.",
            )
        if fusion not in ("concat", "pairwise"):
            raise ConfigurationError(
                f"CRU: fusion is {fusion!r}, expected 'concat' or 'pairwise'.",
                "Use 'concat' for the published code's fusion, 'pairwise' for the paper's.",
            )
        self.up_channels = int(alpha * channels)
        self.low_channels = channels - self.up_channels
        up, low = self.up_channels // squeeze_ratio, self.low_channels // squeeze_ratio
        if up < 1 or low < 1:
            raise ConfigurationError(
                f"CRU: {channels} channels with alpha {alpha} and squeeze_ratio {squeeze_ratio} leave "
                f"{up} upper and {low} lower channels, expected at least 1 of each.",
                "Use more channels, a smaller squeeze_ratio, or alpha nearer 0.5.",
            )
        if up % group_size or out % group_size:
            raise ConfigurationError(
                f"CRU: the {up} squeezed upper channels and the {out} output channels must both be multiples "
                f"of group_size {group_size}.",
                "Change alpha, squeeze_ratio or group_size.",
            )
        if low >= channels:
            raise ConfigurationError(
                f"CRU: squeeze_ratio {squeeze_ratio} leaves all {channels} channels in the lower path.",
                "Raise alpha or squeeze_ratio.",
            )
        if low > out:
            raise ConfigurationError(
                f"CRU: the lower path has {low} squeezed channels, more than the {out} output channels.",
                "Raise alpha, squeeze_ratio or out_channels.",
            )
        self.fusion, self.dims = fusion, dims
        convolution = _CONVOLUTIONS[dims]
        self.squeeze1 = convolution(self.up_channels, up, 1, bias=False)
        self.squeeze2 = convolution(self.low_channels, low, 1, bias=False)
        self.GWC = convolution(up, out, group_kernel_size, padding=group_kernel_size // 2, groups=group_size)
        self.PWC1 = convolution(up, out, 1, bias=False)
        self.PWC2 = convolution(low, out - low, 1, bias=False) if low < out else None

    def forward(self, x: Tensor) -> Tensor:
        up, low = torch.split(x, [self.up_channels, self.low_channels], dim=1)
        up, low = self.squeeze1(up), self.squeeze2(low)
        y1 = self.GWC(up) + self.PWC1(up)
        y2 = low if self.PWC2 is None else torch.cat([self.PWC2(low), low], dim=1)
        if self.fusion == "pairwise":
            pooled = torch.stack([self._pooled(y1), self._pooled(y2)])
            weight1, weight2 = torch.softmax(pooled, dim=0).unbind(0)
            return weight1 * y1 + weight2 * y2
        y = torch.cat([y1, y2], dim=1)
        y = torch.softmax(self._pooled(y), dim=1) * y
        first, second = torch.chunk(y, 2, dim=1)
        return first + second

    def _pooled(self, y: Tensor) -> Tensor:
        return _POOLED[self.dims](y, 1)


class ScConv(nn.Module):
    """SRU, then CRU: a replacement for a convolution that keeps the size.

    Args: those of :class:`SRU` and :class:`CRU`. ``ScConv(64, dims=3)`` is the ScConv3d of code for volumes.

    Shape: ``[N, C, *]`` to ``[N, out_channels, *]``, C without it.
    """

    def __init__(
        self,
        channels: int,
        num_groups: int | None = None,
        gate_threshold: float = 0.5,
        alpha: float = 0.5,
        squeeze_ratio: int = 2,
        group_size: int = 2,
        group_kernel_size: int = 3,
        torch_gn: bool = False,
        variant: str | GateVariant = "groupbn-hard",
        fusion: Literal["concat", "pairwise"] = "concat",
        out_channels: int | None = None,
        dims: Dims = 2,
    ) -> None:
        super().__init__()
        self.SRU = SRU(channels, num_groups, gate_threshold, torch_gn, variant, dims)
        self.CRU = CRU(channels, alpha, squeeze_ratio, group_size, group_kernel_size, fusion, out_channels, dims)

    def forward(self, x: Tensor) -> Tensor:
        return self.CRU(self.SRU(x))
