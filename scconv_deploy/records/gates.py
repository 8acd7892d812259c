"""Gate flip counts and refused candidates. No torch: reports are read where it is not installed."""

from __future__ import annotations

from dataclasses import dataclass

VALUE_TOLERANCE = 1e-6
"""Largest relative L2 between a module and its variant on elements without a flip. torch sums in several orders, so
the outputs need not be bit-exact; a wrong data path is at least 1e-1 away. A wrong eps or ddof need not change values
(a hard gate passes x unchanged): the probes of recognition find those by the gates."""


@dataclass(frozen=True)
class FlipCount:
    """Number of gates compared between two implementations, and number of flips.

    Attributes:
        gates: number of gates compared.
        flips: gates that differ, in well-conditioned groups.
        unexplained: flips whose margin is beyond the rounding bound. Anything but 0 is a fault.
        ill_conditioned: gates that differ in groups with ``s < 1e-6 * |mean|``; not judged.
        channels: number of channels with a flip.
        largest_margin: largest ``|margin| / s`` of a flip; 0.0 without one.
        undecidable: gates that cannot be read, because open and closed give the same output; not in ``gates``.
    """

    gates: int
    flips: int = 0
    unexplained: int = 0
    ill_conditioned: int = 0
    channels: int = 0
    largest_margin: float = 0.0
    undecidable: int = 0

    def __add__(self, other: FlipCount) -> FlipCount:
        """Sum over two samples; ``channels`` is the larger of both, because the channels themselves are not kept."""
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
    """Candidate module that was not recognised, and the reason."""

    path: str
    reason: str


ILL_CONDITIONED = 1e-6
"""Smallest s / |mean| of a well-conditioned group; ``records/tolerances.py`` lists this definition with its reason."""
