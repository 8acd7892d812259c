"""Gates that belong to no known SRU: comparisons (and roundings) of data whose result a model computes with.

A model jumps at each of them as it does at an SRU's gate, so they are judged like those: recorded in the reference,
found in the artifact (:mod:`.graph.gates`), compared on the same input, and put into the replay. Standard library and
NumPy only.

**On the same input.** The artifact runs with the reference's decisions at every gate, so the operands of each gate
differ from the reference's by rounding alone. m is the reference's margin (``a - b`` of a comparison, the argument of a
rounding), m' the artifact's, and::

    B = max(other_gates * max(noise, u * (|a| + |b|)), all)      u: half a unit in the last place of the artifact's type

``noise`` is the largest difference between the margin in float32 and in float64, with the same decisions, in the
channel (axis 1). ``all`` is the largest over all channels: a channel that is zero throughout shows no noise. For half
data, m is the margin of the reference with every value rounded, ``noise`` is how far float32 and other right roundings
are from it (:mod:`.rounding`), and the multiple is ``other_gates_half``.

A flip is *explained* where the step takes the artifact's value between ``m - B`` and ``m + B``. Where m' equals m to
the bit, only the step of m is. The margins are also compared by value.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from scconv_deploy.records.gates import FlipCount
from scconv_deploy.records.quantization import Levels

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
"""Decision as a function of the margin, by kind. Roundings take a half to the even number, in torch as in ONNX."""
COMPLEMENTS = {"ge": "lt", "gt": "le", "eq": "ne"}
COMPLEMENTS |= {other: one for one, other in COMPLEMENTS.items()}
MIRRORED = {"ge": "le", "gt": "lt", "le": "ge", "lt": "gt"}
"""Kind that decides the same from ``-m``. ``eq`` and ``ne`` stay what they are; roundings have none."""
_ASSUMED = 1e-6
"""Assumed noise where none was measured, in units of ``|a| + |b|``: the tolerance ``assumed_floor``."""
LAYERS = 4
"""Assumed error of a half margin whose noise was not measured, in unit roundoffs of ``|a| + |b|``."""
JUMP_DISTURBANCE = {"float32": 2.0**-22, "float16": 2.0**-11, "bfloat16": 2.0**-8}
"""Relative disturbance of each input entry that shows whether a reference jumps. float32: two units in the last place,
as much as a layer of rounding; half: the unit roundoff."""
UNIT_ROUNDOFF = {"float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}


@dataclass(frozen=True, eq=False)
class View:
    """One margin that a gate can be decided from. A threshold on a sigmoid has two: the sigmoid's value, its argument.

    Attributes:
        kind: key of :data:`STEPS`.
        margin: float32, of the gate's shape.
        scale: the largest ``|a| + |b|`` in the channel; broadcasts to the margin.
        noise: the largest ``|float32 - float64|`` of the margin in the channel; None where it was not measured.
        error: relative L2 of ``float32 - float64`` in units of the scale; None where it was not measured.
    """

    kind: str
    margin: np.ndarray
    scale: np.ndarray
    noise: np.ndarray | None = None
    error: float | None = None


@dataclass(frozen=True, eq=False)
class OtherGate:
    """Decisions and margins of one gate on one sample.

    Attributes:
        name: module path and kind, ``features.2::ge``, with a number from the second one on; in an ONNX file, the name
            of the value.
        kind: key of :data:`STEPS`.
        decided: the decisions; bool, float32 for a rounding.
        views: the first one is of this kind; empty where margins were not kept.
    """

    name: str
    kind: str
    decided: np.ndarray
    views: tuple[View, ...] = ()


@dataclass(frozen=True)
class Found:
    """The node of an artifact that decides a gate of the reference.

    Attributes:
        name: of the gate.
        value: the ONNX value that holds the decision; ``operands`` are the one or two values it is decided from.
        node: its name in reports.
        kind: of the value; key of :data:`STEPS`.
        complement: whether the value is the opposite of the reference's decision.
        view: index of the reference's view with the same operands, swapped where ``mirrored``; None where the operands
            are others, so that margins cannot be compared.
        levels: those of a quantiser, whose decision is the code less the zero point, and whose margin is the operand in
            units of the scale, cut off at the first and last code; None for any other gate.
        axis: along which several operands of a quantiser are joined.
        columns: size of the last axis of a quantised matrix whose rows may be several axes in PyTorch; 0 for others.
    """

    name: str
    value: str
    operands: tuple[str, ...]
    node: str
    kind: str
    complement: bool = False
    view: int | None = 0
    mirrored: bool = False
    levels: Levels | None = None
    axis: int = 0
    columns: int = 0


@dataclass
class OtherGateMeasured:
    """Flips and margin errors of one gate over all samples.

    Attributes:
        flips: on the same input.
        free: number of flips running free.
        error, floor: of the margin, relative to ``|a| + |b|``, on the sample with the worst ratio.
        compared: whether margins were compared on any sample.
    """

    found: Found
    flips: FlipCount = field(default_factory=lambda: FlipCount(0))
    free: int = 0
    error: float = 0.0
    floor: float = 1.0
    compared: bool = False


@dataclass
class Jumped:
    """Errors of one value over all samples, where a gate could not be fixed and the reference itself jumps.

    Attributes:
        multiple: the tolerance that limits the ratios; the limit is known when all samples have run.
        ratio: largest error that the jumps explain, in multiples of the value's noise; ``words`` describes it.
        beyond: largest error that the jumps do not explain, in the same units.
    """

    multiple: str
    ratio: float = 0.0
    words: str = ""
    beyond: float = 0.0

    def undecided(self, limit: float) -> bool:
        """Whether the value can be called neither right nor wrong: only jumps explain an error beyond the limit."""
        return not self.ratio <= limit and self.beyond <= limit


def is_other(name: str) -> bool:
    """Whether a gate of this name belongs to no SRU."""
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
    """Count the flips of a gate on the same input, and those that rounding does not explain.

    Args:
        decided, margin: the artifact's, in the reference's sense (complement and swapped operands undone).
        multiple: the tolerance ``other_gates``, for half data ``other_gates_half``.
        data: the dtype that the artifact computes in.
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
    """Whether the artifact's decisions follow from the margin it gives out; half data may be rounded for that alone."""
    own = STEPS[found.kind](-margin if found.mirrored else margin)
    return np.asarray(own == (~decided if found.complement else decided))


