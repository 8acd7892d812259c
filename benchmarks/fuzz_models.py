"""Small models as strangers write them, drawn by their arguments: ``fuzz`` names them as ``fuzz_models.py:FACTORY``.

Every factory is a plain function of JSON values, so that a draw that fails is one command to run again.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Sizes(nn.Module):
    """A convolution, and code that depends on the size of one axis of its input ``[N, 3, H, W]``.

    Args:
        rule: what the code does, see :data:`SIZE_RULES`.
        k: the number in it.
        axis: 0 (the batch) or 3 (the width).
    """

    def __init__(self, rule: str, k: int, axis: int, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.rule, self.k, self.axis = rule, k, axis
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.register_buffer("table", torch.randn(1, 1, 1, 64))
        self.grid: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        return getattr(self, f"_{self.rule}")(self.conv(x))

    def _plain(self, x):
        return torch.relu(x)

    def _odd(self, x):
        return F.avg_pool2d(F.pad(x, (0, 1)) if x.shape[3] % 2 else x, (1, 2))

    def _above(self, x):
        return x * 2 if x.shape[self.axis] > self.k else x + 1

    def _equal(self, x):
        return x * 3 if x.shape[self.axis] == self.k else x

    def _unrolled(self, x):
        y = torch.zeros_like(x[:1])
        for index in range(x.shape[0]):
            y = y + x[index : index + 1] * (index + 1)
        return y

    def _capped(self, x):
        return x.narrow(3, 0, min(x.shape[3], self.k)).mean(3)

    def _upsampled(self, x):
        return F.interpolate(x, scale_factor=2.0, mode="nearest")

    def _resized(self, x):
        return F.interpolate(x, size=(x.shape[2] * 2, x.shape[3] * 2), mode="bilinear")

    def _unet(self, x):
        return torch.cat([x, F.interpolate(F.max_pool2d(x, 2), scale_factor=2.0)], 1)

    def _positional(self, x):
        return x + self.table[..., : x.shape[3]]

    def _averaged(self, x):
        return x.sum(self.axis) / x.shape[self.axis]

    def _scaled(self, x):
        return x / math.sqrt(x.shape[3])

    def _numbered(self, x):
        return x + torch.arange(x.shape[3], dtype=x.dtype)

    def _cached(self, x):
        if self.grid is None or self.grid.shape[-1] != x.shape[3]:
            self.grid = torch.arange(x.shape[3]).float()
        return x + self.grid

    def _padded(self, x):
        return F.max_pool2d(F.pad(x, (0, -x.shape[3] % self.k)), (1, self.k))

    def _flattened(self, x):
        return x.reshape(x.shape[0], -1).mean(1)

    def _baked(self, x):
        return x.reshape(x.shape[0], 4, 16, -1) if self.axis else x.reshape(2, -1).mean(1)

    def _windows(self, x):
        n, c, h, w = x.shape
        return x.reshape(n, c, h, w // self.k, self.k).amax(4)


def sizes(rule: str, k: int, axis: int, seed: int) -> nn.Module:
    """A :class:`Sizes`."""
    return Sizes(rule, k, axis, seed)


class Gate(nn.Module):
    """Group normalisation and a gate, as variants of the SRU in public code are written, and as none is.

    Args:
        weight: of the gate: ``sum`` (Python's, of the original code), ``torch`` (``gamma.sum()``), ``softmax``,
            ``abs`` (over the sum of absolute values), ``one``.
        comparison: ``>=`` or ``>``; ``threshold`` is compared with the sigmoid.
        deviation: ``unbiased``, ``biased`` or ``groupnorm`` (eps below the root).
        apply: how masks are used: ``multiply``, ``float`` (cast first), ``where``, ``soft``, ``fill``, ``other`` (to
            another tensor than the one that they are made of).
        cross: how the halves are put together: ``crossed`` (the paper's), ``straight``, ``added``.
        spread: of beta.
        cancel: draws gamma so that its terms nearly cancel.
    """

    def __init__(
        self, channels: int, groups: int, dims: int, weight: str, comparison: str, threshold: float, deviation: str,
        apply: str, cross: str, spread: float, cancel: bool, seed: int,
    ) -> None:  # fmt: skip
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        shape = (channels,) + (1,) * dims
        gamma = torch.randn(shape, generator=generator)
        if cancel:
            gamma.view(-1)[0] -= gamma.sum() - 0.01
        self.gamma = nn.Parameter(gamma)
        self.beta = nn.Parameter(torch.randn(shape, generator=generator) * spread)
        self.groups, self.weight, self.comparison, self.threshold = groups, weight, comparison, threshold
        self.deviation, self.apply_as, self.cross = deviation, apply, cross

    def forward(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        r = torch.sigmoid(self._normalized(x) * self._weights())
        opened = r >= self.threshold if self.comparison == ">=" else r > self.threshold
        data = x if other is None else other
        if self.apply_as == "multiply":
            one, two = opened * data, (~opened) * data
        elif self.apply_as == "float":
            one, two = opened.float() * data, (1 - opened.float()) * data
        elif self.apply_as == "soft":
            one = torch.where(opened, torch.ones_like(r), r) * data
            two = torch.where(opened, torch.zeros_like(r), r) * data
        elif self.apply_as == "fill":
            one, two = data.masked_fill(~opened, 0.0), data.masked_fill(opened, 0.0)
        else:
            zero = torch.zeros_like(data)
            one, two = torch.where(opened, data, zero), torch.where(opened, zero, data)
        (a, b), (c, d) = one.chunk(2, 1), two.chunk(2, 1)
        if self.cross == "crossed":
            return torch.cat([a + d, b + c], 1)
        return torch.cat([a - c, b - d], 1) if self.cross == "straight" else one + 0.5 * two

    def _normalized(self, x: Tensor) -> Tensor:
        if self.deviation == "groupnorm":
            return F.group_norm(x, self.groups, self.gamma.flatten(), self.beta.flatten(), 1e-5)
        y = x.reshape(x.shape[0], self.groups, -1)
        deviation = y.std(2, unbiased=self.deviation == "unbiased", keepdim=True) + 1e-10
        return ((y - y.mean(2, keepdim=True)) / deviation).reshape(x.shape) * self.gamma + self.beta

    def _weights(self) -> Tensor:
        if self.weight == "sum":
            return self.gamma / sum(self.gamma)
        if self.weight == "torch":
            return self.gamma / self.gamma.sum()
        if self.weight == "softmax":
            return torch.softmax(self.gamma, 0)
        return self.gamma.abs() / self.gamma.abs().sum() if self.weight == "abs" else torch.ones_like(self.gamma)


class Gated(nn.Module):
    """Convolution, a :class:`Gate`, convolution; ``other`` gates a second convolution's output."""

    def __init__(self, channels: int, dims: int, seed: int, apply: str, **gate) -> None:
        super().__init__()
        torch.manual_seed(seed)
        conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
        self.stem, self.twin = conv(3, channels, 3, padding=1), conv(3, channels, 3, padding=1)
        self.gate = Gate(channels, dims=dims, seed=seed, apply="where" if apply == "other" else apply, **gate)
        self.head = conv(channels, 4, 1)
        self.other = apply == "other"

    def forward(self, x: Tensor) -> Tensor:
        y = F.silu(self.stem(x))
        return self.head(self.gate(y, self.twin(x)) if self.other else self.gate(y))


def gated(**arguments) -> nn.Module:
    """A :class:`Gated`."""
    return Gated(**arguments)


def pooled(**arguments) -> nn.Module:
    """A :class:`Gate` behind a global pool: groups of few elements."""
    size = arguments.pop("size")
    return nn.Sequential(nn.AdaptiveAvgPool2d(size), Gate(**arguments))


def branched(channels: int, seed: int) -> nn.Module:
    """The target of the drawn checkpoints: two branches whose layers have the same names inside."""
    torch.manual_seed(seed)
    names = ("student", "teacher") if channels % 2 else ("body", "head")
    model = nn.Sequential()
    model.add_module(names[0], nn.Sequential(nn.Conv2d(3, channels, 3, padding=1), nn.BatchNorm2d(channels)))
    model.add_module(names[1], nn.Conv2d(channels, 4, 1))
    return model
