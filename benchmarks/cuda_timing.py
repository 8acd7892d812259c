"""Seconds of a call on a GPU: CUDA graphs of many calls, over inputs that exceed the L2 together, variants in turns."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

Call = Callable[[Tensor], Tensor]
_CALLS, _MAX_INPUT_BYTES, _MAX_INPUTS = 20, 4 << 30, 256


class GraphTimer:
    """Times calls; one that fails is reported and left out, so that a missing compiler does not end a run.

    Args:
        rounds: how often every variant runs, in a new seeded order each time.
    """

    def __init__(self, rounds: int) -> None:
        self.rounds = rounds
        self.l2_bytes = torch.cuda.get_device_properties(0).L2_cache_size

    def measure(self, calls: Mapping[str, Call], x: Tensor) -> tuple[dict[str, list[float]], dict[str, str]]:
        """Seconds per call of each variant by round, and what went wrong with the others."""
        data = [x, *(x.clone() for _ in range(self.inputs(x) - 1))]
        graphs, errors = {}, {}
        for name, call in calls.items():
            try:
                graphs[name] = _graph(call, data)
            except Exception as error:  # whatever torch.compile raises where its compiler is missing
                if not usable():
                    raise
                errors[name] = (str(error).strip().splitlines() or [type(error).__name__])[0]
        seconds: dict[str, list[float]] = {name: [] for name in graphs}
        order, shuffle = list(graphs), random.Random(0).shuffle
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        for _ in range(self.rounds):
            shuffle(order)
            for name in order:
                graph, count = graphs[name]
                graph.replay()  # so that the clock and the caches are this variant's own
                start.record()
                graph.replay()
                end.record()
                end.synchronize()
                seconds[name].append(start.elapsed_time(end) / 1e3 / count)
        return seconds, errors

    def inputs(self, x: Tensor) -> int:
        """How many inputs of x's size make a call miss the L2."""
        size = x.numel() * x.element_size()
        if 2 * size > 4 * self.l2_bytes:
            return 1
        return max(1, min(math.ceil(4 * self.l2_bytes / size), _MAX_INPUT_BYTES // size, _MAX_INPUTS))


def usable() -> bool:
    """Whether the device still answers; after an illegal access every later call fails."""
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True


def _graph(call: Call, data: list[Tensor]) -> tuple[torch.cuda.CUDAGraph, int]:
    """Calls over all inputs, at least 20, captured in a graph of their own memory."""
    repeats = math.ceil(_CALLS / len(data))
    with torch.inference_mode():
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                call(data[0])
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(repeats):
                for each in data:
                    call(each)
    return graph, repeats * len(data)
