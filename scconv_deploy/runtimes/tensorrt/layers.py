"""Times of an engine's layers, as TensorRT's profiler reports them."""

from __future__ import annotations

from types import ModuleType
from typing import Any


def layer_profiler(module: ModuleType, reported: list[tuple[str, str, float]]) -> Any:
    """Make an ``IProfiler`` of the module that appends name, "" and milliseconds of each layer; it must not raise.

    A context calls it at the end of each run. Keep it as long as the context.
    """

    class Profiler(module.IProfiler):  # type: ignore[name-defined]
        def __init__(self) -> None:
            module.IProfiler.__init__(self)

        def report_layer_time(self, layer_name: str, ms: float) -> None:
            reported.append((layer_name, "", ms))

    return Profiler()
