"""DenseNet-121 for 32x32 images (Huang et al. 2017), ScConv as the 3x3 of every dense layer.

The 3x3 makes ``growth`` channels of four times as many, so ScConv does: its SRU gates them all, its CRU narrows (C1 and
C2 of the paper's cost formula).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scconv_deploy.nn import ScConv
from scconv_deploy.zoo.layers import initialize

NarrowingConv = Callable[[int, int], nn.Module]
"""(in_channels, out_channels) -> a module from ``[N, in_channels, H, W]`` to ``[N, out_channels, H, W]``."""

DENSENET121 = (6, 12, 24, 16)
_BOTTLENECK = 4


class DenseLayer(nn.Module):
    """BatchNorm, ReLU, 1x1, BatchNorm, ReLU, 3x3 (or what replaces it); the result joins the input.

    Shape: ``[N, in_channels, H, W]`` to ``[N, in_channels + growth, H, W]``.
    """

    def __init__(self, in_channels: int, growth: int, spatial: NarrowingConv) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, _BOTTLENECK * growth, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(_BOTTLENECK * growth)
        self.conv2 = spatial(_BOTTLENECK * growth, growth)

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv1(F.relu(self.bn1(x)))
        return torch.cat([x, self.conv2(F.relu(self.bn2(out)))], 1)


class Transition(nn.Module):
    """BatchNorm, ReLU, 1x1 to half the channels, average pooling: ``[N, C, H, W]`` to ``[N, C/2, H/2, W/2]``."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(channels)
        self.conv = nn.Conv2d(channels, channels // 2, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.avg_pool2d(self.conv(F.relu(self.bn(x))), 2)


class DenseNet(nn.Module):
    """``[N, 3, 32, 32]`` to logits ``[N, num_classes]``.

    Args:
        layers: dense layers of each block; a transition stands between blocks.
        growth: channels that each layer adds.
        spatial: the 3x3 of a layer, or what replaces it.
    """

    def __init__(self, layers: tuple[int, ...], growth: int, spatial: NarrowingConv, num_classes: int) -> None:
        super().__init__()
        channels = 2 * growth
        self.conv1 = nn.Conv2d(3, channels, 3, 1, 1, bias=False)
        blocks: list[nn.Module] = []
        for index, count in enumerate(layers):
            if index:
                blocks.append(Transition(channels))
                channels //= 2
            for _ in range(count):
                blocks.append(DenseLayer(channels, growth, spatial))
                channels += growth
        self.blocks = nn.Sequential(*blocks)
        self.bn = nn.BatchNorm2d(channels)
        self.fc = nn.Linear(channels, num_classes)

    def forward(self, image: Tensor) -> Tensor:
        x = self.blocks(self.conv1(image))
        return self.fc(F.relu(self.bn(x)).mean((2, 3)))


def narrowing3x3(in_channels: int, out_channels: int) -> nn.Module:
    """The baseline's convolution."""
    return nn.Conv2d(in_channels, out_channels, 3, 1, 1, bias=False)


def narrowing_scconv(**options: Any) -> NarrowingConv:
    """ScConv that narrows."""
    return lambda in_channels, out_channels: ScConv(in_channels, **options, out_channels=out_channels)


def build(
    spatial: NarrowingConv, num_classes: int = 100, layers: tuple[int, ...] = DENSENET121, growth: int = 32
) -> nn.Module:
    """A DenseNet of any size, initialised; see :class:`DenseNet`."""
    return initialize(DenseNet(layers, growth, spatial, num_classes), (8, 3, 32, 32))


def scconv_densenet121(num_classes: int = 100, **scconv: Any) -> nn.Module:
    """DenseNet-121 with ScConv; further arguments are :class:`~scconv_deploy.nn.ScConv`'s."""
    return build(narrowing_scconv(**scconv), num_classes)


def densenet121(num_classes: int = 100, spatial: NarrowingConv = narrowing3x3) -> nn.Module:
    """The baseline; ``spatial`` puts another convolution in place of each 3x3."""
    return build(spatial, num_classes)
