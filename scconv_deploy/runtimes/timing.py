"""Latency from single runs, and times of layers: percentiles. Standard library and NumPy only."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from scconv_deploy.records.parity import Latency


@dataclass(frozen=True)
class LayerTime:
    """Time of one layer in a run under a profiler.

    Attributes:
        name: in the runtime's words, after fusion.
        kind: operator; "" if the runtime does not say.
        p50_ms: median over the runs.
        share: of the sum of all medians.
    """

    name: str
    kind: str
    p50_ms: float
    share: float


def layer_times(runs: Sequence[Iterable[tuple[str, str, float]]]) -> tuple[LayerTime, ...]:
    """Medians of layers over runs, the longest first.

    Args:
        runs: name, kind and milliseconds of each layer, run by run; a layer that is named twice in a run counts as the
            sum, one that is missing in a run as 0.
    """
    found: defaultdict[tuple[str, str], np.ndarray] = defaultdict(lambda: np.zeros(len(runs)))
    for index, layers in enumerate(runs):
        for name, kind, milliseconds in layers:
            found[name, kind][index] += milliseconds
    medians = {key: float(np.median(values)) for key, values in found.items()}
    total = sum(medians.values()) or 1.0
    ordered = sorted(medians.items(), key=lambda item: -item[1])
    return tuple(LayerTime(name, kind, p50, p50 / total) for (name, kind), p50 in ordered)


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
