"""Latency and output errors of an engine."""

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
