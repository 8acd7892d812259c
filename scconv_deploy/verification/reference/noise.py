"""Noise of a PyTorch reference: the largest distance between equally right runs with the same gates.

One pair of runs is not enough: PyTorch's sum may be exact by luck (a mean over 512 channels was 17 times nearer to
float64 than ONNX Runtime's), and a reference of one number has no spread. So PyTorch's float32 run is compared with
four others, with its gates injected: float64, float32 in another order of summation, and float32 with every result
moved by up to a unit in its last place, twice (:mod:`.model.orders`). The noise of a value is the largest distance.

Cost: float64 runs every row, at 1.8 passes of PyTorch (:mod:`.model.float64`). If rows are independent, the others run
only the first rows (one of eight images of ScConv-ResNet-50, 16 images of CIFAR's size). All of them run for the first
two samples; later samples have one disturbed run.
"""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from scconv_deploy.errors import ModelError, first_line
from scconv_deploy.gate.other_gates import OtherGate, is_other
from scconv_deploy.model import steps
from scconv_deploy.model.float64 import Float64Replay, rows_of, rows_together
from scconv_deploy.model.orders import FollowsInputs, LastPlace, OtherOrder
from scconv_deploy.model.replay import RecordedGate, replay
from scconv_deploy.model.signature import Signature
from scconv_deploy.verification import metrics
from scconv_deploy.verification.detections import align_rows

_ELEMENTS_AT_ONCE = 2**18
FULL_SAMPLES = 2
_FEW_ELEMENTS = 256
"""A value of fewer elements can agree in all runs by luck: its noise is at least the usual one of earlier samples."""
_ANOTHER_FUNCTION = 64.0
"""Multiple of the other runs' distance beyond which float64 computes something else (an unknown step flipped)."""
_UNITS, _PROPORTIONAL = (1.0, 8.0, 64.0), (3.5, 20.0)
"""Disturbances in units in the last place, and the range of the ratio of distances for 8 times the disturbance. A
continuous model moves 8 times as far (half of it if the distance is little more than rounding), a stepping model 2.8
times (the number of steps grows with the noise, their distance with its root), a random model equally far, or any
multiple by luck."""
_DRAWS = (1, 2, 3)
"""Seeds of the runs whose mean distance is compared: a single draw of few numbers can be near or far by luck."""
_WORTH_A_LOOK = 1e-5
"""Noise above which the reference is tested for continuity."""

Value = tuple[str, str]
"""Key of a value: ("output", name), ("part", name) of an output's part, or ("site", name) for the input of an SRU."""


@dataclass(frozen=True)
class Floors:
    """Noise floors of one sample.

    Attributes:
        outputs: noise by output, see :func:`.metrics.distance`; None if no run could be compared.
        parts: noise of parts of outputs by name, see :func:`.metrics.parts`.
        sites: noise of the gates' inputs by site, relative L2.
        spread: factor by which equally right runs scatter (geometric standard deviation); 1 for one run.
        continuous: whether larger disturbances move the values in proportion; tested only if the noise is large.
        refusal: why float64 is not among the runs; "" if it is.
        others: gates of no known SRU, with the noise of their operands.
    """

    outputs: Mapping[str, float | None] = field(default_factory=dict)
    sites: Mapping[str, float] = field(default_factory=dict)
    spread: float = 1.0
    continuous: bool = False
    refusal: str = ""
    others: Mapping[str, OtherGate] = field(default_factory=dict)
    parts: Mapping[str, float] = field(default_factory=dict)


