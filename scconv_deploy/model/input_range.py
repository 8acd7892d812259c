"""Range of generated inputs in which a model's features are as large as in its training.

A network that was trained on images of little contrast answers normal noise with features a hundred times too large:
activations saturate, and attention's softmax becomes a choice of one entry. Rounding is then amplified beyond measure,
and faults do not show (measured on a YOLO12n: HardSigmoid for Sigmoid moved no output). Batch norms tell it, for they
hold the mean and variance that each feature had in training.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.hooks import RemovableHandle

from scconv_deploy.errors import ModelError

_TOO_LARGE = 4.0
"""Size of the features, in units of their size in training, from which another range is looked for."""
_AS_IN_TRAINING = 1.5
"""Size that is still as in training: one image may be larger than the mean of all."""
_MEANS = (0.0, 0.5, 127.5)
"""Centres of the ranges: of normalised images, of pixels in [0, 1] and in [0, 255]."""
_SMALLEST, _BISECTIONS = 2.0**-6, 6
"""Smallest deviation, in units of the largest, which is half of the centre; and steps of the search between them."""


@dataclass(frozen=True)
class InputRange:
    """Mean and deviation of generated floating inputs."""

    mean: float = 0.0
    deviation: float = 1.0

    def of(self, noise: Tensor) -> Tensor:
        """Normal noise in this range; unchanged in the usual one."""
        return noise if self == USUAL else self.mean + self.deviation * noise

    def __str__(self) -> str:
        return f"{self.mean:g} +- {self.deviation:.2g}"


USUAL = InputRange()


def fitted(model: nn.Module, run: Callable[[InputRange], object]) -> InputRange:
    """The usual range, or where features are too large in it, the widest one in which they are as in training.

    Args:
        model: its batch norms are looked at; without statistics of a training in them, the range is the usual one.
        run: runs the model on an input of a range.
    """
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm) and _is_trained(module)]
    if not norms or not _size(norms, run, USUAL) > _TOO_LARGE:
        return USUAL

    def suits(given: InputRange) -> bool:
        return _size(norms, run, given) <= _AS_IN_TRAINING

    return next((found for mean in _MEANS if (found := _widest(mean, suits)) is not None), USUAL)


def _widest(mean: float, suits: Callable[[InputRange], bool]) -> InputRange | None:
    """The widest range around a centre that suits the model; None if the smallest one does not."""
    high = mean / 2 or USUAL.deviation
    low = high * _SMALLEST
    if suits(InputRange(mean, high)):
        return InputRange(mean, high)
    if not suits(InputRange(mean, low)):
        return None
    for _ in range(_BISECTIONS):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if suits(InputRange(mean, middle)) else (low, middle)
    return InputRange(mean, low)


def _is_trained(norm: _BatchNorm) -> bool:
    return norm.running_mean is not None and bool(norm.running_mean.any()) and not norm.training


def _size(norms: list[_BatchNorm], run: Callable[[InputRange], object], given: InputRange) -> float:
    """Geometric mean over the batch norms of the rms of what they normalise: 1 in training; 0 if no norm ran."""
    sizes: list[float] = []

    def watch(norm: _BatchNorm) -> RemovableHandle:
        def measure(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            normalised = functional.batch_norm(args[0], norm.running_mean, norm.running_var, eps=norm.eps)
            sizes.append(float(normalised.square().mean().sqrt()))

        return norm.register_forward_pre_hook(measure)

    with ExitStack() as stack, torch.no_grad():
        for norm in norms:
            stack.callback(watch(norm).remove)
        try:
            run(given)
        except (RuntimeError, ModelError):  # the model refuses its inputs, which is said elsewhere
            return 0.0
    if not all(map(math.isfinite, sizes)):
        return math.inf
    return statistics.geometric_mean(filter(None, sizes)) if any(sizes) else 0.0
