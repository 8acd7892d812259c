"""Checks that artifacts and engines share: gates, seen or read from an output, and accuracy.

Standard library and NumPy only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from scconv_deploy.records.gates import FlipCount
from scconv_deploy.records.parity import Check, Quantity
from scconv_deploy.verification.measure import Measured, total_flips


def unexplained(total: FlipCount, measured: Measured) -> Quantity:
    """What decides: unexplained flips against their limit."""
    return Quantity("unexplained_flips", total.unexplained, measured.limits["unexplained_flips"].value)


def accuracy_checks(measured: Measured) -> list[Check]:
    """Why there is no accuracy, where the data have labels."""
    if not measured.no_accuracy:
        return []
    return [Check("accuracy", "not run", f"the data have labels, but {measured.no_accuracy}: there is no accuracy")]


def gates_check(
    name: str,
    what: str,
    counts: Mapping[str, FlipCount],
    measured: Measured,
    coverage: str = "",
    named: Callable[[str], str] = str,
) -> Check:
    """Judge flips by site: unexplained ones are held against their limit.

    Args:
        what: opens the reason.
        coverage: what the counts do not cover; closes the reason.
        named: what the worst site is called.
    """
    total = total_flips(counts)
    decided = unexplained(total, measured)
    text = f"{what}: {total.flips:,} of {total.gates:,} ({total.unexplained:,} unexplained)"
    if total.ill_conditioned:
        text += f", {total.ill_conditioned} more in ill-conditioned groups"
    text += coverage
    if decided.within:
        return Check(name, "passed", text, (decided,))
    site, worst = max(counts.items(), key=lambda item: item[1].unexplained)
    return Check(name, "failed", f"{text}; worst {named(site)} with {worst.unexplained} unexplained", (decided,))
