"""A small ScConv network trained on the 8x8 digits that scikit-learn ships; nothing is downloaded."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scconv_deploy.nn import ScConv
from tests import made_once, wild

TRAINED_ON = 1400
"""Images; the other 397 are for testing."""


class DigitsNet(nn.Module):
    """8x8 digits; ScConv as user code writes it, and ours with a gate that learns."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 16, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(16)
        self.scconv1 = wild.OriginalScConv(16, 4)
        self.bn2 = nn.BatchNorm2d(16)
        self.scconv2 = ScConv(16, variant="groupnorm-soft")
        self.fc = nn.Linear(16 * 16, 10)

    def forward(self, image):
        x = F.relu(self.bn1(self.conv1(image)))
        x = F.relu(self.bn2(self.scconv1(x)) + x)
        x = F.max_pool2d(x, 2)
        x = F.relu(32 * self.scconv2(x) + x)
        return self.fc(x.flatten(1))


def train(epochs: int = 6) -> tuple[nn.Module, Tensor, Tensor]:
    """(the network in eval mode, test images ``[397, 1, 8, 8]``, their labels), seeded; trained once a run."""
    return made_once.once(made_once.key_of("digits", epochs), lambda: _trained(epochs))


def _trained(epochs: int) -> tuple[nn.Module, Tensor, Tensor]:
    from sklearn import datasets

    data = datasets.load_digits()
    images = torch.tensor(data.images, dtype=torch.float32)[:, None] / 16
    labels = torch.tensor(data.target)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    known, test = order[:TRAINED_ON], order[TRAINED_ON:]
    torch.manual_seed(0)
    net = DigitsNet()
    optimizer = torch.optim.Adam(net.parameters(), 3e-3)
    generator = torch.Generator().manual_seed(1)
    for _ in range(epochs):
        for batch in known[torch.randperm(len(known), generator=generator)].split(64):
            optimizer.zero_grad()
            F.cross_entropy(net(images[batch]), labels[batch]).backward()
            optimizer.step()
    return net.eval(), images[test], labels[test]
