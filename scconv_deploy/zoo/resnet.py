"""ResNet-50 and -101 for 224x224 images (He et al. 2016), ScConv as the 3x3 of every bottleneck."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from scconv_deploy.zoo.layers import SpatialConv, conv3x3, initialize, scconv3x3


class Bottleneck(nn.Module):
    """1x1, the spatial convolution, 1x1 to ``expansion`` times the channels, and a shortcut.

    Shape: ``[N, in_channels, H, W]`` to ``[N, expansion * channels, H/stride, W/stride]``.
    """

    def __init__(self, in_channels: int, channels: int, stride: int, spatial: SpatialConv, expansion: int = 4) -> None:
        super().__init__()
        out_channels = expansion * channels
        self.conv1 = nn.Conv2d(in_channels, channels, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = spatial(channels, stride)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv3 = nn.Conv2d(channels, out_channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.downsample: nn.Module = nn.Identity()
        if stride != 1 or in_channels != out_channels:
            self.downsample = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), nn.BatchNorm2d(out_channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = F.relu(self.bn2(self.conv2(out)))
        return F.relu(self.bn3(self.conv3(out)) + self.downsample(x))


class ResNet(nn.Module):
    """``[N, 3, 224, 224]`` to logits ``[N, num_classes]``.

    Args:
        blocks: bottlenecks of each stage.
        spatial: the 3x3 of a bottleneck, or what replaces it.
        width: channels of the stem; stage s has ``4 * width * 2**s``.
    """

    def __init__(
        self, blocks: tuple[int, int, int, int], spatial: SpatialConv, num_classes: int = 1000, width: int = 64
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        in_channels = width
        stages: list[nn.Module] = []
        for stage, count in enumerate(blocks):
            channels = width * 2**stage
            layers = []
            for index in range(count):
                layers.append(Bottleneck(in_channels, channels, 2 if stage and not index else 1, spatial))
                in_channels = 4 * channels
            stages.append(nn.Sequential(*layers))
        self.layer1, self.layer2, self.layer3, self.layer4 = stages
        self.fc: nn.Module = nn.Linear(in_channels, num_classes)

    def features(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Outputs of the last three stages, of strides 8, 16 and 32: C3, C4 and C5 of a detector."""
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(image))), 3, 2, 1)
        c3 = self.layer2(self.layer1(x))
        c4 = self.layer3(c3)
        return c3, c4, self.layer4(c4)

    def forward(self, image: Tensor) -> Tensor:
        return self.fc(self.features(image)[-1].mean((2, 3)))


RESNET50, RESNET101 = (3, 4, 6, 3), (3, 4, 23, 3)


def build(
    blocks: tuple[int, int, int, int], spatial: SpatialConv, num_classes: int = 1000, width: int = 64
) -> nn.Module:
    """A ResNet of any size, initialised; see :class:`ResNet`."""
    return initialize(ResNet(blocks, spatial, num_classes, width), (2, 3, 224, 224))


def scconv_resnet50(num_classes: int = 1000, **scconv: Any) -> nn.Module:
    """ResNet-50 with ScConv; further arguments are :class:`~scconv_deploy.nn.ScConv`'s."""
    return build(RESNET50, scconv3x3(**scconv), num_classes)


def scconv_resnet50_alpha34(num_classes: int = 1000, **scconv: Any) -> nn.Module:
    """ResNet-50 with ScConv of alpha = 3/4: the upper path of each CRU takes three quarters of the channels."""
    return scconv_resnet50(num_classes, **{"alpha": 0.75} | scconv)


def scconv_resnet101(num_classes: int = 1000, **scconv: Any) -> nn.Module:
    """ResNet-101 with ScConv; further arguments are :class:`~scconv_deploy.nn.ScConv`'s."""
    return build(RESNET101, scconv3x3(**scconv), num_classes)


def resnet50(num_classes: int = 1000, spatial: SpatialConv = conv3x3) -> nn.Module:
    """The baseline, stride in the 3x3; ``spatial`` puts another convolution in place of each 3x3."""
    return build(RESNET50, spatial, num_classes)


def resnet101(num_classes: int = 1000, spatial: SpatialConv = conv3x3) -> nn.Module:
    """The baseline, stride in the 3x3; ``spatial`` puts another convolution in place of each 3x3."""
    return build(RESNET101, spatial, num_classes)
