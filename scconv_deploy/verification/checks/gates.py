"""Gates of the reference's SRUs, flips of an artifact over the samples, and their check. NumPy only."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np

from scconv_deploy.gate.margins import MARGIN_EDGES, histogram
from scconv_deploy.records.gates import FlipCount
from scconv_deploy.records.parity import Check, Histogram, Quantity
from scconv_deploy.records.tolerances import Table
from scconv_deploy.verification.checks import flip_size
from scconv_deploy.verification.reference.run import ReferenceRun, Site

Found = TypeVar("Found")


@dataclass
class SiteGates:
    """Gates of one SRU of the reference, over the samples."""

    site: Site
    opened: int = 0
    gates: int = 0
    _bins: np.ndarray = field(default_factory=lambda: np.zeros(len(MARGIN_EDGES) - 1, dtype=np.int64))

    def add(self, mask: np.ndarray, x: np.ndarray | None) -> None:
        """Add the mask of one sample and its input x; None if x was not kept or is not finite."""
        self.opened += int(mask.sum())
        self.gates += mask.size
        if x is not None:
            self._bins += histogram(x, self.site.form)

    def merge(self, other: SiteGates) -> None:
        """Add the gates of other samples."""
        self.opened += other.opened
        self.gates += other.gates
        self._bins += other._bins

    @property
    def open_share(self) -> float:
        return self.opened / self.gates

    @property
    def margins(self) -> Histogram | None:
        """Histogram of the margins, see :func:`scconv_deploy.gate.margins.histogram`."""
        return Histogram(MARGIN_EDGES, tuple(map(int, self._bins))) if self._bins.any() else None


@dataclass
class Sites:
    """SRUs of the reference.

    Attributes:
        gates: gates by site, in the order of calls.
        redundant: site without a node that no sample needs -> reason.
    """

    gates: dict[str, SiteGates] = field(default_factory=dict)
    redundant: dict[str, str] = field(default_factory=dict)
    _needed: set[str] = field(default_factory=set)

    def add(self, run: ReferenceRun) -> None:
        """Add the gates of one sample."""
        for name, site in run.sites.items():
            self.gates.setdefault(name, SiteGates(site.site)).add(site.mask, site.x if site.finite else None)

    def merge(self, other: Sites) -> None:
        """Add the gates of later samples."""
        for name, found in other.gates.items():
            self.gates.setdefault(name, SiteGates(found.site)).merge(found)

    def add_missing(self, missing: Sequence[str], found: Mapping[str, str]) -> None:
        """Record sites without a node and why this sample does not need them; one sample that does is enough."""
        self._needed |= set(missing) - set(found)
        kept = {**self.redundant, **found}
        self.redundant = {name: reason for name, reason in kept.items() if name not in self._needed}

    def ordered(self, found: Mapping[str, Found]) -> dict[str, Found]:
        """Entries of known sites, in the order of calls."""
        return {name: found[name] for name in self.gates if name in found}

    def of_srus(self, counts: Mapping[str, object]) -> str:
        """Number of SRUs compared, as text for a reason; "" if all SRUs of the artifact were."""
        there = [name for name in self.gates if name not in self.redundant]
        return f", on {len(counts)} of {len(there)} SRUs" if len(counts) < len(there) else ""


@dataclass
class SiteFlips:
    """Flips of an artifact's gates over the samples.

    Attributes:
        counts: flip counts by site.
        jumps: largest change of the SRU's output caused by a flip, in units of the rms of its data, by site.
    """

    counts: dict[str, FlipCount] = field(default_factory=dict)
    jumps: dict[str, float] = field(default_factory=dict)

    def add(self, site: Site, differs: np.ndarray, x: np.ndarray, count: FlipCount) -> None:
        """Add the flips of one sample (bool ``[N, C, H, W]``), the gates' input x (float32) and the count."""
        if differs.any():
            self.jumps[site.name] = max(self.jumps.get(site.name, 0.0), flip_size.largest(x, differs, site))
        self.counts[site.name] = self.counts.get(site.name, FlipCount(0)) + count

    def merge(self, other: SiteFlips) -> None:
        """Add the flips on other samples."""
        for name, jump in other.jumps.items():
            self.jumps[name] = max(self.jumps.get(name, 0.0), jump)
        for name, count in other.counts.items():
            self.counts[name] = self.counts.get(name, FlipCount(0)) + count


def total_flips(counts: Mapping[str, FlipCount]) -> FlipCount:
    """Sum of flip counts over sites."""
    total = FlipCount(0)
    for count in counts.values():
        total = total + count
    return total


def unexplained(total: FlipCount, limits: Table) -> Quantity:
    """Number of unexplained flips and its limit."""
    return Quantity("unexplained_flips", total.unexplained, limits["unexplained_flips"].value)


def gates_check(
    name: str,
    what: str,
    counts: Mapping[str, FlipCount],
    limits: Table,
    coverage: str = "",
    named: Callable[[str], str] = str,
) -> Check:
    """Judge flip counts by site: unexplained flips against their limit.

    Args:
        what: start of the reason.
        coverage: end of the reason, on what the counts do not cover.
        named: name of a site in the reason.
    """
    if not counts:
        return Check(name, "not run", "no gate of the artifact can be read")
    total = total_flips(counts)
    decided = unexplained(total, limits)
    text = f"{what}: {total.flips:,} of {total.gates:,} ({total.unexplained:,} unexplained)"
    if total.ill_conditioned:
        text += f", {total.ill_conditioned} more in ill-conditioned groups"
    text += coverage
    if decided.within:
        return Check(name, "passed", text, (decided,))
    site, worst = max(counts.items(), key=lambda item: item[1].unexplained)
    return Check(name, "failed", f"{text}; worst {named(site)} with {worst.unexplained} unexplained", (decided,))
