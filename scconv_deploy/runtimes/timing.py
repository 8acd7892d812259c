"""Latency from single runs: percentiles of host and device times. Standard library and NumPy only."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from scconv_deploy.records.parity import Latency


def latency(seconds: Sequence[float], device_seconds: Sequence[float], shapes: Sequence[str] = ()) -> Latency:
    """Percentiles of timed runs; ``device_seconds`` is empty without a device."""
    p50, p90, p99 = (float(value) for value in np.percentile(np.array(seconds) * 1e3, (50, 90, 99)))
    on_device = float(np.median(device_seconds)) * 1e3 if len(device_seconds) else None
    return Latency(tuple(shapes), len(seconds), p50, p90, p99, float(np.mean(seconds)) * 1e3, on_device)


def measure(run: Callable[[], float | None], inputs: Mapping[str, np.ndarray], rounds: int, warmup: int) -> Latency:
    """Time runs of a function.

    Args:
        run: run once; returns seconds on the device, None without a device.
        inputs: inputs of the run, for their shapes.
        rounds, warmup: number of timed runs, and of runs before them.
    """
    seconds: list[float] = []
    device: list[float] = []
    for index in range(warmup + rounds):
        start = time.perf_counter()
        on_device = run()
        if index >= warmup:
            seconds.append(time.perf_counter() - start)
            device += [] if on_device is None else [on_device]
    shapes = [f"{name} {'x'.join(map(str, value.shape))}" for name, value in inputs.items()]
    return latency(seconds, device, shapes)
