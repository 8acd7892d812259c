"""Checks of the link from PyTorch as given to PyTorch with its SRUs swapped."""

from __future__ import annotations

from scconv_deploy.records.gates import FlipCount
from scconv_deploy.records.parity import Check, Quantity
from scconv_deploy.verification.checks.artifact_run import ArtifactCheck, ArtifactRun
from scconv_deploy.verification.checks.gates import total_flips, unexplained
from scconv_deploy.verification.checks.jumps import Jumps
from scconv_deploy.verification.checks.shared import Shared
from scconv_deploy.verification.reference.run import ReferenceRun
from scconv_deploy.verification.ruler import FLOAT32, AgainstNoise, floor_check, keep_worst


class Swapped(ArtifactCheck):
    """Checks of each SRU against its variant on the same input, and of the swapped model against the given one.

    Args:
        recognised: whether any SRU was recognised.

    Attributes:
        flips: flip counts by module path.
        distance: largest relative L2 of an SRU's values.
        outputs: error of each output of the whole model, the worst over the samples.
    """

    def __init__(self, recognised: bool, shared: Shared, jumps: Jumps) -> None:
        self._recognised, self._shared, self._jumps = recognised, shared, jumps
        self.flips: dict[str, FlipCount] = {}
        self.distance = 0.0
        self.outputs: dict[str, AgainstNoise] = {}

    def add(self, run: ReferenceRun, found: ArtifactRun) -> None:
        if not run.deep:
            return
        for path, count in run.swapped_flips.items():
            self.flips[path] = self.flips.get(path, FlipCount(0)) + count
        self.distance = max(self.distance, run.swapped_distance)
        as_given = found.aligned(run.as_given, run.given)
        for name in found.comparable:
            # both run in PyTorch in float32, whatever the artifact's type
            floor = self._jumps.floor(run, name)
            keep_worst(
                self.outputs, name, self._shared.ruler.measure(as_given[name], run.given[name], floor, data=FLOAT32)
            )

    def checks(self) -> list[Check]:
        if not self._recognised:
            return [Check("swap", "not run", "no SRU was recognised; the model was exported as it is")]
        total, limits, coverage = total_flips(self.flips), self._shared.limits, self._shared.samples.coverage
        flips = unexplained(total, limits)
        values = Quantity("swapped_values", self.distance, limits["swapped_values"].value)
        return [
            Check(
                "gates",
                "passed" if flips.within else "failed",
                f"same input, gates changed: {total.flips:,} of {total.gates:,} ({total.unexplained:,} unexplained)"
                + coverage,
                (flips,),
            ),
            Check(
                "values",
                "passed" if values.within else "failed",
                f"values agree to {values.value:.1e} relative L2 (limit {values.limit:.0e}){coverage}",
                (values,),
            ),
            *(
                floor_check("whole model", "swapped against given", name, found, self._shared.ruler, coverage)
                for name, found in self.outputs.items()
            ),
        ]
