"""The parity report and its parts: frozen records that ``report.json`` holds."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from scconv_deploy.records import tolerances as table
from scconv_deploy.records.codec import encode
from scconv_deploy.records.engine import EngineOutput, Latency
from scconv_deploy.records.gates import FlipCount, Refusal
from scconv_deploy.records.metrics import OutputMetrics
from scconv_deploy.records.stage import StageRecord
from scconv_deploy.records.tolerances import Tolerance

SCHEMA_VERSION = 1


Status = Literal["passed", "failed", "not run"]
UNDECIDED = frozenset({"jumps", "quantization"})
"""Checks that are neither right nor wrong: a link with one of them, and its report, has not passed."""


@dataclass(frozen=True)
class Quantity:
    """A measured number and its limit, kept so that a stored report can be judged again.

    Attributes:
        tolerance: name of the limit in the table of tolerances.
        value: what was measured, in the tolerance's unit.
        limit: what it may be at most.
    """

    tolerance: str
    value: float
    limit: float

    @property
    def within(self) -> bool:
        """Whether the value is within the limit; NaN is not."""
        return self.value <= self.limit


@dataclass(frozen=True)
class Check:
    """One check of a link: its name, its status and the reason.

    Attributes:
        quantities: the numbers that decided; empty where the answer does not rest on a limit.
    """

    name: str
    status: Status
    reason: str
    quantities: tuple[Quantity, ...] = ()


@dataclass(frozen=True)
class Link:
    """One step of the chain from PyTorch to the artifact.

    ``failed`` as soon as a check failed; ``not run`` if none ran, or if what differs could not be judged, with the
    reason.
    """

    name: str
    status: Status
    reason: str
    checks: tuple[Check, ...] = ()

    @classmethod
    def of(cls, name: str, checks: Sequence[Check]) -> Link:
        """A link with the status that its checks give it."""
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
    """Log-spaced bins of ``|margin| / s`` of the reference's gates.

    Attributes:
        edges: n + 1 of them; the first bin also holds everything below, the last everything above.
        counts: n of them.
    """

    edges: tuple[float, ...]
    counts: tuple[int, ...]


@dataclass(frozen=True)
class FreeRunning:
    """Flips of the free-running artifact against the reference.

    Attributes:
        gates, flips: how many were compared, how many differ in a well-conditioned group.
        unexplained: flips whose margin lies beyond the measured error of the gate's input there and the rounding
            bound.
        channels: how many channels hold a flip, the most over the samples.
        ill_conditioned: differing gates in groups with ``s < 1e-6 * |mean|``; not judged.
    """

    gates: int
    flips: int
    unexplained: int
    channels: int = 0
    ill_conditioned: int = 0


@dataclass(frozen=True)
class LayerError:
    """Error of one tensor that both sides have, with the reference's gates on both sides.

    Attributes:
        name: the ONNX value.
        module: path of the module in the PyTorch model, "" if unknown.
        relative_l2: of the artifact against the reference, the worst over the samples.
        floor: noise of the reference at the same place, relative L2.
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
    """An input on which the free-running artifact is farthest from PyTorch; ``index`` counts in the sample's batch."""

    sample: str
    index: int
    relative_l2: float


@dataclass(frozen=True)
class Accuracy:
    """Top-1 accuracy on labelled data, and a paired interval for its difference (artifact - reference)."""

    samples: int
    reference: float
    artifact: float
    difference: float
    low: float
    high: float
    confidence: float


@dataclass(frozen=True)
class SRUParity:
    """Parity of one SRU, summed over the samples.

    Attributes:
        site: its node, named after its module (``#2`` for a second call).
        variant: what it computes.
        static: whether parameters, attributes and function body are bit for bit what the reference gives.
        swapped: flips between the module as given and its variant, both in PyTorch.
        teacher_forced: flips between the artifact's SRU and the reference, fed the same input.
        open_share: share of gates that are open in the reference.
        free_running: flips between the artifact running free and the reference.
        margins: of the reference's gates.
        jump: the largest change of the SRU's output that one flipped gate made, in units of the rms of its data.
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
        """The variant without its numbers, and the order of its sum of gamma where that is not Python's."""
        name = self.variant.split(" ")[0]
        return f"{name} (torch.sum)" if self.variant.endswith(", torch.sum)") else name


