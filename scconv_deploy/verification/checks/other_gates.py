"""Check of gates that belong to no known SRU: found on the first sample that has them, compared on every sample."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from scconv_deploy.gate.other_gates import (
    LAYERS,
    UNIT_ROUNDOFF,
    OtherGate,
    OtherGateMeasured,
    count_flips,
    margin_error,
    margin_size,
    mean_error,
    of_few,
)
from scconv_deploy.graph import gates as onnx_gates
from scconv_deploy.graph import quantization
from scconv_deploy.records.gates import FlipCount
from scconv_deploy.records.parity import Check, OtherGateParity, Quantity
from scconv_deploy.runtimes.half import runner_of
from scconv_deploy.verification.checks.artifact_run import ArtifactCheck, ArtifactRun, ArtifactRuns
from scconv_deploy.verification.checks.shared import Shared
from scconv_deploy.verification.reference.run import Arrays, ReferenceRun
from scconv_deploy.verification.ruler import FLOAT32

NAME = "other gates"
CODES = "codes"


class OtherGates(ArtifactCheck):
    """Flips and operand errors of gates of no known SRU, and gates that could not be judged.

    Attributes:
        sites: gates found in the artifact, by name.
        unfound: gate not found in the artifact -> reason.
        untaken: comparisons of the artifact that match no gate of the reference.
    """

    def __init__(self, shared: Shared, runs: ArtifactRuns) -> None:
        self._shared, self._runs = shared, runs
        self._known: set[str] = set()
        self.sites: dict[str, OtherGateMeasured] = {}
        self.unfound: dict[str, str] = {}
        self.untaken: list[str] = []

    # --- measured ------------------------------------------------------------------------------------------------

    def align(self, run: ReferenceRun) -> None:
        """Find gates that this sample has for the first time in the artifact; fix all gates of this sample."""
        new = {name: gate for name, gate in run.others.items() if name not in self._known}
        if new:
            self._find(new, run)
        self._runs.fix([site.found for name, site in self.sites.items() if name in run.others])

    def _find(self, new: Mapping[str, OtherGate], run: ReferenceRun) -> None:
        self._known |= set(new)
        codes = {name: quantization.as_found(name, q) for name, q in self._runs.quantizers.items() if name in new}
        self.sites |= {name: OtherGateMeasured(one) for name, one in codes.items()}
        new = {name: gate for name, gate in new.items() if name not in codes}
        if not new:
            return
        wanted = onnx_gates.candidates(self._runs.proto)
        values: Arrays = {}
        if wanted:
            with runner_of(onnx_gates.shown(self._runs.proto, wanted), self._runs.options) as runner:
                values = runner.run(run.inputs)
            taken = {site.found.value for site in self.sites.values()}
            wanted = [one for one in onnx_gates.of_floats(wanted, values) if one.value not in taken]
        found, unfound = onnx_gates.align(new, wanted, values)
        self.unfound |= unfound
        self.sites |= {one.name: OtherGateMeasured(one) for one in found}
        taken = {one.value for one in found}
        self.untaken = [one.node for one in wanted if one.value not in taken]

    def add(self, run: ReferenceRun, found: ArtifactRun) -> None:
        here = {
            name: site for name, site in self.sites.items() if name in run.others and site.found in self._runs.fixed
        }
        for name, site in here.items():
            self._compare_free(site, run.others[name], found.exposed)
        for name, site in here.items() if run.deep else ():
            if run.others[name].views:
                self._compare(name, site, run.others[name], found)

    def _compare_free(self, site: OtherGateMeasured, gate: OtherGate, values: Arrays) -> None:
        """Count the free-running decisions that differ; for information, because earlier flips move operands."""
        (decided,) = onnx_gates.like(gate.decided, site.found, onnx_gates.decision(site.found, values)[0])
        if decided.shape == gate.decided.shape:
            site.free += int((decided != gate.decided).sum())

    def _compare(self, name: str, site: OtherGateMeasured, gate: OtherGate, found: ArtifactRun) -> None:
        """Compare the decisions and operands of the replay with the reference's."""
        decided, margin = onnx_gates.like(gate.decided, site.found, *onnx_gates.decision(site.found, found.forced))
        if decided.shape != gate.decided.shape:
            text = f"gate {name} is {list(decided.shape)}, the reference's {list(gate.decided.shape)}"
            self._shared.contract.note(text)
            return
        multiple, data = self._shared.limits[_multiple(self._shared)].value, self._shared.ruler.data
        in_half = None if found.rounded is None else found.rounded.others.get(name)
        gate = gate if in_half is None else in_half
        site.flips = site.flips + count_flips(gate, site.found, decided, margin, multiple, data, in_half is None)
        if site.found.view is not None:
            self._keep_error(site, gate, margin, in_half is not None)

    def _keep_error(self, site: OtherGateMeasured, gate: OtherGate, margin: np.ndarray, rounded: bool) -> None:
        view = gate.views[site.found.view or 0]
        data = self._shared.ruler.data
        unit, few = UNIT_ROUNDOFF.get(data.name, UNIT_ROUNDOFF["float32"]), of_few(margin.size)
        measured = self._shared.limits["assumed_floor"].value if view.error is None else view.error
        if data == FLOAT32:
            pairs = [(margin_error(view, margin), max(unit, measured) * few)]
        elif rounded:  # exact in this half reference, but not in every right file
            pairs = [(margin_error(view, margin), max(unit * margin_size(view), measured) * few)]
        else:  # rounding has no bias: a moved threshold shows in the mean, far below the errors of single elements
            pairs = [(margin_error(view, margin), max(LAYERS * unit, measured) * few), (mean_error(view, margin), unit)]
        for error, floor in pairs:
            if not site.compared or not error * site.floor <= site.error * floor:
                site.error, site.floor, site.compared = error, floor, True

    # --- judged --------------------------------------------------------------------------------------------------

    def checks(self) -> list[Check]:
        codes = {name: site for name, site in self.sites.items() if name in self._runs.quantizers}
        others = {name: site for name, site in self.sites.items() if name not in codes}
        found: list[Check] = []
        if codes:
            found += [_same_input(CODES, "codes of quantisers", self._shared, codes, {}), *_left(CODES, codes, {})]
        if others or self.unfound:
            what = "gates of no known SRU"
            found += [_same_input(NAME, what, self._shared, others, self.unfound), *_left(NAME, others, self.unfound)]
        return found

    def records(self) -> tuple[OtherGateParity, ...]:
        """Records of the gates for the report."""
        found = [
            OtherGateParity(name, s.found.node, s.flips.gates, s.flips.flips, s.flips.unexplained, s.free,
                            s.error / s.floor if s.compared else None)
            for name, s in self.sites.items()
        ]  # fmt: skip
        return (*found, *(OtherGateParity(name, reason=reason) for name, reason in self.unfound.items()))


