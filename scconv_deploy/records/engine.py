"""Latency, output errors and memory traffic of an engine."""

from __future__ import annotations

from dataclasses import dataclass

from scconv_deploy.records.metrics import OutputMetrics


@dataclass(frozen=True)
class Latency:
    """Latency of one run of an artifact, without copies to and from the device.

    Attributes:
        shapes: name and shape of each input, as text.
        rounds: number of timed runs.
        p50_ms, p90_ms, p99_ms, mean_ms: wall clock.
        device_p50_ms: time between two events on the stream; None without a device.
    """

    shapes: tuple[str, ...]
    rounds: int
    p50_ms: float
    p90_ms: float
    p99_ms: float
    mean_ms: float
    device_p50_ms: float | None = None

    def __str__(self) -> str:
        device = "" if self.device_p50_ms is None else f", on the device p50 {self.device_p50_ms:.3f} ms"
        times = f"p50 {self.p50_ms:.3f} ms, p90 {self.p90_ms:.3f} ms, p99 {self.p99_ms:.3f} ms{device}"
        return f"{times} ({self.rounds} runs, {', '.join(self.shapes)})"


@dataclass(frozen=True)
class EngineOutput:
    """End-to-end error of one engine output, the worst over the samples.

    Attributes:
        name: name of the output.
        metrics: distance of the free-running engine from PyTorch as given.
        noise: change of this output that explained flips cause in the reference, relative L2.
        noise_measured: False if the noise is assumed because the reference could not be disturbed.
    """

    name: str
    metrics: OutputMetrics
    noise: float
    noise_measured: bool


@dataclass(frozen=True)
class PlanTraffic:
    """Memory traffic of a compiled plan: inputs and outputs of its kernels, weights not counted.

    Attributes:
        name: file of the engine, or name of the baseline.
        backend: library that compiled it.
        baseline: True for the network that the others are compared with.
        batch: what an open batch axis counts as; None if no axis is open.
        bytes_moved: of all kernels, in one pass; None if an open axis hides those of one.
        launches: number of kernels.
        kernels: bytes of each kernel, in the order of the launches.
        srus: positions in ``kernels`` of those that compute an SRU.
    """

    name: str
    backend: str
    baseline: bool
    batch: int | None
    bytes_moved: int | None
    launches: int
    kernels: tuple[int | None, ...]
    srus: tuple[int, ...]

    def __str__(self) -> str:
        if self.bytes_moved is None:
            return f"{self.launches} kernels, whose bytes open axes hide"
        at = "" if self.batch is None else f" at batch {self.batch}"
        return f"{self.bytes_moved / 1e6:.1f} MB{at} in {self.launches} kernels"
