"""Networks that people put ScConv into, with and without it: written in plain PyTorch, as their owners write them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scconv_deploy.zoo import MODELS
from tests.wild import OriginalScConv, OriginalSRU

Gate = Callable[[int], nn.Module]
"""What a network has in a place of SRU or ScConv, for a number of channels."""


def layer(channels_in: int, channels: int, kernel: int = 3, stride: int = 1) -> nn.Module:
    convolution = nn.Conv2d(channels_in, channels, kernel, stride, kernel // 2, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(channels), nn.SiLU())


class BasicBlock(nn.Module):
    """ResNet-34's block with a gate before the sum."""

    def __init__(self, channels_in: int, channels: int, stride: int, gate: Gate) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.sru = gate(channels)
        self.downsample = None
        if stride > 1 or channels_in != channels:
            shortcut = nn.Conv2d(channels_in, channels, 1, stride, bias=False)
            self.downsample = nn.Sequential(shortcut, nn.BatchNorm2d(channels))

    def forward(self, x: Tensor) -> Tensor:
        y = self.sru(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))
        return F.relu(y + (x if self.downsample is None else self.downsample(x)))


class ResNet34(nn.Module):
    """ResNet-34, a gate in each of its sixteen blocks."""

    def __init__(self, gate: Gate) -> None:
        super().__init__()
        blocks, channels_in = [], 64
        for channels, count, stride in ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2)):
            for index in range(count):
                blocks.append(BasicBlock(channels_in, channels, 1 if index else stride, gate))
                channels_in = channels
        self.stem = nn.Sequential(layer(3, 64, 7, 2), nn.MaxPool2d(3, 2, 1))
        self.blocks = nn.Sequential(*blocks)
        self.fc = nn.Linear(512, 1000)

    def forward(self, image: Tensor) -> Tensor:
        return self.fc(self.blocks(self.stem(image)).mean((2, 3)))


class C2f(nn.Module):
    """YOLOv8's block: bottlenecks, all of whose outputs are joined; the second convolution is the gated one."""

    def __init__(self, channels_in: int, channels: int, count: int, shortcut: bool, gate: Gate) -> None:
        super().__init__()
        half = channels // 2
        self.shortcut = shortcut
        self.before, self.after = layer(channels_in, channels, 1), layer((2 + count) * half, channels, 1)
        self.bottlenecks = nn.ModuleList(nn.Sequential(layer(half, half), gate(half)) for _ in range(count))

    def forward(self, x: Tensor) -> Tensor:
        parts = list(self.before(x).chunk(2, 1))
        for bottleneck in self.bottlenecks:
            y = bottleneck(parts[-1])
            parts.append(parts[-1] + y if self.shortcut else y)
        return self.after(torch.cat(parts, 1))


