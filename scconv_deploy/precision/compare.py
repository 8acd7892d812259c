"""A half artifact against the float32 file that it came from.

The gate is computed in float32 from whatever data it gets, so for the same half input both decide every gate alike, to
the bit. With the float32 file's gates injected the rest is continuous, and its error is a few roundings of the type.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper

from scconv_deploy.errors import ModelError
from scconv_deploy.precision.half import DTYPES, UNIT_ROUNDOFF, Precision
from scconv_deploy.verification import instrument
from scconv_deploy.verification.compare import relative_l2
from scconv_deploy.verification.runners.onnxruntime import OnnxRuntimeRunner

LARGEST_ERROR = 16.0
"""Relative L2 of an output with the float32 gates, in unit roundoffs of the type. Measured on ScConv-ResNet-50 in
float16: 0.9 of them; a layer in the wrong type or a lost constant is hundreds away."""


@dataclass(frozen=True)
class PrecisionReport:
    """What was compared; falsy when it does not hold.

    Attributes:
        gates, flips: each SRU fed the same half input; flips are 0 in a sound artifact.
        free_flips: gates that differ while both run free, which is what rounding the data costs.
        errors: output -> relative L2 with the float32 file's gates; ``limit`` for each.
        free_errors: the same, running free; they inform.
        changed_parameters: sites whose cut, sign or other parameters are not the original's, bit for bit.
        not_run: why nothing could be run.
    """

    gates: int = 0
    flips: int = 0
    free_flips: int = 0
    errors: Mapping[str, float] | None = None
    free_errors: Mapping[str, float] | None = None
    limit: float = 0.0
    changed_parameters: tuple[str, ...] = ()
    not_run: str = ""

    @property
    def failures(self) -> tuple[str, ...]:
        found = [f"parameters of {site} are not the original's bit for bit" for site in self.changed_parameters]
        if self.flips:
            found.append(f"same half input, gates changed: {self.flips:,} of {self.gates:,}")
        found += [
            f"output {name}: {error:.1e} relative L2 with the float32 gates (limit {self.limit:.1e})"
            for name, error in (self.errors or {}).items()
            if not error <= self.limit  # so that NaN fails
        ]
        return tuple(found)

    def __bool__(self) -> bool:
        return not self.failures

    def as_json(self) -> dict[str, object]:
        return {**asdict(self), "verdict": "not run" if self.not_run else "passed" if self else "failed"}


def compare_precision(
    original: onnx.ModelProto,
    half: onnx.ModelProto,
    feeds: Iterable[Mapping[str, np.ndarray]],
    precision: Precision,
) -> PrecisionReport:
    """Run both on the same inputs (float32; given in half where the half model takes it)."""
    limit = LARGEST_ERROR * UNIT_ROUNDOFF[precision]
    sites = list(instrument.sites(original))
    changed = tuple(site for site in sites if _parameters(original, site) != _parameters(half, site))
    outputs = [value.name for value in original.graph.output]
    errors, free_errors = dict.fromkeys(outputs, 0.0), dict.fromkeys(outputs, 0.0)
    gates = flips = free_flips = 0
    try:
        reference = OnnxRuntimeRunner(instrument.laid_open(original, sites, inject=False))
        free = OnnxRuntimeRunner(instrument.laid_open(half, sites, inject=False))
        forced = OnnxRuntimeRunner(instrument.laid_open(half, sites, inject=True))
        probes = {site: _Probe(original, half, site, precision) for site in sites}
        for feed in feeds:
            expected = reference.run(feed)
            given = _as_taken(half, feed)
            found = free.run(given)
            masks = {instrument.mask_input(s): expected[instrument.gate_output(s)] for s in sites}
            replayed = forced.run({**given, **masks})
            for site, probe in probes.items():
                gates += expected[instrument.gate_output(site)].size
                flips += probe.flips(expected[instrument.gate_input(site)])
                decided = instrument.gate_output(site)
                free_flips += int((found[decided] != expected[decided]).sum())
            for name in outputs:
                errors[name] = max(errors[name], _distance(replayed[name], expected[name]))
                free_errors[name] = max(free_errors[name], _distance(found[name], expected[name]))
    except ModelError as error:
        return PrecisionReport(limit=limit, changed_parameters=changed, not_run=error.message)
    return PrecisionReport(gates, flips, free_flips, errors, free_errors, limit, changed)


class _Probe:
    """One SRU of both files, alone."""

    def __init__(self, original: onnx.ModelProto, half: onnx.ModelProto, site: str, precision: Precision) -> None:
        self._dtype = DTYPES[precision].numpy()
        single = instrument.gate_probe(original, instrument.sites(original)[site])
        halved = instrument.gate_probe(half, instrument.sites(half)[site])
        if single is None or halved is None:
            raise ModelError(f"The gates of {site} cannot be read.")
        for value in (halved.graph.input[0], halved.graph.output[0]):
            value.type.tensor_type.elem_type = TensorProto.DataType.Value(DTYPES[precision].name)
        self._single, self._half = OnnxRuntimeRunner(single), OnnxRuntimeRunner(halved)

    def flips(self, x: np.ndarray) -> int:
        """Gates that differ for x rounded to half."""
        with np.errstate(over="ignore"):  # what half cannot hold is named elsewhere
            rounded = x.astype(self._dtype)
        one = self._single.run({instrument.PROBE_X: rounded.astype(np.float32)})[instrument.PROBE_OPEN]
        other = self._half.run({instrument.PROBE_X: rounded})[instrument.PROBE_OPEN]
        return int((one != other).sum())


def _parameters(model: onnx.ModelProto, site: str) -> list[tuple[int, bytes]]:
    node = instrument.sites(model).get(site)
    found = instrument.parameters(model, node) if node is not None else {}
    return [(tensor.data_type, numpy_helper.to_array(tensor).tobytes()) for tensor in found.values()]


def _as_taken(model: onnx.ModelProto, feed: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    kinds = {v.name: onnx.helper.tensor_dtype_to_np_dtype(v.type.tensor_type.elem_type) for v in model.graph.input}
    return {name: array.astype(kinds[name], copy=False) for name, array in feed.items()}


def _distance(y: np.ndarray, expected: np.ndarray) -> float:
    return relative_l2(y.astype(np.float32), expected) if expected.dtype.kind == "f" else float(np.mean(y != expected))
