"""Gates that belong to no known SRU: comparisons (and roundings) of data whose result a model computes with.

A model jumps at each of them as it does at an SRU's gate, so they are judged like those: recorded in the reference,
found in the artifact (:mod:`.graph.gates`), compared on the same input, and put into the replay. Standard library and
NumPy only.

**On the same input.** The artifact runs with the reference's decisions at every gate, so that the operands of each are
continuous, and differ from the reference's by rounding alone. m is the reference's margin (``a - b`` of a comparison,
the argument of a rounding), m' the artifact's, and::

    B = max(other_gates * max(noise, u * (|a| + |b|)), all)      u: half a unit in the last place of the artifact's type

with the noise that of float32 against float64 with the same decisions, the largest of the channel (axis 1), and ``all``
the largest of all channels: one that is zero throughout shows no noise of its own. Of half data m is the margin of the
reference with every value rounded, and the noise how far other right roundings and float32 are from it
(:mod:`.rounding`), with ``other_gates_half`` as the multiple. What the artifact decides from m' is
*explained* where the step takes that value between ``m - B`` and ``m + B``; where m' equals m to the bit nothing
explains another decision than the step of m. The margins themselves are compared by value beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from scconv_deploy.records.gates import FlipCount

STEPS: dict[str, Callable[[Any], Any]] = {
    "ge": lambda m: m >= 0,
    "gt": lambda m: m > 0,
    "le": lambda m: m <= 0,
    "lt": lambda m: m < 0,
    "eq": lambda m: m == 0,
    "ne": lambda m: m != 0,
    "sign": np.sign,
    "round": np.round,
    "floor": np.floor,
    "ceil": np.ceil,
    "trunc": np.trunc,
}
"""What is decided of a margin; half of a rounding goes to the even number, in torch as in ONNX."""
COMPLEMENTS = {"ge": "lt", "gt": "le", "eq": "ne"}
COMPLEMENTS |= {other: one for one, other in COMPLEMENTS.items()}
MIRRORED = {"ge": "le", "gt": "lt", "le": "ge", "lt": "gt"}
"""Of ``-m``; the others are what they are, or other numbers."""
_ASSUMED = 1e-6
"""Noise of a margin that was not measured, in units of the operands' size: the tolerance ``assumed_floor``."""
LAYERS = 4
"""Unit roundoffs, in units of the operands' size, that a half margin is off by whose noise was not measured."""
JUMP_DISTURBANCE = {"float32": 2.0**-22, "float16": 2.0**-11, "bfloat16": 2.0**-8}
"""Of the inputs of a reference that is seen to jump, relative to each entry: of float32 two units in the last place, as
much as a layer of rounding; of half the unit roundoff."""
UNIT_ROUNDOFF = {"float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}


@dataclass(frozen=True, eq=False)
class View:
    """One way to see what a gate decides from. A threshold on a sigmoid has two: the sigmoid's value, its argument.

    Attributes:
        kind: of :data:`STEPS`.
        margin: float32, of the gate's shape.
        scale: ``|a| + |b|``, the largest of the channel; broadcasts to the margin.
        noise: the largest ``|float32 - float64|`` of the margin in the channel; None where it was not measured.
        error: relative L2 of the same, in units of the scale; None likewise.
    """

    kind: str
    margin: np.ndarray
    scale: np.ndarray
    noise: np.ndarray | None = None
    error: float | None = None


@dataclass(frozen=True, eq=False)
class OtherGate:
    """One gate on one sample.

    Attributes:
        name: of its module and what it computes, ``features.2::ge``, numbered from the second one on; of an ONNX file
            the name of the value.
        kind: of :data:`STEPS`.
        decided: bool, or float32 of a rounding.
        views: the first one is of this kind; empty where margins were not kept.
    """

    name: str
    kind: str
    decided: np.ndarray
    views: tuple[View, ...] = ()


@dataclass(frozen=True)
class Found:
    """Where an artifact decides a gate.

    Attributes:
        name: of the gate.
        value: the ONNX value that holds the decision; ``operands`` what it is decided from, one or two.
        node: what to call it in a report.
        complement: whether the value is the opposite of what the reference calls the gate.
        kind: of the value, of :data:`STEPS`.
        view: the reference's view that it is compared in, ``mirrored`` with the operands the other way round; None
            where it decides from something else, and margins cannot be compared.
    """

    name: str
    value: str
    operands: tuple[str, ...]
    node: str
    kind: str
    complement: bool = False
    view: int | None = 0
    mirrored: bool = False


@dataclass
class OtherGateMeasured:
    """One gate, summed over the samples.

    Attributes:
        flips: fed the same input.
        free: how many differ running free.
        error, floor: of the margin, relative to the operands' size, of the sample with the worst ratio.
    """

    found: Found
    flips: FlipCount = field(default_factory=lambda: FlipCount(0))
    free: int = 0
    error: float = 0.0
    floor: float = 1.0
    compared: bool = False


@dataclass
class Jumped:
    """What a value differs by beside the jumps of the reference, where a gate could not be fixed; over the samples.

    Attributes:
        multiple: the tolerance that limits its ratios; the limit is known when all samples have run.
        ratio: error in multiples of its noise, the largest of those that the jumps explain; ``words`` of it.
        beyond: the largest of those that they do not.
    """

    multiple: str
    ratio: float = 0.0
    words: str = ""
    beyond: float = 0.0

    def undecided(self, limit: float) -> bool:
        """Whether it can be called neither right nor wrong."""
        return not self.ratio <= limit and self.beyond <= limit


def is_other(name: str) -> bool:
    """Whether a mask of this name is another gate's, and no SRU's."""
    return "::" in name


def count_flips(
    gate: OtherGate,
    found: Found,
    decided: np.ndarray,
    margin: np.ndarray,
    multiple: float,
    data: np.dtype,
    unmeasured: bool = False,
) -> FlipCount:
    """What differs on the same input, and what of it rounding does not explain.

    Args:
        decided, margin: of the artifact, as the reference would call them.
        multiple: the tolerance ``other_gates``, of half data ``other_gates_half``.
        data: the type that the artifact computes in.
        unmeasured: whether the gate's noise is that of float32 though the data are half.
    """
    differs = decided != gate.decided
    count = int(differs.sum())
    if not count:
        return FlipCount(differs.size)
    view = gate.views[found.view or 0]
    m = view.margin[differs].astype(np.float64)
    noise = _noise(view, margin if unmeasured and found.view is not None else None, data)
    bound = np.broadcast_to(np.maximum(multiple * noise, noise.max(initial=0.0)), differs.shape)[differs]
    step, value = STEPS[view.kind], decided[differs]
    with np.errstate(invalid="ignore"):
        low, high = step(m - bound), step(m + bound)
        explained = (np.minimum(low, high) <= value) & (value <= np.maximum(low, high))
        if view.kind in ("eq", "ne"):
            explained = np.abs(m) <= bound
        explained &= np.isfinite(m)
        if found.view is not None:
            otherwise = (margin[differs] == view.margin[differs]) & (value != step(m))
            explained &= ~(otherwise & _as_shown(found, value, margin[differs]))
    return FlipCount(differs.size, count, int((~explained).sum()))


def _as_shown(found: Found, decided: np.ndarray, margin: np.ndarray) -> np.ndarray:
    """Whether the artifact decided from the margin that it shows; half data may be rounded only to be shown."""
    own = STEPS[found.kind](-margin if found.mirrored else margin)
    return np.asarray(own == (~decided if found.complement else decided))


def _noise(view: View, margin: np.ndarray | None, data: np.dtype) -> np.ndarray:
    """By channel.

    Args:
        margin: the artifact's, of half data whose noise was not measured. What it scatters by is then taken for noise,
            for a half tensor's error grows with what came before it; what a channel is moved by as a whole is not.
    """
    smallest = UNIT_ROUNDOFF.get(data.name, UNIT_ROUNDOFF["float32"]) * view.scale
    noise = np.maximum(smallest, _ASSUMED * view.scale if view.noise is None else view.noise)
    if data == np.float32 or margin is None:
        return noise
    with np.errstate(invalid="ignore"):
        off = margin.astype(np.float64) - view.margin
    off = np.where(np.isfinite(off), off, 0.0)
    return np.maximum(noise, off.std(axis=channel_axes(off.ndim), keepdims=True))


def channel_axes(dimensions: int) -> tuple[int, ...]:
    """All axes but the channels'."""
    return tuple(axis for axis in range(dimensions) if axis != 1)


def margin_error(view: View, margin: np.ndarray) -> float:
    """Relative L2 of a margin, in units of the operands' size, where the reference's is finite."""
    finite = np.isfinite(view.margin)
    if not finite.any():
        return 0.0
    if not np.isfinite(margin[finite]).all():
        return float("inf")
    off = np.where(finite, margin.astype(np.float64) - np.where(finite, view.margin, 0.0), 0.0)
    size = np.broadcast_to(view.scale, off.shape)[finite].astype(np.float64)
    norm = float(np.linalg.norm(size))
    error = float(np.linalg.norm(off))
    return 0.0 if error == 0.0 else error / norm if norm else float("inf")


def margin_size(view: View) -> float:
    """The size of a margin in units of its operands', L2."""
    finite = np.where(np.isfinite(view.margin), view.margin, 0.0).astype(np.float64)
    norm = float(np.linalg.norm(np.broadcast_to(view.scale, finite.shape).astype(np.float64)))
    return float(np.linalg.norm(finite)) / norm if norm else 0.0


def mean_error(view: View, margin: np.ndarray) -> float:
    """By how much a margin is moved as a whole, in units of the operands' size."""
    finite = np.isfinite(view.margin) & np.isfinite(margin)
    size = float(np.broadcast_to(view.scale, finite.shape)[finite].astype(np.float64).sum())
    off = abs(float((margin[finite].astype(np.float64) - view.margin[finite]).sum()))
    return 0.0 if off == 0.0 else off / size if size else float("inf")


def of_few(elements: int) -> float:
    """By how much a noise must be widened that was measured on so few elements, to be as sure as of many.

    The ratio of two draws exceeds k with a chance of about 1 / k, that of two pairs of 1 / k**2; from four on k = 32 is
    as rare as one in a million.
    """
    return max(1.0, 1000 / max(elements, 1) ** 6)


def masks_of(gates: Mapping[str, OtherGate]) -> dict[str, np.ndarray]:
    """The decisions by name."""
    return {name: gate.decided for name, gate in gates.items()}
