"""All checks of one ONNX artifact, fed sample by sample, and their records for the report."""

from __future__ import annotations

from collections.abc import Iterable

import onnx

from scconv_deploy.gate.other_gates import Found
from scconv_deploy.graph.quantization import read_quantization
from scconv_deploy.graph.types import data_type, precision_of, quantization_of
from scconv_deploy.records.gates import FlipCount
from scconv_deploy.records.parity import Check, FreeRunning, OutputParity, SRUParity
from scconv_deploy.records.tolerances import Table
from scconv_deploy.runtimes.half import float_arithmetic
from scconv_deploy.runtimes.onnxruntime import RuntimeOptions
from scconv_deploy.verification.checks import free_running, other_gates, second_opinion, teacher_forced
from scconv_deploy.verification.checks.answers import check_labels
from scconv_deploy.verification.checks.artifact_run import ArtifactCheck, ArtifactRuns
from scconv_deploy.verification.checks.budget import Budget
from scconv_deploy.verification.checks.end_to_end import EndToEnd, Quantized
from scconv_deploy.verification.checks.half_range import HalfRange, RangeWatch
from scconv_deploy.verification.checks.integer_kernels import IntegerKernels
from scconv_deploy.verification.checks.jumps import Jumps
from scconv_deploy.verification.checks.native import Native, StandIn
from scconv_deploy.verification.checks.quantizers import Quantizers
from scconv_deploy.verification.checks.replay import Replay
from scconv_deploy.verification.checks.rounding import Rounding
from scconv_deploy.verification.checks.shared import Shared
from scconv_deploy.verification.checks.static import Rewritten, Static
from scconv_deploy.verification.checks.stored_weights import StoredCodes
from scconv_deploy.verification.checks.swapped import Swapped
from scconv_deploy.verification.checks.tally import Tally
from scconv_deploy.verification.checks.weights import Weights
from scconv_deploy.verification.reference.expected import ExpectedQuantization
from scconv_deploy.verification.reference.run import ReferenceRun, ReferenceSource


