"""Check of the rounding error of half in each output, against the half budget."""

from __future__ import annotations

from scconv_deploy.records.metrics import OutputMetrics
from scconv_deploy.records.parity import Check, Quantity
from scconv_deploy.verification.checks.artifact_run import ArtifactCheck, ArtifactRun
from scconv_deploy.verification.checks.shared import Shared
from scconv_deploy.verification.metrics import MetricsTally, comparable, compare
from scconv_deploy.verification.reference.run import ReferenceRun
from scconv_deploy.verification.ruler import FLOAT32


class Rounding(ArtifactCheck):
    """Check of a half artifact's outputs against float32 with the same gates.

    Attributes:
        costs: metrics of the outputs over the samples.
    """

    def __init__(self, shared: Shared) -> None:
        self._shared = shared
        self.costs = MetricsTally()

    def add(self, run: ReferenceRun, found: ArtifactRun) -> None:
        if not run.deep or self._shared.ruler.data == FLOAT32:
            return
        for name in found.comparable:
            value, y = run.outputs[name], found.replayed[name]
            if value.dtype.kind == "f" and comparable(y, value):
                self.costs.add(name, compare(y, value), len(value) if value.ndim else 1)

    def checks(self) -> list[Check]:
        return [self._check(output, found) for output, found in self.costs.metrics.items()]

    def _check(self, output: str, found: OutputMetrics) -> Check:
        tolerance = f"half_budget.{self._shared.ruler.data.name}"
        cost = Quantity(tolerance, found.relative_l2, self._shared.limits[tolerance].value)
        words = [f"{found.snr_db:.0f} dB"] if found.snr_db is not None else []
        words += [f"top-1 agrees {found.top1_agreement:.1%}"] if found.top1_agreement is not None else []
        said = f" ({', '.join(words)})" if words else ""
        text = f"{output}: rounding costs {cost.value:.1e} relative L2{said} (limit {cost.limit:g})"
        text += self._shared.samples.coverage
        text += "" if cost.within else ": this network is another one in half; --keep leaves layers in float32"
        return Check("rounding", "passed" if cost.within else "failed", text, (cost,))
