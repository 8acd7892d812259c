"""Parity report and its parts: the records of ``report.json``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from scconv_deploy.records import tolerances as table
from scconv_deploy.records.accuracy import Accuracy
from scconv_deploy.records.codec import encode
from scconv_deploy.records.engine import EngineOutput, Latency, PlanTraffic
from scconv_deploy.records.gates import FlipCount, Refusal
from scconv_deploy.records.metrics import OutputMetrics
from scconv_deploy.records.stage import StageRecord
from scconv_deploy.records.tolerances import Tolerance

SCHEMA_VERSION = 1


Status = Literal["passed", "failed", "not run"]
UNDECIDED = frozenset({"jumps", "quantization"})
"""Names of checks without a verdict. A link with one of them has not passed, and neither has its report."""
UNPROVED = frozenset({"scales", "budget interval"})
"""Names of checks that the headline of a passed report names where they were not run."""


@dataclass(frozen=True)
class Quantity:
    """Measured number and its limit, kept so that a stored report can be judged again.

    Attributes:
        tolerance: name of the limit in the table of tolerances.
        value: measured value, in the tolerance's unit.
        limit: largest value allowed.
    """

    tolerance: str
    value: float
    limit: float

    @property
    def within(self) -> bool:
        """Whether the value is at most the limit; False for NaN."""
        return self.value <= self.limit


@dataclass(frozen=True)
class Check:
    """One check of a link: its name, its status and the reason.

    Attributes:
        quantities: numbers that decided the status; empty if no limit is involved.
    """

    name: str
    status: Status
    reason: str
    quantities: tuple[Quantity, ...] = ()


@dataclass(frozen=True)
class Link:
    """One step of the chain from PyTorch to the artifact.

    The status is ``failed`` if a check failed, and ``not run`` if no check ran or a difference could not be judged.
    """

    name: str
    status: Status
    reason: str
    checks: tuple[Check, ...] = ()

    @classmethod
    def of(cls, name: str, checks: Sequence[Check]) -> Link:
        """Make a link and derive its status and reason from its checks."""
        undecided = [c.reason for c in checks if c.name in UNDECIDED]
        if undecided and not any(c.status == "failed" for c in checks):
            return cls(name, "not run", "; ".join(undecided), tuple(checks))
        for status in ("failed", "passed"):
            having = [c for c in checks if c.status == status]
            if having:
                reasons = "; ".join(c.reason for c in having)
                return cls(name, status, reasons, tuple(checks))
        return cls(name, "not run", "; ".join(c.reason for c in checks), tuple(checks))


@dataclass(frozen=True)
class Histogram:
    """Histogram of ``|margin| / s`` of the reference's gates, in log-spaced bins.

    Attributes:
        edges: n + 1 edges; the first bin also holds everything below, the last everything above.
        counts: gates in each of the n bins.
    """

    edges: tuple[float, ...]
    counts: tuple[int, ...]


@dataclass(frozen=True)
class FreeRunning:
    """Flips of the free-running artifact against the reference.

    Attributes:
        gates: number of gates compared.
        flips: gates that differ, in well-conditioned groups.
        unexplained: flips whose margin is beyond both the measured error of the gate's input and the rounding bound.
        channels: number of channels with a flip, the largest over the samples.
        ill_conditioned: gates that differ in groups with ``s < 1e-6 * |mean|``; not judged.
    """

    gates: int
    flips: int
    unexplained: int
    channels: int = 0
    ill_conditioned: int = 0


@dataclass(frozen=True)
class LayerError:
    """Error of one intermediate tensor in the replay.

    Attributes:
        name: name of the ONNX value.
        module: path of the module in the PyTorch model, "" if unknown.
        relative_l2: distance of the artifact from the reference, the worst over the samples.
        floor: noise floor of the same tensor, relative L2.
    """

    name: str
    module: str
    relative_l2: float
    floor: float

    @property
    def ratio(self) -> float:
        return self.relative_l2 / self.floor


@dataclass(frozen=True)
class WorstInput:
    """Input on which the free-running artifact is farthest from PyTorch; ``index`` is its row in the sample."""

    sample: str
    index: int
    relative_l2: float


@dataclass(frozen=True)
class SRUParity:
    """Parity of one SRU, summed over the samples.

    Attributes:
        site: name of the node, which is its module's path (``#2`` for a second call).
        variant: variant that the SRU computes.
        static: static check of parameters, attributes and function body, bit for bit.
        swapped: flips between the module as given and its variant, both in PyTorch.
        teacher_forced: flips between the artifact's SRU and the reference on the same input.
        open_share: share of gates that are open in the reference.
        free_running: flips between the free-running artifact and the reference.
        margins: histogram of the margins of the reference's gates.
        jump: largest change of the SRU's output caused by one flip, in units of the rms of its data.
    """

    site: str
    variant: str
    static: Check
    swapped: FlipCount
    teacher_forced: FlipCount | None
    open_share: float
    free_running: FreeRunning | None = None
    margins: Histogram | None = None
    jump: float | None = None

    @property
    def variant_label(self) -> str:
        """Name of the variant without its numbers, marked if gamma is summed by torch.sum."""
        name = self.variant.split(" ")[0]
        return f"{name} (torch.sum)" if self.variant.endswith(", torch.sum)") else name


@dataclass(frozen=True)
class OtherGateParity:
    """Parity of one gate that belongs to no known SRU (a comparison, a rounding), summed over the samples.

    Attributes:
        site: module and operator of the gate, ``features.2::ge``.
        node: node of the artifact that computes the gate; "" if none was found, see ``reason``.
        gates, flips, unexplained: counts of its decisions on the same input as the reference's.
        free: decisions that differ in the free-running artifact.
        operand_ratio: relative L2 of the gate's operands, in multiples of their noise; None if the artifact has other
            operands.
    """

    site: str
    node: str = ""
    gates: int = 0
    flips: int = 0
    unexplained: int = 0
    free: int = 0
    operand_ratio: float | None = None
    reason: str = ""

    @property
    def is_quantizer(self) -> bool:
        """Whether it is a quantiser's code."""
        return "::code" in self.site

    @property
    def sentence(self) -> str:
        """Flip counts of this gate in one line."""
        if self.reason:
            return f"{self.site}: {self.reason}"
        apart = "" if self.operand_ratio is None else f", operands {self.operand_ratio:.1f}x their noise"
        flips = f"{self.flips:,} of {self.gates:,} changed ({self.unexplained:,} unexplained)"
        return f"{self.site} ({self.node}): same input, {flips}{apart}; running free, {self.free:,} changed"


