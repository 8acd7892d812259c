"""Networks that jump at gates of no known SRU, and damage to their exports; for the tests and the benchmarks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from torch import nn


class AbsoluteSRU(nn.Module):
    """An SRU whose gate's weights are |gamma|; for any number of axes."""

    def __init__(self, channels=16, groups=4, axes=2):
        super().__init__()
        shape = (1, channels) + (1,) * axes
        self.gamma, self.beta, self.groups = nn.Parameter(torch.randn(shape)), nn.Parameter(torch.randn(shape)), groups

    def forward(self, x):
        y = x.reshape(x.shape[0], self.groups, -1)
        y = (y - y.mean(2, keepdim=True)) / (y.std(2, keepdim=True) + 1e-10)
        r = torch.sigmoid((y.reshape(x.shape) * self.gamma + self.beta) * self.gamma.abs() / self.gamma.abs().sum())
        one, other = ((r >= 0.5) * x).chunk(2, 1), ((r < 0.5) * x).chunk(2, 1)
        return torch.cat([one[0] + other[1], one[1] + other[0]], 1)


class NormGate(nn.Module):
    """A gate on a BatchNorm's output."""

    def __init__(self, channels=16):
        super().__init__()
        self.norm = nn.BatchNorm2d(channels)
        nn.init.normal_(self.norm.weight)
        self.norm.running_mean.normal_(0, 0.1)
        self.norm.running_var.uniform_(0.5, 2)

    def forward(self, x):
        weight = self.norm.weight / self.norm.weight.sum()
        r = torch.sigmoid(self.norm(x) * weight.view(1, -1, 1, 1))
        return torch.where(r > 0.5, x, r * x)