@dataclass(frozen=True)
class OtherGateParity:
    """Parity of one gate of no known SRU (a comparison, a rounding), summed over the samples.

    Attributes:
        site: its module and what it computes, ``features.2::ge``.
        node: that decides it in the artifact, "" if none was found; ``reason`` why.
        gates, flips, unexplained: of its decisions, on the same input as the reference's.
        free: how many differ running free.
        operand_ratio: relative L2 of what it decides from, in multiples of its noise; None where the artifact decides
            from something else.
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
    def sentence(self) -> str:
        """The flips of this gate in one line."""
        if self.reason:
            return f"{self.site}: {self.reason}"
        apart = "" if self.operand_ratio is None else f", operands {self.operand_ratio:.1f}x their noise"
        flips = f"{self.flips:,} of {self.gates:,} changed ({self.unexplained:,} unexplained)"
        return f"{self.site} ({self.node}): same input, {flips}{apart}; running free, {self.free:,} changed"


@dataclass(frozen=True)
class OutputParity:
    """Parity of one output of the model, the worst over the samples.

    Attributes:
        name: of the output.
        end_to_end: the artifact as it is against PyTorch as given; informs.
        replay_error: relative L2 of the artifact with the reference's gates against the reference; decides.
        noise_floor: relative L2 of PyTorch's right runs with the same gates from each other, the farthest; of a half
            artifact with every value rounded to its type.
        floor_measured: False where the reference could not be run in several ways and a floor was assumed.
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
    """Parity of an engine that ran; its link has its backend's name.

    Attributes:
        backend: ``tensorrt`` or ``tensorrt-rtx``, and the library's version.
        artifact, artifact_sha256: the engine.
        gpu: that it ran on.
        srus: each SRU built alone and fed the reference's input, gates decoded from its output.
        outputs: of the whole engine.
        latency: where it was timed.
        provenance: of the device's own report, where ``report merge`` brought it home.
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


@dataclass(frozen=True)
class ParityReport:
    """The verdict on one artifact and everything it rests on; its truth value is the verdict.

    Attributes:
        model, artifact: what was compared; ``artifact_sha256`` of the file's bytes.
        links: the chain.
        samples: name and input shapes of what was run.
        provenance: versions, seed, device, command.
        layers: error layer by layer, in the graph's order.
        first_departure: the first tensor that leaves its tolerance, with its module; "" if none does.
        worst_inputs: farthest first.
        accuracy: where the data had labels.
        overrides: tolerances that the user changed.
        tolerances: the table that it was judged by, before the overrides.
        engines: what was measured of engines that ran.
        other_gates: gates of no known SRU.
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

    @property
    def verdict(self) -> Status:
        statuses = {link.status for link in self.links}
        if "failed" in statuses or "passed" not in statuses or self._undecided:
            return "failed" if "failed" in statuses else "not run"
        return "passed"

    @property
    def _undecided(self) -> list[str]:
        """Reasons of checks that found neither right nor wrong."""
        return [f"{link.name}: {c.reason}" for link in self.links for c in link.checks if c.name in UNDECIDED]

    def __bool__(self) -> bool:
        return self.verdict == "passed"

    @property
    def failures(self) -> tuple[str, ...]:
        """Failures, the link's name first: each failed check, or the link's own reason; or that nothing ran."""
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
        """The reason of the verdict in one line: the first failure, or the results of gates and replay."""
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
        not_run = [link.name for link in self.links if link.status == "not run"]
        if not_run:
            parts.append(f"not run: {', '.join(not_run)}")
        return "; ".join(parts) or "nothing was measured"

    @property
    def caveats(self) -> tuple[str, ...]:
        """Checks of passed links that were not run, the link's name first."""
        return tuple(
            f"{link.name}: {c.reason}"
            for link in self.links
            for c in link.checks
            if link.status == "passed" and c.status == "not run"
        )

    def as_json(self) -> dict[str, Any]:
        """The report as JSON values; ``schema_version`` changes when a field changes its meaning."""
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
        """The bytes of ``report.json``."""
        return (json.dumps(self.as_json(), indent=2) + "\n").encode()
