"""Which variant of the SRU a cross reconstruction is, and with which parameters."""

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

FOLDED = "its gamma and gate weight are one constant, so cut is good to its float32; --reference MODEL restores gamma"
"""Note of an SRU whose gamma a simplifier has multiplied by the gate weight."""
LARGE_GROUPS = "its groups are so large that L and L - 1 are one number in float32"
"""Note of an SRU whose ddof its graph does not show. It changes s by 1 / (2 L) of it, less than the rounding of s."""
REORDERED = "its sum(gamma) was added up in a runtime's order; cut is that of the file's weight"
"""Note of an SRU whose gate weight is a constant in an order of the sum that is neither Python's nor torch's here."""
NO_EPS = "the graph holds no eps"
"""Begin of a note: an exporter dropped it, so that the eps is assumed, and whether it stands below the root."""
_DDOF_TOLERANCE = 2.0**-22  # relative: L and 1 / (L - 1) as float32 constants
_ASSUMED_EPS = 1e-10
_UNIT_ROUNDOFF = 2.0**-24
_ULPS = 2.0**-21  # relative: the orders of a sum without much cancellation
_ORDERS: tuple[Weighting, ...] = ("sum", "torch_sum")


class UnreadableError(Exception):
    """It is no SRU, or none that an operator can stand for; ``node`` is where."""

    def __init__(self, reason: str, node: str = "") -> None:
        super().__init__(reason)
        self.reason, self.node = reason, node


Interpreted = tuple[Gate, tuple[str, ...]]
"""What a gate decides, and what was assumed."""


def interpret(crossing: Crossing, sample: Shape) -> Interpreted:
    """The gate and what was assumed.

    Args:
        crossing: what the SRU's Concat means.
        sample: x's shape, for which it means that.

    Raises:
        UnreadableError: no operator stands for it.
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
    """The weighting of ``z = (n * gamma + beta) * w``, gamma, beta, and w where no known order of the sum gives it.

    Simplifiers drop a gamma of 1 and a beta of 0, and make one constant ``a = gamma * w`` of what is multiplied twice.
    ``z = n * a + b`` is then all that the graph says: an SRU without a weight, whose cut is ``(tau - b) / a``.
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
    """Which deviation it is: ``per_square * (L - ddof)`` is 1 for the right ddof."""
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
    """Which function of gamma the gate weight is, and the weight itself where no known order of the sum gives it.

    Python's order and torch's are known to the bit. A chain of additions is folded in its own order by whoever folds
    it, so that another rounding can only be a ``torch.sum`` in a runtime's order: within what rounding a sum of C
    numbers can cost.
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
    """How far, relatively, ``gamma / sum(gamma)`` in float32 can be off: ``|error| <= C u sum|gamma|`` in any order."""
    total = abs(gamma.sum())
    return float((len(gamma) + 8) * _UNIT_ROUNDOFF * np.abs(gamma).sum() / total) if total else math.inf


def _shortest(value: float) -> float:
    """The number as its author wrote it: the shortest that rounds to this float32."""
    return float(str(np.float32(value)))
