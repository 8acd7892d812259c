"""Variant and parameters of an SRU from the meaning of its Concat."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import torch

from scconv_deploy.errors import ScconvDeployError
from scconv_deploy.gate.gate import Gate
from scconv_deploy.gate.margins import LARGEST_WEIGHT_ERROR
from scconv_deploy.gate.variant import (
    GateVariant,
    Statistics,
    Weighting,
    check_groups,
    check_halves,
    gate_weight,
)
from scconv_deploy.rewrite.reader.meaning import Crossing, Input, Normalized, Shape

FOLDED = "its gamma and gate weight are one float32 constant, which limits the cut; --reference MODEL restores gamma"
"""Note of an SRU whose gamma a simplifier has multiplied by the gate weight."""
LARGE_GROUPS = "its groups are so large that L and L - 1 are one number in float32"
"""Note of an SRU whose ddof its graph does not show. It changes s by 1 / (2 L) of s, less than the rounding of s."""
REORDERED = "its sum(gamma) was added up in a runtime's order; its cut is computed from the file's weight"
"""Note of an SRU whose gate weight is a constant from a sum in neither Python's order nor torch's here."""
NO_EPS = "the graph holds no eps"
"""Start of a note: an exporter dropped eps, so its size and its place (variance or deviation) are assumed."""
_DDOF_TOLERANCE = 2.0**-22  # relative: L and 1 / (L - 1) as float32 constants
_ASSUMED_EPS = 1e-10
_UNIT_ROUNDOFF = 2.0**-24
_ULPS = 2.0**-21  # relative: the orders of a sum without much cancellation
_ORDERS: tuple[Weighting, ...] = ("sum", "torch_sum")


class UnreadableError(Exception):
    """A part of a graph is no SRU, or none that an operator computes; ``node`` is where it shows."""

    def __init__(self, reason: str, node: str = "") -> None:
        super().__init__(reason)
        self.reason, self.node = reason, node


Interpreted = tuple[Gate, tuple[str, ...]]
"""A gate, and the assumptions of its reading."""


def interpret(crossing: Crossing, sample: Shape) -> Interpreted:
    """Gate of an SRU, and the assumptions of the reading.

    Args:
        crossing: meaning of the SRU's Concat.
        sample: x's shape for which it was read.

    Raises:
        UnreadableError: no operator computes it.
    """
    part = crossing.open_part
    mask = part.gate
    z = mask.sigmoid.of
    weighting, gamma, beta, weight = _parameters(z)
    weighted = z.steps if weighting == "none" else z.steps[:-1]
    if isinstance(part.data, Normalized) and part.data != replace(z, steps=weighted):
        raise UnreadableError("its mask multiplies other normalised data than its gate reads")
    statistics, eps, notes = _statistics(z, sample)
    if weighting == "none":
        notes = (*notes, FOLDED)
    data = "x" if isinstance(part.data, Input) else "normalized"
    fusion = "soft" if part.soft else "hard"
    try:
        check_halves(sample[1], "it")
        check_groups(sample[1], z.num_groups, math.prod(sample[1:]), "it")
        variant = GateVariant(
            statistics, weighting, mask.comparison, fusion, data, z.num_groups, eps, _shortest(mask.threshold)  # type: ignore[arg-type]
        )  # fmt: skip
    except ScconvDeployError as error:
        raise UnreadableError(error.message) from error
    if weight is not None and not torch.allclose(weight, gate_weight(gamma, weighting), _ULPS, 0):
        notes = (*notes, REORDERED)
    return Gate(variant, gamma, beta, weight), notes


def _parameters(z: Normalized) -> tuple[Weighting, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Weighting, gamma and beta of ``z = (n * gamma + beta) * w``, and w where no known order of the sum gives it.

    Simplifiers drop a gamma of 1 and a beta of 0, and fold gamma and w into one constant ``a = gamma * w``. Then only
    ``z = n * a + b`` is known: an SRU without a weight, whose cut is ``(tau - b) / a``.
    """
    kinds = tuple(kind for kind, _ in z.steps)
    arrays = [torch.tensor(values, dtype=torch.float32) for _, values in z.steps]
    if kinds == ("multiply", "add"):
        return "none", arrays[0], arrays[1], None
    if not kinds or kinds[-1] != "multiply" or kinds[:-1] not in ((), ("multiply",), ("add",), ("multiply", "add")):
        raise UnreadableError(f"its gate reads (n {' '.join(kinds)}), expected ((n * gamma + beta) * weight)")
    gamma = arrays[0] if kinds[0] == "multiply" and len(kinds) > 1 else torch.ones_like(arrays[-1])
    beta = arrays[-2] if "add" in kinds else torch.zeros_like(arrays[-1])
    try:
        weighting, weight = _weighting(gamma, arrays[-1])
    except UnreadableError:
        if len(kinds) > 1:
            raise
        return "none", arrays[0], beta, None
    return weighting, gamma, beta, weight


