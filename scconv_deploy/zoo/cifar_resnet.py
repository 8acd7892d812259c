"""ResNets for 32x32 images.

ResNet-20 and -56 (He et al. 2016, section 4.2) have ScConv as the second 3x3 of each basic block: the first one may
change channels and stride. ResNet-50 is that of ImageNet with a 3x3 stem that keeps the size, and has ScConv as the 3x3
of every bottleneck. The paper's parameter counts are those of 100 classes.
"""

from __future__ import annotations

from typing import Any, Literal

import torch.nn.functional as F
from torch import Tensor, nn

from scconv_deploy.zoo.layers import SpatialConv, conv3x3, initialize, scconv3x3
from scconv_deploy.zoo.resnet import RESNET50, ResNet

Shortcut = Literal["pad", "conv"]
"""Shortcut where the channels change: zeros in the new ones (He et al.'s option A), or a strided 1x1 (option B)."""


class BasicBlock(nn.Module):
    """3x3, then the second 3x3 (or what replaces it), and a shortcut.

    Shape: ``[N, in_channels, H, W]`` to ``[N, channels, H/stride, W/stride]``.
    """

    def __init__(
        self, in_channels: int, channels: int, stride: int, second: SpatialConv, shortcut: Shortcut = "pad"
    ) -> None:
        super().__init__()
        self.stride = stride
        self.extra_channels = channels - in_channels
        self.downsample: nn.Module | None = None
        if shortcut == "conv" and (stride != 1 or self.extra_channels):
            self.downsample = nn.Sequential(
                nn.Conv2d(in_channels, channels, 1, stride, bias=False), nn.BatchNorm2d(channels)
            )
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = second(channels, 1)
        self.bn2 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.downsample is not None:
            return F.relu(out + self.downsample(x))
        if self.stride != 1:
            x = x[:, :, :: self.stride, :: self.stride]
        if self.extra_channels:
            before = self.extra_channels // 2
            x = F.pad(x, (0, 0, 0, 0, before, self.extra_channels - before))
        return F.relu(out + x)


class CifarResNet(nn.Module):
    """Three stages of 16, 32 and 64 channels; ``[N, 3, 32, 32]`` to logits ``[N, num_classes]``."""

    def __init__(
        self, blocks_per_stage: int, second: SpatialConv, num_classes: int = 10, shortcut: Shortcut = "pad"
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        stages: list[nn.Module] = []
        in_channels = 16
        for stage, channels in enumerate((16, 32, 64)):
            blocks = []
            for index in range(blocks_per_stage):
                stride = 2 if stage and not index else 1
                blocks.append(BasicBlock(in_channels, channels, stride, second, shortcut))
                in_channels = channels
            stages.append(nn.Sequential(*blocks))
        self.layer1, self.layer2, self.layer3 = stages
        self.fc = nn.Linear(64, num_classes)

    def forward(self, image: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(image)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(x.mean((2, 3)))


class CifarBottleneckResNet(ResNet):
    """:class:`~scconv_deploy.zoo.resnet.ResNet` with a 3x3 stem of stride 1 and no max pooling.

    Shape: ``[N, 3, 32, 32]`` to logits ``[N, num_classes]``.
    """

    def __init__(
        self, blocks: tuple[int, int, int, int], spatial: SpatialConv, num_classes: int = 100, width: int = 64
    ) -> None:
        super().__init__(blocks, spatial, num_classes, width)
        self.conv1 = nn.Conv2d(3, width, 3, 1, 1, bias=False)

    def forward(self, image: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(image)))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(x.mean((2, 3)))


def build(blocks_per_stage: int, second: SpatialConv, num_classes: int, shortcut: Shortcut) -> nn.Module:
    """A basic-block ResNet of any depth, initialised."""
    return initialize(CifarResNet(blocks_per_stage, second, num_classes, shortcut), (8, 3, 32, 32))


def build_bottleneck(
    blocks: tuple[int, int, int, int], spatial: SpatialConv, num_classes: int = 100, width: int = 64
) -> nn.Module:
    """A bottleneck ResNet of any size, initialised."""
    return initialize(CifarBottleneckResNet(blocks, spatial, num_classes, width), (8, 3, 32, 32))


def scconv_resnet20(num_classes: int = 10, **scconv: Any) -> nn.Module:
    """ResNet-20 with ScConv; further arguments are :class:`~scconv_deploy.nn.ScConv`'s."""
    return build(3, scconv3x3(**scconv), num_classes, "pad")


def scconv_resnet56(num_classes: int = 100, **scconv: Any) -> nn.Module:
    """ResNet-56 with ScConv; further arguments are :class:`~scconv_deploy.nn.ScConv`'s."""
    return build(9, scconv3x3(**scconv), num_classes, "conv")


def scconv_cifar_resnet50(num_classes: int = 100, **scconv: Any) -> nn.Module:
    """Bottleneck ResNet-50 with ScConv; further arguments are :class:`~scconv_deploy.nn.ScConv`'s."""
    return build_bottleneck(RESNET50, scconv3x3(**scconv), num_classes)


def resnet20(num_classes: int = 10, second: SpatialConv = conv3x3) -> nn.Module:
    """The baseline; ``second`` puts another convolution in place of each second 3x3."""
    return build(3, second, num_classes, "pad")


def resnet56(num_classes: int = 100, second: SpatialConv = conv3x3) -> nn.Module:
    """The baseline, with the paper's shortcut; ``second`` puts another convolution in place of each second 3x3."""
    return build(9, second, num_classes, "conv")


def cifar_resnet50(num_classes: int = 100, spatial: SpatialConv = conv3x3) -> nn.Module:
    """The baseline, stride in the 3x3; ``spatial`` puts another convolution in place of each 3x3."""
    return build_bottleneck(RESNET50, spatial, num_classes)
