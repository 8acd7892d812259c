"""Networks for the receiver's curve: depths, widths and forms whose rounding noise differs."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scconv_deploy.nn import ScConv
from scconv_deploy.zoo.cifar_resnet import CifarResNet
from scconv_deploy.zoo.layers import conv3x3, initialize, scconv3x3

SHAPE = (8, 3, 32, 32)


def layer(channels_in: int, channels: int, kernel: int = 3, stride: int = 1) -> nn.Module:
    convolution = nn.Conv2d(channels_in, channels, kernel, stride, kernel // 2, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(channels), nn.ReLU())


class GlobalPool(nn.Module):
    """A mean over the image of 512 channels, of signed values that nearly cancel."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(layer(3, 64, 3, 2), layer(64, 512, 1), ScConv(512))
        self.fc = nn.Linear(512, 10)

    def forward(self, image: Tensor) -> Tensor:
        return self.fc(self.body(image).mean((2, 3)))


class Segmentation(nn.Module):
    """A narrow head: two classes for every pixel from eight channels."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.fine, self.coarse = layer(3, width), nn.Sequential(layer(width, 2 * width, 3, 2), ScConv(2 * width))
        self.middle, self.merge = layer(2 * width, 2 * width), layer(3 * width, width)
        self.head = nn.Conv2d(width, 2, 1)

    def forward(self, image: Tensor) -> Tensor:
        fine = self.fine(image)
        coarse = F.interpolate(self.middle(self.coarse(fine)), scale_factor=2, mode="bilinear", align_corners=False)
        return self.head(self.merge(torch.cat([fine, coarse], 1)))


class UNet(nn.Module):
    """Four scales, a ScConv in each."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        widths = [width * 2**scale for scale in range(4)]
        self.down = nn.ModuleList(
            nn.Sequential(layer(a, b), ScConv(b)) for a, b in zip([3, *widths], widths, strict=False)
        )
        self.up = nn.ModuleList(layer(width * n, width * (n // 3)) for n in (12, 6, 3))
        self.head = nn.Conv2d(width, 2, 1)

    def forward(self, image: Tensor) -> Tensor:
        kept = []
        x = image
        for scale, down in enumerate(self.down):
            x = down(F.max_pool2d(x, 2) if scale else x)
            kept.append(x)
        for up, skip in zip(self.up, kept[-2::-1], strict=True):
            x = up(torch.cat([F.interpolate(x, scale_factor=2), skip], 1))
        return self.head(x)


class Attention(nn.Module):
    """A transformer's block on patches behind a ScConv: layer norms, softmax, gelu."""

    def __init__(self, channels: int = 64) -> None:
        super().__init__()
        self.patches, self.scconv = nn.Conv2d(3, channels, 4, 4), ScConv(channels)
        self.before, self.between = nn.LayerNorm(channels), nn.LayerNorm(channels)
        self.attention = nn.MultiheadAttention(channels, 4, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(channels, 4 * channels), nn.GELU(), nn.Linear(4 * channels, channels))
        self.head = nn.Linear(channels, 10)

    def forward(self, image: Tensor) -> Tensor:
        tokens = self.scconv(self.patches(image)).flatten(2).transpose(1, 2)
        n = self.before(tokens)
        tokens = tokens + self.attention(n, n, n, need_weights=False)[0]
        return self.head((tokens + self.mlp(self.between(tokens))).mean(1))


class Unnormalised(nn.Module):
    """Residual blocks without a norm, each of which adds as much as comes in: rounding grows with the depth."""

    def __init__(self, depth: int = 12, channels: int = 32) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, channels, 3, padding=1)
        self.blocks = nn.ModuleList(nn.Conv2d(channels, channels, 3, padding=1) for _ in range(depth))
        self.head = nn.Linear(channels, 1)

    def forward(self, image: Tensor) -> Tensor:
        x = self.stem(image)
        for block in self.blocks:
            x = x + F.silu(block(x)) - 0.5 * x
        return self.head(x.mean((2, 3)))


def _with_betas(model: nn.Module) -> nn.Module:
    for name, parameter in model.named_parameters():
        if name.endswith(("gn.beta", "SRU.gn.bias")):
            nn.init.normal_(parameter, std=0.5)
    return model


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "plain ResNet-20": lambda: CifarResNet(3, conv3x3),
    "ScConv-ResNet-8": lambda: CifarResNet(1, scconv3x3()),
    "ScConv-ResNet-20": lambda: CifarResNet(3, scconv3x3()),
    "soft SRUs in ResNet-20": lambda: CifarResNet(3, scconv3x3(variant="groupnorm-soft")),
    "normalised SRUs in ResNet-32": lambda: CifarResNet(5, scconv3x3(variant="groupbn-hard-normalized")),
    "global pool of 512 channels": GlobalPool,
    "narrow segmentation": Segmentation,
    "U-Net": UNet,
    "attention": Attention,
    "no norms and one output": Unnormalised,
}
LARGE: dict[str, str] = {name: name for name in ("resnet50", "scconv_resnet50")}
"""Of the zoo."""


def network(name: str, seed: int, calibrated: bool = True) -> nn.Module:
    """Seeded, in eval mode.

    Args:
        calibrated: BatchNorms have the statistics of a batch; else those that PyTorch begins with, so that values grow
            or vanish from layer to layer.
    """
    torch.manual_seed(seed)
    model = NETWORKS[name]()
    return _with_betas(initialize(model, SHAPE) if calibrated else model).eval()
