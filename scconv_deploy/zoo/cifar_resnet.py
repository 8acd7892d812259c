"""ResNet-20 and -56 for 32x32 images (He et al. 2016, section 4.2), ScConv as the second 3x3 of each basic block."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from scconv_deploy.zoo.layers import SpatialConv, conv3x3, initialize, scconv3x3


class BasicBlock(nn.Module):
    """3x3, then the second 3x3 (or what replaces it), with option A's parameter-free shortcut.

    Shape: ``[N, in_channels, H, W]`` to ``[N, channels, H/stride, W/stride]``.
    """

    def __init__(self, in_channels: int, channels: int, stride: int, second: SpatialConv) -> None:
        super().__init__()
        self.stride = stride
        self.extra_channels = channels - in_channels
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = second(channels, 1)
        self.bn2 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.stride != 1:
            x = x[:, :, :: self.stride, :: self.stride]
        if self.extra_channels:
            before = self.extra_channels // 2
            x = F.pad(x, (0, 0, 0, 0, before, self.extra_channels - before))
        return F.relu(out + x)


class CifarResNet(nn.Module):
    """Three stages of 16, 32 and 64 channels; ``[N, 3, 32, 32]`` to logits ``[N, num_classes]``."""

    def __init__(self, blocks_per_stage: int, second: SpatialConv, num_classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        stages: list[nn.Module] = []
        in_channels = 16
        for stage, channels in enumerate((16, 32, 64)):
            blocks = []
            for index in range(blocks_per_stage):
                blocks.append(BasicBlock(in_channels, channels, 2 if stage and not index else 1, second))
                in_channels = channels
            stages.append(nn.Sequential(*blocks))
        self.layer1, self.layer2, self.layer3 = stages
        self.fc = nn.Linear(64, num_classes)

    def forward(self, image: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(image)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(x.mean((2, 3)))


def _build(blocks_per_stage: int, second: SpatialConv, num_classes: int) -> nn.Module:
    return initialize(CifarResNet(blocks_per_stage, second, num_classes), (8, 3, 32, 32))


def scconv_resnet20(num_classes: int = 10, **scconv: Any) -> nn.Module:
    """ResNet-20 with ScConv; further arguments are :class:`~scconv_deploy.nn.ScConv`'s."""
    return _build(3, scconv3x3(**scconv), num_classes)


def scconv_resnet56(num_classes: int = 10, **scconv: Any) -> nn.Module:
    """ResNet-56 with ScConv; further arguments are :class:`~scconv_deploy.nn.ScConv`'s."""
    return _build(9, scconv3x3(**scconv), num_classes)


def resnet20(num_classes: int = 10, second: SpatialConv = conv3x3) -> nn.Module:
    """The baseline; ``second`` puts another convolution in place of each second 3x3."""
    return _build(3, second, num_classes)


def resnet56(num_classes: int = 10, second: SpatialConv = conv3x3) -> nn.Module:
    """The baseline; ``second`` puts another convolution in place of each second 3x3."""
    return _build(9, second, num_classes)
