"""Damage to an exported ScConv-ResNet, and what must catch it; used by the tests and by ``benchmarks/mutations.py``."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from scconv_deploy.gate.cut import tau
from scconv_deploy.gate.gate import Gate
from scconv_deploy.graph import instrument
from scconv_deploy.graph.contract import FunctionKey
from scconv_deploy.graph.functions import function_text
from scconv_deploy.graph.merged import merged_name
from scconv_deploy.graph.types import PRECISION
from scconv_deploy.nn import ScConv
from scconv_deploy.zoo.cifar_resnet import CifarResNet
from scconv_deploy.zoo.layers import initialize, scconv3x3


class Block(nn.Module):
    """A residual block of volumes or signals with a ScConv in it."""

    def __init__(self, dims: int, channels: int, stride: int, **scconv: Any) -> None:
        super().__init__()
        conv, norm = _LAYERS[dims]
        self.conv1, self.bn1 = conv(channels, channels, 3, stride, 1, bias=False), norm(channels)
        self.conv2, self.bn2 = ScConv(channels, dims=dims, **scconv), norm(channels)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x))))))


class RankResNet(nn.Module):
    """A small ScConv network of volumes (dims 3) or signals (1): two stages, ``[N, 3, *]`` to ``[N, 32]``."""

    def __init__(self, dims: int, channels: int = 32, **scconv: Any) -> None:
        super().__init__()
        conv, norm = _LAYERS[dims]
        self.conv1, self.bn1 = conv(3, channels, 3, 1, 1, bias=False), norm(channels)
        self.layer1, self.layer2 = (nn.Sequential(Block(dims, channels, stride, **scconv)) for stride in (1, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer2(self.layer1(torch.relu(self.bn1(self.conv1(x))))).flatten(2).mean(2)


class TwoHeads(nn.Module):
    """A network with two outputs of one shape."""

    def __init__(self, net: nn.Module, channels: int) -> None:
        super().__init__()
        self.net = net
        self.first, self.second = nn.Linear(channels, 10), nn.Linear(channels, 10)

    def forward(self, image):
        x = self.net(image)
        return {"first": self.first(x), "second": self.second(x)}


_LAYERS: dict[int, tuple[Any, Any]] = {1: (nn.Conv1d, nn.BatchNorm1d), 3: (nn.Conv3d, nn.BatchNorm3d)}
SITE = "net.layer2.0.conv2.SRU"
ZERO_BETA = "net.layer1.0.conv2.SRU"
"""As it is before training: its cut is tau / a, so that every bit of tau shows; beta * w would swallow them."""


def two_heads(blocks_per_stage: int, side: int, seed: int = 0, dims: int = 2) -> nn.Module:
    """Seeded, in eval mode, its gates' beta drawn: with beta = 0 the deviation and its eps would hardly matter.

    Args:
        blocks_per_stage: three are ScConv-ResNet-20; of volumes and signals there is the one network.
        side: of the input, in every axis.
    """
    torch.manual_seed(seed)
    if dims == 2:
        net: nn.Module = initialize(CifarResNet(blocks_per_stage, scconv3x3()), (8, 3, side, side))
        net.fc = nn.Identity()
        model = TwoHeads(net, 64)
    else:
        model = TwoHeads(initialize(RankResNet(dims), (8, 3, *[side] * dims)), 32)
    for name, parameter in model.named_parameters():
        if name.endswith("gn.beta") and ZERO_BETA not in name:
            nn.init.normal_(parameter)
    return model.eval()


def node_of(model: onnx.ModelProto, site: str = SITE) -> onnx.NodeProto:
    return instrument.sites(model)[site]


def edit(model: onnx.ModelProto, name: str, change: Callable[[np.ndarray], np.ndarray]) -> None:
    tensor = next(t for t in model.graph.initializer if t.name == name)
    tensor.CopyFrom(numpy_helper.from_array(change(numpy_helper.to_array(tensor).copy()), tensor.name))


def edit_body(model: onnx.ModelProto, old: str, new: str) -> None:
    text = function_text(FunctionKey("SRU", False, "multiply", 18))
    if text.count(old) != 1:
        raise ValueError(f"{old!r} is not once in the body")
    del model.functions[:]
    model.functions.append(onnx.parser.parse_function(text.replace(old, new)))


def set_attribute(model: onnx.ModelProto, name: str, value: float) -> None:
    node = node_of(model)
    kept = [a for a in node.attribute if a.name != name]
    del node.attribute[:]
    node.attribute.extend([*kept, helper.make_attribute(name, value)])


def recut(model: onnx.ModelProto, torch_model: nn.Module, change, site: str = SITE) -> None:
    """The cut of one SRU as it would be for other parameters; change is (gamma, beta) -> cut."""
    norm = torch_model.get_submodule(site).gn
    edit(model, node_of(model, site).input[1], lambda cut: change(norm.gamma, norm.beta))


def tau_moved(
    model: onnx.ModelProto, torch_model: nn.Module, move: Callable[[np.float32], np.float64], site: str = SITE
) -> None:
    variant = torch_model.get_submodule(site).variant

    def cut(gamma, beta):
        sign, threshold = Gate(variant, gamma, beta).form.sign, tau(variant.threshold, variant.comparison)
        g, b = gamma.detach().double().numpy().ravel(), beta.detach().double().numpy().ravel()
        w = (gamma / gamma.sum()).detach().double().numpy().ravel()
        return (sign * (move(np.float32(threshold)) - b * w) / (g * w)).astype(np.float32)

    recut(model, torch_model, cut, site)


def one_ulp(tau: np.float32) -> np.float64:
    return np.float64(np.nextafter(tau, np.float32(1)))


def gamma_changed(model: onnx.ModelProto, torch_model: nn.Module) -> None:
    variant = torch_model.get_submodule(SITE).variant

    def cut(gamma, beta):
        changed = gamma.detach().clone()
        changed.view(-1)[3] *= 1 + 1e-3
        return Gate(variant, changed, beta).form.cut

    recut(model, torch_model, cut)


def sru_in_half(model: onnx.ModelProto) -> None:
    """Data in float16 around one SRU; what it computes inside stays float32."""
    node = node_of(model)
    index = list(model.graph.node).index(node)
    x, y = node.input[0], node.output[0]
    node.input[0], node.output[0] = "half_x", "half_y"
    model.graph.node.insert(index, helper.make_node("Cast", [x], ["half_x"], to=TensorProto.FLOAT16))
    model.graph.node.insert(index + 2, helper.make_node("Cast", ["half_y"], [y], to=TensorProto.FLOAT))


def called_half(model: onnx.ModelProto) -> None:
    """Off by a hundredth, which bfloat16's tolerances would let pass, in a float32 model that says it is bfloat16."""
    edit(model, "second.bias", lambda bias: bias * np.float32(1.01))
    entry = model.metadata_props.add()
    entry.key, entry.value = PRECISION, json.dumps({"precision": "bf16"})


