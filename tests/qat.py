"""Networks that PyTorch's eager mode trains with fake quantisation."""

from __future__ import annotations

import torch
import torch.ao.quantization as ao
import torch.nn.functional as F
from torch import Tensor, nn

from scconv_deploy.nn import ScConv
from tests import made_once


class QuantizedDigits(nn.Module):
    """8x8 digits; its SRU is left in float, as the fence wants it."""

    def __init__(self) -> None:
        super().__init__()
        self.quant, self.dequant = ao.QuantStub(), ao.DeQuantStub()
        self.conv, self.bn, self.relu = nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU()
        self.scconv, self.fc = ScConv(16, variant="groupnorm-soft"), nn.Linear(16 * 16, 10)

    def forward(self, image: Tensor) -> Tensor:
        x = self.dequant(self.relu(self.bn(self.conv(self.quant(image)))))
        x = F.max_pool2d(x + F.relu(self.scconv(x)), 2)
        return self.fc(x.flatten(1))


def fake(low: int = -128, high: int = 127, channels: bool = False, **settings: object) -> object:
    """A FakeQuantize, for a tensor or for the channels of a weight."""
    observer = ao.MovingAveragePerChannelMinMaxObserver if channels else ao.MovingAverageMinMaxObserver
    scheme = torch.per_channel_symmetric if channels else torch.per_tensor_symmetric
    more = {"ch_axis": 0} if channels else {}
    kind = torch.qint8 if low < 0 else torch.quint8
    given = {"dtype": kind, "qscheme": scheme} | more | settings
    return ao.FakeQuantize.with_args(observer=observer, quant_min=low, quant_max=high, **given)


def prepared(activation: object = None, weight: object = None, fence: bool = True) -> nn.Module:
    """The network in train mode with fake quantisers."""
    torch.manual_seed(0)
    net = QuantizedDigits().train()
    net.qconfig = ao.QConfig(activation=activation or fake(), weight=weight or fake(channels=True))
    if fence:
        net.scconv.SRU.qconfig = None
    net = ao.fuse_modules_qat(net, [["conv", "bn", "relu"]])
    return ao.prepare_qat(net)


def seen(net: nn.Module) -> nn.Module:
    """A network that saw two batches of noise, in eval mode, its scales fixed."""
    for seed in range(2):
        net(torch.rand(8, 1, 8, 8, generator=torch.Generator().manual_seed(seed)))
    net.eval().apply(ao.disable_observer)
    return net


def trained() -> tuple[nn.Module, Tensor, Tensor]:
    """(network in eval mode, test images ``[397, 1, 8, 8]``, labels), seeded; trained once a run."""
    return made_once.once(made_once.key_of("digits with fake quantisation"), _trained)


def _trained() -> tuple[nn.Module, Tensor, Tensor]:
    from sklearn import datasets

    data = datasets.load_digits()
    images, labels = torch.tensor(data.images, dtype=torch.float32)[:, None] / 16, torch.tensor(data.target)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    known, test = order[:1400], order[1400:]
    net = prepared()
    optimizer, generator = torch.optim.Adam(net.parameters(), 3e-3), torch.Generator().manual_seed(1)
    for _ in range(3):
        for batch in known[torch.randperm(len(known), generator=generator)].split(64):
            optimizer.zero_grad()
            F.cross_entropy(net(images[batch]), labels[batch]).backward()
            optimizer.step()
    net.eval().apply(ao.disable_observer)
    for module in net.modules():
        vars(module).pop("qconfig", None)  # it cannot be pickled
    return net, images[test], labels[test]
