"""Checks of gates that belong to no known SRU."""

from __future__ import annotations

from scconv_deploy.records.gates import FlipCount
from scconv_deploy.records.parity import Check, OtherGateParity, Quantity
from scconv_deploy.verification.measure import Measured


def other_gates_checks(measured: Measured) -> list[Check]:
    """Decisions on the same input and the operands they rest on, and what could not be judged."""
    others = measured.others
    if not others.sites and not others.unfound:  # an argmax, or an SRU without a node, jumps too
        return _jumps(measured)
    return [_same_input(measured), *_left(measured), *_jumps(measured)]


def _same_input(measured: Measured) -> Check:
    name = "other gates"
    others = measured.others
    missing = "; ".join(f"{site}: {reason}" for site, reason in list(others.unfound.items())[:3])
    if not others.sites:
        return Check(name, "not run", f"gates of no known SRU were not found in the graph: {missing}")
    compared = {name: site for name, site in others.sites.items() if site.flips.gates}
    if not compared:
        places = ", ".join(list(others.sites)[:3])
        return Check(name, "not run", f"the reference kept no operands of gates of no known SRU: {places}")
    total = FlipCount(0)
    for site in compared.values():
        total = total + site.flips
    limits = measured.limits
    flips = Quantity("unexplained_flips", total.unexplained, limits["unexplained_flips"].value)
    ratios = {n: s.error / s.floor for n, s in compared.items() if s.compared}
    apart = Quantity(measured.other_gates, max(ratios.values(), default=0.0), limits[measured.other_gates].value)
    there = len(others.sites) + len(others.unfound)
    among = f" of {there}" if len(compared) < there else ""
    text = (
        f"gates of no known SRU, same input: {total.flips:,} of {total.gates:,} changed ({total.unexplained:,} "
        f"unexplained), operands within {apart.value:.1f}x their noise, at {len(compared)}{among} places"
        f"{measured.coverage}"
    )
    if not flips.within:
        worst, site = max(compared.items(), key=lambda item: item[1].flips.unexplained)
        text += f"; worst {worst} ({site.found.node}) with {site.flips.unexplained:,} unexplained"
    elif not apart.within:
        worst = max(ratios, key=ratios.__getitem__)
        text += f" (limit {apart.limit:g}x); worst {worst} ({others.sites[worst].found.node})"
    passed = flips.within and apart.within
    return Check(name, "passed" if passed else "failed", text, (flips, apart))


def _left(measured: Measured) -> list[Check]:
    """Gates that were not compared beside others that were."""
    others = measured.others
    unkept = [name for name, site in others.sites.items() if not site.flips.gates]
    why = [f"{name}: {reason}" for name, reason in others.unfound.items()]
    why += [f"{name}: the reference kept no operands" for name in unkept]
    if not why or len(unkept) == len(others.sites):
        return []
    more = f" and {len(why) - 3} more" if len(why) > 3 else ""
    return [Check("other gates", "not run", f"not compared: {'; '.join(why[:3])}{more}")]


def _jumps(measured: Measured) -> list[Check]:
    """What differs no more than the reference's own jumps: neither right nor wrong is known of it."""
    jumped = measured.others.jumped
    found = [f"{n} {j.words}" for n, j in jumped.items() if j.undecided(measured.largest_multiple(j.multiple))]
    return [Check("jumps", "not run", "; ".join(found))] if found else []


def other_gate_records(measured: Measured) -> tuple[OtherGateParity, ...]:
    """For the report, by gate."""
    others = measured.others
    found = [
        OtherGateParity(name, s.found.node, s.flips.gates, s.flips.flips, s.flips.unexplained, s.free,
                        s.error / s.floor if s.compared else None)
        for name, s in others.sites.items()
    ]  # fmt: skip
    return (*found, *(OtherGateParity(name, reason=reason) for name, reason in others.unfound.items()))