def drop_layer(model: onnx.ModelProto) -> None:
    """The first ReLU of the second stage."""
    relu = next(n for n in model.graph.node if n.op_type == "Relu" and instrument.module_of(n) == "net.layer2.0")
    relu.op_type = "Identity"


def swap_outputs(model: onnx.ModelProto) -> None:
    names = {"first": "second", "second": "first"}
    for node in model.graph.node:
        node.output[:] = [names.get(name, name) for name in node.output]


def flip_bit(bit: int) -> Callable[[np.ndarray], np.ndarray]:
    def flip(weight: np.ndarray) -> np.ndarray:
        weight.view(np.uint32).flat[5] ^= 1 << bit
        return weight

    return flip


def nudge(weight: np.ndarray) -> np.ndarray:
    weight.flat[7] += 1e-4 * np.linalg.norm(weight)
    return weight


def spoil(bias: np.ndarray) -> np.ndarray:
    bias[1] = np.nan
    return bias


GWC = "net.layer2.0.conv2.CRU.GWC.weight"  # a convolution that no BatchNorm is folded into
BIAS = GWC.removesuffix("weight") + "bias"
STEM = "net.conv1.weight"  # one that has its BatchNorm folded in


@dataclass(frozen=True)
class Mutation:
    """Damage, the check that must fail, words of its reason, and why no run of the model can show it (if so)."""

    damage: Callable[[onnx.ModelProto, nn.Module], None]
    check: str
    words: str
    below_the_noise: str = ""


MUTATIONS = {
    "gate inverted": Mutation(
        lambda m, _: edit_body(m, "GreaterOrEqual (", "Less ("), "teacher-forced gates", "unexplained"
    ),
    "> for >=": Mutation(
        lambda m, _: edit_body(m, "GreaterOrEqual (", "Greater ("), "static", "function body",
        "the two differ only where the margin is exactly 0, which no element of a random input meets",
    ),
    "tau off by one ulp": Mutation(
        lambda m, t: tau_moved(m, t, one_ulp, ZERO_BETA), "static", "cut differs",
        "tau is about 1e-7, its last place 1e-14: no rounding can say on which side of that a gate lies",
    ),
    "tau off by 1e-3": Mutation(
        lambda m, t: tau_moved(m, t, lambda tau: tau + np.float64(1e-3)), "teacher-forced gates", SITE
    ),
    "biased for unbiased deviation": Mutation(lambda m, _: set_attribute(m, "ddof", 0), "static", "ddof is 0"),
    "eps 1e-5 for 1e-10": Mutation(lambda m, _: set_attribute(m, "eps_std", 1e-5), "static", "eps_std"),
    "halves not crossed": Mutation(
        lambda m, _: edit_body(m, "value_ints = [1, 0]", "value_ints = [0, 1]"), "replay", "noise floor"
    ),
    "wrong group count": Mutation(lambda m, _: set_attribute(m, "num_groups", 8), "teacher-forced gates", SITE),
    "one channel's gamma changed by 1e-3": Mutation(gamma_changed, "static", "cut differs"),
    "one weight changed by 1e-4 of its norm": Mutation(lambda m, _: edit(m, GWC, nudge), "weights", GWC),
    "the same where a BatchNorm is folded in": Mutation(lambda m, _: edit(m, STEM, nudge), "weights", STEM),
    "one weight bit flipped, the lowest": Mutation(
        lambda m, _: edit(m, GWC, flip_bit(0)), "weights", GWC,
        "one part in 1e7 of one of thousands of weights: below the rounding of the sums that it is part of",
    ),
    "one weight bit flipped, the sign": Mutation(lambda m, _: edit(m, GWC, flip_bit(31)), "replay", "noise floor"),
    "one bit of a bias flipped": Mutation(lambda m, _: edit(m, BIAS, flip_bit(9)), "weights", BIAS),
    "half by its metadata alone": Mutation(lambda m, _: called_half(m), "replay", "noise floor"),
    "one SRU in fp16": Mutation(lambda m, _: sru_in_half(m), "replay", "noise floor"),
    "a layer dropped": Mutation(lambda m, _: drop_layer(m), "replay", "noise floor"),
    "outputs swapped": Mutation(lambda m, _: swap_outputs(m), "replay", "noise floor"),
    "NaN in one output": Mutation(
        lambda m, _: edit(m, "second.bias", spoil), "finite", "the artifact's output second"
    ),
}  # fmt: skip