@dataclass(frozen=True)
class OutputParity:
    """Parity of one output of the model, the worst over the samples.

    Attributes:
        name: name of the output.
        end_to_end: distance of the free-running artifact from PyTorch as given; for information.
        replay_error: relative L2 of the replay from the reference; decides.
        noise_floor: largest relative L2 between equally right runs of PyTorch with the same gates; for a half artifact,
            with every value rounded to its type.
        floor_measured: False if the floor is assumed because the reference could not be run in several ways.
    """

    name: str
    end_to_end: OutputMetrics
    replay_error: float
    noise_floor: float
    floor_measured: bool

    @property
    def replay_ratio(self) -> float:
        return self.replay_error / self.noise_floor


@dataclass(frozen=True)
class EngineParity:
    """Parity of an engine that ran; its link is named after its backend.

    Attributes:
        backend, version: ``tensorrt`` or ``tensorrt-rtx``, and the version of the library.
        artifact, artifact_sha256: name and SHA-256 of the engine.
        gpu: GPU that the engine ran on.
        srus: parity of each SRU, built alone and fed the reference's input; gates are decoded from its output.
        outputs: end-to-end error of each output of the whole engine.
        latency: latency of the engine; None if it was not timed.
        provenance: provenance of the device's report, if ``report merge`` added it.
        precision: as the command line names it; "" in a report of before it was kept.
    """

    backend: str
    version: str
    artifact: str
    artifact_sha256: str
    gpu: str
    srus: tuple[SRUParity, ...]
    outputs: tuple[EngineOutput, ...]
    latency: Latency | None = None
    provenance: dict[str, str] = field(default_factory=dict)
    precision: str = ""


