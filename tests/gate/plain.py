"""An SRU in plain PyTorch with every choice open: what people write, and what looks like it and is another gate.

Nothing here uses the package.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

WEIGHTS = {
    "python": lambda g: g / sum(g),
    "torch": lambda g: g / g.sum(),
    "mean": lambda g: g / (g.mean() * g.numel()),
    "softmax": lambda g: torch.softmax(g, 0),
    # other gates
    "absolute": lambda g: g.abs() / g.abs().sum(),
    "of absolutes": lambda g: g / g.abs().sum(),
    "squares": lambda g: g * g / (g * g).sum(),
    "length": lambda g: g / g.norm(),
    "sigmoid": lambda g: torch.sigmoid(g),
    "one": lambda g: torch.ones_like(g),
}


@dataclass(frozen=True)
class Choices:
    """What an SRU may do; the defaults are the published one."""

    channels: int = 32
    groups: int = 16
    eps: float = 1e-10
    ddof: int = 1
    eps_in_variance: bool = False
    weight: str = "python"
    comparison: str = ">="
    threshold: float = 0.5
    soft: bool = False
    normalized: bool = False
    cross: str = "crossed"
    mask: str = "product"
    beta: float = 0.3
    beta_factor: float = 1.0
    gamma_power: int = 1
    group_norm: bool = False


class PlainSRU(nn.Module):
    def __init__(self, choices: Choices, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.gamma = nn.Parameter(torch.randn(choices.channels, 1, 1, generator=generator))
        self.beta = nn.Parameter(torch.randn(choices.channels, 1, 1, generator=generator) * choices.beta)
        self.choices = choices
        self.t = choices.threshold  # groups and eps are literals to whoever looks
        self.eval()

    def normalize(self, x):
        c = self.choices
        if c.group_norm:
            return F.group_norm(x, c.groups, self.gamma.reshape(-1), self.beta.reshape(-1), c.eps)
        y = x.reshape(x.shape[0], c.groups, -1)
        mean = y.mean(2, keepdim=True)
        if c.eps_in_variance:
            s = torch.sqrt(y.var(2, unbiased=c.ddof == 1, keepdim=True) + c.eps)
        else:
            s = y.std(2, unbiased=c.ddof == 1, keepdim=True) + c.eps
        return ((y - mean) / s).reshape(x.shape) * self.gamma**c.gamma_power + self.beta * c.beta_factor

    def forward(self, x):
        c = self.choices
        normalized = self.normalize(x)
        r = torch.sigmoid(normalized * WEIGHTS[c.weight](self.gamma))
        opened = r >= c.threshold if c.comparison == ">=" else r > c.threshold
        data = normalized if c.normalized else x
        if c.soft:
            x1 = torch.where(opened, torch.ones_like(r), r) * data
            x2 = torch.where(opened, torch.zeros_like(r), r) * data
        elif c.mask == "where":
            one, zero = torch.ones_like(r), torch.zeros_like(r)
            x1, x2 = data * torch.where(opened, one, zero), data * torch.where(opened, zero, one)
        else:
            x1, x2 = opened * data, (~opened) * data
        half = x.shape[1] // 2
        if c.cross == "none":
            return x1 + x2 * 0.5
        lower, upper = x1[:, :half] + x2[:, half:], x1[:, half:] + x2[:, :half]
        if c.cross == "straight":
            lower, upper = x1[:, :half] + x1[:, half:], x2[:, half:] + x2[:, :half]
        return torch.cat([upper, lower] if c.cross == "other way" else [lower, upper], 1)
