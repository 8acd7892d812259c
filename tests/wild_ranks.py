"""ScConv3d and ScConv1d as people write them, for medical volumes ``[N, C, D, H, W]`` and signals ``[N, C, L]``.

Nothing here uses the package; see :mod:`tests.wild`.
"""

from __future__ import annotations

import torch
from torch import nn

from tests.wild import OriginalCRU, cross


class GroupBatchnorm3d(nn.Module):
    def __init__(self, c_num, group_num=16, eps=1e-10):
        super().__init__()
        assert c_num >= group_num
        self.group_num = group_num
        self.weight = nn.Parameter(torch.randn(c_num, 1, 1, 1))
        self.bias = nn.Parameter(torch.zeros(c_num, 1, 1, 1))
        self.eps = eps

    def forward(self, x):
        N, C, D, H, W = x.size()
        x = x.view(N, self.group_num, -1)
        mean = x.mean(dim=2, keepdim=True)
        std = x.std(dim=2, keepdim=True)
        x = (x - mean) / (std + self.eps)
        x = x.view(N, C, D, H, W)
        return x * self.weight + self.bias


class SRU3d(nn.Module):
    """groupbn-hard, or with nn.GroupNorm."""

    def __init__(self, oup_channels, group_num=16, gate_treshold=0.5, torch_gn=False):
        super().__init__()
        norm = nn.GroupNorm(group_num, oup_channels) if torch_gn else GroupBatchnorm3d(oup_channels, group_num)
        self.gn = norm
        self.gate_treshold = gate_treshold
        self.sigomid = nn.Sigmoid()

    def forward(self, x):
        gn_x = self.gn(x)
        w_gamma = self.gn.weight / sum(self.gn.weight)
        w_gamma = w_gamma.view(1, -1, 1, 1, 1)
        reweigts = self.sigomid(gn_x * w_gamma)
        info_mask = reweigts >= self.gate_treshold
        noninfo_mask = reweigts < self.gate_treshold
        return cross(info_mask * x, noninfo_mask * x)


class CRU3d(OriginalCRU):
    conv, pool = nn.Conv3d, nn.AdaptiveAvgPool3d


class ScConv3d(nn.Module):
    def __init__(self, op_channel, group_num=16, gate_treshold=0.5):
        super().__init__()
        self.SRU = SRU3d(op_channel, group_num, gate_treshold)
        self.CRU = CRU3d(op_channel)

    def forward(self, x):
        return self.CRU(self.SRU(x))


class GroupBatchnorm1d(nn.Module):
    def __init__(self, c_num, group_num=16, eps=1e-10):
        super().__init__()
        self.group_num = group_num
        self.gamma = nn.Parameter(torch.randn(c_num, 1))
        self.beta = nn.Parameter(torch.zeros(c_num, 1))
        self.eps = eps

    def forward(self, x):
        n, c, length = x.size()
        x = x.view(n, self.group_num, -1)
        x = (x - x.mean(dim=2, keepdim=True)) / (x.std(dim=2, keepdim=True) + self.eps)
        return x.view(n, c, length) * self.gamma + self.beta


class SRU1d(nn.Module):
    """groupbn-hard."""

    def __init__(self, oup_channels, group_num=16, gate_treshold=0.5):
        super().__init__()
        self.gn = GroupBatchnorm1d(oup_channels, group_num)
        self.gate_treshold = gate_treshold

    def forward(self, x):
        gn_x = self.gn(x)
        r = torch.sigmoid(gn_x * (self.gn.gamma / sum(self.gn.gamma)))
        return cross((r >= self.gate_treshold) * x, (r < self.gate_treshold) * x)


class CRU1d(OriginalCRU):
    conv, pool = nn.Conv1d, nn.AdaptiveAvgPool1d


class ScConv1d(nn.Module):
    def __init__(self, op_channel, group_num=16, gate_treshold=0.5):
        super().__init__()
        self.SRU = SRU1d(op_channel, group_num, gate_treshold)
        self.CRU = CRU1d(op_channel)

    def forward(self, x):
        return self.CRU(self.SRU(x))


class NormalizedSRU(nn.Module):
    """groupbn-hard-normalized for any number of axes: the mask multiplies the normalised features."""

    def __init__(self, channels, dims, groups=4):
        super().__init__()
        self.g = groups
        self.weight = nn.Parameter(torch.randn(1, channels, *[1] * dims))
        self.bias = nn.Parameter(torch.randn(1, channels, *[1] * dims))

    def forward(self, x):
        y = x.reshape(x.shape[0], self.g, -1)
        y = ((y - y.mean(-1, keepdim=True)) / (y.std(-1, keepdim=True) + 1e-10)).view_as(x)
        y = y * self.weight + self.bias
        keep = (torch.sigmoid(y * (self.weight / self.weight.sum())) >= 0.5).float()
        return cross(keep * y, (1 - keep) * y)


class SoftSRU(nn.Module):
    """groupnorm-soft for any number of axes."""

    def __init__(self, channels, groups=4):
        super().__init__()
        self.gn = nn.GroupNorm(groups, channels)

    def forward(self, x):
        w = (self.gn.weight / torch.sum(self.gn.weight)).view(1, -1, *[1] * (x.dim() - 2))
        r = torch.sigmoid(self.gn(x) * w)
        w1 = torch.where(r > 0.5, torch.ones_like(r), r)
        w2 = torch.where(r > 0.5, torch.zeros_like(r), r)
        return cross(w1 * x, w2 * x)


class ProjectingSRU(nn.Module):
    """A convolution of kernel size 1 inside, before the gate or after it."""

    def __init__(self, cin, cout, dims, after=False, groups=4):
        super().__init__()
        conv = {1: nn.Conv1d, 3: nn.Conv3d}[dims]
        self.proj, self.after = conv(cin, cout, 1), after
        self.sru = {1: GroupBatchnorm1d, 3: GroupBatchnorm3d}[dims](cin if after else cout, groups)

    def gate(self, x):
        gamma = self.sru.gamma if hasattr(self.sru, "gamma") else self.sru.weight
        r = torch.sigmoid(self.sru(x) * (gamma / gamma.sum()))
        return cross((r >= 0.5) * x, (r < 0.5) * x)

    def forward(self, x):
        return self.proj(self.gate(x)) if self.after else self.gate(self.proj(x))


# --- looks like an SRU of volumes and is none ---


class SlicewiseSRU3d(SRU3d):
    """Statistics of each slice alone: the groups lie over one depth only."""

    def forward(self, x):
        n, c, d, h, w = x.shape
        y = super().forward(x.transpose(1, 2).reshape(n * d, c, 1, h, w).contiguous())
        return y.reshape(n, d, c, h, w).transpose(1, 2)


class DepthCrossedSRU3d(SRU3d):
    """The halves of the depth are crossed, not those of the channels."""

    def forward(self, x):
        r = torch.sigmoid(self.gn(x) * (self.gn.weight / self.gn.weight.sum()))
        x1, x2 = ((r >= 0.5) * x).transpose(1, 2), ((r < 0.5) * x).transpose(1, 2)
        return cross(x1, x2).transpose(1, 2)
