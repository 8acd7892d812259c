"""Runners that compute what a file says: half models in half, quantised ones in float arithmetic."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import onnx
from onnx import helper

from scconv_deploy.graph.types import NUMPY, half_in, quantization_of
from scconv_deploy.runtimes.onnxruntime import CPU, OnnxRuntimeRunner, RuntimeOptions
from scconv_deploy.runtimes.stand_in import stand_in


class HalfRunner:
    """Runner of a half model in ONNX Runtime, or of its float32 stand-in where ONNX Runtime cannot run it.

    ONNX Runtime's CPU provider has no arithmetic in half: it multiplies float16 in float32, drops roundings between
    operators that it fuses or casts, and has no bfloat16. There the stand-in computes what the file says.
    Inputs are rounded to the model's type; half outputs come back as float32.

    Args:
        native: run the model itself, even where the stand-in is nearer to the file.

    Raises:
        MissingRuntimeError, ModelError: as :class:`.onnxruntime.OnnxRuntimeRunner`.
    """

    name = "onnxruntime"

    def __init__(
        self, model: onnx.ModelProto, options: RuntimeOptions = RuntimeOptions(), *, native: bool = False
    ) -> None:
        self._taken = {
            value.name: helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type) for value in model.graph.input
        }
        emulated = not native and needs_stand_in(model, options)
        self._fed = np.dtype(np.float32) if emulated else None
        self._runner = OnnxRuntimeRunner(stand_in(model) if emulated else model, options)
        self.inputs, self.outputs = self._runner.inputs, self._runner.outputs

    def __enter__(self) -> HalfRunner:
        return self

    def __exit__(self, *exc: object) -> None:
        self._runner.__exit__(*exc)

    def run(self, tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Run once on arrays by name; return the outputs by name."""
        given = {name: self._as_taken(name, array) for name, array in tensors.items()}
        found = self._runner.run(given)
        return {name: y.astype(np.float32) if y.dtype in NUMPY.values() else y for name, y in found.items()}

    def _as_taken(self, name: str, array: np.ndarray) -> np.ndarray:
        taken = self._taken.get(name, array.dtype)
        if taken not in NUMPY.values():
            return array
        with np.errstate(over="ignore"):  # values beyond half's range become infinite, and show in the outputs
            return array.astype(taken).astype(self._fed or taken)


def needs_stand_in(model: onnx.ModelProto, options: RuntimeOptions) -> bool:
    """Whether the provider computes a half file in other arithmetic than the file says, as the CPU provider does."""
    return half_in(model) is not None and options.resolved_provider() == CPU


def runs_here(model: onnx.ModelProto, options: RuntimeOptions) -> bool:
    """Whether the provider runs the model's type at all: the CPU provider lacks bfloat16 kernels (Where, for one)."""
    return half_in(model) != "bf16" or options.resolved_provider() != CPU


def float_arithmetic(model: onnx.ModelProto, options: RuntimeOptions) -> RuntimeOptions:
    """The options, without optimisation for a quantised model, whose quantisers then run as they stand.

    Optimised, they become integer kernels, which on some CPUs add in 16 bits and saturate.
    """
    return replace(options, optimization="none") if quantization_of(model) else options


def runner_of(model: onnx.ModelProto, options: RuntimeOptions = RuntimeOptions()) -> OnnxRuntimeRunner | HalfRunner:
    """Make the runner of a float32 or half model; a quantised one runs in float arithmetic."""
    options = float_arithmetic(model, options)
    return OnnxRuntimeRunner(model, options) if half_in(model) is None else HalfRunner(model, options)
