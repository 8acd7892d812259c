"""ScConv as people write it: code that the package did not write and must recognise by what it does.

Nothing here uses the package. ``OriginalSRU`` follows the published code's behaviour and names; the others differ in
the ways that are found in the wild.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


class OriginalGroupBatchnorm2d(nn.Module):
    def __init__(self, c_num, group_num=16, eps=1e-10):
        super().__init__()
        self.group_num = group_num
        self.gamma = nn.Parameter(torch.randn(c_num, 1, 1))
        self.beta = nn.Parameter(torch.zeros(c_num, 1, 1))
        self.eps = eps

    def forward(self, x):
        n, c, h, w = x.size()
        x = x.view(n, self.group_num, -1)
        mean = x.mean(dim=2, keepdim=True)
        std = x.std(dim=2, keepdim=True)
        x = (x - mean) / (std + self.eps)
        x = x.view(n, c, h, w)
        return x * self.gamma + self.beta


def cross(x1, x2):
    x11, x12 = torch.split(x1, x1.size(1) // 2, dim=1)
    x21, x22 = torch.split(x2, x2.size(1) // 2, dim=1)
    return torch.cat([x11 + x22, x12 + x21], dim=1)


class OriginalSRU(nn.Module):
    """groupbn-hard, with the gamma sum that unrolls into one node per channel."""

    def __init__(self, oup_channels, group_num=16, gate_treshold=0.5):
        super().__init__()
        self.gn = OriginalGroupBatchnorm2d(oup_channels, group_num)
        self.gate_treshold = gate_treshold
        self.sigomid = nn.Sigmoid()

    def forward(self, x):
        gn_x = self.gn(x)
        w_gamma = self.gn.gamma / sum(self.gn.gamma)
        reweigts = self.sigomid(gn_x * w_gamma)
        info_mask = reweigts >= self.gate_treshold
        noninfo_mask = reweigts < self.gate_treshold
        return cross(info_mask * x, noninfo_mask * x)


class OriginalCRU(nn.Module):
    conv, pool = nn.Conv2d, nn.AdaptiveAvgPool2d

    def __init__(self, op_channel, alpha=1 / 2, squeeze_radio=2, group_size=2, group_kernel_size=3):
        super().__init__()
        self.up_channel = up = int(alpha * op_channel)
        self.low_channel = low = op_channel - up
        self.squeeze1 = self.conv(up, up // squeeze_radio, 1, bias=False)
        self.squeeze2 = self.conv(low, low // squeeze_radio, 1, bias=False)
        self.GWC = self.conv(
            up // squeeze_radio, op_channel, group_kernel_size, 1, group_kernel_size // 2, groups=group_size
        )
        self.PWC1 = self.conv(up // squeeze_radio, op_channel, 1, bias=False)
        self.PWC2 = self.conv(low // squeeze_radio, op_channel - low // squeeze_radio, 1, bias=False)
        self.advavg = self.pool(1)

    def forward(self, x):
        up, low = torch.split(x, [self.up_channel, self.low_channel], dim=1)
        up, low = self.squeeze1(up), self.squeeze2(low)
        y1 = self.GWC(up) + self.PWC1(up)
        y2 = torch.cat([self.PWC2(low), low], dim=1)
        out = torch.cat([y1, y2], dim=1)
        out = F.softmax(self.advavg(out), dim=1) * out
        out1, out2 = torch.split(out, out.size(1) // 2, dim=1)
        return out1 + out2


class OriginalScConv(nn.Module):
    def __init__(self, op_channel, group_num=16, gate_treshold=0.5):
        super().__init__()
        self.SRU = OriginalSRU(op_channel, group_num, gate_treshold)
        self.CRU = OriginalCRU(op_channel)

    def forward(self, x):
        return self.CRU(self.SRU(x))


class NormalizedSRU(nn.Module):
    """groupbn-hard-normalized: .weight/.bias, the mask multiplies the normalised features."""

    class Norm(nn.Module):
        def __init__(self, channels, groups=4, eps=1e-10):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(channels, 1, 1))
            self.bias = nn.Parameter(torch.randn(channels, 1, 1))
            self.groups, self.eps = groups, eps

        def forward(self, x):
            shape = x.shape
            x = x.reshape(shape[0], self.groups, -1)
            x = (x - x.mean(-1, keepdim=True)) / (x.std(-1, keepdim=True) + self.eps)
            return x.reshape(shape) * self.weight + self.bias

    def __init__(self, channels, groups=4):
        super().__init__()
        self.norm = self.Norm(channels, groups)

    def forward(self, x):
        x = self.norm(x)
        weight = self.norm.weight / self.norm.weight.sum()
        keep = (torch.sigmoid(x * weight) >= 0.5).float()
        return cross(keep * x, (1 - keep) * x)


class SoftSRU(nn.Module):
    """groupnorm-soft, the public repository's head."""

    def __init__(self, oup_channels, group_num=4, gate_treshold=0.5):
        super().__init__()
        self.gn = nn.GroupNorm(group_num, oup_channels)
        self.gate_treshold = gate_treshold

    def forward(self, x):
        gn_x = self.gn(x)
        w_gamma = (self.gn.weight / sum(self.gn.weight)).view(1, -1, 1, 1)
        r = torch.sigmoid(gn_x * w_gamma)
        w1 = torch.where(r > self.gate_treshold, torch.ones_like(r), r)
        w2 = torch.where(r > self.gate_treshold, torch.zeros_like(r), r)
        return cross(w1 * x, w2 * x)


