"""Check of the rounding error of half in each output, against the half budget."""

from __future__ import annotations

from scconv_deploy.records.metrics import OutputMetrics
from scconv_deploy.records.parity import Check, Quantity
from scconv_deploy.verification.checks.artifact_run import ArtifactCheck, ArtifactRun
from scconv_deploy.verification.checks.shared import Shared
from scconv_deploy.verification.metrics import comparable, compare, worst_of
from scconv_deploy.verification.reference.run import ReferenceRun
from scconv_deploy.verification.ruler import FLOAT32


class Rounding(ArtifactCheck):
    """Check of a half artifact's outputs against float32 with the same gates."""

    def __init__(self, shared: Shared) -> None:
        self._shared = shared
        self._costs: dict[str, OutputMetrics] = {}

    def add(self, run: ReferenceRun, found: ArtifactRun) -> None:
        if not run.deep or self._shared.ruler.data == FLOAT32:
            return
        for name in found.comparable:
            value, y = run.outputs[name], found.replayed[name]
            if value.dtype.kind == "f" and comparable(y, value):
                self.keep(name, compare(y, value))

    def keep(self, name: str, metrics: OutputMetrics) -> None:
        """Keep the worst metrics of an output."""
        kept = self._costs.get(name)
        self._costs[name] = metrics if kept is None else worst_of(kept, metrics, 1, 1)

    def checks(self) -> list[Check]:
        return [self._check(output, found) for output, found in self._costs.items()]

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