CRU = "net.layer2.0.conv2.CRU"
MERGED = {
    kind: merged_name(kind, [f"{CRU}.{part}" for part in parts])
    for kind, parts in {
        "squeeze": ("squeeze1.weight", "squeeze2.weight"),
        "paths": ("GWC.weight", "PWC1.weight", "PWC2.weight"),
        "bias": ("GWC.bias",),
    }.items()
}


def without_the_1x1(weight: np.ndarray, torch_model: nn.Module) -> np.ndarray:
    pwc1 = torch_model.get_submodule(CRU).PWC1.weight.detach().numpy()
    weight[: len(pwc1), :, 1, 1] -= pwc1[:, :, 0, 0]
    return weight


def entry_of(*index: int, value: float) -> Callable[[np.ndarray], np.ndarray]:
    def change(weight: np.ndarray) -> np.ndarray:
        weight[index] = value
        return weight

    return change


def convolution_of(model: onnx.ModelProto, name: str) -> onnx.NodeProto:
    return next(node for node in model.graph.node if name in node.input)


def padded_aside(model: onnx.ModelProto) -> None:
    pads = next(a for a in convolution_of(model, MERGED["paths"]).attribute if a.name == "pads")
    pads.ints[:] = [0, 1, 2, 1]


def paths_swapped(model: onnx.ModelProto) -> None:
    """Each path with the other's weights of the softmax."""
    product = next(n for n in model.graph.node if n.op_type == "Mul" and instrument.module_of(n) == CRU)
    weights = product.input[0]
    index = list(model.graph.node).index(product)
    product.input[0] = "swapped"
    model.graph.node.insert(index, helper.make_node("Split", [weights], ["share1", "share2"], axis=1, num_outputs=2))
    model.graph.node.insert(index + 1, helper.make_node("Concat", ["share2", "share1"], ["swapped"], axis=1))


_SMALL = "one part in 1e7 of one of thousands of weights"
MERGED_MUTATIONS = {
    "a dense tap, its lowest bit": Mutation(
        lambda m, _: edit(m, MERGED["paths"], flip_bit(0)), "weights", "not what the reference's weights give", _SMALL
    ),
    "a squeeze, its lowest bit": Mutation(
        lambda m, _: edit(m, MERGED["squeeze"], flip_bit(0)), "weights", "not what the reference's weights give", _SMALL
    ),
    "the bias, one bit": Mutation(
        lambda m, _: edit(m, MERGED["bias"], flip_bit(9)), "weights", "not what the reference's weights give", _SMALL
    ),
    "PWC1 left out of the centre": Mutation(
        lambda m, t: edit(m, MERGED["paths"], lambda w: without_the_1x1(w, t)), "replay", "noise floor"
    ),
    "the identity off by one unit in the last place": Mutation(
        lambda m, _: edit(m, MERGED["paths"], entry_of(32 + 24, 0, 1, 1, value=1 + 2.0**-23)), "weights",
        "not what the reference's weights give", "it is below the rounding of any sum",
    ),
    "a zero of the lower path that is none": Mutation(
        lambda m, _: edit(m, MERGED["paths"], entry_of(32, 0, 0, 0, value=1e-3)), "weights",
        "not what the reference's weights give",
    ),
    "padding moved by a row": Mutation(lambda m, _: padded_aside(m), "replay", "noise floor"),
    "weights of the paths swapped": Mutation(lambda m, _: paths_swapped(m), "replay", "noise floor"),
}  # fmt: skip

IN_THE_ROUNDING = (
    "a bit below 8 units in the last place, of a weight that has a BatchNorm folded in: the folding itself rounds "
    "differently in NumPy, onnxscript and onnxsim, so a file that differs there is a healthy export",
    lambda m: edit(m, STEM, flip_bit(0)),
)

__all__ = ["IN_THE_ROUNDING", "MERGED_MUTATIONS", "MUTATIONS", "SITE", "Mutation", "RankResNet", "two_heads"]