class SoftmaxSRU(nn.Module):
    """Older code: the gate weight is softmax(gamma); other names, reshape for view, float masks."""

    def __init__(self, dim, num_groups=16, th=0.5):
        super().__init__()
        self.g = num_groups
        self.scale = nn.Parameter(torch.randn(1, dim, 1, 1))
        self.offset = nn.Parameter(torch.randn(1, dim, 1, 1) * 0.1)
        self.th = th

    def forward(self, x):
        b, c, h, w = x.shape
        y = x.reshape(b, self.g, c * h * w // self.g)
        y = (y - y.mean(2, True)) / (y.std(2, keepdim=True) + 1e-10)
        y = y.reshape(b, c, h, w) * self.scale + self.offset
        gate = torch.sigmoid(y * torch.softmax(self.scale, 1))
        hi, lo = (gate >= self.th).float(), (gate < self.th).float()
        return cross(hi * x, lo * x)


class StrictSRU(OriginalSRU):
    """The original with > for >=: differs only where the sigmoid is exactly the threshold."""

    def forward(self, x):
        w_gamma = self.gn.gamma / self.gn.gamma.sum()
        r = torch.sigmoid(self.gn(x) * w_gamma)
        return cross((r > self.gate_treshold) * x, (r <= self.gate_treshold) * x)


class ProjectingSRU(nn.Module):
    """in != out: a 1x1 inside the SRU, before the gate."""

    strict = False

    def __init__(self, cin, cout, groups=16):
        super().__init__()
        self.proj = nn.Conv2d(cin, cout, 1)
        self.sru_norm = OriginalGroupBatchnorm2d(cout, groups)

    def project(self, x):
        return self.proj(x)

    def gate(self, x):
        w = self.sru_norm.gamma / self.sru_norm.gamma.sum()
        r = torch.sigmoid(self.sru_norm(x) * w)
        mask = r > 0.5 if self.strict else r >= 0.5
        return cross(mask * x, ~mask * x)

    def forward(self, x):
        return self.gate(self.project(x))


class ProjectedSRU(ProjectingSRU):
    """The same with the 1x1 after the gate."""

    def forward(self, x):
        return self.project(self.gate(x))


class BiasedSRU(OriginalSRU):
    """The biased deviation, with the original's eps on it."""

    def forward(self, x):
        n, c, h, w = x.size()
        y = x.view(n, self.gn.group_num, -1)
        y = (y - y.mean(2, keepdim=True)) / (y.std(2, keepdim=True, unbiased=False) + self.gn.eps)
        y = y.view(n, c, h, w) * self.gn.gamma + self.gn.beta
        r = torch.sigmoid(y * (self.gn.gamma / self.gn.gamma.sum()))
        return cross((r >= self.gate_treshold) * x, (r < self.gate_treshold) * x)


class ManualSRU(nn.Module):
    """Nothing to read from attributes: groups and eps are literals in the code."""

    def __init__(self, channels, normalize):
        super().__init__()
        self.g = nn.Parameter(torch.randn(1, channels, 1, 1))
        self.b = nn.Parameter(torch.zeros(1, channels, 1, 1))
        self.normalize = normalize

    def forward(self, x):
        r = torch.sigmoid((self.normalize(x) * self.g + self.b) * (self.g / self.g.sum()))
        return cross((r >= 0.5) * x, (r < 0.5) * x)


def manual_sru(channels, groups, eps, ddof=1, in_variance=False):
    """A ManualSRU with this normalisation."""

    def normalize(x):
        y = x.reshape(x.shape[0], groups, -1)
        var = y.var(2, unbiased=ddof == 1, keepdim=True)
        s = torch.sqrt(var + eps) if in_variance else torch.sqrt(var) + eps
        return ((y - y.mean(2, keepdim=True)) / s).reshape(x.shape)

    return ManualSRU(channels, normalize)


def far_out(module):
    """gamma 0.5, beta 3: every boundary lies six deviations from the mean."""
    with torch.no_grad():
        module.gn.gamma.fill_(0.5)
        module.gn.beta.fill_(3.0)
    module.keep = True
    return module


# --- looks like an SRU and is none ---


class UncrossedSRU(OriginalSRU):
    """The halves are not crossed."""

    def forward(self, x):
        w = self.gn.gamma / self.gn.gamma.sum()
        r = torch.sigmoid(self.gn(x) * w)
        return (r >= self.gate_treshold) * x + 0.5 * (r < self.gate_treshold) * x


class InvertedSRU(OriginalSRU):
    """The comparison is the other way round."""

    def forward(self, x):
        w = self.gn.gamma / self.gn.gamma.sum()
        r = torch.sigmoid(self.gn(x) * w)
        return cross((r < self.gate_treshold) * x, (r >= self.gate_treshold) * x)


class ClampedSRU(OriginalSRU):
    """An SRU up to a thousand."""

    def forward(self, x):
        return super().forward(x.clamp(-1000, 1000))


class InPlaceSRU(OriginalSRU):
    """Writes into what it is given."""

    def forward(self, x):
        y = super().forward(x)
        x.mul_(0.5)
        return y


class CountingSRU(OriginalSRU):
    """Has a state that moves."""

    def __init__(self, channels):
        super().__init__(channels)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        return super().forward(x)


def hooked(module):
    """With a hook that changes what the module returns."""
    module.register_forward_hook(lambda m, args, y: y * 2)
    return module


class LayerNorm2d(nn.Module):
    """Has an SRU's parameters and nothing else of it."""

    def __init__(self, channels):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x):
        mean = x.mean(1, keepdim=True)
        var = (x - mean).square().mean(1, keepdim=True)
        return (x - mean) / torch.sqrt(var + 1e-6) * self.weight[:, None, None] + self.bias[:, None, None]


def randomize(module, seed=0):
    """Give gamma and beta values such as training leaves; returns the module in eval mode."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if parameter.numel() == max(parameter.shape) and parameter.numel() > 1 and "proj" not in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return module.eval()
