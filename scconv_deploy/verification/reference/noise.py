"""The noise of a reference: how far apart runs of it are that are all right, with the same gates.

One pair of runs says little: PyTorch's own sum may be exact by luck (a mean over 512 channels was 17 times nearer to
float64 than ONNX Runtime's), and a reference of one number has no spread. So several runs are held against PyTorch's
float32 with its gates put in: float64, float32 in another order of summation, and float32 whose every result moves by
up to a unit in its last place, twice (:mod:`.model.orders`). The noise of a value is the farthest of them.

What it costs: float64 runs every row, 1.8 passes of PyTorch (:mod:`.model.float64`). The others run the first rows
alone where rows are independent (one of eight images of ScConv-ResNet-50, 16 of a network on CIFAR's), and only for the
first two samples; later samples are disturbed once.
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
"""A value of fewer elements can be near in every run by luck; it takes at least the usual noise of earlier samples."""
_ANOTHER_FUNCTION = 64.0
"""Times the other runs: beyond it float64 computes something else (a step that no one knows fell otherwise)."""
_UNITS, _PROPORTIONAL = (1.0, 8.0, 64.0), (3.5, 20.0)
"""Noise of eight times as many units moves what is continuous eight times as far (half of it where it is hardly more
than rounding itself), what steps 2.8 times (the number of steps grows with the noise, their distance with its root),
and what is random as far, or by luck any times."""
_DRAWS = (1, 2, 3)
"""Seeds of the runs whose mean is compared: few numbers that cancel are near in one draw and far in the next."""
_WORTH_A_LOOK = 1e-5
"""Noise from which it is tried out whether the reference is continuous."""

Value = tuple[str, str]
"""What is compared: ("output", name) or ("site", name of the SRU whose input it is)."""


@dataclass(frozen=True)
class Floors:
    """Noise of a run.

    Attributes:
        outputs: by name, see :func:`.metrics.distance`; None where no run could be compared.
        sites: of the inputs of gates, by site.
        spread: by which factor the right runs of one value scatter (geometric standard deviation); 1 for one run.
        continuous: whether larger disturbances move the values proportionally; tried only where the noise is large.
        refusal: why float64 is not among the runs.
        others: gates of no known SRU, with the noise of what they decide from.
    """

    outputs: Mapping[str, float | None] = field(default_factory=dict)
    sites: Mapping[str, float] = field(default_factory=dict)
    spread: float = 1.0
    continuous: bool = False
    refusal: str = ""
    others: Mapping[str, OtherGate] = field(default_factory=dict)


class NoiseRuns:
    """Measures the noise of a swapped model, sample by sample."""

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
        """Noise of one sample.

        Args:
            tensors: the inputs by name.
            outputs: of the float32 run.
            gates: of it, by site.
            others: of it, gates of no SRU; their decisions are put into every run too.
        """
        exact, of_others, refusal = self._in_float64(tensors, outputs, gates, others)
        masks, inputs = {n: g.mask for n, g in gates.items()}, {n: g.x for n, g in gates.items()}
        masks |= others.decided
        full = self._samples < FULL_SAMPLES
        self._samples += 1
        run, found = right_runs(
            Rows(tensors, outputs, masks, inputs).tried(self._float64.rows_apart),
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
        noisy = [value for value, floor in floors.items() if not floor <= _WORTH_A_LOOK and value in found]
        return Floors(
            {name: floors.get(("output", name)) for name in outputs},
            {name: floor for (kind, name), floor in floors.items() if kind == "site"},
            spread_of(apart.values()),
            bool(noisy) and self._is_continuous(run, noisy),
            refusal,
            of_others,
        )

    def _in_float64(
        self,
        tensors: Mapping[str, Tensor],
        outputs: Mapping[str, Tensor],
        gates: Mapping[str, RecordedGate],
        others: steps.Steps,
    ) -> tuple[dict[Value, float], dict[str, OtherGate], str]:
        try:
            exact = self._float64.noise(tensors, outputs, gates, others)
        except (RuntimeError, ModelError) as error:  # the user's forward makes, or wants, float32 tensors
            return {}, others.gates({}, {}), f"the reference cannot run in float64: {first_line(error)}"
        found: dict[Value, float] = {("site", name): d for name, d in exact.at_gates.items() if name in gates}
        errors = {name: error**0.5 for name, (error, _) in exact.squares.items()}
        return found | outputs_apart(exact.outputs, outputs), others.gates(exact.largest, errors), ""

    def _modes(self, run: Rows, full: bool) -> list[FollowsInputs]:
        inputs = run.followed
        if not full:
            return [LastPlace(inputs, self._samples)]
        return [OtherOrder(inputs, 0), LastPlace(inputs, 1), LastPlace(inputs, 2)]

    def _distances(self, run: Rows, mode: FollowsInputs) -> dict[Value, float]:
        """Of one right run from the usual one; of what can be compared."""
        found: dict[Value, float] = {}

        def watch(site: str, x: Tensor) -> None:
            expected = run.inputs.get(site)  # none of a gate of no SRU
            if expected is not None and x.shape == expected.shape:
                found["site", site] = metrics.relative_l2(x.detach().numpy(), expected.numpy())

        with mode:
            outputs = replay(self._swapped, self._signature, run.tensors, run.masks, watch)
        found |= outputs_apart(outputs, run.outputs)
        return {value: d for value, d in found.items() if math.isfinite(d)}

    def _is_continuous(self, run: Rows, noisy: Iterable[Value]) -> bool:
        repeated = [replay(self._swapped, self._signature, run.tensors, run.masks) for _ in range(3)]
        if any(not torch.equal(y, repeated[0][name]) for other in repeated[1:] for name, y in other.items()):
            return False  # it draws numbers
        inputs, (low, high) = run.followed, _PROPORTIONAL
        try:
            moved = [
                _mean([self._distances(run, LastPlace(inputs, seed, units)) for seed in _DRAWS]) for units in _UNITS
            ]
        except (RuntimeError, ModelError):  # it came to another number of rows, say
            return False
        return all(
            low * less.get(value, math.inf) <= more.get(value, 0.0) <= high * less.get(value, 0.0)
            for value in noisy
            for less, more in pairwise(moved)
        )


def _mean(runs: Sequence[Mapping[Value, float]]) -> dict[Value, float]:
    """The mean distance of each value that every run has."""
    return {value: statistics.mean(run[value] for run in runs) for value in runs[0] if all(value in r for r in runs)}


def disturbed_modules(
    tensors: Sequence[Tensor], record: Callable[[], Mapping[tuple[str, int], Tensor]]
) -> list[Mapping[tuple[str, int], Tensor]]:
    """Outputs of modules in runs that are as right as the usual one.

    Args:
        tensors: :func:`followed` in the run.
        record: runs it and gives the outputs.
    """
    runs = []
    for mode in (OtherOrder(tensors, 0), LastPlace(tensors, 1)):
        with mode:
            runs.append(record())
    return runs


def followed(tensors: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> list[Tensor]:
    """The inputs of a run with fixed gates: what follows from any of them may be rounded otherwise.

    Beside the inputs these are the decisions of gates of no SRU, from which a model may compute all that it gives out;
    an SRU's mask is multiplied with its own data.
    """
    return [*tensors.values(), *(mask for name, mask in masks.items() if is_other(name))]


@dataclass(frozen=True, eq=False)
class Rows:
    """Rows of a float32 run: inputs, outputs, gates and their inputs by name."""

    tensors: Mapping[str, Tensor]
    outputs: Mapping[str, Tensor]
    masks: Mapping[str, Tensor]
    inputs: Mapping[str, Tensor]

    def tried(self, rows_apart: bool) -> list[Rows]:
        """The first rows, as many as fit together into the cache, and all of them.

        All of them alone where rows may depend on one another; that they do not was seen at one size, and may not hold
        at another.
        """
        if not rows_apart:
            return [self]
        few = rows_together([*self.tensors.values(), *self.masks.values()], [*self.outputs.values()], _ELEMENTS_AT_ONCE)
        parts = (self.tensors, self.outputs, self.masks, self.inputs)
        return [Rows(*(rows_of(part, few[0]) for part in parts)), self]

    @property
    def followed(self) -> list[Tensor]:
        return followed(self.tensors, self.masks)

    def size(self, value: Value) -> int:
        kind, name = value
        return (self.outputs if kind == "output" else self.inputs)[name].numel()


Mode = TypeVar("Mode", bound=FollowsInputs)


def right_runs(
    tried: Iterable[Rows],
    modes: Callable[[Rows], Iterable[Mode]],
    distances: Callable[[Rows, Mode], Mapping[Value, float]],
) -> tuple[Rows, dict[Value, list[float]]]:
    """Distances of runs in several modes, on the first rows that the model takes.

    Runs that it refuses are left out: rows that do not fit its code, another number of detections.
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


def outputs_apart(found: Mapping[str, Tensor], usual: Mapping[str, Tensor]) -> dict[Value, float]:
    """Distances of the outputs that have the usual shapes."""
    single = {name: tensor.detach().numpy() for name, tensor in usual.items()}
    ruler = {name: tensor.detach().numpy() for name, tensor in found.items()}
    if any(ruler[name].shape != value.shape for name, value in single.items()):  # of detections, say
        return {}
    ruler = align_rows(ruler, single)
    return {("output", name): metrics.distance(value, ruler[name]) for name, value in single.items()}


def spread_of(runs: Iterable[list[float]]) -> float:
    """By which factor the distances of one value scatter, over all values: a geometric standard deviation."""
    squares, count = 0.0, 0
    for distances in runs:
        logs = [math.log(d) for d in distances if 0 < d < math.inf]
        if len(logs) > 1:
            squares += float(np.var(logs)) * len(logs)
            count += len(logs) - 1
    return math.exp(math.sqrt(squares / count)) if count else 1.0
