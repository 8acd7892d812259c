"""Parts that the zoo's networks share: the 3x3 that ScConv replaces, and initialisation."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from scconv_deploy.gate.threads import one_thread
from scconv_deploy.nn import ScConv

LARGEST_GAIN = 8.0

SpatialConv = Callable[[int, int], nn.Module]
"""(channels, stride) -> a module from ``[N, C, H, W]`` to ``[N, C, H/stride, W/stride]``."""


def conv3x3(channels: int, stride: int = 1) -> nn.Module:
    """The baseline's convolution."""
    return nn.Conv2d(channels, channels, 3, stride, 1, bias=False)


def scconv3x3(**options) -> SpatialConv:
    """ScConv in place of a 3x3; a stride is average pooling before it, for ScConv itself keeps the size.

    The paper does not say how it strides. Pooling before keeps ScConv's cost at that of the strided 3x3.
    """

    def build(channels: int, stride: int = 1) -> nn.Module:
        scconv = ScConv(channels, **options)
        return scconv if stride == 1 else nn.Sequential(nn.AvgPool2d(stride, stride), scconv)

    return build


def initialize(model: nn.Module, input_shape: tuple[int, ...]) -> nn.Module:
    """Initialise a network of the zoo so that its gates matter before it is trained.

    Convolutions outside ScConv are initialised for ReLU (He et al. 2015); ScConv keeps PyTorch's default, as in the
    original code. Then BatchNorms take their statistics from one seeded noise batch: with the initial mean 0 and
    variance 1, ScConv's channel softmax (which divides by about 2C) makes each residual branch vanish, and a network
    would compute nearly the same with every gate wrong (measured on ResNet-50: inverting all gates moves the logits by
    0.6 % then, by 4 % now). No BatchNorm amplifies by more than 8: the softmax is so steep that an untrained
    network without this limit overflows on inputs of another scale.

    The batch runs on one thread: with more of them sums come out otherwise, and the same seed would make another
    network on a machine with other cores (measured on ResNet-50: 1e-6 in one variance becomes 6 % of the logits).

    Args:
        input_shape: of the batch, ``[N, C, H, W]`` or with as many axes as the network takes, N of at least 2.

    Returns:
        The model, in train mode, as constructors leave it. One on the meta device, which has shapes but no values, is
        returned as it is: it is built to be counted.
    """
    if any(parameter.is_meta for parameter in model.parameters()):
        return model
    inside = {id(m) for scconv in model.modules() if isinstance(scconv, ScConv) for m in scconv.modules()}
    for module in model.modules():
        if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)) and id(module) not in inside:
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    norms = [m for m in model.modules() if isinstance(m, (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d))]
    momenta = [m.momentum for m in norms]
    for norm in norms:
        norm.momentum = None  # cumulative average: the statistics of this batch
    noise: Tensor = torch.randn(input_shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), one_thread():
        model.train()(noise)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
        assert norm.running_var is not None  # noqa: S101  (for the type checker: our norms track statistics)
        norm.running_var.clamp_(min=LARGEST_GAIN**-2)
    return model