def _same_input(
    name: str, what: str, shared: Shared, sites: Mapping[str, OtherGateMeasured], unfound: Mapping[str, str]
) -> Check:
    missing = "; ".join(f"{site}: {reason}" for site, reason in list(unfound.items())[:3])
    if not sites:
        return Check(name, "not run", f"{what} were not found in the graph: {missing}")
    compared = {site: one for site, one in sites.items() if one.flips.gates}
    if not compared:
        return Check(name, "not run", f"the reference kept no operands of {what}: {', '.join(list(sites)[:3])}")
    total = FlipCount(0)
    for one in compared.values():
        total = total + one.flips
    limits, multiple = shared.limits, _multiple(shared)
    flips = Quantity("unexplained_flips", total.unexplained, limits["unexplained_flips"].value)
    ratios = {n: s.error / s.floor for n, s in compared.items() if s.compared}
    apart = Quantity(multiple, max(ratios.values(), default=0.0), limits[multiple].value)
    there = len(sites) + len(unfound)
    among = f" of {there}" if len(compared) < there else ""
    text = (
        f"{what}, same input: {total.flips:,} of {total.gates:,} changed ({total.unexplained:,} "
        f"unexplained), operands within {apart.value:.1f}x their noise, at {len(compared)}{among} places"
        f"{shared.samples.coverage}"
    )
    if not flips.within:
        worst, one = max(compared.items(), key=lambda item: item[1].flips.unexplained)
        text += f"; worst {worst} ({one.found.node}) with {one.flips.unexplained:,} unexplained"
    elif not apart.within:
        worst = max(ratios, key=ratios.__getitem__)
        text += f" (limit {apart.limit:g}x); worst {worst} ({sites[worst].found.node})"
    return Check(name, "passed" if flips.within and apart.within else "failed", text, (flips, apart))


def _left(name: str, sites: Mapping[str, OtherGateMeasured], unfound: Mapping[str, str]) -> list[Check]:
    """Check that names the gates that were not compared; empty if all were."""
    unkept = [site for site, one in sites.items() if not one.flips.gates]
    why = [f"{site}: {reason}" for site, reason in unfound.items()]
    why += [f"{site}: the reference kept no operands" for site in unkept]
    if not why or len(unkept) == len(sites):
        return []
    more = f" and {len(why) - 3} more" if len(why) > 3 else ""
    return [Check(name, "not run", f"not compared: {'; '.join(why[:3])}{more}")]


def _multiple(shared: Shared) -> str:
    """Name of the tolerance."""
    return "other_gates" if shared.ruler.data == FLOAT32 else "other_gates_half"
