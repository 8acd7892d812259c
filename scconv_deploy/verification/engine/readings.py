"""Gates and values decoded from outputs of an engine's SRUs, and their checks. NumPy only."""

from __future__ import annotations

import numpy as np

from scconv_deploy.records.gates import FlipCount
from scconv_deploy.records.parity import Check, Quantity
from scconv_deploy.verification.checks.gates import gates_check
from scconv_deploy.verification.checks.shared import Shared
from scconv_deploy.verification.engine.decode import decode
from scconv_deploy.verification.reference.run import Site


class Readings:
    """Collector of decoded gates and values, by site; of several samples the worst distance counts.

    Args:
        data: dtype of the engine's data.
        where: where the SRUs were read, as text: ``alone`` or ``inside the engine``.

    Attributes:
        counts: flip counts by site.
        apart: distance of the output from the nearest possible one, relative L2, by site.
        foreign: pairs of outputs that no gates explain, by site.
    """

    def __init__(self, data: str, where: str, shared: Shared) -> None:
        self.data, self.where, self.shared = data, where, shared
        self.counts: dict[str, FlipCount] = {}
        self.apart: dict[str, float] = {}
        self.foreign: dict[str, int] = {}

    def add(self, site: Site, y: np.ndarray, x: np.ndarray, expected: np.ndarray) -> None:
        """Decode an SRU's output y for the input x (bit for bit) and compare with the expected mask."""
        found, name = decode(y, x, site, self.data), site.name
        self.counts[name] = self.counts.get(name, FlipCount(0)) + found.count(expected, x, site)
        self.apart[name] = max(self.apart.get(name, 0.0), found.apart, key=_badness)
        self.foreign[name] = self.foreign.get(name, 0) + int(found.foreign.sum()) // 2


def readings_gates(name: str, readings: Readings, read: str) -> Check:
    """Check of gates.

    Args:
        read: which SRUs were read, as text, for the reason if no gate was seen.
    """
    shared, counts = readings.shared, readings.counts
    hidden = sum(count.undecidable for count in counts.values())
    coverage = f"; {hidden:,} gates do not show in the output" if hidden else ""
    if not any(count.gates for count in counts.values()):
        return Check(name, "not run", f"{read}{coverage}: no gate was seen")
    what = f"{len(counts)} SRUs {readings.where}, same input, gates changed"
    return gates_check(name, what, counts, shared.limits, coverage, lambda site: named(site, shared))


def readings_values(name: str, readings: Readings) -> Check:
    """Check of values: the worst distance from what an input allows."""
    tolerance, where = f"engine_sru.{readings.data}", readings.where
    limit = readings.shared.limits[tolerance].value
    site, apart = max(readings.apart.items(), key=lambda item: _badness(item[1]))
    decided = Quantity(tolerance, apart, limit)
    if decided.within:
        text = f"values of SRUs {where} agree to {apart:.1e} relative L2 (limit {limit:.0e})"
        return Check(name, "passed", text, (decided,))
    at = named(site, readings.shared)
    text = f"{at} {where} is {apart:.1e} from all that its input allows (limit {limit:.0e})"
    if readings.foreign[site]:
        text += f": {readings.foreign[site]:,} pairs of outputs that no gates explain"
    return Check(name, "failed", text, (decided,))


def named(site: str, shared: Shared) -> str:
    """Name of a site in a reason, with its module's path where that differs."""
    path = shared.sites.gates[site].site.path if site in shared.sites.gates else site
    return site if path == site else f"{site} ({path})"


def _badness(value: float) -> float:
    return value if value == value else float("inf")