def _noise(view: View, margin: np.ndarray | None, data: np.dtype) -> np.ndarray:
    """Noise of a margin by channel; broadcasts to the margin.

    Args:
        margin: the artifact's, for half data whose noise was not measured. Its scatter around the reference then counts
            as noise, because a half tensor's error grows with depth. The shift of a whole channel does not count.
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
    """L2 error of a margin in units of ``|a| + |b|``, where the reference's is finite."""
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
    """L2 norm of a margin in units of ``|a| + |b|``."""
    finite = np.where(np.isfinite(view.margin), view.margin, 0.0).astype(np.float64)
    norm = float(np.linalg.norm(np.broadcast_to(view.scale, finite.shape).astype(np.float64)))
    return float(np.linalg.norm(finite)) / norm if norm else 0.0


def mean_error(view: View, margin: np.ndarray) -> float:
    """Mean shift of a margin in units of ``|a| + |b|``."""
    finite = np.isfinite(view.margin) & np.isfinite(margin)
    size = float(np.broadcast_to(view.scale, finite.shape)[finite].astype(np.float64).sum())
    off = abs(float((margin[finite].astype(np.float64) - view.margin[finite]).sum()))
    return 0.0 if off == 0.0 else off / size if size else float("inf")


def of_few(elements: int) -> float:
    """Factor that widens a noise measured on few elements.

    The ratio of two draws exceeds k with a probability of about 1 / k, that of two pairs 1 / k**2; from four elements
    on, k = 32 has one in a million.
    """
    return max(1.0, 1000 / max(elements, 1) ** 6)


def masks_of(gates: Mapping[str, OtherGate]) -> dict[str, np.ndarray]:
    """Decisions by gate name."""
    return {name: gate.decided for name, gate in gates.items()}