class YOLOv8n(nn.Module):
    """The layout of YOLOv8n (backbone, feature pyramid, three heads of boxes and 80 classes), ten gated bottlenecks."""

    def __init__(self, gate: Gate) -> None:
        super().__init__()
        self.stem = nn.Sequential(layer(3, 16, 3, 2), layer(16, 32, 3, 2), C2f(32, 32, 1, True, gate))
        self.p3 = nn.Sequential(layer(32, 64, 3, 2), C2f(64, 64, 2, True, gate))
        self.p4 = nn.Sequential(layer(64, 128, 3, 2), C2f(128, 128, 2, True, gate))
        self.p5 = nn.Sequential(layer(128, 256, 3, 2), C2f(256, 256, 1, True, gate))
        self.pool_in, self.pool_out = layer(256, 128, 1), layer(512, 256, 1)
        self.up4, self.up3 = C2f(384, 128, 1, False, gate), C2f(192, 64, 1, False, gate)
        self.down4, self.down5 = layer(64, 64, 3, 2), layer(128, 128, 3, 2)
        self.out4, self.out5 = C2f(192, 128, 1, False, gate), C2f(384, 256, 1, False, gate)
        self.boxes, self.classes = (
            nn.ModuleList(
                nn.Sequential(layer(channels, width), layer(width, width), nn.Conv2d(width, count, 1))
                for channels in (64, 128, 256)
            )
            for width, count in ((64, 64), (80, 80))
        )

    def forward(self, images: Tensor) -> Tensor:
        p3 = self.p3(self.stem(images))
        p4 = self.p4(p3)
        p5 = self.pool_in(self.p5(p4))
        pooled = [p5]
        for _ in range(3):
            pooled.append(F.max_pool2d(pooled[-1], 5, 1, 2))
        p5 = self.pool_out(torch.cat(pooled, 1))
        p4 = self.up4(torch.cat([F.interpolate(p5, scale_factor=2.0), p4], 1))
        p3 = self.up3(torch.cat([F.interpolate(p4, scale_factor=2.0), p3], 1))
        p4 = self.out4(torch.cat([self.down4(p3), p4], 1))
        p5 = self.out5(torch.cat([self.down5(p4), p5], 1))
        heads = zip((p3, p4, p5), self.boxes, self.classes, strict=True)
        found = torch.cat([torch.cat([box(x), cls(x)], 1).flatten(2) for x, box, cls in heads], 2)
        distribution, scores = found.split((64, 80), 1)
        bins = torch.arange(16, dtype=torch.float32).reshape(1, 1, 16, 1)
        sides = (distribution.reshape(len(images), 4, 16, -1).softmax(2) * bins).sum(2)
        return torch.cat([sides, scores.sigmoid()], 1)


class UNet(nn.Module):
    """Five scales of two convolutions, a gate behind each pair: nine gates."""

    def __init__(self, gate: Gate, width: int = 32) -> None:
        super().__init__()

        def pair(channels_in: int, channels: int) -> nn.Module:
            return nn.Sequential(layer(channels_in, channels), layer(channels, channels), gate(channels))

        widths = [width * 2**scale for scale in range(5)]
        self.down = nn.ModuleList(pair(a, b) for a, b in zip([3, *widths], widths, strict=False))
        self.up = nn.ModuleList(pair(3 * w, w) for w in widths[-2::-1])
        self.head = nn.Conv2d(width, 2, 1)

    def forward(self, image: Tensor) -> Tensor:
        kept, x = [], image
        for scale, down in enumerate(self.down):
            x = down(F.max_pool2d(x, 2) if scale else x)
            kept.append(x)
        for up, skip in zip(self.up, kept[-2::-1], strict=True):
            x = up(torch.cat([F.interpolate(x, scale_factor=2.0), skip], 1))
        return self.head(x)


@dataclass(frozen=True)
class Network:
    """A network, its input's shape, and what stands in the places of its gates with and without ScConv."""

    build: Callable[[Gate], nn.Module]
    shape: tuple[int, ...]
    gated: Gate
    plain: Gate


def _identity(channels: int) -> nn.Module:
    return nn.Identity()


NETWORKS = {
    "resnet34": Network(ResNet34, (1, 3, 224, 224), OriginalSRU, _identity),
    "yolov8n": Network(YOLOv8n, (1, 3, 320, 320), OriginalScConv, lambda channels: layer(channels, channels)),
    "unet": Network(UNet, (1, 3, 256, 256), OriginalSRU, _identity),
}


def network(name: str, gated: bool, seed: int) -> tuple[nn.Module, Tensor]:
    """A network of :data:`NETWORKS`, or ``resnet50`` or ``resnet20`` of the zoo, and an example input.

    Args:
        gated: with SRUs or ScConvs; else the plain network.
    """
    torch.manual_seed(seed)
    if name in NETWORKS:
        chosen = NETWORKS[name]
        model, shape = chosen.build(chosen.gated if gated else chosen.plain), chosen.shape
    else:
        entry = MODELS[f"scconv_{name}" if gated else name]
        model, shape = entry.build(), entry.input_shape
    return model.eval(), torch.randn(shape)