class NoiseRuns:
    """Measurement of the noise of a swapped model, sample by sample."""

    def __init__(self, swapped: nn.Module, signature: Signature, float64: Float64Replay) -> None:
        self._swapped, self._signature, self._float64 = swapped, signature, float64
        self._samples = 0
        self._earlier: dict[Value, list[float]] = defaultdict(list)

    def measure(
        self,
        tensors: Mapping[str, Tensor],
        outputs: Mapping[str, Tensor],
        gates: Mapping[str, RecordedGate],
        others: steps.Steps,
    ) -> Floors:
        """Measure the noise of one sample.

        Args:
            tensors: inputs by name.
            outputs: outputs of the float32 run.
            gates: gates of the float32 run by site.
            others: gates of no known SRU in the float32 run; their decisions are injected as well.
        """
        parts = metrics.parts_of({name: y.detach().numpy() for name, y in outputs.items()})
        exact, of_others, refusal = self._in_float64(tensors, outputs, gates, others, parts)
        masks, inputs = {n: g.mask for n, g in gates.items()}, {n: g.x for n, g in gates.items()}
        masks |= others.decided
        full = self._samples < FULL_SAMPLES
        self._samples += 1
        run, found = right_runs(
            Rows(tensors, outputs, masks, inputs, parts).tried(self._float64.rows_apart),
            lambda run: self._modes(run, full),
            self._distances,
        )
        apart = {
            value: [d for d in (exact.get(value),) if d is not None and not _another(d, found[value])] + found[value]
            for value in [*exact, *(v for v in found if v not in exact)]
        }
        floors = {value: max(ds) for value, ds in apart.items() if ds}
        if not full:
            few = [v for v in floors if run.size(v) < _FEW_ELEMENTS and self._earlier[v]]
            floors |= {v: max(floors[v], statistics.median(self._earlier[v])) for v in few}
        for value, floor in floors.items():
            self._earlier[value].append(floor)
        noisy = [v for v, floor in floors.items() if not floor <= _WORTH_A_LOOK and v in found and v[0] != "part"]
        return Floors(
            {name: floors.get(("output", name)) for name in outputs},
            of_kind("site", floors),
            spread_of(apart),
            bool(noisy) and self._is_continuous(run, noisy),
            refusal,
            of_others,
            of_kind("part", floors),
        )

    def _in_float64(
        self,
        tensors: Mapping[str, Tensor],
        outputs: Mapping[str, Tensor],
        gates: Mapping[str, RecordedGate],
        others: steps.Steps,
        parts: Mapping[str, metrics.Part],
    ) -> tuple[dict[Value, float], dict[str, OtherGate], str]:
        try:
            exact = self._float64.noise(tensors, outputs, gates, others)
        except (RuntimeError, ModelError) as error:  # the user's forward makes or needs float32 tensors
            return {}, others.gates({}, {}), f"the reference cannot run in float64: {first_line(error)}"
        found: dict[Value, float] = {("site", name): d for name, d in exact.at_gates.items() if name in gates}
        errors = {name: error**0.5 for name, (error, _) in exact.squares.items()}
        return found | outputs_apart(exact.outputs, outputs, parts), others.gates(exact.largest, errors), ""

    def _modes(self, run: Rows, full: bool) -> list[FollowsInputs]:
        inputs = run.followed
        if not full:
            return [LastPlace(inputs, self._samples)]
        return [OtherOrder(inputs, 0), LastPlace(inputs, 1), LastPlace(inputs, 2)]

    def _distances(self, run: Rows, mode: FollowsInputs) -> dict[Value, float]:
        """Distances of one run from the usual run, for all comparable values."""
        found: dict[Value, float] = {}

        def watch(site: str, x: Tensor) -> None:
            expected = run.inputs.get(site)  # None for a gate of no known SRU
            if expected is not None and x.shape == expected.shape:
                found["site", site] = metrics.relative_l2(x.detach().numpy(), expected.numpy())

        with mode:
            outputs = replay(self._swapped, self._signature, run.tensors, run.masks, watch)
        found |= outputs_apart(outputs, run.outputs, run.parts)
        return {value: d for value, d in found.items() if math.isfinite(d)}

    def _is_continuous(self, run: Rows, noisy: Iterable[Value]) -> bool:
        repeated = [replay(self._swapped, self._signature, run.tensors, run.masks) for _ in range(3)]
        if any(not torch.equal(y, repeated[0][name]) for other in repeated[1:] for name, y in other.items()):
            return False  # the model draws random numbers
        inputs, (low, high) = run.followed, _PROPORTIONAL
        try:
            moved = [
                _mean([self._distances(run, LastPlace(inputs, seed, units)) for seed in _DRAWS]) for units in _UNITS
            ]
        except (RuntimeError, ModelError):  # for example, another number of rows
            return False
        return all(
            low * less.get(value, math.inf) <= more.get(value, 0.0) <= high * less.get(value, 0.0)
            for value in noisy
            for less, more in pairwise(moved)
        )


def _mean(runs: Sequence[Mapping[Value, float]]) -> dict[Value, float]:
    """Mean distance of each value that all runs have."""
    return {value: statistics.mean(run[value] for run in runs) for value in runs[0] if all(value in r for r in runs)}


def disturbed_modules(
    tensors: Sequence[Tensor], record: Callable[[], Mapping[tuple[str, int], Tensor]]
) -> list[Mapping[tuple[str, int], Tensor]]:
    """Outputs of modules in disturbed runs, which are as right as the usual run.

    Args:
        tensors: tensors whose dependents are disturbed, see :func:`followed`.
        record: run the model and return the outputs.
    """
    runs = []
    for mode in (OtherOrder(tensors, 0), LastPlace(tensors, 1)):
        with mode:
            runs.append(record())
    return runs


