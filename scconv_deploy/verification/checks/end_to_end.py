"""End-to-end errors of an ONNX artifact against PyTorch as given; for information, without a limit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from scconv_deploy.records.metrics import OutputMetrics
from scconv_deploy.records.parity import Check
from scconv_deploy.verification.checks.artifact_run import ArtifactCheck, ArtifactRun, same_kind
from scconv_deploy.verification.checks.shared import Shared
from scconv_deploy.verification.metrics import MetricsTally, compare
from scconv_deploy.verification.reference.run import ReferenceRun


class EndToEnd(ArtifactCheck):
    """Metrics of each free-running output; also counts shapes, types, NaN, Inf and answers.

    Attributes:
        tally: metrics of the outputs over the samples.
    """

    def __init__(self, shared: Shared) -> None:
        self._shared = shared
        self.tally = MetricsTally()

    @property
    def metrics(self) -> dict[str, OutputMetrics]:
        """Metrics by output: the worst distances over the samples, agreements over all rows."""
        return self.tally.metrics

    def add(self, run: ReferenceRun, found: ArtifactRun) -> None:
        for name in run.outputs:
            y, given = found.outputs[name], run.given[name]
            if not same_kind(y, given):
                actual, expected = (f"{a.dtype}{list(a.shape)}" for a in (y, given))
                self._shared.contract.note(f"output {name} is {actual}, PyTorch's {expected}")
            elif name not in found.comparable:
                self._shared.finite.note_output(name, run, y, "artifact")
            else:
                self.tally.add(name, compare(y, given), len(given) if given.ndim else 1)
        floats = replace(run, given=run.unquantized) if run.unquantized else run  # what quantisation costs
        self._shared.answers.add(floats, found.outputs, run.count)


class Quantized(ArtifactCheck):
    """Outputs of a quantised artifact whose quantisers cannot be put into the reference, so that it is not judged.

    Every tensor between quantisers is rounded to a few hundred values, and weights are stored as integers. The limits
    for floating-point rounding do not apply.

    Args:
        quantization: kind of quantisation, as text.
        why: why the reference has no such quantisers.
        passed: names of the checks that judged a part of the file.
    """

    def __init__(self, quantization: str, why: str, end_to_end: EndToEnd, passed: Sequence[str] = ()) -> None:
        self._quantization, self._why, self._end_to_end, self._passed = quantization, why, end_to_end, passed

    def checks(self) -> list[Check]:
        metrics = self._end_to_end.metrics
        apart = ", ".join(f"{name} is {found.relative_l2:.1e} away" for name, found in metrics.items())
        what = f"the parity of {self._quantization} is not judged: {self._why}"
        judged = f"; judged and right: {', '.join(dict.fromkeys(self._passed))}" if self._passed else ""
        return [Check("quantization", "not run", f"{what}{judged}; relative L2 from the reference: {apart}")]
