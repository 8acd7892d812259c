"""A ScConv-ResNet for scikit-learn's digits, as a user writes it, and its training: seeded, two minutes on one core.

``network`` is the MODEL of the commands; ``train`` gives its weights and the rows that it has not seen.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scconv_deploy.zoo.cifar_resnet import BasicBlock
from tests.wild import OriginalScConv

SIDE, WIDTHS, BLOCKS = 16, (32, 64, 128), (2, 2, 4)
TRAINED_ON = 898
"""Half of the digits; the other 899 are held out."""
_EPOCHS, _BATCH, _RATE = 16, 64, 2e-3


class DigitsResNet(nn.Module):
    """Three stages of basic blocks, ScConv as the second 3x3; ``[N, 1, 16, 16]`` to logits ``[N, 10]``."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, WIDTHS[0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(WIDTHS[0])
        before, stages = WIDTHS[0], []
        for stage, channels in enumerate(WIDTHS):
            blocks = []
            for index in range(BLOCKS[stage]):
                stride = 2 if stage and not index else 1
                blocks.append(BasicBlock(before, channels, stride, lambda c, _: OriginalScConv(c), "conv"))
                before = channels
            stages.append(nn.Sequential(*blocks))
        self.layer1, self.layer2, self.layer3 = stages
        self.fc = nn.Linear(before, 10)

    def forward(self, image: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(image)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(x.mean((2, 3)))


def network() -> nn.Module:
    """A factory; its weights come from ``--weights``."""
    torch.manual_seed(0)
    return DigitsResNet().eval()


@dataclass(frozen=True)
class Digits:
    """Images float32 ``[N, 1, 16, 16]`` in [0, 1], each pixel doubled, and labels int64 ``[N]``, trained on and held
    out."""

    images: np.ndarray
    labels: np.ndarray
    held_images: np.ndarray
    held_labels: np.ndarray


def digits(seed: int) -> Digits:
    """Scikit-learn's digits in two halves, in a seeded order."""
    from sklearn import datasets

    data = datasets.load_digits()
    images = (data.images / 16).astype(np.float32)[:, None].repeat(2, 2).repeat(2, 3)
    order = np.random.default_rng(seed).permutation(len(images))
    known, held = order[:TRAINED_ON], order[TRAINED_ON:]
    return Digits(images[known], data.target[known], images[held], data.target[held])


def train(data: Digits, seed: int) -> nn.Module:
    """The network trained on the first half, in eval mode; images are moved by up to a pixel of the original."""
    torch.manual_seed(seed)
    net = DigitsResNet()
    images, labels = torch.from_numpy(data.images), torch.from_numpy(data.labels)
    optimizer = torch.optim.AdamW(net.parameters(), _RATE, weight_decay=1e-2)
    steps = _EPOCHS * -(-len(images) // _BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, _RATE * 2, total_steps=steps)
    for _ in range(_EPOCHS):
        for rows in torch.randperm(len(images)).split(_BATCH):
            down, right = (int(i) for i in torch.randint(-2, 3, (2,)))
            moved = torch.roll(images[rows], (down, right), (2, 3))
            optimizer.zero_grad()
            F.cross_entropy(net(moved), labels[rows]).backward()
            optimizer.step()
            schedule.step()
    return net.eval()