def followed(tensors: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> list[Tensor]:
    """Tensors of a run with fixed gates whose dependents may be rounded otherwise.

    These are the inputs and the decisions of gates of no known SRU, from which a model may compute its outputs. The
    mask of an SRU is not needed: it is multiplied with data that depend on the inputs.
    """
    return [*tensors.values(), *(mask for name, mask in masks.items() if is_other(name))]


@dataclass(frozen=True, eq=False)
class Rows:
    """Rows of a float32 run: inputs, outputs, masks and gate inputs by name; parts of the outputs by name."""

    tensors: Mapping[str, Tensor]
    outputs: Mapping[str, Tensor]
    masks: Mapping[str, Tensor]
    inputs: Mapping[str, Tensor]
    parts: Mapping[str, metrics.Part] = field(default_factory=dict)

    def tried(self, rows_apart: bool) -> list[Rows]:
        """Row counts to try: first as many rows as fit into the cache, then all rows.

        Only all rows if rows may depend on one another. Independence was tested at one size and may fail at another.
        """
        if not rows_apart:
            return [self]
        few = rows_together([*self.tensors.values(), *self.masks.values()], [*self.outputs.values()], _ELEMENTS_AT_ONCE)
        tensors, outputs, masks, inputs = (
            rows_of(some, few[0]) for some in (self.tensors, self.outputs, self.masks, self.inputs)
        )
        return [Rows(tensors, outputs, masks, inputs, self.parts), self]

    @property
    def followed(self) -> list[Tensor]:
        return followed(self.tensors, self.masks)

    def size(self, value: Value) -> int:
        kind, name = value
        if kind == "part":
            part = self.parts[name]
            whole = self.outputs[part.output]
            return whole.numel() // whole.shape[part.axis] * len(part.indices)
        return (self.outputs if kind == "output" else self.inputs)[name].numel()


Mode = TypeVar("Mode", bound=FollowsInputs)


def right_runs(
    tried: Iterable[Rows],
    modes: Callable[[Rows], Iterable[Mode]],
    distances: Callable[[Rows, Mode], Mapping[Value, float]],
) -> tuple[Rows, dict[Value, list[float]]]:
    """Distances of runs in several modes, on the first row count that the model accepts.

    Runs that the model refuses are left out (a fixed batch size, another number of detections).
    """
    found: dict[Value, list[float]] = defaultdict(list)
    for run in tried:
        for mode in modes(run):
            try:
                apart = distances(run, mode)
            except (RuntimeError, ModelError):
                continue
            for value, distance in apart.items():
                found[value].append(distance)
        if found:
            break
    return run, found


def _another(d: float, others: list[float]) -> bool:
    return bool(others) and d > _ANOTHER_FUNCTION * max(*others, 2.0**-24)


def outputs_apart(
    found: Mapping[str, Tensor], usual: Mapping[str, Tensor], parts: Mapping[str, metrics.Part] | None = None
) -> dict[Value, float]:
    """Distances of the outputs, and of parts of them, from those of the usual run; empty if a shape differs."""
    single = {name: tensor.detach().numpy() for name, tensor in usual.items()}
    ruler = {name: tensor.detach().numpy() for name, tensor in found.items()}
    if any(ruler[name].shape != value.shape for name, value in single.items()):  # of detections, for example
        return {}
    ruler = align_rows(ruler, single)
    whole = {("output", name): metrics.distance(value, ruler[name]) for name, value in single.items()}
    return whole | {
        ("part", name): metrics.relative_l2(part.of(ruler[part.output]), part.of(single[part.output]))
        for name, part in (parts or {}).items()
    }


def of_kind(kind: str, floors: Mapping[Value, float]) -> dict[str, float]:
    """Floors of the values of one kind by their names."""
    return {name: floor for (of, name), floor in floors.items() if of == kind}


def spread_of(runs: Mapping[Value, list[float]]) -> float:
    """Geometric standard deviation of the distances of one value, over all values but parts of outputs."""
    squares, count = 0.0, 0
    for distances in (found for (kind, _), found in runs.items() if kind != "part"):
        logs = [math.log(d) for d in distances if 0 < d < math.inf]
        if len(logs) > 1:
            squares += float(np.var(logs)) * len(logs)
            count += len(logs) - 1
    return math.exp(math.sqrt(squares / count)) if count else 1.0