class ArtifactChecks:
    """Checks of an artifact against a reference; a context manager that closes its sessions.

    Args:
        source: the reference.
        proto: the artifact.
        limits: table of tolerances.
        options: settings of ONNX Runtime.
        float32_model: float32 model that a half artifact was converted from; None if not available.
        quantized: quantisers of a quantised artifact that the reference has too; or why it does not have them.
    """

    def __init__(
        self,
        source: ReferenceSource,
        proto: onnx.ModelProto,
        limits: Table,
        options: RuntimeOptions,
        float32_model: onnx.ModelProto | None = None,
        quantized: ExpectedQuantization | str = "",
    ) -> None:
        precision, self._quantization = precision_of(proto), quantization_of(proto)
        expected = quantized if isinstance(quantized, ExpectedQuantization) else None
        self._unjudged = quantized if isinstance(quantized, str) else ""
        self.options = options = float_arithmetic(proto, options)
        self.shared = shared = Shared(limits, data_type(precision))
        quantizers = {} if expected is None else expected.found.quantizers
        self._runs = runs = ArtifactRuns(source, proto, shared, options, quantizers)
        self.static = Static(source, shared, runs)
        self.weights = Weights(source, proto, limits["weight_ulps"].value)
        self.forced = teacher_forced.TeacherForced(shared, runs)
        self.opinion = second_opinion.SecondOpinion(source, shared, runs)
        self.free = free_running.FreeRunning(shared)
        self.others = other_gates.OtherGates(shared, runs)
        self.jumps = Jumps(source, shared, runs, self.others)
        self.swapped = Swapped(source.recognised, shared, self.jumps)
        self.replay = Replay(shared, runs, self.jumps)
        self.end_to_end = EndToEnd(shared)
        ranges: list[ArtifactCheck] = []
        if float32_model is not None and precision != "fp32":
            ranges = [HalfRange(RangeWatch(float32_model, proto, precision, options), proto, shared)]
        self.budget, self.kernels = Budget(limits), IntegerKernels(runs, limits)
        static = [] if expected is None else [Quantizers(expected, limits)]
        self._recorded: list[ArtifactCheck] = []
        if self._unjudged and self._quantization:
            found = read_quantization(proto)
            self._recorded = [
                Quantizers(ExpectedQuantization(found, {}), limits), StoredCodes(found, source, limits)
            ]  # fmt: skip
        # in the order of the report; a later check may use what an earlier one measured
        self._all: list[ArtifactCheck] = [
            StandIn(runs), *ranges, *static, self.static, Rewritten(shared, runs), self.weights, self.forced,
            self.opinion, self.free, self.others, self.jumps, Rounding(shared), self.replay, self.end_to_end,
            Native(shared, runs, self.jumps),
        ]  # fmt: skip

        if self._quantization and self._unjudged:  # a replay without its codes would show nothing
            self._all = [*self._recorded, self.static, self.forced, self.opinion, self.free, self.end_to_end]

    def __enter__(self) -> ArtifactChecks:
        _ = self._runs.as_it_is  # refuse an artifact that cannot run here before any sample runs
        return self

    def __exit__(self, *exc: object) -> None:
        self._runs.close()

    def add(self, run: ReferenceRun) -> None:
        """Measure one sample.

        Raises:
            UsageError: the artifact's inputs or outputs are not the reference's, or a label is no class of the model.
            ModelError: ONNX Runtime cannot run the artifact.
        """
        shared, found = self.shared, self._runs.of(run)
        check_labels(run)
        shared.samples.add(run)
        shared.sites.add(run)
        if run.deep:
            shared.ruler.add(run)
            shared.finite.add(run)
            self.others.align(run)
        for check in (*self._all, self.swapped):
            check.add(run, found)
        if self._quantization and (self._unjudged or run.unquantized):
            self.budget.add(run, found)
            self.kernels.add(run, found)

    @property
    def fixed(self) -> list[Found]:
        """Gates of no known SRU that are exposed beside the SRUs'; samples that run free need the same file."""
        return self._runs.fixed

    @fixed.setter
    def fixed(self, gates: list[Found]) -> None:
        self._runs.fix(gates)

    @property
    def tally(self) -> Tally:
        """What the samples added so far, if all of them ran free."""
        shared = self.shared
        return Tally(
            shared.samples, shared.sites, shared.contract, shared.finite, shared.answers, self.free.flips,
            self.end_to_end.tally, self.budget.costs, self.kernels.costs,
        )  # fmt: skip

    def merge(self, tally: Tally) -> None:
        """Add what further samples, which ran free in another process, gave there."""
        shared = self.shared
        shared.samples.merge(tally.samples)
        shared.sites.merge(tally.sites)
        shared.contract.merge(tally.contract)
        shared.finite.merge(tally.finite)
        shared.answers.merge(tally.answers)
        self.free.flips.merge(tally.flips)
        self.end_to_end.tally.merge(tally.outputs)
        self.budget.merge(tally.costs)
        self.kernels.merge(tally.kernels)

    def checks(self) -> list[Check]:
        """Checks of the artifact; where its quantisers cannot be judged, those of its SRUs, which stay in float32."""
        if not self._quantization or not self._unjudged:
            return [*_judged([*self._all, self.kernels]), *self.shared.checks()]
        judged = _judged([*self._recorded, self.static, self.forced, self.opinion, self.kernels])
        passed = [check.name for check in judged if check.status == "passed"]
        unjudged = Quantized(self._quantization, self._unjudged, self.end_to_end, passed)
        return [*judged, *unjudged.checks(), *self.shared.contract.checks(), *self.shared.finite.checks()]

    @property
    def srus(self) -> tuple[SRUParity, ...]:
        """Records of the SRUs for the report, by site."""
        return tuple(self._sru(name) for name in self.shared.sites.gates)

    def _sru(self, name: str) -> SRUParity:
        gates, free = self.shared.sites.gates[name], self.free.flips.counts.get(name)
        return SRUParity(
            site=name,
            variant=gates.site.variant,
            static=self.static.by_site[name],
            swapped=self.swapped.flips.get(gates.site.path, FlipCount(0)),
            teacher_forced=self.forced.flips.counts.get(name),
            open_share=gates.open_share,
            free_running=None if free is None else _free_running(free),
            margins=gates.margins,
            jump=max((f.jumps[name] for f in (self.forced.flips, self.free.flips) if name in f.jumps), default=None),
        )

    @property
    def outputs(self) -> tuple[OutputParity, ...]:
        """Records of the outputs for the report."""
        found = self.replay.unruled | self.replay.outputs
        metrics = self.end_to_end.metrics
        return tuple(OutputParity(n, metrics[n], v.error, v.floor, v.measured) for n, v in found.items())


def _judged(checks: Iterable[ArtifactCheck]) -> list[Check]:
    return [judged for check in checks for judged in check.checks()]


def _free_running(count: FlipCount) -> FreeRunning:
    return FreeRunning(count.gates, count.flips, count.unexplained, count.channels, count.ill_conditioned)