class Lambda(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def top_share(x):
    kept = torch.topk(x.flatten(2), 20, 2).values[..., -1:].unsqueeze(-1)
    return x * (x >= kept)


def in_place(x):
    return x.clone().gt_(0.2) * x + (x * 4).round_()


GATES: dict[str, Callable[[], nn.Module]] = {
    "|gamma|": AbsoluteSRU,
    "on a BatchNorm": NormGate,
    "no sigmoid": lambda: Lambda(lambda x: (x > x.mean()).float() * x),
    "masked_fill": lambda: Lambda(lambda x: x.masked_fill(x.abs() < x.abs().mean((2, 3), keepdim=True), 0.0)),
    "top share": lambda: Lambda(top_share),
    "sign": lambda: Lambda(lambda x: x * torch.relu(torch.sign(torch.sigmoid(x) - 0.5))),
    "rounded": lambda: Lambda(lambda x: torch.round(x * 8) / 8 + torch.floor(x * 3)),
    "casts": lambda: Lambda(lambda x: x * torch.relu(x - 0.1).bool() + x.int()),
    "quotients": lambda: Lambda(lambda x: x % 0.3 + x // 0.7),
    "operators that compare": lambda: Lambda(
        lambda x: nn.functional.threshold(x, 0.1, -1.0) + nn.functional.hardshrink(x, 0.3)
    ),
    "and, or": lambda: Lambda(lambda x: torch.where((x > 0.1) & (x < 0.9) | (x.mean(1, True) < 0), x, -x)),
    "local maxima": lambda: Lambda(lambda x: x * (x == nn.functional.max_pool2d(x, 3, 1, 1))),
    "in place": lambda: Lambda(in_place),
    # 3e4 times the rounding of x: on every machine some of 8,192 gates flip
    "many flips": lambda: Lambda(lambda x: torch.where(torch.sin(x * 3e4) > 0, x, -x)),
}


def around(gate: nn.Module) -> nn.Module:
    """A small network with a gate in the middle, for images ``[N, 3, 16, 16]``."""
    before, after = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 8, 3, padding=1)
    return nn.Sequential(before, nn.SiLU(), gate, after, nn.Tanh()).eval()


def gated(name: str, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return around(GATES[name]())


class AllGates(nn.Module):
    """All of :data:`GATES` on one tensor, so that many gates are told apart in one graph."""

    def __init__(self):
        super().__init__()
        self.gates = nn.ModuleList(gate() for gate in GATES.values())

    def forward(self, x):
        return sum(gate(x) for gate in self.gates)


def all_gates(seed: int = 0) -> nn.Module:
    """A small network with every one of them."""
    torch.manual_seed(seed)
    return around(AllGates())


class TwoMasks(nn.Module):
    """One gate computed from one tensor and applied to two others, and one with equal values on its threshold."""

    def __init__(self):
        super().__init__()
        self.stem, self.score = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 1)
        self.one, self.other = nn.Conv2d(16, 16, 1), nn.Conv2d(16, 16, 3, padding=1)
        self.head = nn.Conv2d(16, 8, 3, padding=1)

    def forward(self, image):
        x = self.stem(image)
        kept = torch.sigmoid(self.score(x)) >= 0.5
        y = torch.where(kept, self.one(x), self.other(x))
        rectified = torch.relu(y)
        return torch.tanh(self.head(y + 0.1 * (rectified > 0)))


def two_masks(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return TwoMasks().eval()


def node_of(model: onnx.ModelProto, *types: str) -> onnx.NodeProto:
    """The first node of one of these types."""
    return next(node for node in model.graph.node if node.op_type in types)


def _edit(model: onnx.ModelProto, name: str, change: Callable[[np.ndarray], np.ndarray]) -> None:
    tensor = next(t for t in model.graph.initializer if t.name == name)
    tensor.CopyFrom(numpy_helper.from_array(change(numpy_helper.to_array(tensor).copy()), tensor.name))


def _inverted(model: onnx.ModelProto) -> None:
    node = node_of(model, "GreaterOrEqual")
    node.op_type = "Less"


def _threshold_moved(model: onnx.ModelProto) -> None:
    node, further = node_of(model, "GreaterOrEqual"), "moved"
    stored = next(t for t in model.graph.initializer if t.name == node.input[1])
    model.graph.initializer.append(numpy_helper.from_array(numpy_helper.to_array(stored) + np.float32(1e-3), further))
    node.input[1] = further


def _other_branch(model: onnx.ModelProto) -> None:
    node = node_of(model, "Where")
    node.input[1], node.input[2] = node.input[2], node.input[1]


def _mask_dropped(model: onnx.ModelProto) -> None:
    node = node_of(model, "Where")
    kept = node.input[1]
    node.op_type = "Identity"
    del node.input[:]
    node.input.append(kept)


def _ties_decided_otherwise(model: onnx.ModelProto) -> None:
    node_of(model, "Greater").op_type = "GreaterOrEqual"


def _last_layer_dropped(model: onnx.ModelProto) -> None:
    node_of(model, "Tanh").op_type = "Identity"


def _applied_to_another_tensor(model: onnx.ModelProto) -> None:
    """The mask of the score lets the stem through, and not the convolution of it."""
    node, convolution = node_of(model, "Where"), node_of(model, "Conv")
    node.input[1] = convolution.output[0]


def _score_scaled(model: onnx.ModelProto) -> None:
    """A weight that only the gate sees."""

    def change(weight: np.ndarray) -> np.ndarray:
        weight[3] *= np.float32(1.001)
        return weight

    _edit(model, "score.weight", change)


def _gate_of_another_tensor(model: onnx.ModelProto) -> None:
    """The gate is computed from what it is applied to."""
    node_of(model, "GreaterOrEqual").input[0] = node_of(model, "Where").input[1]


@dataclass(frozen=True)
class Damage:
    """To an export of :func:`two_masks`, and one check that must fail."""

    damage: Callable[[onnx.ModelProto], None]
    check: str


DAMAGE = {
    "comparison inverted": Damage(_inverted, "replay"),
    "threshold moved by 1e-3": Damage(_threshold_moved, "other gates"),
    "branches exchanged": Damage(_other_branch, "replay"),
    "mask dropped": Damage(_mask_dropped, "replay"),
    "> became >=": Damage(_ties_decided_otherwise, "other gates"),
    "layer after the gate dropped": Damage(_last_layer_dropped, "replay"),
    "mask applied to another tensor": Damage(_applied_to_another_tensor, "replay"),
    "a weight before the gate changed": Damage(_score_scaled, "other gates"),
    "gate computed from another tensor": Damage(_gate_of_another_tensor, "replay"),
}

__all__ = ["DAMAGE", "GATES", "Damage", "Lambda", "all_gates", "around", "gated", "node_of", "two_masks"]
