"""Costs of quantised models against their float model, on rows of data.

All models run in ONNX Runtime without optimisation, because its integer kernels add in 16 bits on some CPUs, and
saturate. The float model runs once for all of them.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import onnx

from scconv_deploy.errors import ModelError, UsageError
from scconv_deploy.graph import instrument
from scconv_deploy.records.sensitivity import Cost
from scconv_deploy.records.stage import Progress
from scconv_deploy.runtimes.half import runner_of
from scconv_deploy.runtimes.onnxruntime import RuntimeOptions
from scconv_deploy.verification.accuracy import PairedMetric
from scconv_deploy.verification.checks.answers import check_classes
from scconv_deploy.verification.metrics import error_and_signal, looks_like_logits, snr_db
from scconv_deploy.verification.reference.onnx_file import NamedArrays
from scconv_deploy.verification.reference.run import Arrays

_CHUNK_BYTES = 2**28
"""Inputs and float results that are held at a time. Where the data have more, models are loaded once for each chunk."""
_PLAIN = RuntimeOptions(optimization="none")


@dataclass(frozen=True, eq=False)
class _Expected:
    """Results of the float model for one batch.

    Attributes:
        rows: number of rows that count, the first ones.
        outputs: floating outputs by name, of these rows.
        answers: all outputs by name, of these rows.
        gates: by site, number of gates of these rows, and their decisions as bits.
    """

    batch: NamedArrays
    rows: int
    outputs: Arrays
    answers: Arrays
    gates: Mapping[str, tuple[int, np.ndarray]]

    @property
    def logits(self) -> str | None:
        """Name of the first output that looks like logits."""
        return next((name for name, value in self.outputs.items() if looks_like_logits(value)), None)

    @property
    def held_bytes(self) -> int:
        arrays = (*self.batch.inputs.values(), *self.answers.values(), *(bits for _, bits in self.gates.values()))
        return sum(array.nbytes for array in arrays)


class CostMeter:
    """Measures models against a float model.

    Args:
        proto: float model.
        batches: reads the data, each time anew.
    """

    def __init__(
        self, proto: onnx.ModelProto, batches: Callable[[], Iterator[NamedArrays]], progress: Progress
    ) -> None:
        self._proto, self._batches, self._progress = proto, batches, progress
        self._only_chunk: list[_Expected] | None = None

    def measure(self, models: Mapping[str, Callable[[], onnx.ModelProto]]) -> dict[str, Cost]:
        """Measure models, each made when it is needed; their inputs and outputs are the float model's.

        Raises:
            ModelError: ONNX Runtime refuses a model, or an output of the float model is NaN.
            UsageError: the data cannot be read, a label is no class, or no output is floating.
        """
        tallies = {name: _Tally() for name in models}
        for chunk in self._chunks():
            for number, (name, make) in enumerate(models.items(), 1):
                with runner_of(_exposed(make()), _PLAIN) as runner:
                    for one in chunk:
                        self._progress(f"{name} on {one.batch.name} ({number} of {len(models)})")
                        tallies[name].add(one, _results(one.batch, runner.run(one.batch.inputs)))
        return {name: tally.cost() for name, tally in tallies.items()}

    def _chunks(self) -> Iterator[list[_Expected]]:
        """Yield the data with the float model's results; they are kept where one chunk holds all."""
        if self._only_chunk is not None:
            yield self._only_chunk
            return
        chunk: list[_Expected] = []
        held, several = 0, False
        with runner_of(_exposed(self._proto), _PLAIN) as runner:
            for batch in self._batches():
                self._progress(f"the float model on {batch.name}")
                chunk.append(_results(batch, runner.run(batch.inputs)))
                _check(chunk[-1])
                held += chunk[-1].held_bytes
                if held > _CHUNK_BYTES:
                    yield chunk
                    chunk, held, several = [], 0, True
        if not several:
            self._only_chunk = chunk
        if chunk:
            yield chunk


def _exposed(proto: onnx.ModelProto) -> onnx.ModelProto:
    """A copy with the gates of its SRUs as outputs, without their inputs, which are large."""
    sites = list(instrument.sites(proto))
    copy = instrument.expose_gates(proto, sites)
    inputs = {instrument.gate_input(site) for site in sites}
    kept = [value for value in copy.graph.output if value.name not in inputs]
    del copy.graph.output[:]
    copy.graph.output.extend(kept)
    return copy


def _results(batch: NamedArrays, found: Mapping[str, np.ndarray]) -> _Expected:
    size = len(next(iter(batch.inputs.values())))
    rows = size if batch.count is None else batch.count
    outputs, answers, gates = {}, {}, {}
    for name, value in found.items():
        counted = value[:rows] if value.ndim and len(value) == size else value
        if value.dtype == np.bool_ and name.endswith(instrument.gate_output("")):
            gates[name] = counted.size, np.packbits(counted)
            continue
        answers[name] = counted
        if value.dtype.kind == "f":
            outputs[name] = counted
    return _Expected(batch, rows, outputs, answers, gates)


def _check(expected: _Expected) -> None:
    if not expected.outputs:
        raise UsageError("No output of the model is floating, so no cost can be measured.", "Give out its logits.")
    for name, value in expected.outputs.items():
        if np.isnan(value).any():
            raise ModelError(
                f"{name} holds NaN on {expected.batch.name} in float, so there is nothing to compare with.",
                "Look at what the model gives for this input in float.",
            )
    if expected.batch.labels is not None and (logits := expected.logits) is not None:
        check_classes(expected.batch.labels, expected.outputs[logits].shape[1], expected.batch.name)


class _Tally:
    """Sums over batches."""

    def __init__(self) -> None:
        self._rows = self._changed = self._answers = self._gates_changed = self._gates = 0
        self._error: defaultdict[str, float] = defaultdict(float)
        self._signal: defaultdict[str, float] = defaultdict(float)
        self._paired = PairedMetric()

    def add(self, expected: _Expected, found: _Expected) -> None:
        self._rows += expected.rows
        for name, value in expected.outputs.items():
            squares = error_and_signal(found.outputs[name], value)
            error, signal = (math.inf, 1.0) if squares is None else squares
            self._error[name] += error
            self._signal[name] += signal
        if (logits := expected.logits) is not None:
            before, after = expected.outputs[logits], found.outputs[logits]
            self._changed += int((before.argmax(1) != after.argmax(1)).sum())
            self._answers += len(before)
        if (labels := expected.batch.labels) is not None:
            self._paired.add(expected.answers, found.answers, labels[: expected.rows])
        for site, (count, bits) in expected.gates.items():
            self._gates += count
            self._gates_changed += int(np.bitwise_count(bits ^ found.gates[site][1]).sum())

    def cost(self) -> Cost:
        accuracy = self._paired.accuracy()
        return Cost(
            self._rows,
            min(snr_db(self._signal[name], error) for name, error in self._error.items()),
            None if accuracy is None else -accuracy.difference + 0.0,  # no -0.0
            self._changed,
            self._answers,
            self._gates_changed,
            self._gates,
        )
