"""WRN-28-10 for 32x32 images (Zagoruyko and Komodakis 2016), ScConv as the second 3x3 of each block.

Convolutions have biases and the stride is in the second 3x3: so the paper's baseline (36.55 M, 5.96 G) recomputes.
Without dropout, which changes nothing at inference.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from scconv_deploy.zoo.layers import SpatialConv, initialize, scconv3x3


class PreActivationBlock(nn.Module):
    """BatchNorm, ReLU, 3x3, BatchNorm, ReLU, the second 3x3 (or what replaces it), and a shortcut.

    Shape: ``[N, in_channels, H, W]`` to ``[N, channels, H/stride, W/stride]``.
    """

    def __init__(self, in_channels: int, channels: int, stride: int, second: SpatialConv) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, channels, 3, 1, 1)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv2 = second(channels, stride)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or in_channels != channels:
            self.shortcut = nn.Conv2d(in_channels, channels, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv1(F.relu(self.bn1(x)))
        return self.conv2(F.relu(self.bn2(out))) + self.shortcut(x)


class WideResNet(nn.Module):
    """Three stages of 16, 32 and 64 times ``widen`` channels; ``[N, 3, 32, 32]`` to logits ``[N, num_classes]``.

    Args:
        blocks_per_stage: 4 for WRN-28.
        second: the second 3x3 of a block, or what replaces it.
    """

    def __init__(self, blocks_per_stage: int, widen: int, second: SpatialConv, num_classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1)
        in_channels = 16
        stages: list[nn.Module] = []
        for stage in range(3):
            channels = 16 * widen * 2**stage
            blocks = []
            for index in range(blocks_per_stage):
                blocks.append(PreActivationBlock(in_channels, channels, 2 if stage and not index else 1, second))
                in_channels = channels
            stages.append(nn.Sequential(*blocks))
        self.layer1, self.layer2, self.layer3 = stages
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.fc = nn.Linear(in_channels, num_classes)

    def forward(self, image: Tensor) -> Tensor:
        x = self.layer3(self.layer2(self.layer1(self.conv1(image))))
        return self.fc(F.relu(self.bn1(x)).mean((2, 3)))


def biased3x3(channels: int, stride: int = 1) -> nn.Module:
    """The baseline's convolution."""
    return nn.Conv2d(channels, channels, 3, stride, 1)


def normalized_scconv3x3(**options: Any) -> SpatialConv:
    """ScConv and a BatchNorm, for a branch that ends in it.

    ScConv's channel softmax divides by about 2C. In a block with post-activation a BatchNorm follows and undoes that;
    here the sum would follow, to which such a branch gives nothing.
    """
    scconv = scconv3x3(**options)

    def build(channels: int, stride: int = 1) -> nn.Module:
        return nn.Sequential(scconv(channels, stride), nn.BatchNorm2d(channels))

    return build


def build(second: SpatialConv, num_classes: int = 100, blocks_per_stage: int = 4, widen: int = 10) -> nn.Module:
    """A WideResNet of any size, initialised; see :class:`WideResNet`."""
    return initialize(WideResNet(blocks_per_stage, widen, second, num_classes), (8, 3, 32, 32))


def scconv_wrn28_10(num_classes: int = 100, **scconv: Any) -> nn.Module:
    """WRN-28-10 with ScConv; further arguments are :class:`~scconv_deploy.nn.ScConv`'s."""
    return build(normalized_scconv3x3(**scconv), num_classes)


def wrn28_10(num_classes: int = 100, second: SpatialConv = biased3x3) -> nn.Module:
    """The baseline; ``second`` puts another convolution in place of each second 3x3."""
    return build(second, num_classes)