@dataclass(frozen=True)
class ParityReport:
    """Verdict on one artifact and all its measurements; true if it passed.

    Attributes:
        model, artifact: names of the reference and of the artifact.
        artifact_sha256: SHA-256 of the artifact's bytes.
        links: links of the chain.
        samples: name and input shapes of each sample.
        provenance: versions, seed, device, command.
        layers: errors of intermediate tensors, in the graph's order.
        first_departure: first tensor beyond its tolerance, with its module; "" if there is none.
        worst_inputs: inputs with the largest errors, farthest first.
        accuracy: accuracy on labelled data; None without labels.
        overrides: tolerances that the user changed.
        tolerances: table of tolerances before the overrides.
        engines: measurements of engines that ran.
        other_gates: gates that belong to no known SRU.
        plans: memory traffic of the engines that were compiled, and of the baseline.
    """

    model: str
    artifact: str
    artifact_sha256: str
    links: tuple[Link, ...]
    srus: tuple[SRUParity, ...]
    outputs: tuple[OutputParity, ...]
    samples: tuple[str, ...]
    left_alone: tuple[Refusal, ...]
    provenance: dict[str, str]
    stages: tuple[StageRecord, ...] = ()
    layers: tuple[LayerError, ...] = ()
    first_departure: str = ""
    worst_inputs: tuple[WorstInput, ...] = ()
    accuracy: Accuracy | None = None
    overrides: dict[str, float] = field(default_factory=dict)
    tolerances: dict[str, Tolerance] = field(default_factory=lambda: table.ALL | table.FIXED)
    engines: tuple[EngineParity, ...] = ()
    other_gates: tuple[OtherGateParity, ...] = ()
    plans: tuple[PlanTraffic, ...] = ()

    @property
    def verdict(self) -> Status:
        statuses = {link.status for link in self.links}
        if "failed" in statuses or "passed" not in statuses or self._undecided:
            return "failed" if "failed" in statuses else "not run"
        return "passed"

    @property
    def _undecided(self) -> list[str]:
        """Reasons of the checks without a verdict."""
        return [f"{link.name}: {c.reason}" for link in self.links for c in link.checks if c.name in UNDECIDED]

    def __bool__(self) -> bool:
        return self.verdict == "passed"

    @property
    def failures(self) -> tuple[str, ...]:
        """Reasons of failed checks, each after its link's name; without a verdict, the reason for that."""
        if self.verdict == "not run":
            return tuple(self._undecided) or ("no link ran, so nothing is proved",)
        failed = [link for link in self.links if link.status == "failed"]
        return tuple(
            f"{link.name}: {reason}"
            for link in failed
            for reason in [c.reason for c in link.checks if c.status == "failed"] or [link.reason]
        )

    @property
    def headline(self) -> str:
        """Reason of the verdict in one line: the first failure, or the results of gates and replay."""
        if self.failures:
            more = f" (and {len(self.failures) - 1} more)" if len(self.failures) > 1 else ""
            return self.failures[0] + more
        counts = [sru.teacher_forced for sru in self.srus if sru.teacher_forced]
        parts = []
        if counts:
            parts.append(
                f"same input, gates changed: {sum(c.flips for c in counts):,} of {sum(c.gates for c in counts):,}"
            )
        if self.outputs:
            worst = max(self.outputs, key=lambda output: output.replay_ratio)
            parts.append(f"replay error {worst.replay_ratio:.1f}x the noise floor")
        passed = [check for link in self.links if link.status == "passed" for check in link.checks]
        if unproved := [check.name for check in passed if check.name in UNPROVED and check.status == "not run"]:
            parts.append(f"not proved: {', '.join(unproved)}")
        not_run = [link.name for link in self.links if link.status == "not run"]
        if not_run:
            parts.append(f"not run: {', '.join(not_run)}")
        return "; ".join(parts) or "nothing was measured"

    @property
    def caveats(self) -> tuple[str, ...]:
        """Reasons of checks that were not run in links that passed, each after its link's name."""
        return tuple(
            f"{link.name}: {c.reason}"
            for link in self.links
            for c in link.checks
            if link.status == "passed" and c.status == "not run"
        )

    def as_json(self) -> dict[str, Any]:
        """JSON values of the report; ``schema_version`` changes when a field changes its meaning."""
        document = {
            "schema_version": SCHEMA_VERSION,
            "verdict": self.verdict,
            "failures": list(self.failures),
            **encode(self),
        }
        for output, plain in zip(self.outputs, document["outputs"], strict=True):
            plain["replay_ratio"] = encode(output.replay_ratio)
        return document

    def as_bytes(self) -> bytes:
        """Content of ``report.json``."""
        return (json.dumps(self.as_json(), indent=2) + "\n").encode()
