"""ResNeXt-29 for 32x32 images (Xie et al. 2017), ScConv as the grouped 3x3 of every bottleneck.

The grouped convolution inside ScConv keeps the cardinality as its groups: with 2 groups, ScConv would not be smaller
than the convolution it replaces. The bottleneck expands twofold, as in the CIFAR code in wide use.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from scconv_deploy.zoo.layers import SpatialConv, initialize, scconv3x3
from scconv_deploy.zoo.resnet import Bottleneck

CARDINALITY, GROUP_WIDTH = 4, 64
_EXPANSION = 2


class ResNeXt(nn.Module):
    """Three stages of ``width``, twice and four times ``width``; ``[N, 3, 32, 32]`` to logits ``[N, num_classes]``.

    Args:
        blocks_per_stage: 3 for ResNeXt-29.
        spatial: the grouped 3x3 of a bottleneck, or what replaces it.
        width: of the first stage's grouped convolutions, cardinality times the width of a group.
    """

    def __init__(self, blocks_per_stage: int, spatial: SpatialConv, num_classes: int, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        in_channels = 64
        stages: list[nn.Module] = []
        for stage in range(3):
            channels = width * 2**stage
            blocks = []
            for index in range(blocks_per_stage):
                stride = 2 if stage and not index else 1
                blocks.append(Bottleneck(in_channels, channels, stride, spatial, _EXPANSION))
                in_channels = _EXPANSION * channels
            stages.append(nn.Sequential(*blocks))
        self.layer1, self.layer2, self.layer3 = stages
        self.fc = nn.Linear(in_channels, num_classes)

    def forward(self, image: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(image)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(x.mean((2, 3)))


def grouped3x3(cardinality: int) -> SpatialConv:
    """The baseline's convolution."""

    def build(channels: int, stride: int = 1) -> nn.Module:
        return nn.Conv2d(channels, channels, 3, stride, 1, groups=cardinality, bias=False)

    return build


def build(
    spatial: SpatialConv, num_classes: int = 100, blocks_per_stage: int = 3, width: int = CARDINALITY * GROUP_WIDTH
) -> nn.Module:
    """A ResNeXt of any size, initialised; see :class:`ResNeXt`."""
    return initialize(ResNeXt(blocks_per_stage, spatial, num_classes, width), (8, 3, 32, 32))


def scconv_resnext29(num_classes: int = 100, **scconv: Any) -> nn.Module:
    """ResNeXt-29 4x64d with ScConv; further arguments are :class:`~scconv_deploy.nn.ScConv`'s."""
    return build(scconv3x3(**{"group_size": CARDINALITY} | scconv), num_classes)


def resnext29(num_classes: int = 100, spatial: SpatialConv | None = None) -> nn.Module:
    """The baseline, 4x64d; ``spatial`` puts another convolution in place of each grouped 3x3."""
    return build(spatial or grouped3x3(CARDINALITY), num_classes)
