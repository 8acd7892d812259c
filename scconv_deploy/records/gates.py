"""Gate flip counts and refused candidates. No torch: reports are read where it is not installed."""

from __future__ import annotations

from dataclasses import dataclass

VALUE_TOLERANCE = 1e-6
"""Relative L2 between a module and its variant where no gate differs. torch itself sums in several orders, so a
bit-exact match is too much to ask; a wrong data path is at least 1e-1 away. A wrong eps or ddof need not show in the
values (a hard gate on x passes x on, whatever they are): the probes of recognition tell those by the gates."""


@dataclass(frozen=True)
class FlipCount:
    """Gates that differ between two implementations.

    Attributes:
        gates: how many were compared.
        flips: how many differ in a well-conditioned group.
        unexplained: how many of the flips have a margin beyond what explains them. Anything but 0 is a fault.
        ill_conditioned: differing gates in groups with ``s < 1e-6 * |mean|``; not judged.
        channels: how many channels hold a flip.
        largest_margin: the largest ``|margin| / s`` of a flip, 0.0 without one.
        undecidable: gates that could not be read, for open and closed they give the same output; not among ``gates``.
    """

    gates: int
    flips: int = 0
    unexplained: int = 0
    ill_conditioned: int = 0
    channels: int = 0
    largest_margin: float = 0.0
    undecidable: int = 0

    def __add__(self, other: FlipCount) -> FlipCount:
        """The sum over two samples; ``channels`` is the larger of both, because their names are not kept."""
        return FlipCount(
            self.gates + other.gates,
            self.flips + other.flips,
            self.unexplained + other.unexplained,
            self.ill_conditioned + other.ill_conditioned,
            max(self.channels, other.channels),
            max(self.largest_margin, other.largest_margin),
            self.undecidable + other.undecidable,
        )


@dataclass(frozen=True)
class Refusal:
    """A candidate module that was not recognised, with the reason."""

    path: str
    reason: str


ILL_CONDITIONED = 1e-6
"""Smallest s / |mean| of a well-conditioned group; ``records/tolerances.py`` lists this definition with its reason."""
