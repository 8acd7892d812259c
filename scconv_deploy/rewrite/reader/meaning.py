"""What the tensors of an SRU mean: the vocabulary in which :mod:`.operators` reads a graph.

Exporters write the same SRU in many ways (operand orders, decomposed deviations, duplicated masks). Reading each
tensor as one of these meanings makes the ways equal: two nodes that compute the same mean have the same meaning.

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
    """A number known without x: an initializer, a Constant, or computed from shapes."""

    value: np.ndarray

    @property
    def shape(self) -> Shape:
        return self.value.shape

    @property
    def number(self) -> float | None:
        """The number that it holds in every place; None if they differ."""
        if not self.value.size:
            return None
        first = self.value[(0,) * self.value.ndim]
        broadcast = not any(self.value.strides)  # one number, however large it looks
        return float(first) if broadcast or (self.value == first).all() else None

    def is_filled_with(self, number: float) -> bool:
        return self.number == number


@dataclass(frozen=True)
class Unknown:
    """None of the meanings; why, and at which node."""

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
    """Of each group, ``[N, G]`` or with ones behind."""

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
    """``root(per_square * SS + eps_var) + eps_std`` of each group, as far as the graph has come.

    Attributes:
        rooted: the root was taken; before, it is a variance.
        inverse: one over it.
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
    """``(x - mean) / s`` and then ``steps``: multiplied by, or added to, one number per channel each.

    ``[N, G, ...]`` before it is brought back to ``[N, C, *]``; only there it has steps.
    """

    shape: Shape
    num_groups: int
    deviation: Deviation
    steps: tuple[Step, ...] = ()


@dataclass(frozen=True)
class Sigmoid:
    """Of the normalised and weighted data: r."""

    of: Normalized

    @property
    def shape(self) -> Shape:
        return self.of.shape


@dataclass(frozen=True)
class Mask:
    """``r >= threshold`` (or ``>``) where ``opened``, its complement where not; bool, or as 0 and 1 where a number."""

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
        """The gate, whichever side of it this is."""
        return replace(self, opened=True, number=False)


@dataclass(frozen=True)
class SoftMask:
    """``where(open, 1, r)`` or, not ``opened``, ``where(open, 0, r)``."""

    gate: Mask
    opened: bool

    @property
    def shape(self) -> Shape:
        return self.gate.shape


@dataclass(frozen=True)
class Part:
    """Masked data: x1 where ``opened``, x2 where not."""

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
    """``x1[half] + x2[other half]``; ``index`` is x1's half."""

    open_part: Part
    closed_part: Part
    index: int

    @property
    def shape(self) -> Shape:
        return Half(self.open_part, self.index).shape


@dataclass(frozen=True)
class Crossing:
    """The whole SRU: both crossed halves, in their order."""

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
