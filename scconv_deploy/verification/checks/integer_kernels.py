"""Check of an int8 file as ONNX Runtime runs it on this CPU, with all its optimisations, beside float arithmetic.

Optimised, ONNX Runtime fuses quantisers and layers into integer kernels. On x86-64 without VNNI these add two products
of uint8 and int8 in 16 bits, which saturate without a word.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import numpy as np

from scconv_deploy.errors import ModelError
from scconv_deploy.graph.types import half_in, has_unsigned_codes
from scconv_deploy.records.parity import Check, Quantity
from scconv_deploy.records.tolerances import Table, name_of
from scconv_deploy.runtimes.half import HalfRunner, runs_here
from scconv_deploy.runtimes.onnxruntime import CPU, OnnxRuntimeRunner
from scconv_deploy.system.cpu import int8_instructions
from scconv_deploy.verification.checks.artifact_run import ArtifactCheck, ArtifactRun, ArtifactRuns, Runner, same_kind
from scconv_deploy.verification.metrics import comparable, looks_like_logits
from scconv_deploy.verification.reference.run import ReferenceRun

NAME = "integer kernels"
TOLERANCE = "integer_kernels"
_REMEDY = "quantise with --target cpu --reduce-range, whose products cannot saturate"


@dataclass
class KernelCosts:
    """What integer kernels change over samples; it merges exactly.

    Attributes:
        on_data: whether the samples are real data, not noise.
        squares: rows of :func:`_squares` by output, one for each sample.
        floors: rounding of the output's type, relative.
        changed, answers: changed and all answers.
        refusal: why nothing was run; "" if it was.
    """

    on_data: bool = False
    squares: dict[str, list[np.ndarray]] = field(default_factory=dict)
    floors: dict[str, float] = field(default_factory=dict)
    changed: int = 0
    answers: int = 0
    refusal: str = ""

    def merge(self, other: KernelCosts) -> None:
        """Add the costs on other samples of the same kind."""
        for name, rows in other.squares.items():
            self.squares.setdefault(name, []).extend(rows)
        self.floors |= other.floors
        self.changed, self.answers = self.changed + other.changed, self.answers + other.answers
        self.refusal = self.refusal or other.refusal


class IntegerKernels(ArtifactCheck):
    """Check that integer kernels change the outputs by no more than quantisation did.

    A file with signed codes alone is for GPUs: it is measured, and judged only if the user gives the limit. TensorRT
    takes no unsigned codes, so a file that has some is for CPUs.
    """

    def __init__(self, runs: ArtifactRuns, limits: Table) -> None:
        self._runs, self._limits = runs, limits
        self._judged = has_unsigned_codes(runs.proto) or limits[TOLERANCE].given
        self.costs = KernelCosts()

    def add(self, run: ReferenceRun, found: ArtifactRun) -> None:
        if self.costs.refusal or (self.costs.on_data and not run.kind):  # noise, beside real data
            return
        runner = self._runner()
        if runner is None:
            return
        if run.kind and not self.costs.on_data:
            self.costs = KernelCosts(on_data=True)
        costs = self.costs
        floats = run.unquantized or run.given
        outputs = found.aligned(runner.run(run.inputs), run.given)
        for name, y in outputs.items():
            plain, reference = found.outputs[name], floats.get(name)
            if reference is None or plain.dtype.kind != "f" or not same_kind(plain, reference):
                continue
            if not comparable(plain, reference) or y.shape != plain.shape:
                continue
            costs.floors[name] = self._limits[name_of(self._limits, "engine_noise", plain.dtype)].value
            costs.squares.setdefault(name, []).append(_squares(y, plain, reference))
            if looks_like_logits(plain):
                changed = (plain.argmax(1) != y.argmax(1))[: run.count or len(y)]
                costs.changed, costs.answers = costs.changed + int(changed.sum()), costs.answers + changed.size

    def merge(self, costs: KernelCosts) -> None:
        """Add the costs on further samples; those on noise do not count beside real data."""
        if costs.on_data and not self.costs.on_data:
            self.costs = KernelCosts(on_data=True, refusal=self.costs.refusal)
        if costs.on_data == self.costs.on_data:
            self.costs.merge(costs)

    def _runner(self) -> Runner | None:
        """Session with all optimisations; None where there is none (recorded)."""
        proto, options = self._runs.proto, replace(self._runs.options, optimization="all")
        if options.resolved_provider() != CPU:
            self.costs.refusal = f"{options.resolved_provider()} runs the file, not the CPU"
        elif not runs_here(proto, options):
            self.costs.refusal = "ONNX Runtime cannot run bf16 here"
        if self.costs.refusal:
            return None
        try:
            native = half_in(proto) is not None
            return self._runs.session(
                NAME, lambda: HalfRunner(proto, options, native=True) if native else OnnxRuntimeRunner(proto, options)
            )
        except ModelError as error:  # no kernel for an operator that float arithmetic does without
            self.costs.refusal = error.message
            return None

    def checks(self) -> list[Check]:
        if not self.costs.squares:
            return [Check(NAME, "not run", self.costs.refusal)] if self.costs.refusal else []
        ratios, words = {}, []
        for name, rows in self.costs.squares.items():
            off, cost, size = map(math.fsum, zip(*rows, strict=True))
            least = self.costs.floors[name] ** 2 * size
            ratios[name] = float(np.sqrt(off / max(cost, least, np.finfo(float).tiny)))
            snr = f"SNR {10 * np.log10(size / off):.1f} dB" if off and size else "the same"
            words.append(f"{name}: {snr}, {ratios[name]:.2g}x what quantising costs")
        if self.costs.answers:
            words.append(f"{self.costs.changed:,} of {self.costs.answers:,} answers changed")
        where = "" if self.costs.on_data else " on noise"
        worst = max(ratios.values(), key=lambda ratio: (np.isnan(ratio), ratio))
        instructions = int8_instructions()
        text = f"in ONNX Runtime's integer kernels on this CPU ({instructions}){where}: {', '.join(words)}"
        return [self.judged(worst, text, instructions.saturating)]

    def judged(self, ratio: float, text: str, saturating: bool = False) -> Check:
        """Judge an error in multiples of the cost of quantising; of a file for GPUs it is shown alone.

        Args:
            saturating: whether this CPU adds in 16 bits.
        """
        quantity = Quantity(TOLERANCE, ratio, self._limits[TOLERANCE].value)
        text += f" (limit {quantity.limit:.3g}x)"
        if not quantity.within:
            text += f"; {'they saturate without VNNI: ' if saturating else ''}for this CPU, {_REMEDY}"
        if not self._judged:
            return Check(NAME, "not run", f"{text}; its codes are for GPUs, so this was not judged")
        return Check(NAME, "passed" if quantity.within else "failed", text, (quantity,))


def _squares(y: np.ndarray, plain: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Squared norms, float64 ``[3]``: integer kernels against float arithmetic, the cost of quantising, the output."""
    parts = (y.astype(np.float64) - plain, plain.astype(np.float64) - reference, plain)
    with np.errstate(over="ignore", invalid="ignore"):
        return np.array([float(np.sum(np.square(part, dtype=np.float64))) for part in parts])
