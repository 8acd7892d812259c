"""Meanings of the tensors of an SRU, such as group mean, deviation, mask: the vocabulary of :mod:`.operators`.

Exporters write the same SRU in many ways (operand orders, decomposed deviations, duplicated masks). As meanings these
are equal: two nodes that compute the same mean have the same meaning.

Symbols: x is ``[N, C, *]``; G groups of L elements lie over its flattened channels and positions; SS is a group's sum
of squares around its mean.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from scconv_deploy.gate.variant import Comparison

Shape = tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Constant:
    """A tensor that does not depend on x's values: an initializer, a Constant, or computed from shapes."""

    value: np.ndarray

    @property
    def shape(self) -> Shape:
        return self.value.shape

    @property
    def number(self) -> float | None:
        """The one number of all entries; None if they differ."""
        if not self.value.size:
            return None
        first = self.value[(0,) * self.value.ndim]
        broadcast = not any(self.value.strides)  # one entry in memory, whatever the shape
        return float(first) if broadcast or (self.value == first).all() else None

    def is_filled_with(self, number: float) -> bool:
        return self.number == number


@dataclass(frozen=True)
class Unknown:
    """A tensor with none of the meanings: the reason, and the node where it began."""

    reason: str
    node: str


@dataclass(frozen=True)
class Input:
    """The SRU's x, as ``[N, C, *]``."""

    shape: Shape


@dataclass(frozen=True)
class Groups:
    """x seen as ``[N, G, ...]``."""

    shape: Shape


@dataclass(frozen=True)
class GroupMean:
    """Mean of each group, ``[N, G]`` or ``[N, G, 1, ...]``."""

    shape: Shape


@dataclass(frozen=True)
class Centred:
    """``x - mean``, ``[N, G, ...]``."""

    shape: Shape


@dataclass(frozen=True)
class Squares:
    """``(x - mean)^2``, ``[N, G, ...]``."""

    shape: Shape


@dataclass(frozen=True)
class Deviation:
    """Deviation of each group, ``sqrt(per_square * SS + eps_var) + eps_std``, or a part of that computation.

    Attributes:
        rooted: whether the root was taken; before, the value is a variance.
        inverse: whether the value is the reciprocal.
    """

    shape: Shape
    per_square: float
    eps_var: float = 0.0
    eps_std: float = 0.0
    rooted: bool = False
    inverse: bool = False

    def reshaped(self, shape: Shape) -> Deviation:
        return replace(self, shape=shape)


Step = tuple[Literal["multiply", "add"], tuple[float, ...]]


@dataclass(frozen=True)
class Normalized:
    """``(x - mean) / s`` followed by ``steps``, each of which multiplies by or adds one number per channel.

    ``[N, G, ...]`` without steps, or ``[N, C, *]``.
    """

    shape: Shape
    num_groups: int
    deviation: Deviation
    steps: tuple[Step, ...] = ()


@dataclass(frozen=True)
class Sigmoid:
    """``r``: the sigmoid of normalised and weighted data."""

    of: Normalized

    @property
    def shape(self) -> Shape:
        return self.of.shape


@dataclass(frozen=True)
class Mask:
    """``r >= threshold`` (or ``>``) if ``opened``, else its complement; bool, or 0 and 1 if ``number``."""

    sigmoid: Sigmoid
    comparison: Comparison
    threshold: float
    opened: bool
    number: bool = False

    @property
    def shape(self) -> Shape:
        return self.sigmoid.shape

    @property
    def complement(self) -> Mask:
        return replace(self, opened=not self.opened)

    @property
    def decision(self) -> Mask:
        """The bool mask of the open gates, for a mask of either side."""
        return replace(self, opened=True, number=False)


@dataclass(frozen=True)
class SoftMask:
    """``where(open, 1, r)`` if ``opened``, else ``where(open, 0, r)``."""

    gate: Mask
    opened: bool

    @property
    def shape(self) -> Shape:
        return self.gate.shape


@dataclass(frozen=True)
class Part:
    """Masked data: x1 if ``opened``, else x2."""

    gate: Mask
    opened: bool
    soft: bool
    data: Input | Normalized

    @property
    def shape(self) -> Shape:
        return self.gate.shape


@dataclass(frozen=True)
class Half:
    """The lower (0) or upper (1) half of a part's channels."""

    part: Part
    index: int

    @property
    def shape(self) -> Shape:
        n, c, *positions = self.part.shape
        return n, c // 2, *positions


@dataclass(frozen=True)
class Crossed:
    """``x1[half] + x2[other half]``; ``index`` is the half of x1."""

    open_part: Part
    closed_part: Part
    index: int

    @property
    def shape(self) -> Shape:
        return Half(self.open_part, self.index).shape


@dataclass(frozen=True)
class Crossing:
    """Output of the SRU: both crossed halves in their order."""

    open_part: Part
    closed_part: Part

    @property
    def shape(self) -> Shape:
        return self.open_part.shape


Meaning = (
    Constant | Unknown | Input | Groups | GroupMean | Centred | Squares | Deviation | Normalized
    | Sigmoid | Mask | SoftMask | Part | Half | Crossed | Crossing
)  # fmt: skip
Known = (
    Constant | Input | Groups | GroupMean | Centred | Squares | Deviation | Normalized
    | Sigmoid | Mask | SoftMask | Part | Half | Crossed | Crossing
)  # fmt: skip