def _statistics(z: Normalized, sample: Shape) -> tuple[Statistics, float, tuple[str, ...]]:
    """Statistics, eps and notes of a deviation: ``per_square * (L - ddof)`` is 1 for the right ddof."""
    deviation = z.deviation
    elements = math.prod(sample[1:]) / z.num_groups
    off = [abs(deviation.per_square * (elements - ddof) - 1) for ddof in (0, 1)]
    if min(off) > _DDOF_TOLERANCE:
        raise UnreadableError("the divisor of its variance is neither L nor L - 1")
    notes: tuple[str, ...] = ()
    unbiased = off[1] < off[0]
    if max(off) <= 4 * _DDOF_TOLERANCE:
        unbiased = not deviation.eps_var  # the original code's deviation, or nn.GroupNorm's variance
        notes = (f"{LARGE_GROUPS}; {'L - 1' if unbiased else 'L'} is assumed",)
    if deviation.eps_var and deviation.eps_std:
        raise UnreadableError("it adds an eps to the variance and another one to the deviation")
    if deviation.eps_var:
        return ("unbiased_variance" if unbiased else "group_norm"), _shortest(deviation.eps_var), notes
    statistics: Statistics = "group_batchnorm" if unbiased else "biased_deviation"
    if deviation.eps_std:
        return statistics, _shortest(deviation.eps_std), notes
    # measured: torch.export drops an eps of 1e-10, which float32 loses beside any deviation but 0
    return statistics, _ASSUMED_EPS, (*notes, f"{NO_EPS}; {_ASSUMED_EPS:g} is assumed")


def _weighting(gamma: torch.Tensor, weight: torch.Tensor) -> tuple[Weighting, torch.Tensor | None]:
    """Weighting that gives the gate weight from gamma, and the weight itself where no known order of the sum gives it.

    Python's order and torch's are compared to the bit. A folded chain of additions keeps its order, so any other
    rounding can only be a ``torch.sum`` in a runtime's order: within the rounding error of a sum of C numbers.
    """
    for order in _ORDERS:
        if torch.equal(gate_weight(gamma, order), weight):
            return order, None
    exact, found = gamma.double().numpy(), weight.double().numpy()
    total, error = exact.sum(), weight_error(exact)
    if error <= LARGEST_WEIGHT_ERROR and np.all(np.abs(found - exact / total) <= error * np.abs(exact / total)):
        return "torch_sum", weight
    softmax = np.exp(exact - exact.max())
    softmax /= softmax.sum()
    if np.all(np.abs(found - softmax) <= 1e-5 * softmax):
        return "softmax", None
    if error > LARGEST_WEIGHT_ERROR:
        raise UnreadableError(f"sum(gamma) is {total:.1e}: it is lost to rounding, and the gate weight with it")
    raise UnreadableError("its gate weight is neither gamma / sum(gamma) nor softmax(gamma)")


def weight_error(gamma: np.ndarray) -> float:
    """Largest relative error of ``gamma / sum(gamma)`` in float32: ``|error| <= C u sum|gamma|`` in any order."""
    total = abs(gamma.sum())
    return float((len(gamma) + 8) * _UNIT_ROUNDOFF * np.abs(gamma).sum() / total) if total else math.inf


def _shortest(value: float) -> float:
    """The shortest decimal number that rounds to this float32: as its author wrote it."""
    return float(str(np.float32(value)))
