"""What the stages leave behind: frozen records that end in ``report.json``."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from scconv_deploy.gate import FlipCount, Refusal
from scconv_deploy.verification import tolerances
from scconv_deploy.verification.compare import OutputMetrics

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class StageRecord:
    """One stage of the pipeline.

    Attributes:
        name: of the stage.
        seconds: wall clock.
        applied: what it did, one line each.
        skipped: (candidate, reason) of everything that it left alone.
    """

    name: str
    seconds: float
    applied: tuple[str, ...] = ()
    skipped: tuple[tuple[str, str], ...] = ()


@dataclass
class StageLog:
    """Collects the records of one run, in order."""

    records: list[StageRecord] = field(default_factory=list)

    @contextmanager
    def stage(self, name: str) -> Iterator[OpenStage]:
        """Time a stage; what is noted on the yielded object goes into its record."""
        opened = OpenStage()
        start = time.perf_counter()
        try:
            yield opened
        finally:
            self.records.append(
                StageRecord(name, time.perf_counter() - start, tuple(opened.applied), tuple(opened.skipped))
            )


@dataclass
class OpenStage:
    """What a stage notes while it runs."""

    applied: list[str] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)


Status = Literal["passed", "failed", "not run"]


@dataclass(frozen=True)
class Check:
    """One question that was asked of a link, its answer and why."""

    name: str
    status: Status
    reason: str


@dataclass(frozen=True)
class Link:
    """One step of the chain from PyTorch to the artifact.

    ``failed`` as soon as a check failed; ``not run`` if none ran, with the reason.
    """

    name: str
    status: Status
    reason: str
    checks: tuple[Check, ...] = ()

    @classmethod
    def of(cls, name: str, checks: Sequence[Check]) -> Link:
        """Judge a link by its checks."""
        for status in ("failed", "passed"):
            having = [c for c in checks if c.status == status]
            if having:
                reasons = "; ".join(c.reason for c in having)
                return cls(name, status, reasons, tuple(checks))
        return cls(name, "not run", "; ".join(c.reason for c in checks), tuple(checks))


@dataclass(frozen=True)
class SRUParity:
    """One SRU, summed over the samples.

    Attributes:
        site: its node, named after its module (``#2`` for a second call).
        variant: what it computes.
        static: whether parameters, attributes and function body are bit for bit what the reference gives.
        swapped: flips between the module as given and its variant, both in PyTorch.
        teacher_forced: flips between the artifact's SRU and the reference, fed the same input.
        open_share: share of gates that are open in the reference.
    """

    site: str
    variant: str
    static: Check
    swapped: FlipCount
    teacher_forced: FlipCount | None
    open_share: float


@dataclass(frozen=True)
class OutputParity:
    """One output of the model, the worst over the samples.

    Attributes:
        name: of the output.
        end_to_end: the artifact as it is against PyTorch as given; informs.
        replay_error: relative L2 of the artifact with the reference's gates against the reference; decides.
        noise_floor: relative L2 of PyTorch float32 against float64 with the same gates.
        floor_measured: False where the reference cannot run in float64 and a floor was assumed.
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
class ParityReport:
    """The verdict on one artifact and everything it rests on; its truth value is the verdict.

    Attributes:
        model, artifact: what was compared; ``artifact_sha256`` of the file's bytes.
        links: the chain.
        samples: name and input shapes of what was run.
        provenance: versions, seed, device, command.
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

    @property
    def verdict(self) -> Literal["passed", "failed"]:
        return "failed" if any(link.status == "failed" for link in self.links) else "passed"

    def __bool__(self) -> bool:
        return self.verdict == "passed"

    @property
    def failures(self) -> tuple[str, ...]:
        """Each failed check, the link's name first."""
        return tuple(f"{link.name}: {c.reason}" for link in self.links for c in link.checks if c.status == "failed")

    @property
    def caveats(self) -> tuple[str, ...]:
        """What a link that passed did not look at, the link's name first."""
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
            **asdict(self),
            "tolerances": {name: asdict(tolerance) for name, tolerance in tolerances.ALL.items()},
        }
        for output, plain in zip(self.outputs, document["outputs"], strict=True):
            plain["replay_ratio"] = output.replay_ratio
        return _finite(document)


def _finite(value: Any) -> Any:
    """JSON has no NaN or Infinity: they become strings."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    return value
